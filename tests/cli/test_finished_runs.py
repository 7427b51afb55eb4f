"""A finished run is trained further, and is never left in silence where something was asked of it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftcli.data.split_record import SplitRecord
from peftcli.run_dir import RunDir, read_json, read_log

Write = Callable[..., Path]
Cli = Callable[..., int]


@pytest.fixture(scope="module")
def finished(recipe_in: Write, cli_in: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its finished run of 4 steps, merged; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = recipe_in(folder, quantization=None, trainer={"max_steps": 4, "lr_scheduler_type": "cosine"})
    assert cli_in(folder, "train", recipe, "--output-dir", "run") == 0
    assert cli_in(folder, "merge", "run") == 0
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> tuple[Path, RunDir]:
    """The recipe and a copy of the run, each in the test's folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    recipe = tmp_path / "recipe.yaml"
    for file in (recipe, tmp_path / "run" / "recipe.yaml"):
        file.write_text(file.read_text().replace(str(finished), str(tmp_path)))
    return recipe, RunDir(tmp_path / "run")


def rates(run: RunDir) -> dict[int, float]:
    return {row["step"]: row["learning_rate"] for row in read_log(run.log) if "learning_rate" in row}


@pytest.mark.numeric
def test_with_a_constant_rate_the_longer_run_is_one_from_the_start_bit_for_bit(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, capfd: Any
) -> None:
    trainer = {"max_steps": 8, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}
    recipe = write_recipe(adapter={"dropout": 0.1}, trainer=trainer)
    assert run_cli("train", recipe, "--output-dir", "whole") == 0
    assert run_cli("train", recipe, "--set", "trainer.max_steps=3", "--output-dir", "run") == 0
    capfd.readouterr()
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    said = capfd.readouterr().err
    assert "steps 4 to 8 are trained, with the optimizer state of step 3" in said
    assert "constant_with_warmup goes on as it was; the result is that of a run of 8 steps from the start" in said
    weights = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]
    whole, run = (read_json(tmp_path / name / "metrics.json") for name in ("whole", "run"))
    assert run["train"]["resumed_from_step"] == 3 and run["train"]["steps"] == 8 and run["status"] == "finished"
    assert run["base"] == whole["base"] and run["adapter"] == whole["adapter"]


def test_another_schedule_is_followed_from_the_next_step_and_stated(
    copied: tuple[Path, RunDir], run_cli: Cli, capfd: Any
) -> None:
    recipe, run = copied
    before = rates(run)
    assert run_cli("train", recipe, "--output-dir", run.path, "--set", "trainer.max_steps=8") == 0
    said = capfd.readouterr().err
    assert "now cosine over 8 steps: 2.50e-03 at step 5" in said and "the checkpoint has 0.00e+00 for step 5" in said
    assert "The result is not that of a run of 8 steps from the start" in said
    after = rates(run)
    # cosine: half of the peak at half of the steps; the rate of a step may be logged before or after it.
    assert {step: after[step] for step in before} == before
    expected = [0.0025 * (1 + np.cos(np.pi * step / 8)) for step in range(4, 9)]
    for step in range(5, 9):
        assert min(abs(after[step] - rate) for rate in expected[step - 5 : step - 3]) < 1e-9
    assert sorted(after) == list(range(1, 9))


def test_a_lower_learning_rate_is_the_rate_of_every_further_step(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, capfd: Any
) -> None:
    trainer = {"max_steps": 3, "lr_scheduler_type": "constant", "learning_rate": 5e-3}
    recipe = write_recipe(quantization=None, trainer=trainer)
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    capfd.readouterr()
    lower = ("--set", "trainer.max_steps=6", "--set", "trainer.learning_rate=1e-4", "--force", "trainer.learning_rate")
    assert run_cli("train", recipe, "--output-dir", "run", *lower) == 0
    assert "now constant over 6 steps: 1.00e-04 at step 4" in capfd.readouterr().err
    found = rates(RunDir(tmp_path / "run"))
    assert found == pytest.approx({step: 5e-3 if step <= 3 else 1e-4 for step in range(1, 7)})


def test_nothing_of_before_is_left_as_if_of_the_new_adapter(
    copied: tuple[Path, RunDir], run_cli: Cli, tmp_path: Path, capfd: Any
) -> None:
    recipe, run = copied
    old = read_json(run.eval)
    assert old["adapter"] is not None and run.merge.is_file()
    words = ("train", recipe, "--output-dir", run.path, "--set", "trainer.max_steps=400", "--max-time", "8s")
    assert run_cli(*words) == 75
    assert "run/merged was merged from the adapter of an earlier step" in capfd.readouterr().err
    new = read_json(run.eval)
    metrics = read_json(run.metrics)
    assert not run.merge.exists() and metrics["merged"] is None and metrics["status"] == "stopped"
    assert new["base"] == old["base"] and new["adapter"] != old["adapter"]
    assert metrics["train"]["resumed_from_step"] == 4 and metrics["train"]["steps"] > 4


