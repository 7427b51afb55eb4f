"""Trainings that start from others: stages, a trained adapter; and the calibration before the first step."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from comparisons import without_repacking
from helpers import adapter, logits
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from peftcli.errors import RecipeError
from peftcli.model.load import merge_previous_stages
from peftcli.recipe.dump import dump_recipe, fingerprint
from peftcli.recipe.load import load_recipe
from peftcli.recipe.stages import stage_recipes
from peftcli.run_dir import read_json, read_log
from peftcli.train import callbacks
from peftcli.train.stop import StopRequests


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A small random model on the disk."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(str(tmp_path / "base"))
    return tmp_path / "base"


def loaded(base: Path, *, quantized: bool) -> Any:
    given: dict[str, Any] = {"dtype": torch.float32}
    if quantized:
        given["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    return without_repacking(AutoModelForCausalLM.from_pretrained(str(base), **given))


@pytest.mark.numeric
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "nf4"])
def test_two_adapters_are_folded_in_order_and_the_third_stands_on_them(
    base: Path, tmp_path: Path, quantized: bool
) -> None:
    adapter(loaded(base, quantized=quantized), tmp_path / "1", "q_proj", "down_proj")
    second = adapter(
        merge_previous_stages(loaded(base, quantized=quantized), [str(tmp_path / "1")]),
        tmp_path / "2",
        "q_proj",
        "up_proj",
    )
    both = merge_previous_stages(loaded(base, quantized=quantized), [str(tmp_path / "1"), str(tmp_path / "2")])
    assert not isinstance(both, PeftModel)
    torch.testing.assert_close(logits(both), second, atol=1e-5, rtol=1e-4)
    packed = [name for name, part in both.named_modules() if hasattr(getattr(part, "weight", None), "quant_state")]
    # k, v, o and gate of two blocks stay in 4 bit; what an adapter changed does not.
    assert len(packed) == (8 if quantized else 0)
    third = adapter(both, tmp_path / "3", "q_proj", "k_proj")
    assert not torch.allclose(third, second)


# Recipes


STAGES = [
    {"name": "top", "adapter": {"r": 4, "target_modules": ["down_proj", "up_proj"]}, "trainer": {"max_steps": 3}},
    {"name": "rest", "adapter": {"method": "ia3"}, "trainer": {"save_steps": 2}},
]


def test_a_stage_has_its_own_adapter_and_lays_its_arguments_over_the_recipes(write_recipe: Any) -> None:
    recipe = load_recipe(write_recipe(adapter=None, stages=STAGES)).recipe
    first, second = stage_recipes(recipe)
    assert (first.name, second.name) == ("things-top", "things-rest")
    assert (first.adapter.r, first.adapter.method, second.adapter.method) == (4, "lora", "ia3")
    assert (first.trainer["max_steps"], second.trainer["max_steps"]) == (3, 6)
    assert first.trainer["learning_rate"] == second.trainer["learning_rate"] == 5e-3
    assert first.stages == second.stages == ()


def test_a_recipe_with_stages_is_written_back_the_same(write_recipe: Any, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(adapter=None, stages=STAGES)).recipe
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe, tmp_path / "again.yaml"))
    again = load_recipe(tmp_path / "again.yaml").recipe
    assert fingerprint(again) == fingerprint(recipe)
    (tmp_path / "one.yaml").write_text(dump_recipe(stage_recipes(recipe)[1], tmp_path / "one.yaml"))
    assert load_recipe(tmp_path / "one.yaml").recipe.adapter.method == "ia3"


@pytest.mark.parametrize(
    ("stages", "adapter", "said"),
    [
        ([], None, "stages is empty"),
        ([{"name": "a"}, {"name": "a"}], None, "two stages are named a"),
        ([{"adapter": {"r": 4}}], None, "stages[0].name is missing"),
        ([{"name": "a", "adapter": {"rr": 4}}], None, "adapter.rr is not a recipe key; did you mean adapter.r?"),
        ([{"name": "a", "trainer": {"max_step": 4}}], None, "did you mean trainer.max_steps?"),
        ([{"name": "a", "adapter": {"r": 4}}], {"r": 8}, "adapter is unused because every stage"),
        ([{"name": "a", "adapter": {"method": "prompt"}}, {"name": "b"}], None, "but prompt cannot be merged"),
    ],
)
def test_stages_that_cannot_be_are_refused_with_their_line(
    write_recipe: Any, stages: list[Any], adapter: Any, said: str
) -> None:
    path = write_recipe(adapter=adapter, stages=stages)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert said in text and f"{path}:" in text, text


@pytest.fixture(scope="module")
def staged(recipe_in: Any, cli_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe of two stages and its `run`."""
    folder = tmp_path_factory.mktemp("staged")
    assert cli_in(folder, "train", recipe_in(folder, adapter=None, stages=STAGES), "--output-dir", "run") == 0
    return folder


