"""Run folders that an earlier version wrote, with its names of keys and values, still open and go on."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftcli.recipe.earlier_names import RENAMED_KEYS, RENAMED_VALUES
from peftcli.run_dir import read_json, write_json

Cli = Callable[..., int]
Write = Callable[..., Path]


def with_earlier_names(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as the version before the renaming wrote it."""
    for key, names in RENAMED_VALUES.items():
        section, name = key.split(".")
        value = recipe.get(section, {}).get(name)
        earlier = {new: old for old, new in names.items()}
        if value is not None:
            recipe[section][name] = [earlier[one] for one in value] if isinstance(value, list) else earlier[value]
    for old, new in RENAMED_KEYS.items():
        holder: Any = recipe
        for part in new.split(".")[:-1]:
            holder = holder.get(part, {})
        if new.rpartition(".")[2] in holder:
            holder[old.rpartition(".")[2]] = holder.pop(new.rpartition(".")[2])
    return recipe


def age(run: Path) -> None:
    """Give the files of a run the names that the version before the renaming wrote."""
    path = run / "recipe.yaml"
    path.write_text(yaml.safe_dump(with_earlier_names(yaml.safe_load(path.read_text())), sort_keys=False))
    for name in ("plan.json", "train.json"):
        value = read_json(run / name)
        assert value["batching"]["kind"] == "padding_free"
        value["batching"]["kind"] = "flat"
        value["schema"] = 1
        if name == "train.json":
            value["levers"] = value.pop("optimizations")
        else:
            value["forecast"]["mends"] = value["forecast"].pop("suggestions")
            value["forecast"]["time"]["card"] = value["forecast"]["time"].pop("gpu")
        write_json(run / name, value)
    metrics = read_json(run / "metrics.json")
    for gate in metrics["gates"]:
        gate["name"] = gate["name"].replace("forgetting_", "retention_")
    write_json(run / "metrics.json", metrics)


@pytest.fixture
def recipe(write_recipe: Write, tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("The sea is blue and wide. " * 40)
    dataset = yaml.safe_load(write_recipe().read_text())["dataset"]
    limits = {"max_dropped": 0.5, "max_truncated": 0.4, "max_leaked": 0.3, "min_eos_trained": 0.2}
    return write_recipe(
        quantization=None,
        dataset=dataset | {"limits": limits},
        performance={"batching": "padding_free", "disable": ["fused_lora", "deferred_metrics"]},
        evaluation={"max_new_tokens": 2, "samples": 1, "forgetting_text": "text.txt", "forgetting_tokens": 100},
        gates={"forgetting_change": "< 100"},
        trainer={"max_steps": 4, "save_steps": 2, "logging_steps": 1},
    )


def test_a_finished_run_opens_with_every_command(
    recipe: Path, run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    run = tmp_path / "run"
    retention = read_json(run / "metrics.json")["retention"]
    age(run)
    earlier = (run / "recipe.yaml").read_text()
    assert all(re.search(rf"^ +{old.rpartition('.')[2]}:", earlier, re.M) for old in ("without", "leaked", "retention"))
    assert run_cli("report", "run") == 0
    assert "Forgetting: loss on another text" in (run / "report.md").read_text(encoding="utf-8")
    capfd.readouterr()
    assert run_cli("eval", "run", "--json") == 0
    assert json.loads(capfd.readouterr().out)["retention"]["tokens"] == 100
    metrics = read_json(run / "metrics.json")
    assert metrics["retention"] == retention
    assert [(gate["name"], gate["met"]) for gate in metrics["gates"]] == [("forgetting_change", True)]
    assert run_cli("generate", "run", "apple") == 0
    assert run_cli("merge", "run") == 0
    assert (run / "recipe.yaml").read_text() == earlier  # reading a run changes nothing of its recipe
    capfd.readouterr()
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    assert "run is already finished" in capfd.readouterr().err
    assert run_cli("train", recipe, "--output-dir", "other", "--baseline-from", "run") == 0
    assert read_json(tmp_path / "other" / "eval.json")["base"] == read_json(run / "eval.json")["base"]


def test_a_stopped_run_goes_on_with_the_recipe_in_the_new_names(
    recipe: Path, run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    run = tmp_path / "run"
    age(run)
    for name in ("train.json", "eval.json", "metrics.json"):
        (run / name).unlink()
    (run / "checkpoints").joinpath("checkpoint-4").rename(tmp_path / "checkpoint-4")
    capfd.readouterr()
    assert run_cli("train", recipe, "--output-dir", "run", "--set", "performance.batching=padded") == 2
    assert 'performance.batching: "padding_free" -> "padded"' in capfd.readouterr().err
    assert run_cli("train", recipe, "--output-dir", "run", "--resume") == 0
    assert "resuming from step 2" in capfd.readouterr().err
    assert "forgetting_text: ../text.txt" in (run / "recipe.yaml").read_text()