def test_a_kill_in_the_longer_part_goes_on_with_the_same_command(
    copied: tuple[Path, RunDir], run_cli: Cli, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from peftcli.train.callbacks import RunCallback

    recipe, run = copied
    words = ("train", recipe, "--output-dir", run.path, "--set", "trainer.max_steps=6", "--force", "data")
    with (run.path.parent / "things.csv").open("a") as file:
        file.write("900,big apple 900,red fruit\n")

    def killed(*_: Any, **__: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(RunCallback, "on_pre_optimizer_step", killed)
        assert run_cli(*words) == 1
    assert not run.metrics.exists() and not run.train.exists()
    capfd.readouterr()
    assert run_cli(*words[:-2]) == 0  # the rows were accepted before
    said = capfd.readouterr().err
    assert "resuming from step 4" in said and "2.50e-03" not in said and "now cosine over 6 steps" in said
    assert read_json(run.metrics)["train"] | {"steps": 6, "resumed_from_step": 4} == read_json(run.metrics)["train"]


def test_new_rows_are_trained_on_and_the_test_rows_stay(copied: tuple[Path, RunDir], run_cli: Cli, capfd: Any) -> None:
    recipe, run = copied
    before = SplitRecord.load(run.rows)
    file = run.path.parent / "things.csv"
    lines = file.read_text().splitlines()
    more = [f"9{number},huge plum {number},blue fruit" for number in range(8)]
    file.write_text("\n".join([lines[0], *more, *lines[:0:-1]]) + "\n")
    assert run_cli("train", recipe, "--output-dir", run.path) == 2
    said = capfd.readouterr().err
    assert "already finished, but its data changed since then: 8 new" in said and "raise trainer.max_steps" in said
    assert run_cli("train", recipe, "--output-dir", run.path, "--set", "trainer.max_steps=6") == 2
    assert "data.train" in capfd.readouterr().err and read_json(run.metrics)["status"] == "finished"
    words = ("--set", "trainer.max_steps=6", "--force", "data")
    assert run_cli("train", recipe, "--output-dir", run.path, *words) == 0
    after = SplitRecord.load(run.rows)
    assert np.array_equal(after.test, before.test) and len(after.train) == len(before.train) + 8
    assert read_json(run.metrics)["data"]["train_rows"] == len(before.train) + 8
    assert run_cli("train", recipe, "--output-dir", run.path, *words[:2]) == 0
    assert "already finished" in capfd.readouterr().err


def test_a_sorted_file_is_no_other_data(copied: tuple[Path, RunDir], run_cli: Cli, capfd: Any) -> None:
    recipe, run = copied
    file = run.path.parent / "things.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    assert run_cli("train", recipe, "--output-dir", run.path) == 0
    assert "already finished" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--force", "data"), "--force has no change to accept; set trainer.max_steps to more than 4"),
        (("--set", "trainer.max_steps=3"), "trainer.max_steps = 3 leaves nothing to train; set more than 4 steps"),
        (("--set", "trainer.learning_rate=1e-4"), "without more steps this has no effect"),
        (("--set", "trainer.max_steps=-1", "--set", "trainer.num_train_epochs=0.2"), "this recipe has 2 steps"),
        (("--set", "seed=7", "--force", "seed"), "without more steps this has no effect"),
        (
            ("--set", "trainer.max_steps=6", "--set", "trainer.weight_decay=0.1", "--force", "trainer.weight_decay"),
            "to train its adapter further in a new run: peftcli train",
        ),
        (("--set", "trainer.max_steps=6", "--set", "adapter.r=4"), "adapter.r: 8 -> 4"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    copied: tuple[Path, RunDir], run_cli: Cli, capfd: Any, words: tuple[str, ...], message: str
) -> None:
    recipe, run = copied
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    assert run_cli("train", recipe, "--output-dir", run.path, *words) == 2
    assert message in capfd.readouterr().err
    changed = [file.name for file, content in before.items() if file.read_bytes() != content]
    assert [name for name in changed if name != "log.txt"] == []


def test_without_a_checkpoint_the_command_that_goes_on_from_the_adapter_is_named_and_runs(
    copied: tuple[Path, RunDir], run_cli: Cli, capfd: Any, tmp_path: Path
) -> None:
    import shlex

    recipe, run = copied
    shutil.rmtree(run.checkpoints)
    assert run_cli("train", recipe, "--output-dir", run.path, "--set", "trainer.max_steps=6") == 2
    said = capfd.readouterr().err
    assert "no checkpoint is left" in said and read_json(run.metrics)["status"] == "finished"
    words = shlex.split(said.strip().rsplit("schedule: ", 1)[1])
    assert words[:2] == ["peftcli", "train"] and run_cli(*words[1:]) == 0
    new = RunDir(tmp_path / "run-2")
    assert np.array_equal(SplitRecord.load(new.rows).test, SplitRecord.load(run.rows).test)


def test_a_failed_start_is_no_lost_training(write_recipe: Write, run_cli: Cli, tmp_path: Path, capfd: Any) -> None:
    recipe = write_recipe(trainer={"max_steps": 2}, dataset={"limits": {"max_dropped": 0.0}})
    file = tmp_path / "things.csv"
    whole = file.read_text()
    file.write_text(whole + "998,,\n")
    assert run_cli("train", recipe, "--output-dir", "run") == 3
    file.write_text(whole)
    capfd.readouterr()
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    assert "no checkpoint" not in capfd.readouterr().err


def test_a_run_folder_is_trained_further_with_its_own_recipe(
    copied: tuple[Path, RunDir], run_cli: Cli, capfd: Any
) -> None:
    recipe, run = copied
    recipe.unlink()
    assert run_cli("train", run.path) == 0
    assert "already finished" in capfd.readouterr().err
    assert run_cli("train", run.path, "--set", "trainer.max_steps=5") == 0
    assert read_json(run.metrics)["train"]["steps"] == 5
    assert run_cli("validate", run.path) == 0