@pytest.mark.numeric
@pytest.mark.xdist_group("staged run")
def test_a_staged_run_ends_as_one_run_whose_adapter_is_enough_by_itself(
    staged: Path, run_cli: Any, tmp_path: Path
) -> None:
    recipe = staged / "recipe.yaml"
    run = Path(shutil.copytree(staged / "run", tmp_path / "run"))
    metrics, first = (read_json(place / "metrics.json") for place in (run, run / "stages" / "1-top"))
    assert (metrics["status"], first["status"]) == ("finished", "finished")
    assert metrics["base"] == first["base"] and metrics["adapter"] != first["adapter"]
    assert metrics["train"]["steps"] == 6 and first["train"]["steps"] == 3
    assert "1-top" in (run / "report.md").read_text()

    moved = shutil.copytree(run / "adapter", tmp_path / "alone")
    shutil.rmtree(run / "stages")
    assert run_cli("eval", moved, "--recipe", recipe, "--base") == 0
    assert run_cli("merge", run) == 0
    merged = read_json(run / "metrics.json")
    assert merged["merged"]["loss"] == pytest.approx(metrics["adapter"]["loss"], abs=1e-4)
    assert run_cli("merge", run, "--into", "original") == 2


@pytest.mark.xdist_group("staged run")
def test_an_earlier_adapter_that_was_changed_is_refused(staged: Path, run_cli: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(staged / "run", tmp_path / "run"))
    file = run / "adapter" / "earlier" / "1" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert run_cli("generate", run, "big apple 3") == 4


