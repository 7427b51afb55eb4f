"""Several processes: their losses and figures are those of one, they go on with one's run, and how they end."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from comparisons import assert_same_metrics

from peftcli.cli.launcher import EXIT_FILE
from peftcli.run_dir import read_json, read_log

Cli = Callable[..., int]
Write = Callable[..., Path]
LAST = 12
"""Steps of 8 of 32 rows: the checkpoint of step 7 lies in the second pass over the data, the third begins after it."""

pytestmark = pytest.mark.xdist_group("several processes")  # which look at the same runs


@dataclass(frozen=True)
class Runs:
    """One training by one process and by two, and what the launcher of the two said.

    Attributes:
        wide: by one process, all rows of a step at once.
        whole: by one process, half of the rows at a time.
        two: by two processes.
    """

    recipe: Path
    wide: Path
    whole: Path
    two: Path
    said: subprocess.CompletedProcess[str]


def train_by_two(recipe: Path, run: Path) -> subprocess.CompletedProcess[str]:
    """Train in two processes through the command line."""
    words = [sys.executable, "-m", "peftcli", "train", recipe, "--num-processes", "2", "--output-dir", run]
    return subprocess.run(words, cwd=run.parent, check=False, capture_output=True, text=True)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_log(run / "log.jsonl") if "loss" in row]


@pytest.fixture(scope="module")
def runs(recipe_in: Write, cli_in: Cli, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The runs that most tests here look at; their gate is not met, so that the exit code is another one than 0."""
    folder = tmp_path_factory.mktemp("processes")
    lines = [f"{number},new thing {number},{('red', 'green')[number % 2]} thing" for number in range(100, 108)]
    (folder / "more.csv").write_text("\n".join(["id,thing,kind", *lines]), encoding="utf-8")
    recipe = recipe_in(
        folder,
        dataset={"split": {"test_size": 16, "seed": 1}, "validation": {"path": str(folder / "more.csv")}},
        trainer={
            "max_steps": LAST,
            "save_steps": 7,
            "save_total_limit": 3,
            "eval_strategy": "steps",
            "eval_steps": LAST,
        },
        evaluation={
            "samples": 0,
            "batch_size": 3,
        },  # 16 and 8 rows are no multiple of it, so accelerate takes some twice
        gates={"loss": "<= 0.0001"},
    )
    by_one = {"wide": "trainer.per_device_train_batch_size=8", "whole": "trainer.gradient_accumulation_steps=2"}
    for name, changed in by_one.items():
        assert cli_in(folder, "train", recipe, "--output-dir", name, "--set", changed) == 7
    said = train_by_two(recipe, folder / "two")
    return Runs(recipe, folder / "wide", folder / "whole", folder / "two", said)


@pytest.fixture
def stopped(tmp_path: Path) -> Callable[[Path], Path]:
    """A function that copies a finished run as if it had been stopped after its first checkpoint."""

    def copy(run: Path) -> Path:
        copied = Path(shutil.copytree(run, tmp_path / run.name))
        for folder in (f"checkpoints/checkpoint-{LAST}", "adapter"):
            shutil.rmtree(copied / folder)
        for file in ("train.json", "metrics.json", "eval.json"):
            (copied / file).unlink()
        return copied

    return copy


def test_of_several_processes_the_exit_code_is_that_of_the_first(runs: Runs) -> None:
    assert runs.said.returncode == 7, runs.said.stderr


def test_several_processes_say_each_thing_once(runs: Runs) -> None:
    assert runs.said.stderr.count("error: ") == 1 and "Traceback" not in runs.said.stderr


@pytest.mark.numeric
def test_two_processes_give_the_losses_of_one(runs: Runs) -> None:
    assert len(losses(runs.two)) == LAST, runs.said.stderr
    assert losses(runs.two) == pytest.approx(losses(runs.wide), abs=1e-5)


def test_two_processes_train_in_lines_as_one_does(runs: Runs) -> None:
    for run in (runs.two, runs.wide):
        assert read_json(run / "train.json")["batching"]["kind"] == "padding_free", runs.said.stderr


@pytest.mark.numeric
def test_two_processes_give_the_metrics_of_one(runs: Runs) -> None:
    one, two = (read_json(run / "metrics.json") for run in (runs.wide, runs.two))
    assert_same_metrics(two["base"], one["base"])
    assert two["adapter"]["loss"] == pytest.approx(one["adapter"]["loss"], abs=1e-4)
    for name in ("tokens", "trained_tokens", "rows"):
        assert two["train"][name] == one["train"][name]


@pytest.mark.numeric
def test_an_evaluation_on_the_way_counts_each_row_once(runs: Runs) -> None:
    one, two = ([row for row in read_log(run / "log.jsonl") if "eval_loss" in row] for run in (runs.wide, runs.two))
    assert len(one) == len(two) == 1
    for name in ("eval_loss", "eval_token_accuracy"):
        assert two[0][name] == pytest.approx(one[0][name], abs=1e-5)


@pytest.mark.numeric
def test_a_run_begun_by_two_processes_is_ended_by_one(
    runs: Runs, stopped: Callable[[Path], Path], cli_in: Cli, tmp_path: Path
) -> None:
    run = stopped(runs.two)
    halves = ("--set", "trainer.gradient_accumulation_steps=2")
    assert cli_in(tmp_path, "train", runs.recipe, "--output-dir", run, *halves) == 7
    assert read_json(run / "train.json")["resumed_from_step"] == 7
    assert losses(run) == pytest.approx(losses(runs.whole), abs=1e-5)


@pytest.mark.numeric
def test_a_run_begun_by_one_process_is_ended_by_two(runs: Runs, stopped: Callable[[Path], Path]) -> None:
    run = stopped(runs.whole)
    said = train_by_two(runs.recipe, run)
    assert said.returncode == 7, said.stderr
    assert read_json(run / "train.json")["resumed_from_step"] == 7
    assert losses(run) == pytest.approx(losses(runs.whole), abs=1e-5)


ONE_LOSS_IS_NAN = """
import os, sys
import torch
from float16 import train_in_float16
from peftcli.cli.main import main
from peftcli.train.trainers import Trainer

train_in_float16()
compute = Trainer.compute_loss

def compute_loss(self, *given, **more):
    loss = compute(self, *given, **more)
    return loss * float("nan") if os.environ["RANK"] == "1" and self.state.global_step == 2 else loss

Trainer.compute_loss = compute_loss
sys.exit(main(sys.argv[1:]))
"""


def test_a_loss_of_one_process_that_is_not_finite_stops_all_of_them(write_recipe: Write, tmp_path: Path) -> None:
    """In float16, where a process whose own loss is finite takes the gradient for one that the scaler will skip."""
    recipe = write_recipe(quantization=None, evaluation={"samples": 0, "baseline": False})
    script, exit_code = tmp_path / "train.py", tmp_path / "exit"
    script.write_text(ONE_LOSS_IS_NAN, encoding="utf-8")
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    path = os.pathsep.join((str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")))
    said = subprocess.run(
        [sys.executable, *words, "train", str(recipe), "--output-dir", str(tmp_path / "run")],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": path, EXIT_FILE: str(exit_code)},
    )
    assert exit_code.read_text() == "6", said.stderr
    assert "step 3: the loss is nan" in said.stderr and "this model overflows float16 (maximum 65504)" in said.stderr
    assert "bug in peftcli" not in said.stderr and "cannot go on" not in said.stderr
    assert len(losses(tmp_path / "run")) == 2
