"""Models that give labels, through the command line: heads, training, measuring, labelling and merging."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import merge_sections, prepare_labels, rows_of_reviews, write_yaml
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    RobertaConfig,
)

from peftcli.errors import MachineError
from peftcli.merge.drift import compare_labels
from peftcli.model.classification import TaskHead, label_loss, make_batch, row_logits, segments, task_head
from peftcli.model.heads import positions_of
from peftcli.model.load import load_base
from peftcli.model.predict_labels import split_words
from peftcli.plan.heads import targets_beside_head
from peftcli.plan.machine import ModelFacts
from peftcli.plan.targets import match_targets
from peftcli.progress import Silent
from peftcli.run_dir import read_json, read_log
from peftcli.tiny.build import tiny_model
from peftcli.train.micro_batch import split_batch
from peftcli.train.step import TrainerSetup
from peftcli.train.trainers import LabelTrainer, make_label_trainer

Cli = Callable[..., int]
Write = Callable[..., Path]
STABLE = {"max_steps": 40, "learning_rate": 3e-3}
"""A training that ends at a loss below 0.001 and a score of 1.0 for each of three seeds, so that what is asserted of
its outcome has a margin. At the learning rate of the other recipes here, 0.01, the outcome depends on rounding."""


@pytest.fixture
def label_recipe(tmp_path: Path) -> Write:
    """A function that writes a small recipe with labels; keyword arguments replace or add sections."""

    def write(task: str = "sequence-classification", column: str = "label", **sections: Any) -> Path:
        data = tmp_path / "reviews.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows_of_reviews()), encoding="utf-8")
        columns = {"tokens": "tokens", "tags": "tags"}
        if task == "sequence-classification":
            columns = {"text": "text", "label": column}
        recipe: dict[str, Any] = {
            "name": "reviews",
            "model": {"name": "tiny:llama", "task": task},
            "adapter": {"r": 8},
            "dataset": {
                "path": str(data),
                "columns": columns,
                "split": {"test_size": 0.25, "seed": 1},
                "max_length": 64,
                "limits": {"max_leaked": 1.0},
            },
            "trainer": {"per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1},
            "evaluation": {"samples": 2},
        }
        return write_yaml(tmp_path, merge_sections(recipe, sections))

    return write


def trainer_of(recipe: Path, folder: Path) -> LabelTrainer:
    plan, data, tokenizer = prepare_labels(recipe)
    return make_label_trainer(TrainerSetup(plan, data, tokenizer), folder / "checkpoints", load_base(plan.base))


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_log(run / "log.jsonl")]


def test_a_classifier_learns_and_its_adapter_holds_the_labels(
    label_recipe: Write, run_cli: Cli, tmp_path: Path
) -> None:
    assert run_cli("train", label_recipe(trainer=STABLE)) == 0
    run = tmp_path / "runs" / "reviews"
    metrics = read_json(run / "metrics.json")
    assert metrics["status"] == "finished" and metrics["task"] == "sequence-classification"
    assert metrics["adapter"]["accuracy"] >= 0.9 and metrics["adapter"]["loss"] < 0.3 < metrics["base"]["loss"]
    assert metrics["adapter"]["labels"] == ["bad", "good"]
    assert metrics["parameters"]["trainable"] == sum(
        torch.Size(map(int, shape.split(" ")[1].split("x"))).numel()
        for shape in read_json(run / "adapter" / "peftcli.json")["tensors"].values()
    )
    identity = read_json(run / "adapter" / "peftcli.json")
    assert identity["base"]["labels"] == ["bad", "good"] and identity["base"]["problem"] == "single-label"
    assert AutoConfig.from_pretrained(run / "adapter").id2label == {0: "bad", 1: "good"}
    said = (run / "report.md").read_text()
    assert "untrained head" in said


@pytest.mark.numeric
def test_plain_peft_loads_the_adapter_to_the_same_outputs(label_recipe: Write, run_cli: Cli, tmp_path: Path) -> None:
    recipe = label_recipe()
    assert run_cli("train", recipe) == 0
    adapter = tmp_path / "runs" / "reviews" / "adapter"
    plan, data, tokenizer = prepare_labels(recipe)
    model = AutoModelForSequenceClassification.from_pretrained(
        plan.base.path, config=AutoConfig.from_pretrained(adapter)
    )
    tuned = PeftModel.from_pretrained(model, adapter).eval()
    head = task_head(plan.base.labels, plan.base.problem_type, tuned, tokenizer)
    ids, labels = (data.test.column(name).to_pylist() for name in ("input_ids", "labels"))
    logits = row_logits(tuned, ids, None, head, batch_rows=4, progress=Silent(), what="")
    measured = read_json(tmp_path / "runs" / "reviews" / "metrics.json")["adapter"]["loss"]
    assert label_loss(head, logits, labels) == pytest.approx(measured, abs=1e-6)


@pytest.mark.numeric
@pytest.mark.parametrize("labels", [None, ["printer", "network", "mail"]])
def test_multi_hot_floats_have_the_loss_of_plain_transformers(
    label_recipe: Write, run_cli: Cli, tmp_path: Path, labels: list[str] | None
) -> None:
    recipe = label_recipe(column="hot", dataset={"labels": labels}, trainer={"max_steps": 4})
    rows = [row | {"hot": [float(at % 2), float(at % 3 == 0), 0.0]} for at, row in enumerate(rows_of_reviews())]
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert run_cli("train", recipe) == 0
    adapter = tmp_path / "runs" / "reviews" / "adapter"
    names = labels or ["0", "1", "2"]
    config = AutoConfig.from_pretrained(adapter)
    assert config.id2label == dict(enumerate(names)) and config.problem_type == "multi_label_classification"
    plan, data, _ = prepare_labels(recipe)
    model = AutoModelForSequenceClassification.from_pretrained(plan.base.path, config=config)
    tuned, tokenizer = PeftModel.from_pretrained(model, adapter).eval(), AutoTokenizer.from_pretrained(adapter)
    hot = {row["text"]: row["hot"] for row in rows}
    losses = []
    for text in data.test.column("prompt").to_pylist():
        with torch.no_grad():
            losses.append(tuned(**tokenizer(text, return_tensors="pt"), labels=torch.tensor([hot[text]])).loss.item())
    measured = read_json(tmp_path / "runs" / "reviews" / "metrics.json")["adapter"]["loss"]
    # Means of float32 losses of about 0.7, each rounded to 6e-8, in another order and with padding.
    assert sum(losses) / len(losses) == pytest.approx(measured, abs=1e-5)


@pytest.mark.numeric
@pytest.mark.parametrize("task", ["sequence-classification", "token-classification"])
def test_batch_by_accumulation_and_batch_alone_give_the_same_losses(
    label_recipe: Write, run_cli: Cli, tmp_path: Path, task: str
) -> None:
    steady = tmp_path / "steady"
    shutil.copytree(tiny_model("tiny:llama"), steady)
    config = read_json(steady / "config.json") | {"classifier_dropout": 0.0}  # drawn anew for each micro-batch
    (steady / "config.json").write_text(json.dumps(config))
    found = []
    for batch, accumulation in ((1, 8), (8, 1)):
        recipe = label_recipe(
            task,
            model={"name": str(steady), "task": task},
            trainer={"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation},
            evaluation={"baseline": False},
        )
        assert run_cli("train", recipe, "--output-dir", tmp_path / f"run{batch}") == 0
        found.append(losses(tmp_path / f"run{batch}"))
    assert found[0] == pytest.approx(found[1], abs=1e-5) and len(found[0]) == 4


@pytest.mark.numeric
@pytest.mark.parametrize("task", ["sequence-classification", "token-classification"])
def test_the_loss_of_a_step_is_that_of_transformers(label_recipe: Write, tmp_path: Path, task: str) -> None:
    trainer = trainer_of(label_recipe(task), tmp_path / "run")
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    expected = trainer.model(**batch).loss
    count = trainer.targets(batch["labels"])
    assert trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count).item() == pytest.approx(
        expected.item(), abs=1e-6
    )


@pytest.mark.numeric
def test_a_stopped_classifier_goes_on_to_the_bits_of_an_unbroken_one(
    label_recipe: Write, run_cli: Cli, tmp_path: Path
) -> None:
    recipe = label_recipe(adapter={"dropout": 0.1}, evaluation={"baseline": False})
    assert run_cli("train", recipe, "--output-dir", "whole") == 0
    assert run_cli("train", recipe, "--output-dir", "stopped", "--max-time", "1s") == 75
    assert 0 < read_json(tmp_path / "stopped" / "metrics.json")["train"]["steps"] < 4
    assert run_cli("train", recipe, "--output-dir", "stopped") == 0
    one, two = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "stopped"))
    assert one.read_bytes() == two.read_bytes()
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")


def test_eva_begins_a_classifier_whose_pooler_reads_one_vector_a_row(label_recipe: Write, run_cli: Cli) -> None:
    adapter = {"r": 4, "init_lora_weights": "eva"}
    recipe = label_recipe(model={"name": "tiny:bert"}, adapter=adapter, evaluation={"baseline": False})
    assert run_cli("train", recipe) == 0


@pytest.mark.numeric
@pytest.mark.parametrize("column", ["kinds", "stars"])
def test_several_classes_and_numbers_are_learned(
    label_recipe: Write, run_cli: Cli, tmp_path: Path, column: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("train", label_recipe(column=column, trainer={"max_steps": 40})) == 0
    metrics = read_json(tmp_path / "runs" / "reviews" / "metrics.json")
    capfd.readouterr()
    assert run_cli("generate", "runs/reviews", "3 the soup was good") == 0
    said = capfd.readouterr().out.strip()
    if column == "kinds":
        assert metrics["adapter"]["f1_micro"] > metrics["base"]["f1_micro"]
        assert said.startswith(("even (", "good (", "none"))
    else:
        assert metrics["adapter"]["mse"] == pytest.approx(metrics["adapter"]["loss"], rel=1e-4)
        assert metrics["adapter"]["mse"] < metrics["base"]["mse"] and 1 < float(said) < 6
    assert run_cli("merge", "runs/reviews") == 0


def test_words_are_tagged_and_shown_with_their_tags(
    label_recipe: Write, run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("train", label_recipe("token-classification", trainer=STABLE)) == 0
    metrics = read_json(tmp_path / "runs" / "reviews" / "metrics.json")
    assert metrics["adapter"]["entity_f1"] >= 0.9 and metrics["adapter"]["labels"] == ["O", "B-place"]
    capfd.readouterr()
    assert run_cli("generate", "runs/reviews", "the soup was good 8 in Paris") == 0
    assert capfd.readouterr().out == "the/O soup/O was/O good/O 8/O in/O Paris/B-place\n"
    assert run_cli("generate", "runs/reviews", '["the", "room", "was", "bad", "3", "in", "Rome"]', "--json") == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["entities"] == [{"type": "place", "words": ["Rome"], "first": 6, "last": 6}]
    assert len(answer["probabilities"]) == 7 and min(answer["probabilities"]) > 0.5
    assert run_cli("merge", "runs/reviews") == 0
    merged = AutoModelForTokenClassification.from_pretrained(tmp_path / "runs" / "reviews" / "merged")
    assert merged.config.id2label == {0: "O", 1: "B-place"}


@pytest.mark.parametrize(
    ("model", "task", "names"),
    [
        ("tiny:bert", "sequence-classification", ("classifier", "bert.pooler")),
        ("tiny:bert", "token-classification", ("classifier",)),
        ("tiny:llama", "sequence-classification", ("score",)),
        ("tiny:llama", "token-classification", ("score",)),
    ],
)
def test_in_4bit_the_head_is_float_and_trained(
    label_recipe: Write, run_cli: Cli, tmp_path: Path, model: str, task: str, names: tuple[str, ...]
) -> None:
    recipe = label_recipe(task, model={"name": model, "task": task}, quantization={"bits": 4}, trainer={"max_steps": 2})
    plan, _, _ = prepare_labels(recipe)
    assert plan.base.head == names
    base = load_base(plan.base)
    for name in names:
        kinds = {type(part).__name__ for part in base.get_submodule(name).modules()}
        assert "Linear4bit" not in kinds and all(p.is_floating_point() for p in base.get_submodule(name).parameters())
    assert any(type(part).__name__ == "Linear4bit" for part in base.modules())
    assert run_cli("train", recipe) == 0
    tensors = read_json(tmp_path / "runs" / "reviews" / "adapter" / "peftcli.json")["tensors"]
    assert all(any(f".{name}." in tensor for tensor in tensors) for name in names)
    assert run_cli("merge", "runs/reviews") == 0
    merge = read_json(tmp_path / "runs" / "reviews" / "merge.json")
    assert merge["into"] == "dequantized" and merge["max_abs_logit_difference"] < 0.01


@pytest.mark.numeric
@pytest.mark.parametrize("model", ["tiny:bert", "tiny:llama", "tiny:qwen3", "tiny:gpt2"])
@pytest.mark.parametrize("task", ["sequence-classification", "token-classification"])
def test_a_new_head_is_the_same_on_each_load_and_outputs_do_not_depend_on_the_batch(
    label_recipe: Write, model: str, task: str
) -> None:
    plan, data, tokenizer = prepare_labels(label_recipe(task, model={"name": model, "task": task}))
    ids, labels = (data.test.column(name).to_pylist() for name in ("input_ids", "labels"))
    found = []
    for batch_rows, base in ((1, plan.base), (16, plan.base), (16, replace(plan.base, seed=plan.base.seed + 1))):
        torch.manual_seed(batch_rows)  # what ran before must not matter
        loaded = load_base(base)
        head = task_head(base.labels, base.problem_type, loaded, tokenizer)
        marks = labels if head.problem_type == "tagging" else None
        found.append(row_logits(loaded, ids, marks, head, batch_rows=batch_rows, progress=Silent(), what=""))
        if task == "sequence-classification":
            assert loaded.config.pad_token_id == tokenizer.pad_token_id
    one, many, other = (torch.cat([part.reshape(-1) for part in side]) for side in found)
    assert torch.allclose(one, many, atol=2e-6)
    assert not torch.allclose(one, other, atol=1e-3)


def test_a_merged_classifier_loads_with_plain_transformers(label_recipe: Write, run_cli: Cli, tmp_path: Path) -> None:
    recipe = label_recipe()
    assert run_cli("train", recipe) == 0
    assert run_cli("merge", "runs/reviews") == 0
    merge = read_json(tmp_path / "runs" / "reviews" / "merge.json")
    assert merge["top1_agreement"] == 1.0 and merge["max_abs_logit_difference"] < 1e-5
    merged = tmp_path / "runs" / "reviews" / "merged"
    model = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    assert model.config.id2label == {0: "bad", 1: "good"} and type(model).__name__ == "LlamaForSequenceClassification"
    tokenizer = AutoTokenizer.from_pretrained(merged)
    _, data, _ = prepare_labels(recipe)
    text = data.test.column("prompt")[0].as_py()
    with torch.inference_mode():
        found = model(**tokenizer(text, return_tensors="pt")).logits.argmax(-1).item()
    shown = read_json(tmp_path / "runs" / "reviews" / "eval.json")["samples"][0]
    assert shown["adapter"] == model.config.id2label[found]
    assert run_cli("eval", "runs/reviews/merged", "--recipe", recipe) == 0
    assert run_cli("generate", "runs/reviews/merged", text) == 0


@pytest.mark.numeric
def test_eval_measures_the_same_again_and_a_base_with_its_recipe(
    label_recipe: Write, run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = label_recipe()
    assert run_cli("train", recipe) == 0
    before = read_json(tmp_path / "runs" / "reviews" / "eval.json")
    assert run_cli("eval", "runs/reviews", "--set", "evaluation.batch_size=3") == 0
    capfd.readouterr()
    assert run_cli("eval", "tiny:llama", "--recipe", recipe, "--json") == 0
    base = json.loads(capfd.readouterr().out)["base"]
    after = read_json(tmp_path / "runs" / "reviews" / "eval.json")
    for name in ("loss", "accuracy", "f1"):
        assert after["adapter"][name] == pytest.approx(before["adapter"][name], abs=1e-6)
        assert base[name] == pytest.approx(before["base"][name], abs=1e-6)


def test_rows_of_one_class_keep_the_numbers_of_the_training(
    label_recipe: Write, run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = label_recipe(trainer={"max_steps": 20})
    assert run_cli("train", recipe) == 0
    others = tmp_path / "others.jsonl"
    good = [row for row in rows_of_reviews(40) if row["label"] == "good"]
    others.write_text("".join(json.dumps(row) + "\n" for row in good), encoding="utf-8")
    capfd.readouterr()
    assert run_cli("eval", "runs/reviews", "--set", f"dataset.path={others}", "--no-base", "--json") == 0
    found = json.loads(capfd.readouterr().out)["adapter"]
    assert found["labels"] == ["bad", "good"] and found["accuracy"] == 1.0


def test_a_rehearsal_of_a_model_that_is_not_here_runs_to_the_end(label_recipe: Write, run_cli: Cli) -> None:
    for task in ("sequence-classification", "token-classification"):
        recipe = label_recipe(task, model={"name": "bert-base-uncased", "task": task})
        assert run_cli("train", recipe, "--smoke", "--output-dir", task) == 0
        assert read_json(Path(task) / "metrics.json")["smoke"] is True


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"trainer": {"packing": True}}, "trainer.packing has no effect with model.task: sequence-classification"),
        ({"evaluation": {"max_new_tokens": 5}}, "evaluation.max_new_tokens has no effect"),
        ({"gates": {"exact_match": ">= 0.5"}}, "gates.exact_match has no effect"),
        (
            {"gates": {"entity_f1": ">= 0.5"}},
            "it is a metric of token-classification; use accuracy or precision; remove it",
        ),
        (
            {"model": {"name": "tiny:llama"}, "gates": {"f1": ">= 0.5"}},
            "gates.f1 has no effect with model.task: causal-lm",
        ),
    ],
)
def test_keys_that_do_nothing_for_the_task_are_refused(
    label_recipe: Write, run_cli: Cli, capsys: pytest.CaptureFixture[str], sections: dict[str, Any], said: str
) -> None:
    if "model" in sections:
        path = label_recipe(**sections)
        recipe = yaml.safe_load(path.read_text())
        del recipe["model"]["task"]
        path.write_text(yaml.safe_dump(recipe))
    else:
        path = label_recipe(**sections)
    assert run_cli("validate", path) == 2
    assert said in capsys.readouterr().err


def test_flat_lines_are_refused_where_a_head_reads_rows(
    label_recipe: Write, run_cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("plan", label_recipe(performance={"batching": "padding_free"})) == 2
    assert "classification uses padded batches" in capsys.readouterr().err


@pytest.mark.numeric
def test_segments_are_those_of_the_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("tiny:bert"))
    pairs = tokenizer(["a small room", "yes"], ["it was cold", "no or maybe"], padding=True, return_tensors="pt")
    found = segments(pairs["input_ids"], pairs["attention_mask"], tokenizer.sep_token_id)
    assert torch.equal(found, pairs["token_type_ids"])


@pytest.mark.numeric
def test_smaller_pieces_keep_the_labels_of_several_classes() -> None:
    head = TaskHead(("a", "b", "c"), "multi-label")
    batch = make_batch([[1, 2, 3], [4], [5, 6], [7]], [[0, 2], [], [1], [0]], head)
    parts = split_batch(batch, 2)
    assert [part["input_ids"].shape[1] for part in parts] == [3, 2]
    assert torch.equal(torch.cat([part["labels"] for part in parts]), batch["labels"])


def test_the_drift_of_labels_says_what_changed_by_the_kind_of_label() -> None:
    before, after = (
        [torch.tensor([2.0, 1.0]), torch.tensor([0.0, 3.0])],
        [torch.tensor([2.0, 2.5]), torch.tensor([0.0, 3.0])],
    )
    one = compare_labels(TaskHead(("a", "b"), "single-label"), before, after)
    assert (one.top1_agreement, one.positions, one.max_abs_logit_difference) == (0.5, 2, 1.5)
    several = compare_labels(TaskHead(("a", "b"), "multi-label"), before, after)
    assert several.top1_agreement == 1.0 and several.kl_nats is not None and several.kl_nats > 0
    numbers = compare_labels(
        TaskHead(("value",), "regression"), [side[:1] for side in before], [side[:1] for side in after]
    )
    assert numbers.top1_agreement == 1.0 and numbers.kl_nats is None


def test_running_text_is_parted_into_words_and_signs() -> None:
    assert split_words("Arsenal will win, @fan #COYG!") == ["Arsenal", "will", "win", ",", "@fan", "#COYG", "!"]
    assert split_words("U.S. (3.5%)", raw=True) == ["U.S.", "(3.5%)"]


@pytest.mark.numeric
def test_the_loss_while_training_is_that_of_all_test_rows(label_recipe: Write, tmp_path: Path) -> None:
    trainer = trainer_of(label_recipe("token-classification"), tmp_path / "run")
    found = trainer.evaluate()["eval_loss"]
    rows = trainer.eval_dataset
    logits = row_logits(
        trainer.model, rows["input_ids"], rows["labels"], trainer.head, batch_rows=5, progress=Silent(), what=""
    )
    assert found == pytest.approx(label_loss(trainer.head, logits, rows["labels"]), abs=1e-6)


def test_two_texts_of_a_row_are_told_apart(label_recipe: Write, run_cli: Cli, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"premise": f"it is {n}", "hypothesis": f"is it {n % 3}", "label": ["no", "yes"][n % 2]} for n in range(40)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = {"text": "premise", "text_pair": "hypothesis", "label": "label"}
    recipe = label_recipe(model={"name": "tiny:bert"}, dataset={"path": str(pairs), "columns": columns})
    trainer = trainer_of(recipe, tmp_path / "run")
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch["token_type_ids"].unique().tolist()) == {0, 1}
    assert run_cli("train", recipe) == 0
    assert run_cli("generate", "runs/reviews", '{"text": "it is 1", "text_pair": "is it 1"}') == 0


@pytest.mark.numeric
def test_two_processes_give_the_losses_and_figures_of_one(label_recipe: Write, run_cli: Cli, tmp_path: Path) -> None:
    recipe = label_recipe(trainer={"per_device_train_batch_size": 4})
    words = [sys.executable, "-m", "peftcli", "train", str(recipe), "--num-processes", "2", "--output-dir", "two"]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    wide = "trainer.per_device_train_batch_size=8"
    assert run_cli("train", recipe, "--output-dir", "one", "--set", wide) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one, two = (read_json(tmp_path / name / "metrics.json") for name in ("one", "two"))
    assert two["base"]["loss"] == pytest.approx(one["base"]["loss"], abs=1e-5)
    assert two["adapter"]["confusion_matrix"] == one["adapter"]["confusion_matrix"]
    assert two["train"]["trained_tokens"] == one["train"]["trained_tokens"] == 32


def test_positions_are_counted_from_the_pad_token_on_where_the_family_does() -> None:
    assert positions_of(RobertaConfig(max_position_embeddings=514)) == 512
    assert positions_of(BertConfig(max_position_embeddings=512)) == 512


def test_a_short_target_stands_for_no_part_of_the_head() -> None:
    modules = ("bert.encoder.layer.0.output.dense", "bert.pooler", "bert.pooler.dense", "classifier")
    facts = ModelFacts("p", "BertX", 1, modules, modules[:1], None, None, head=("classifier", "bert.pooler"))
    assert targets_beside_head(("dense",), facts) == modules[:1]
    assert targets_beside_head("all-linear", facts) == modules[:1]
    assert match_targets(("dense",), facts) == {"dense": 1}


def test_a_base_whose_files_lack_more_than_the_head_is_refused(label_recipe: Write) -> None:
    plan, _, _ = prepare_labels(label_recipe(model={"name": "tiny:bert"}))
    with pytest.raises(MachineError, match=r"no matching weights for bert\.pooler\.dense\.bias"):
        load_base(replace(plan.base, head=("classifier",)))


def test_a_text_to_label_is_put_into_the_template_of_the_run(
    label_recipe: Write, run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = label_recipe(
        dataset={"text": "Review: {text} Verdict:", "columns": {"label": "label"}}, evaluation={"baseline": False}
    )
    assert run_cli("train", recipe) == 0
    capfd.readouterr()
    assert run_cli("generate", "runs/reviews", "the soup was good", "--json") == 0
    filled = json.loads(capfd.readouterr().out)
    assert run_cli("generate", "runs/reviews", "Review: the soup was good Verdict:", "--raw", "--json") == 0
    whole = json.loads(capfd.readouterr().out)
    assert filled["probabilities"] == whole["probabilities"] and filled["asked"] == "the soup was good"
