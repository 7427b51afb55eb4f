"""`dataset.split.test_size: 0`: all rows are trained on, and what was not measured is null everywhere."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftcli.run_dir import read_json

Cli = Callable[..., int]
Write = Callable[..., Path]
ALL_ROWS = {"split": {"test_size": 0}}
OF_ROWS = ("base", "adapter", "merged")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"gates": {"exact_match": ">= 0.1"}}, "gates.exact_match is measured on test rows"),
        ({"dataset": {"split": {"test_size": 0.0, "group": "kind"}}}, "dataset.split.group controls how test rows are"),
    ],
)
def test_what_needs_test_rows_is_refused_beside_none(
    write_recipe: Write, run_cli: Cli, capfd: Any, sections: dict[str, Any], said: str
) -> None:
    sections = {"dataset": ALL_ROWS} | sections
    assert run_cli("validate", write_recipe(**sections)) == 2
    found = capfd.readouterr().err
    assert said in found and "dataset.split.test_size is 0; remove one of the two" in found


def test_gates_on_the_merge_and_on_forgetting_are_allowed_without_test_rows(
    write_recipe: Write, run_cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("The milk is cold. " * 200)
    gates = {"merge_kl_nats": "<= 0.5", "forgetting_change": "<= 9"}
    recipe = write_recipe(dataset=ALL_ROWS, gates=gates, evaluation={"forgetting_text": str(tmp_path / "text.txt")})
    assert run_cli("validate", recipe) == 0


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, recipe_in: Write, cli_in: Callable[..., int]) -> Path:
    """A folder with a run of a language model that was trained on all rows, and merged."""
    folder = tmp_path_factory.mktemp("all-rows")
    (folder / "text.txt").write_text("The milk is cold. " * 200)
    retention = {"forgetting_text": str(folder / "text.txt"), "forgetting_tokens": 200}
    recipe = recipe_in(folder, dataset=ALL_ROWS, evaluation=retention, trainer={"max_steps": 3})
    assert cli_in(folder, "train", recipe, "--output-dir", "run") == 0
    assert cli_in(folder, "merge", "run", "--into", "best") == 0
    return folder


def test_figures_of_test_rows_are_null_and_forgetting_is_measured(written: Path) -> None:
    run = written / "run"
    metrics, evaluation = read_json(run / "metrics.json"), read_json(run / "eval.json")
    assert metrics["status"] == "finished" and all(metrics[name] is None for name in OF_ROWS)
    assert metrics["data"] | {"train_rows": 48, "test_rows": 0, "leaked_rows": None} == metrics["data"]
    assert metrics["retention"]["base_loss"] > 0 and metrics["retention"]["adapter_loss"] > 0
    assert evaluation["base"] is None and evaluation["adapter"] is None and evaluation["samples"] == []
    assert read_json(run / "data.json")["fingerprint"]["test"] is None
    card = (run / "adapter" / "README.md").read_text()
    assert "trained on 48 rows" in card and "it was not tested" in card and "| Metric |" not in card


def test_the_merge_is_compared_on_training_rows_and_says_so(written: Path) -> None:
    merge = read_json(written / "run" / "merge.json")
    assert merge["rows_from"] == "training" and merge["rows"] == 48 and merge["positions"] > 48
    assert merge["metrics"] is None and merge["samples"] == [] and merge["met"]
    assert {one["into"]: one["loss"] for one in merge["candidates"]} == {"dequantized": None, "original": None}
    drifts = {one["into"]: one["mean_abs_logit_difference"] for one in merge["candidates"]}
    assert drifts[merge["into"]] == min(drifts.values())


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_the_report_says_that_nothing_was_held_out(written: Path, name: str) -> None:
    text = (written / "run" / name).read_text()
    assert "none held out, so it is unknown whether" in text
    assert "48 training rows, because none were held out" in text
    assert "Forgetting" in text and "Exact match" not in text and "NaN" not in text


def test_an_evaluation_without_test_rows_is_refused(
    written: Path, cli_in: Callable[..., int], capfd: Any, recipe_in: Write
) -> None:
    said = "dataset.split.test_size is 0, so all rows were trained on and none is left to evaluate on"
    assert cli_in(written, "eval", "run") == 2
    assert said in capfd.readouterr().err
    assert cli_in(written, "eval", "run", "--set", "dataset.split.test_size=0.5") == 2
    assert said in capfd.readouterr().err
    other = written / "other"
    other.mkdir()
    assert cli_in(written, "eval", "run", "--recipe", recipe_in(other), "--json") == 0
    assert json.loads(capfd.readouterr().out)["adapter"]["loss"] > 0


def test_runs_without_test_rows_are_compared_by_what_was_measured(
    written: Path, cli_in: Callable[..., int], capfd: Any
) -> None:
    shutil.copytree(written / "run", written / "second")
    assert cli_in(written, "compare", "run", "second", "--output-dir", "both") == 0
    assert "No variant was scored on held-out rows" in capfd.readouterr().out
    rows = read_json(written / "both" / "compare.json")["variants"]
    assert all(row["quality"] is None and row["retention_change"] is not None for row in rows)


def test_a_classifier_is_trained_on_all_rows_and_merged(run_cli: Cli, tmp_path: Path, capfd: Any) -> None:
    lines = [f"the {'good' if number % 2 else 'bad'} thing {number},{number % 2}" for number in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]))
    recipe = {
        "name": "c",
        "model": {"name": "tiny:bert", "task": "sequence-classification"},
        "dataset": {"path": "rows.csv"} | ALL_ROWS,
        "adapter": {"r": 4},
        "trainer": {"max_steps": 2},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(recipe))
    assert run_cli("data", "c.yaml") == 0
    assert run_cli("train", "c.yaml") == 0
    said = capfd.readouterr()
    assert "40 train and no test rows of 40" in said.err and "none held out" in said.out
    assert "test side has no row" not in said.err
    assert run_cli("merge", "runs/c") == 0 and run_cli("generate", "runs/c", "the good thing") == 0
    assert "training rows, because none were held out" in capfd.readouterr().out
    run = tmp_path / "runs" / "c"
    metrics, merge = read_json(run / "metrics.json"), read_json(run / "merge.json")
    assert all(metrics[name] is None for name in OF_ROWS) and metrics["merge"]["top1_agreement"] > 0.97
    assert (merge["rows_from"], merge["rows"]) == ("training", 40)
    labels = read_json(run / "data.json")["labels"]
    assert "test" not in labels and sum(labels["train"].values()) == 40
    assert run_cli("eval", "runs/c") == 2
