"""Answers to a sample of the test rows: drawn by the seed, the same rows for every model that is compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftcli.metrics.interval import wilson_interval
from peftcli.plan import answered_rows
from peftcli.plan.answered_rows import AUTO_ROWS, choose_answered_rows, rows_digest
from peftcli.recipe.schema import EvaluationSection
from peftcli.run_dir import read_json, write_json

Cli = Callable[..., int]
Write = Callable[..., Path]
SHORT = {"trainer": {"max_steps": 2}}


def test_many_test_rows_are_sampled_by_the_seed_and_few_are_all_answered() -> None:
    auto = EvaluationSection()
    drawn = choose_answered_rows(auto, 9937, seed=7)
    assert len(drawn) == AUTO_ROWS and drawn == sorted(set(drawn)) and max(drawn) < 9937
    assert drawn == choose_answered_rows(auto, 9937, seed=7) != choose_answered_rows(auto, 9937, seed=8)
    assert choose_answered_rows(auto, AUTO_ROWS, seed=7) == list(range(AUTO_ROWS))
    assert choose_answered_rows(EvaluationSection(rows="all"), 9937, seed=7) == list(range(9937))
    assert len(choose_answered_rows(EvaluationSection(rows=700), 9937, seed=7)) == 700


def test_a_wrong_number_of_rows_is_refused_with_what_may_be(write_recipe: Write, run_cli: Cli, capfd: Any) -> None:
    for value in ("0", "most"):
        assert run_cli("validate", write_recipe(), "--set", f"evaluation.rows={value}") == 2
        assert "must be a whole number of at least 1, all, or null for at most 500" in capfd.readouterr().err
    assert run_cli("validate", write_recipe(), "--set", "evaluation.rows=all") == 0


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of answered rows where the recipe sets none: a third of the 12 test rows."""
    monkeypatch.setattr(answered_rows, "AUTO_ROWS", 4)
    return 4


def test_base_adapter_and_merged_answer_the_same_sample(
    few: int, write_recipe: Write, run_cli: Cli, tmp_path: Path, capfd: Any
) -> None:
    assert run_cli("train", write_recipe(**SHORT, seed=3), "--output-dir", "run") == 0
    assert "4 of the 12 test rows, drawn by the seed, are answered" in capfd.readouterr().err
    assert run_cli("merge", "run") == 0
    rows = choose_answered_rows(EvaluationSection(), 12, seed=3)
    found, merge, metrics = (read_json(tmp_path / "run" / f"{name}.json") for name in ("eval", "merge", "metrics"))
    assert rows != list(range(4)) and found["generated_rows_sha256"] == rows_digest(rows)
    assert (found["rows"], found["generated_rows"]) == (12, few)
    prompts = [sample["prompt"] for sample in found["samples"]]
    assert prompts == [sample["prompt"] for sample in merge["samples"]] and len(prompts) == 2
    assert all(sample["base"] is not None and sample["adapter"] is not None for sample in found["samples"])
    assert (metrics["answers"]["rows"], metrics["answers"]["test_rows"]) == (4, 12)
    for name in ("base", "adapter", "merged"):
        expected = list(wilson_interval(metrics[name]["exact_match"], 4))
        assert metrics["answers"]["exact_match_interval"][name] == expected
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "Scored on 12 held-out rows, 4 of them answered, drawn by the seed." in report


def test_a_base_that_answered_other_rows_is_not_compared_with_the_adapter(
    few: int, write_recipe: Write, run_cli: Cli, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a version left it that answered every row.
    monkeypatch.setattr(answered_rows, "AUTO_ROWS", 12)
    assert run_cli("train", write_recipe(**SHORT), "--output-dir", "run") == 0
    old = read_json(tmp_path / "run" / "eval.json")
    assert old.pop("generated_rows_sha256") is not None and old["generated_rows"] == 12
    write_json(tmp_path / "run" / "eval.json", old)
    monkeypatch.setattr(answered_rows, "AUTO_ROWS", 4)
    capfd.readouterr()
    assert run_cli("train", write_recipe(**SHORT), "--output-dir", "other", "--baseline-from", "run") == 0
    assert "its base answered other test rows (evaluation.rows)" in capfd.readouterr().err
    monkeypatch.setattr(answered_rows, "AUTO_ROWS", 12)
    assert run_cli("train", write_recipe(**SHORT), "--output-dir", "third", "--baseline-from", "run") == 0
    assert "reusing the baseline of run" in capfd.readouterr().err


def test_a_run_that_goes_on_measures_its_base_again_on_the_rows_of_the_adapter(
    few: int, write_recipe: Write, run_cli: Cli, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answered_rows, "AUTO_ROWS", 12)
    recipe = write_recipe(**SHORT)
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    # The state of a run that was stopped in its last evaluation: the base measured, the adapter not yet.
    state = read_json(tmp_path / "run" / "eval.json")
    write_json(tmp_path / "run" / "eval.json", state | {"adapter": None})
    (tmp_path / "run" / "metrics.json").unlink()
    capfd.readouterr()
    monkeypatch.setattr(answered_rows, "AUTO_ROWS", 4)
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    assert "the base answered other test rows before" in capfd.readouterr().err
    after = read_json(tmp_path / "run" / "eval.json")
    assert after["generated_rows"] == 4
    expected = rows_digest(choose_answered_rows(EvaluationSection(), 12, seed=after["decoding"]["seed"]))
    assert after["generated_rows_sha256"] == expected
    assert after["base"]["loss"] == pytest.approx(state["base"]["loss"], abs=1e-6)
