"""Adapters that plain PEFT wrote, without a run: merged, asked and evaluated like those of a run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peftcli.run_dir import read_json
from peftcli.tiny.build import tiny_model

Cli = Callable[..., int]
Change = Callable[..., Path]
LABELS = {0: "plum", 1: "fig", 2: "pear"}


def write_adapter(base: Any, config: LoraConfig, folder: Path) -> None:
    """Save an adapter with weights of its own, as a script that uses PEFT alone does."""
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(str(folder))


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A LoRA adapter on tiny:llama, without a tokenizer."""
    folder = tmp_path_factory.mktemp("plain") / "writer"
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type=TaskType.CAUSAL_LM)
    write_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), config, folder)
    return folder


@pytest.fixture(scope="module")
def labeller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter on tiny:bert with a head of three classes, and the names of those in a config.json."""
    folder = tmp_path_factory.mktemp("plain") / "labeller"
    bert = tiny_model("tiny:bert")
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3, id2label=LABELS)
    config = LoraConfig(r=4, task_type=TaskType.SEQ_CLS, modules_to_save=["classifier", "pooler"])
    write_adapter(model, config, folder)
    model.config.save_pretrained(str(folder))
    return folder


@pytest.fixture
def changed(tmp_path: Path) -> Change:
    """A function that copies an adapter and changes its configuration."""

    def change(folder: Path, **keys: Any) -> Path:
        copy = tmp_path / "changed"
        shutil.copytree(folder, copy)
        config = read_json(copy / "adapter_config.json") | keys
        (copy / "adapter_config.json").write_text(json.dumps(config))
        return copy

    return change


def test_a_merge_without_a_recipe_is_compared_on_fixed_texts(
    writer: Path, tiny_llama: Path, run_cli: Cli, tmp_path: Path, capfd: Any
) -> None:
    assert run_cli("merge", writer, "--output-dir", tmp_path / "merged") == 0
    assert "64 rows of fixed texts" in capfd.readouterr().out
    found = read_json(tmp_path / "merged" / "merge.json")
    assert found["rows_from"] == "fixed texts" and found["metrics"] is None and found["positions"] > 200
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    batch = tokenizer(["The milk is cold."], return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        tuned = PeftModel.from_pretrained(base, str(writer))(**batch).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(**batch).logits
        with_base = AutoModelForCausalLM.from_pretrained(tiny_llama)(**batch).logits
    # Float32 sums of a few hundred products in another order; the adapter moves the logits by far more.
    assert torch.allclose(tuned, merged, atol=1e-3)
    assert (tuned - with_base).abs().max() > 0.05
    assert run_cli("generate", tmp_path / "merged", "The milk", "--max-new-tokens", "4") == 0


def test_answers_are_those_of_plain_peft(writer: Path, tiny_llama: Path, run_cli: Cli, capfd: Any) -> None:
    assert run_cli("generate", writer, "The milk is", "--raw", "--max-new-tokens", "5", "--json") == 0
    said = json.loads(capfd.readouterr().out)["answer"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), str(writer)).eval()
    ids = tokenizer("The milk is", return_tensors="pt")["input_ids"]
    made = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert said.strip() == tokenizer.decode(made, skip_special_tokens=True).strip()
    assert run_cli("generate", writer, "Is milk cold?", "--max-new-tokens", "2", "--json") == 0
    assert "<|user|>" in json.loads(capfd.readouterr().out)["prompt"], "the tokenizer has a chat template"


def test_an_adapter_is_evaluated_and_merged_with_the_rows_of_a_recipe(
    writer: Path, run_cli: Cli, write_recipe: Callable[..., Path], tmp_path: Path, capfd: Any
) -> None:
    recipe = write_recipe(quantization=None)
    assert run_cli("eval", writer, "--recipe", recipe, "--json") == 0
    measured = json.loads(capfd.readouterr().out)
    assert measured["rows"] == 12 and measured["adapter"]["loss"] != measured["base"]["loss"]
    assert run_cli("merge", writer, "--recipe", recipe, "--output-dir", tmp_path / "m", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["rows_from"] == "test" and found["rows"] == 12
    # The same rows in float32, merged or not: the sums differ in their order alone.
    assert found["metrics"]["loss"] == pytest.approx(measured["adapter"]["loss"], rel=1e-3)
    assert run_cli("generate", writer, "big apple", "--recipe", recipe, "--max-new-tokens", "2", "--json") == 0
    assert json.loads(capfd.readouterr().out)["prompt"] == "big apple ->:"
    assert run_cli("eval", writer) == 2
    assert "pass --recipe to choose the test set" in capfd.readouterr().err


def test_a_head_with_named_classes_labels_merges_and_is_evaluated(
    labeller: Path, run_cli: Cli, tmp_path: Path, capfd: Any
) -> None:
    assert run_cli("generate", labeller, "The fig is ripe.", "--json") == 0
    answer = json.loads(capfd.readouterr().out)
    assert list(answer["probabilities"]) == list(LABELS.values())
    bert = tiny_model("tiny:bert")
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    model = PeftModel.from_pretrained(base, str(labeller)).eval()
    with torch.no_grad():
        logits = model(**AutoTokenizer.from_pretrained(bert)("The fig is ripe.", return_tensors="pt")).logits
    expected = logits.softmax(-1)[0].tolist()
    assert list(answer["probabilities"].values()) == pytest.approx(expected, abs=1e-4)
    assert run_cli("merge", labeller, "--output-dir", tmp_path / "merged") == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == LABELS
    lines = [f"the {LABELS[number % 3]} number {number},{LABELS[number % 3]}" for number in range(30)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]))
    recipe = {
        "model": {"name": "tiny:bert", "task": "sequence-classification"},
        "dataset": {"path": "rows.csv", "limits": {"max_leaked": 1}},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    capfd.readouterr()
    assert run_cli("eval", labeller, "--recipe", "r.yaml", "--json") == 0
    assert json.loads(capfd.readouterr().out)["adapter"]["labels"] == list(LABELS.values()), "not sorted"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"peft_type": "NEXT_BEST"}, "peft_type NEXT_BEST is unknown to the installed peft; install"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type SEQ_2_SEQ_LM is not supported"),
        ({"base_model_name_or_path": "/no/such/base"}, "the base /no/such/base (base_model_name_or_path) cannot be"),
        ({"base_model_name_or_path": "org/no-such-base"}, "the base org/no-such-base (base_model_name_or_path)"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is empty, so the base is unknown; pass a recipe"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused_with_a_fix(
    writer: Path, changed: Change, run_cli: Cli, capfd: Any, keys: dict[str, Any], said: str
) -> None:
    folder = changed(writer, **keys)
    for command in (("merge", folder), ("generate", folder, "a")):
        assert run_cli(*command) == 4
        assert said in capfd.readouterr().err


def test_an_adapter_of_another_base_is_refused(
    writer: Path, changed: Change, run_cli: Cli, tmp_path: Path, capfd: Any
) -> None:
    from transformers import AutoConfig

    other = tmp_path / "other"
    config = AutoConfig.from_pretrained(read_json(writer / "adapter_config.json")["base_model_name_or_path"])
    config.hidden_size, config.head_dim = 64, 16
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_model("tiny:llama")).save_pretrained(other)
    folder = changed(writer, base_model_name_or_path=str(other))
    assert run_cli("merge", folder, "--output-dir", tmp_path / "m") == 4
    said = capfd.readouterr().err
    assert "does not fit this base: size mismatch" in said and "use the base that it was trained on" in said
    assert not (tmp_path / "m").exists()


def test_a_head_whose_weights_are_nowhere_is_refused(run_cli: Cli, tmp_path: Path, capfd: Any) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model("tiny:bert"), num_labels=2)
    write_adapter(model, LoraConfig(r=4, task_type=TaskType.SEQ_CLS), tmp_path / "poor")  # its pooler was random
    assert run_cli("generate", tmp_path / "poor", "a") == 4
    assert "the weights of bert.pooler are neither here nor in the base" in capfd.readouterr().err
