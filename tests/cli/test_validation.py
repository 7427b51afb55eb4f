"""Three splits: every choice during and after training uses the validation rows, and the test rows are scored once."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import write_yaml
from safetensors.torch import load_file

from peftcli.data.prepare import PreparedData
from peftcli.model.manifest import read_manifest
from peftcli.run_dir import read_json, read_log
from peftcli.train.step import StepTrainer
from peftcli.train.trainers import HeadTrainer

Cli = Callable[..., int]
Write = Callable[..., Path]

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_total_limit": 9, "max_steps": 6}
BEST = EVALUATED | {"load_best_model_at_end": True}
SPLIT = {"test_size": 0.25, "validation_size": 0.25, "seed": 1}


def labelled(folder: Path, rows: list[dict[str, Any]], **sections: Any) -> Path:
    """Write rows and a recipe that classifies them; keyword arguments replace sections."""
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe: dict[str, Any] = {
        "name": "labels",
        "model": {"name": "tiny:bert", "task": "sequence-classification"},
        "adapter": {"r": 4},
        "dataset": {"path": "rows.jsonl", "split": SPLIT},
        "trainer": {"per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-3, "max_steps": 4},
    }
    return write_yaml(folder, recipe | sections)


def spam(count: int = 48) -> list[dict[str, Any]]:
    """Rows of two classes, every fourth of them spam."""
    return [
        {"text": f"{'win a prize' if not number % 4 else 'see you'} {number}", "label": "ham" if number % 4 else "spam"}
        for number in range(count)
    ]


def several(count: int = 48) -> list[dict[str, Any]]:
    """Rows with none, one or both of two labels."""
    return [
        {"text": f"{'red' if number % 2 else ''} {'big' if not number % 3 else ''} {number}", "label": labels}
        for number in range(count)
        for labels in [[*(["red"] if number % 2 else []), *(["big"] if not number % 3 else [])]]
    ]


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_log(run / "log.jsonl") if "eval_loss" in row]


def same_weights(first: Path, second: Path) -> bool:
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_validation_rows_come_from_the_rows_that_are_not_test_rows(write_recipe: Write, run_cli: Cli) -> None:
    recipe = write_recipe(evaluation={"baseline": False})
    for name, size in (("two", 0), ("three", 0.25)):
        split = f"dataset.split.validation_size={size}"
        assert run_cli("train", recipe, "--output-dir", name, "--set", split, "--set", "trainer.max_steps=1") == 0
    two, three = (read_json(Path(name) / "data.json") for name in ("two", "three"))
    assert (three["train_rows"], three["validation_rows"], three["test_rows"]) == (24, 12, 12)
    assert three["fingerprint"]["test"] == two["fingerprint"]["test"]
    with np.load("three/rows.npz") as rows:
        groups = [set(rows[name].tolist()) for name in ("train", "validation", "test")]
    assert [len(group) for group in groups] == [24, 12, 12] and len(set.union(*groups)) == 48
    assert read_json(Path("three/metrics.json"))["data"]["validation_rows"] == 12


def test_no_test_row_is_read_before_the_final_scoring(
    write_recipe: Write, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[int, ...]] = set()
    read: list[bool] = []
    held_out: list[PreparedData] = []
    original, test = StepTrainer.compute_loss, PreparedData.__dict__["test"]

    def spy(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        held_out[:] = [self.setup.data]
        positions = inputs.get("position_ids")
        flat = inputs["input_ids"].flatten().tolist()
        starts = [0] if positions is None else [n for n, place in enumerate(positions.flatten().tolist()) if not place]
        if positions is None:
            rows = [
                [token for token, on in zip(*row, strict=True) if on]
                for row in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
            ]
        else:
            rows = [flat[start:end] for start, end in zip(starts, [*starts[1:], len(flat)], strict=True)]
        seen.update(map(tuple, rows))
        return original(self, model, inputs, *args, **kwargs)

    def spied(self: PreparedData) -> Any:
        if self.test_split is not self.validation_split:  # else validation rows are scored in their place
            read.append(Path("runs/things/adapter").exists())
        return test.func(self)

    monkeypatch.setattr(StepTrainer, "compute_loss", spy)
    monkeypatch.setattr(PreparedData, "test", property(spied))
    trainer = BEST | {"metric_for_best_model": "exact_match", "early_stopping_patience": 3}
    recipe = write_recipe(trainer=trainer, dataset={"split": SPLIT}, evaluation={"baseline": False}, quantization=None)
    assert run_cli("train", recipe) == 0
    data = held_out[0]

    def ids(split: Any) -> set[tuple[int, ...]]:
        return {tuple(row) for row in split.store.examples.column("input_ids").take(split.rows).to_pylist()}

    assert ids(data.validation_split) <= seen and ids(data.train) & seen
    assert not seen & ids(data.test_split)
    assert read and all(read)
    metrics = read_json(Path("runs/things/metrics.json"))
    assert metrics["test_rows_used_for"] == ["final scoring of the adapter"]


def test_the_best_step_by_a_task_metric_is_kept(tmp_path: Path, run_cli: Cli, capfd: Any) -> None:
    recipe = labelled(
        tmp_path, spam(), trainer=BEST | {"metric_for_best_model": "eval_f1_macro", "learning_rate": 0.02}
    )
    assert run_cli("train", recipe) == 0
    said, run = capfd.readouterr(), tmp_path / "runs" / "labels"
    found = evaluations(run)
    assert [row["step"] for row in found] == [2, 4, 6]
    value = max(row["eval_f1_macro"] for row in found)
    step = next(row["step"] for row in found if row["eval_f1_macro"] == value)
    best = {"step": step, "metric": "f1_macro", "value": value, "greater_is_better": True}
    for file in ("train.json", "metrics.json"):
        stored = read_json(run / file)
        stored = stored.get("train", stored)["best"]
        assert stored == best | {"kept": True, "rows_from": "validation"}
    assert same_weights(run / "adapter", run / "checkpoints" / f"checkpoint-{step}")
    assert f"best step {step}: f1_macro" in said.err
    assert f"step {step}: F1 (f1_macro)" in (run / "report.md").read_text()
    page = (run / "report.html").read_text()
    assert "F1 on the validation rows" in page and "Loss on the validation rows" in page


def test_a_best_step_between_two_saves_is_kept(write_recipe: Write, run_cli: Cli, tmp_path: Path) -> None:
    trainer = BEST | {"eval_steps": 1, "save_steps": 6, "max_steps": 3, "learning_rate": 0.01}
    assert run_cli("train", write_recipe(trainer=trainer, dataset={"split": SPLIT})) == 0
    run = tmp_path / "runs" / "things"
    losses = {row["step"]: row["eval_loss"] for row in evaluations(run)}
    step = min(losses, key=lambda one: losses[one])
    assert read_json(run / "train.json")["best"]["step"] == step
    assert same_weights(run / "adapter", run / "checkpoints" / f"checkpoint-{step}")


@pytest.fixture
def stopped_early(tmp_path: Path, run_cli: Cli, capfd: Any) -> Path:
    """A run in which no evaluation improves enough, so that it stops after three of them."""
    trainer = BEST | {"max_steps": 12, "early_stopping_patience": 2, "early_stopping_threshold": 100}
    recipe = labelled(tmp_path, spam(), trainer=trainer | {"learning_rate": 1e-3, "per_device_train_batch_size": 4})
    assert run_cli("train", recipe) == 0
    return tmp_path / "runs" / "labels"


def test_early_stopping_stops_and_keeps_the_best_step(stopped_early: Path, run_cli: Cli, capfd: Any) -> None:
    run = stopped_early
    said = capfd.readouterr().err
    found = read_json(run / "train.json")
    assert (found["status"], found["steps"], found["planned_steps"], found["stopped_early"]) == (
        "finished",
        6,
        12,
        True,
    )
    losses = {row["step"]: row["eval_loss"] for row in evaluations(run)}
    assert list(losses) == [2, 4, 6] and found["best"]["step"] == min(losses, key=lambda step: losses[step])
    assert "stopped early at step 6 of 12: no improvement in 2 evaluations" in said
    assert same_weights(run / "adapter", run / "checkpoints" / f"checkpoint-{found['best']['step']}")
    assert run_cli("train", run.parent.parent / "recipe.yaml") == 0
    assert "already finished" in capfd.readouterr().err


def test_a_resumed_run_continues_the_count_of_early_stopping(stopped_early: Path, run_cli: Cli) -> None:
    run = stopped_early
    whole = shutil.copytree(run, run.parent / "whole")
    for folder in ("checkpoints/checkpoint-6", "adapter"):
        shutil.rmtree(run / folder)
    for file in ("train.json", "metrics.json", "eval.json"):
        (run / file).unlink()
    assert run_cli("train", run.parent.parent / "recipe.yaml") == 0
    again = read_json(run / "train.json")
    assert (again["resumed_from_step"], again["steps"], again["stopped_early"]) == (4, 6, True)
    assert again["best"] == read_json(whole / "train.json")["best"]
    assert same_weights(run / "adapter", whole / "adapter")
    assert evaluations(run) == evaluations(whole)


@pytest.mark.numeric
@pytest.mark.filterwarnings("ignore:.label_smoothing_factor:FutureWarning")
@pytest.mark.parametrize(
    ("disabled", "trainer"),
    [([], {}), (["deferred_metrics", "fused_loss"], {}), ([], {"label_smoothing_factor": 0.2})],
)
def test_an_evaluation_during_training_has_the_metrics_of_the_final_one(
    write_recipe: Write, things: Path, run_cli: Cli, tmp_path: Path, disabled: list[str], trainer: dict[str, Any]
) -> None:
    lines = things.read_text().splitlines()
    (tmp_path / "other.csv").write_text("\n".join([lines[0], *lines[1:12]]))
    recipe = write_recipe(
        dataset={"test": {"path": "other.csv"}, "validation": {"path": "other.csv"}},
        trainer=EVALUATED | {"early_stopping_patience": 9, "metric_for_best_model": "exact_match"} | trainer,
        evaluation={"batch_size": 4, "baseline": False},
        performance={"disable": disabled},
        quantization=None,
    )
    sections = yaml.safe_load(recipe.read_text())
    del sections["dataset"]["split"]
    write_yaml(tmp_path, sections)
    # All test rows are training rows, which only matters to a reader of their metrics.
    assert run_cli("train", recipe, "--set", "dataset.limits.max_leaked=1") == 0
    run = tmp_path / "runs" / "things"
    last, final = evaluations(run)[-1], read_json(run / "metrics.json")["adapter"]
    for name in ("loss", "token_accuracy", "exact_match", "chrf"):
        assert last[f"eval_{name}"] == pytest.approx(final[name], abs=1e-4), name


@pytest.mark.numeric
def test_class_weights_are_those_of_torch_and_evaluations_are_unweighted(
    tmp_path: Path, run_cli: Cli, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    rows = spam()
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, rows[:16])))
    weights = torch.tensor([2 / 3, 2.0])  # of 48 rows 36 are ham: 48 / (2 * 36) and 48 / (2 * 12)
    original, compared = HeadTrainer.compute_loss, []

    def spy(self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        loss, outputs = original(self, model, inputs, True, num_items_in_batch)
        if model.training:
            plain = torch.nn.CrossEntropyLoss(weight=weights, label_smoothing=0.1)
            expected = plain(outputs["logits"].detach(), inputs["labels"])
            compared.append((float(loss.detach()), float(expected)))
        return (loss, outputs) if return_outputs else loss

    monkeypatch.setattr(HeadTrainer, "compute_loss", spy)
    recipe = labelled(
        tmp_path,
        rows,
        model={"name": "tiny:bert", "task": "sequence-classification", "class_weights": "balanced"},
        dataset={"path": "rows.jsonl", "test": {"path": "other.jsonl"}, "validation": {"path": "other.jsonl"}},
        trainer=EVALUATED | {"label_smoothing_factor": 0.1, "per_device_train_batch_size": 8},
        evaluation={"baseline": False},
    )
    assert run_cli("train", recipe, "--set", "dataset.limits.max_leaked=1") == 0
    assert len(compared) == 6
    assert [loss for loss, _ in compared] == pytest.approx([plain for _, plain in compared], rel=1e-5)
    assert "class weights of the training loss: ham 0.6667, spam 2 (balanced" in capfd.readouterr().err
    run = tmp_path / "runs" / "labels"
    last, final = evaluations(run)[-1], read_json(run / "metrics.json")["adapter"]
    for name in ("loss", "accuracy", "f1", "f1_macro"):
        assert last[f"eval_{name}"] == pytest.approx(final[name], abs=1e-5), name


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1, 2, 3], "model.class_weights has 3 weights, but there are 2 classes (ham, spam)"),
        ({"Spam": 4}, "there is no class Spam; did you mean spam?"),
    ],
)
def test_weights_that_do_not_fit_the_classes_are_refused(
    tmp_path: Path, run_cli: Cli, capfd: Any, weights: Any, said: str
) -> None:
    model = {"name": "tiny:bert", "task": "sequence-classification", "class_weights": weights}
    assert run_cli("train", labelled(tmp_path, spam(), model=model)) == 2
    assert said in capfd.readouterr().err


def test_weights_need_classes(tmp_path: Path, run_cli: Cli, capfd: Any) -> None:
    model = {"name": "tiny:bert", "task": "sequence-classification", "class_weights": "balanced"}
    assert run_cli("train", labelled(tmp_path, several(), model=model)) == 2
    assert "the labels are multi-label; remove it, or set evaluation.threshold: auto" in capfd.readouterr().err


def test_a_threshold_is_chosen_on_validation_rows_and_used_later(tmp_path: Path, run_cli: Cli, capfd: Any) -> None:
    recipe = labelled(tmp_path, several(), evaluation={"threshold": "auto"})
    assert run_cli("train", recipe) == 0
    run = tmp_path / "runs" / "labels"
    manifest = read_manifest(run / "adapter")
    assert manifest is not None
    threshold = manifest["base"]["threshold"]
    assert 0 < threshold < 1 and f"threshold {threshold:.4g}: the best micro F1 on the validation rows" in (
        capfd.readouterr().err
    )
    trained = read_json(run / "eval.json")["adapter"]
    assert run_cli("eval", run) == 0
    assert read_json(run / "eval.json")["adapter"] == trained
    capfd.readouterr()
    assert run_cli("eval", run, "--set", "evaluation.threshold=0.999", "--json") == 0
    assert json.loads(capfd.readouterr().out)["adapter"]["recall_micro"] == 0
    assert run_cli("generate", run, "red big 7", "--json") == 0
    answer = json.loads(capfd.readouterr().out.splitlines()[0])
    said = {name for name, value in answer["probabilities"].items() if value >= threshold}
    assert set(answer["label"]) == said


def test_a_run_that_began_without_validation_rows_resumes(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(trainer=BEST)
    assert run_cli("train", recipe) == 2
    assert "add dataset.split.validation_size" in capfd.readouterr().err
    with monkeypatch.context() as earlier:  # an earlier version had no such rule
        earlier.setattr("peftcli.recipe.rules.find_unvalidated", lambda tree, problems: None)
        assert run_cli("train", recipe, "--output-dir", "run") == 0
    run = tmp_path / "run"
    for folder in ("checkpoints/checkpoint-6", "adapter"):
        shutil.rmtree(run / folder)
    for file in ("train.json", "metrics.json", "eval.json"):
        (run / file).unlink()
    capfd.readouterr()
    assert run_cli("train", run) == 0
    assert "the test rows are evaluated during training" in capfd.readouterr().err
    metrics = read_json(run / "metrics.json")
    assert metrics["train"]["resumed_from_step"] == 4 and metrics["train"]["best"]["rows_from"] == "test"
    assert metrics["test_rows_used_for"][:2] == ["evaluations during training", "the choice of the best step"]
    assert run_cli("eval", run) == 0 and run_cli("report", run) == 0


def test_runs_are_compared_by_their_validation_rows(write_recipe: Write, run_cli: Cli, tmp_path: Path) -> None:
    recipe = write_recipe(dataset={"split": SPLIT}, evaluation={"baseline": False})
    for name, steps in (("short", 1), ("long", 6)):
        assert run_cli("train", recipe, "--output-dir", name, "--set", f"trainer.max_steps={steps}") == 0
    assert run_cli("compare", "short", "long", "--output-dir", "both") == 0
    compared = read_json(tmp_path / "both" / "compare.json")
    assert (compared["quality"]["rows_from"], compared["quality"]["rows"]) == ("validation", 12)
    for row in compared["variants"]:
        metrics = read_json(tmp_path / row["name"] / "metrics.json")
        assert row["loss"] == metrics["validation"]["loss"] != metrics["adapter"]["loss"]
    assert run_cli("eval", "long") == 0  # which measures the test rows again, and nothing else
    assert read_json(tmp_path / "long" / "metrics.json")["validation"] == metrics["validation"]


def test_a_merge_is_chosen_by_validation_rows(write_recipe: Write, run_cli: Cli, tmp_path: Path) -> None:
    recipe = write_recipe(dataset={"split": SPLIT}, evaluation={"baseline": False})
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    assert run_cli("merge", "run", "--into", "best") == 0
    merge = read_json(tmp_path / "run" / "merge.json")
    assert (merge["rows_from"], merge["rows"]) == ("validation", 12)
    drifts = {one["into"]: one["mean_abs_logit_difference"] for one in merge["candidates"]}
    assert len(drifts) == 2 and merge["into"] == min(drifts, key=lambda into: drifts[into])
    uses = read_json(tmp_path / "run" / "metrics.json")["test_rows_used_for"]
    assert uses == ["final scoring of the adapter", "final scoring of the merged model"]


def by_two(folder: Path, recipe: Path, name: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "peftcli", "train", str(recipe), "--num-processes", "2", "--output-dir", name]
    return subprocess.run(words, cwd=folder, check=False, capture_output=True, text=True)


@pytest.mark.numeric
@pytest.mark.parametrize("generates", [pytest.param(True, marks=pytest.mark.slow), False])
def test_two_processes_evaluate_and_choose_as_one_does(
    recipe_in: Write, run_cli: Cli, tmp_path: Path, generates: bool
) -> None:
    # 12 rows in batches of 5 by 2 processes: accelerate repeats rows, which must not count twice.
    sections: dict[str, Any] = {"evaluation": {"batch_size": 5, "baseline": False, "max_new_tokens": 6}}
    trainer = BEST | {"early_stopping_patience": 1, "early_stopping_threshold": 100, "learning_rate": 5e-3}
    if generates:
        metric = {"metric_for_best_model": "exact_match"}
        recipe = recipe_in(tmp_path, trainer=trainer | metric, dataset={"split": SPLIT}, quantization=None, **sections)
    else:
        model = {"name": "tiny:bert", "task": "sequence-classification", "class_weights": {"spam": 3}}
        metric = {"metric_for_best_model": "f1_macro", "per_device_train_batch_size": 4}
        recipe = labelled(
            tmp_path, spam(), trainer=trainer | metric, model=model, evaluation={"batch_size": 5, "baseline": False}
        )
    said = by_two(tmp_path, recipe, "two")
    assert said.returncode == 0, said.stderr
    assert run_cli("train", recipe, "--output-dir", "one", "--set", "trainer.per_device_train_batch_size=8") == 0
    one, two = (evaluations(tmp_path / name) for name in ("one", "two"))
    assert [row["step"] for row in two] == [row["step"] for row in one] == [2, 4]
    if generates:  # the dropout of a classifier differs between processes
        assert [row["eval_loss"] for row in two] == pytest.approx([row["eval_loss"] for row in one], abs=1e-3)
    best = read_json(tmp_path / "two" / "train.json")["best"]
    assert same_weights(tmp_path / "two" / "adapter", tmp_path / "two" / "checkpoints" / f"checkpoint-{best['step']}")
    assert best["value"] == max(row[f"eval_{best['metric']}"] for row in two)


@pytest.mark.parametrize(("higher", "worst"), [(True, -np.inf), (False, np.inf)])
def test_a_metric_that_is_undefined_is_never_the_best(higher: bool, worst: float) -> None:
    arguments = SimpleNamespace(metric_for_best_model="pearson", greater_is_better=higher)
    trainer: Any = SimpleNamespace(args=arguments)
    found = StepTrainer._comparable(trainer, {"loss": 1.0, "pearson": None, "spearman": None})
    assert found == {"loss": 1.0, "pearson": worst}