@pytest.mark.numeric
@pytest.mark.xdist_group("staged run")
def test_a_run_that_was_stopped_in_its_second_stage_goes_on_to_the_same_bits(
    staged: Path, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = staged / "recipe.yaml"
    run = tmp_path / "run"

    def stopping(self: StopRequests, margin: float) -> str | None:
        return "STOP" if (run / "checkpoints" / "checkpoint-2").is_dir() and not (run / "train.json").exists() else None

    with monkeypatch.context() as patch:
        patch.setattr(StopRequests, "reason", stopping)
        assert run_cli("train", recipe, "--output-dir", run) == 75
    before = (run / "stages" / "1-top" / "train.json").read_bytes()
    assert run_cli("train", recipe, "--output-dir", run) == 0
    assert (run / "stages" / "1-top" / "train.json").read_bytes() == before
    files = [place / "adapter" / "adapter_model.safetensors" for place in (run, staged / "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


# A training that starts from a trained adapter


def test_a_training_starts_from_the_weights_of_another_run(
    write_recipe: Any, run_cli: Any, tmp_path: Path, capfd: Any
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_cli("train", write_recipe(trainer={"max_steps": 12}), "--output-dir", first) == 0
    capfd.readouterr()
    recipe = write_recipe(adapter={"init_from": str(first)})
    assert run_cli("train", recipe, "--output-dir", second) == 0
    assert f"starts from {first}: 28 of 28 tensors" in capfd.readouterr().err
    losses = [read_log(run / "log.jsonl")[0]["loss"] for run in (first, second)]
    assert losses[1] < losses[0] - 0.5


@pytest.fixture(scope="module")
def trained(recipe_in: Any, cli_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run under `first`."""
    folder = tmp_path_factory.mktemp("trained")
    quick = {"trainer": {"max_steps": 1}, "evaluation": {"baseline": False, "rows": 1, "samples": 0}}
    assert cli_in(folder, "train", recipe_in(folder, **quick), "--output-dir", "first") == 0
    return folder


@pytest.mark.xdist_group("start from one run")
@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"init_from": "nowhere"}, "no adapter there (adapter_config.json and adapter_model.safetensors)"),
        ({"init_from": "first", "r": 4}, "lora_A.weight is 8x384 in that adapter, but 4x384 in the recipe"),
        ({"init_from": "first", "target_modules": ["q_proj"]}, "recipe's adapter has no"),
        ({"init_from": "first", "method": "ia3", "r": None}, "a LORA adapter, but the recipe trains IA3"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(
    write_recipe: Any, run_cli: Any, trained: Path, tmp_path: Path, capfd: Any, adapter: dict[str, Any], said: str
) -> None:
    adapter = adapter | {"init_from": str(trained / adapter["init_from"])}
    given = {key: value for key, value in adapter.items() if value is not None}
    recipe = write_recipe(adapter=None)
    recipe.write_text(recipe.read_text() + yaml.safe_dump({"adapter": given}))
    assert run_cli("train", recipe, "--output-dir", tmp_path / "second") == 2
    assert said in capfd.readouterr().err


# Calibration


@pytest.mark.numeric
def test_a_calibration_changes_nothing_and_is_reported(
    write_recipe: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_it, without = tmp_path / "with", tmp_path / "without"
    monkeypatch.setattr(callbacks, "FEWEST_STEPS", 2)
    recipe = write_recipe(adapter={"dropout": 0.2})
    assert run_cli("train", recipe, "--output-dir", with_it) == 0
    found = read_json(with_it / "train.json")["calibration"]
    assert found["tokens"] > 0 and found["step_seconds"] > 0 and found["peak_memory_bytes"] is None
    assert "After one micro-batch" in (with_it / "report.md").read_text()
    monkeypatch.setattr(callbacks, "FEWEST_STEPS", 100)
    assert run_cli("train", recipe, "--output-dir", without) == 0
    assert read_json(without / "train.json")["calibration"] is None
    files = [place / "adapter" / "adapter_model.safetensors" for place in (with_it, without)]
    assert files[0].read_bytes() == files[1].read_bytes()
    counted = [read_json(place / "train.json") for place in (with_it, without)]
    assert counted[0]["tokens"] == counted[1]["tokens"] and counted[0]["batching"] == counted[1]["batching"]


def test_a_head_for_other_labels_is_new_on_a_trained_adapter(
    write_recipe: Any, run_cli: Any, tmp_path: Path, capfd: Any
) -> None:
    rows = [(f"{name} {number}", name, "even" if number % 2 else "odd") for number in range(24) for name in ("a", "b")]
    table = tmp_path / "rows.csv"
    table.write_text("text,kind,side\n" + "".join(f"{','.join(row)}\n" for row in rows), encoding="utf-8")

    def train(label: str, folder: str, **adapter: str) -> str:
        recipe = {
            "model": {"name": "tiny:bert", "task": "sequence-classification"},
            "adapter": {"r": 4, **adapter},
            "dataset": {"path": str(table), "columns": {"label": label}, "limits": {"max_leaked": 1}},
            "trainer": {"max_steps": 2, "per_device_train_batch_size": 4},
        }
        path = tmp_path / "labels.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        assert run_cli("train", path, "--output-dir", folder) == 0
        return str(capfd.readouterr().err)

    train("kind", "first")
    other = train("side", "other", init_from="first")
    same = train("kind", "same", init_from="first")
    assert "24 of 28 tensors, new " in other and "classifier.weight" in other  # of the same size, for other labels
    assert "starts from" in same and ", new" not in same
