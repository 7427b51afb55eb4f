"""A split is remembered: what a run trained on is never a test row, whatever happens to the file."""

import csv
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from peftcli.data.split_record import SplitRecord, _as_often_as, join_records
from peftcli.run_dir import RunDir, read_json

Write = Callable[..., Path]
Cli = Callable[..., int]
ROWS = [(f"item {number}", "red" if number % 3 else "blue") for number in range(40)]


def write_rows(file: Path, rows: list[tuple[str, str]]) -> None:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([("name", "color"), *rows])


@pytest.fixture
def trained(write_recipe: Write, run_cli: Cli, tmp_path: Path) -> tuple[RunDir, Path, Path]:
    """A run over 40 rows of which 10 are held out, its recipe and its file."""
    file = tmp_path / "rows.csv"
    write_rows(file, ROWS)
    dataset = {"path": "rows.csv", "prompt": "{name}:", "completion": " {color}", "split": {"test_size": 10}}
    recipe = write_recipe(dataset=dataset, trainer={"max_steps": 2})
    run = RunDir(tmp_path / "run")
    assert run_cli("train", recipe, "--output-dir", run.path) == 0
    return run, recipe, file


def scored(run: RunDir, run_cli: Cli, capfd: Any, *words: object) -> tuple[dict[str, Any], str]:
    assert run_cli("eval", run.path, *words) == 0
    return read_json(run.eval), capfd.readouterr().err


def test_a_sorted_or_longer_file_is_scored_on_the_rows_that_were_held_out(
    trained: tuple[RunDir, Path, Path], run_cli: Cli, capfd: Any
) -> None:
    run, _, file = trained
    capfd.readouterr()
    before, said = scored(run, run_cli, capfd)
    assert "changed" not in said and before["rows"] == 10
    shuffled = list(ROWS)
    random.Random(1).shuffle(shuffled)
    write_rows(file, shuffled)
    after, said = scored(run, run_cli, capfd)
    assert after["rows"] == 10 and "changed" not in said
    assert after["adapter"]["loss"] == pytest.approx(before["adapter"]["loss"], rel=1e-5)
    write_rows(file, [("new 1", "red"), ("new 2", "blue"), *shuffled])
    after, said = scored(run, run_cli, capfd)
    assert after["rows"] == 10 and "2 rows are new and not scored; scored on 10 recorded rows" in said
    assert after["adapter"]["loss"] == pytest.approx(before["adapter"]["loss"], rel=1e-5)


def test_rows_that_are_gone_are_counted_and_trained_rows_are_never_scored(
    trained: tuple[RunDir, Path, Path], run_cli: Cli, capfd: Any
) -> None:
    run, _, file = trained
    record = SplitRecord.load(run.rows)
    assert (len(record.train), len(record.test)) == (30, 10)
    write_rows(file, ROWS[:20])
    some, said = scored(run, run_cli, capfd)
    held_out = int(some["rows"])
    assert 0 < held_out < 10 and f"{10 - held_out} of its 10 test rows are gone" in said
    write_rows(file, [("other 1", "red"), ("other 2", "blue")])
    new, said = scored(run, run_cli, capfd)
    assert new["rows"] == 2 and "scored on 2 new rows" in said


def test_rows_that_were_all_trained_on_are_refused(
    trained: tuple[RunDir, Path, Path], run_cli: Cli, capfd: Any
) -> None:
    run, _, file = trained
    shown = {sample["prompt"] for sample in read_json(run.eval)["samples"]}
    record = SplitRecord.load(run.rows)
    kept = []
    for row in ROWS[:6]:  # one by one: a file of a row that was trained on is refused
        write_rows(file, [row, row])
        if run_cli("eval", run.path) == 3:
            kept.append(row)
    assert "the run trained on all 2 rows" in capfd.readouterr().err
    assert 0 < len(kept) < 6 and not {f"{name}:" for name, _ in kept} & shown and len(record.train) == 30


def test_a_run_that_starts_from_another_keeps_its_test_rows(
    trained: tuple[RunDir, Path, Path], run_cli: Cli, tmp_path: Path
) -> None:
    run, recipe, file = trained
    first = SplitRecord.load(run.rows)
    write_rows(file, [(f"more {number}", "red") for number in range(20)] + ROWS[::-1])
    again = RunDir(tmp_path / "again")
    words = ["--set", f"adapter.init_from={run.path}", "--output-dir", again.path]
    assert run_cli("train", recipe, *words) == 0
    second = SplitRecord.load(again.rows)
    assert np.isin(first.test, second.test).all() and not np.isin(second.test, first.train).any()
    assert np.isin(first.train, second.train).all() and len(second.test) > len(first.test)


def test_a_run_that_resumes_keeps_its_split_also_with_equal_rows_and_a_sample_of_the_training_rows(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, capfd: Any
) -> None:
    write_rows(tmp_path / "rows.csv", ROWS + ROWS[:15])
    split = {"split": {"test_size": 12}, "max_train_samples": 20, "limits": {"max_leaked": 1.0}}
    dataset = {"path": "rows.csv", "prompt": "{name}:", "completion": " {color}", **split}
    recipe = write_recipe(dataset=dataset, trainer={"max_steps": 4, "save_steps": 2}, budget={"wall_clock": "1h"})
    run = RunDir(tmp_path / "run")
    assert run_cli("train", recipe, "--output-dir", run.path) == 0
    before = read_json(run.data)["fingerprint"]
    capfd.readouterr()
    _, said = scored(run, run_cli, capfd)
    assert "changed" not in said  # rows outside the sample are known, not new
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "checkpoint-4")
    for file in (run.train, run.eval, run.metrics):
        file.unlink()
    capfd.readouterr()
    assert run_cli("train", recipe, "--output-dir", run.path) == 0
    assert "resuming from step 2" in capfd.readouterr().err
    assert read_json(run.data)["fingerprint"] == before


def test_test_rows_of_their_own_that_were_trained_on_are_refused(
    trained: tuple[RunDir, Path, Path], run_cli: Cli, tmp_path: Path, capfd: Any
) -> None:
    run, recipe, _ = trained
    write_rows(tmp_path / "test.csv", ROWS)
    other = tmp_path / "other.yaml"
    given = yaml.safe_load(recipe.read_text())
    del given["dataset"]["split"]
    given["dataset"] |= {"test": {"path": "test.csv"}, "limits": {"max_leaked": 1.0}}
    given["adapter"] |= {"init_from": str(run.path)}
    other.write_text(yaml.safe_dump(given))
    capfd.readouterr()
    assert run_cli("train", other, "--output-dir", tmp_path / "again") == 3
    assert "30 of the 40 rows of dataset.test were trained on" in capfd.readouterr().err


def test_hashes_are_taken_as_often_as_they_were_held_out() -> None:
    have, want = np.array([3, 1, 3, 3, 2], np.uint64), np.array([2, 3, 3, 9], np.uint64)
    assert _as_often_as(have, want).tolist() == [True, False, True, False, True]
    assert not _as_often_as(np.zeros(0, np.uint64), want).any() and not _as_often_as(have, have[:0]).any()


def test_a_row_that_one_training_of_several_has_seen_is_no_test_row() -> None:
    one = SplitRecord(np.array([1, 2], np.uint64), np.array([3], np.uint64))
    two = SplitRecord(np.array([3], np.uint64), np.array([4, 4], np.uint64))
    joined = join_records([one, two])
    assert joined is not None and joined.train.tolist() == [1, 2, 3] and joined.test.tolist() == [4, 4]
    assert join_records([]) is None
