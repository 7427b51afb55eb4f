"""The time budget counts the last evaluation, also where the base was not measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftcli.run_dir import read_json
from peftcli.train import run as train_run

Cli = Callable[..., int]
Write = Callable[..., Path]
NO_BASE = {"trainer": {"max_steps": 4}, "evaluation": {"baseline": False}}


def test_a_last_evaluation_that_was_not_measured_is_timed_on_its_first_rows(
    write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    whole = train_run.estimate_evaluation
    monkeypatch.setattr(
        train_run, "estimate_evaluation", lambda *asked, **given: found.append(whole(*asked, **given)) or found[-1]
    )
    assert run_cli("train", write_recipe(**NO_BASE), "--output-dir", "free") == 0 and not found
    recipe = write_recipe(**NO_BASE, budget={"wall_clock": "10h"})
    assert run_cli("train", recipe, "--output-dir", "timed") == 0
    assert len(found) == 1 and found[0] > 0
    assert "the last evaluation will take at most about" in capfd.readouterr().err
    # It only looks: the training is that of a run without a clock.
    losses = [read_json(tmp_path / name / "train.json")["last_loss"] for name in ("free", "timed")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_training_stops_early_enough_for_a_long_evaluation(
    write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_run, "estimate_evaluation", lambda *asked, **given: 30_000.0)
    recipe = write_recipe(**NO_BASE, budget={"wall_clock": "10h"})
    assert run_cli("train", recipe, "--output-dir", "run") == 75
    assert "stopped at step 1 by the time budget" in capfd.readouterr().err
    assert read_json(tmp_path / "run" / "eval.json")["adapter"]["loss"] > 0


def test_the_time_of_labels_is_measured_too(
    label_rows: Path, run_cli: Cli, capfd: Any, tmp_path: Path, tiny_llama: Path
) -> None:
    recipe = tmp_path / "labels.yaml"
    recipe.write_text(
        f"model: {{name: {tiny_llama}, task: sequence-classification}}\n"
        f"dataset: {{path: {label_rows}, columns: {{text: text, label: label}}, split: {{test_size: 16}}}}\n"
        "trainer: {max_steps: 2}\nevaluation: {baseline: false}\nbudget: {wall_clock: 10h}\n",
        encoding="utf-8",
    )
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    assert "the last evaluation will take at most about" in capfd.readouterr().err


@pytest.fixture
def label_rows(tmp_path: Path) -> Path:
    """A CSV of 64 texts with a class."""
    rows = [f"{number} the soup was {'good' if number % 2 else 'bad'},{number % 2}" for number in range(64)]
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    return path
