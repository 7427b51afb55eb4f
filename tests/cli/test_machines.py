"""Two machines without a shared disk, played by processes with a folder, a home and a cache of their own each."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from peftcli.run_dir import read_json, read_log

Cli = Callable[..., int]
Write = Callable[..., Path]
LAST = 24
TOLERANCE = 1e-4
"""Nats: float32 sums of two halves differ from those of one whole by 1e-7, and some two dozen steps carry it on."""
SPLIT = {"split": {"test_size": 16, "seed": 1}}
"""Leaves 32 rows, so that two processes with 4 each take none twice."""
PATIENCE = 120
"""Seconds, far more than any of these trainings takes."""

pytestmark = pytest.mark.xdist_group("several processes")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass(frozen=True)
class Machine:
    """What one machine has to itself.

    Attributes:
        folder: in which commands are given; holds the recipe and its data.
    """

    number: int
    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def environment(self) -> dict[str, str]:
        own = {"HOME": str(self.folder / "home"), "PEFTCLI_CACHE": str(self.folder / "cache")}
        return {**os.environ, **own, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

    def start(self, port: int, *words: str) -> subprocess.Popen[str]:
        """The only process of this machine, with what torchrun sets."""
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        place |= {"RANK": str(self.number), "GROUP_RANK": str(self.number), "LOCAL_RANK": "0"}
        return self._popen([sys.executable, "-m", "peftcli"], words, self.environment() | place)

    def torchrun(self, port: int, *words: str) -> subprocess.Popen[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(self.number)]
        where = ["--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
        return self._popen([*launcher, *where, "--module", "peftcli"], words, self.environment())

    def _popen(self, start: list[str], words: tuple[str, ...], environment: dict[str, str]) -> subprocess.Popen[str]:
        command = [*start, "train", "recipe.yaml", "--output-dir", "run", *words]
        return subprocess.Popen(command, cwd=self.folder, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def machines(recipe_in: Write, tmp_path: Path) -> Callable[..., list[Machine]]:
    """A function that gives two machines, each with the same recipe and data."""

    def make(**sections: Any) -> list[Machine]:
        both = []
        for number in range(2):
            machine = Machine(number, tmp_path / f"machine{number}")
            machine.folder.mkdir()
            (machine.folder / "home").mkdir()
            trainer = {"max_steps": LAST} | sections.get("trainer", {})
            own: dict[str, Any] = {"evaluation": {"baseline": False, "samples": 0, "rows": 4}, "dataset": SPLIT}
            recipe_in(machine.folder, **(own | sections | {"trainer": trainer}))
            both.append(machine)
        return both

    return make


@pytest.fixture(scope="module")
def one(recipe_in: Write, cli_in: Cli, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process that takes the rows of both machines."""
    folder = tmp_path_factory.mktemp("one")
    trainer = {"max_steps": LAST, "per_device_train_batch_size": 8}
    recipe_in(folder, evaluation={"baseline": False, "samples": 0, "rows": 4}, dataset=SPLIT, trainer=trainer)
    assert cli_in(folder, "train", "recipe.yaml", "--output-dir", "run") == 0
    return losses(folder / "run")


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and what was written on stderr, of each."""
    try:
        said = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def started(machines: list[Machine], *words: str) -> list[subprocess.Popen[str]]:
    """A training of both machines that has logged a step."""
    port = free_port()
    before = len(read_log(machines[0].run / "log.jsonl"))
    processes = [machine.start(port, *words) for machine in machines]
    while len(read_log(machines[0].run / "log.jsonl")) <= before and all(one.poll() is None for one in processes):
        time.sleep(0.05)
    return processes


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_log(run / "log.jsonl") if "loss" in row]


def test_two_machines_give_the_losses_of_one_process(machines: Any, one: list[float]) -> None:
    first, second = both = machines()
    port = free_port()
    said = ended([machine.torchrun(port) for machine in both])
    assert [code for code, _ in said] == [0, 0], said
    assert len(losses(first.run)) == LAST
    assert losses(first.run) == pytest.approx(one, abs=TOLERANCE)
    assert read_json(first.run / "metrics.json")["status"] == "finished"
    assert [file.name for file in second.run.iterdir()] == ["log.txt"]
    assert any((second.folder / "cache" / "data").iterdir())


@pytest.mark.slow
def test_a_stop_on_one_machine_stops_both_and_both_go_on_from_the_checkpoint_of_the_first(
    machines: Any, one: list[float]
) -> None:
    first, second = both = machines()
    processes = started(both)
    processes[1].send_signal(signal.SIGTERM)
    said = ended(processes)
    assert [code for code, _ in said] == [75, 75], said
    step = read_json(first.run / "train.json")["steps"]
    assert all(f"stopped at step {step} by SIGTERM" in text for _, text in said)
    kept = read_json(first.run / "checkpoints" / f"checkpoint-{step}" / "manifest.json")["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(kept)
    assert [file.name for file in second.run.iterdir()] == ["log.txt"]
    (second.run / "STOP").touch()  # of a request that was answered, so it is no request any more
    port = free_port()
    said = ended([machine.start(port) for machine in both])
    assert [code for code, _ in said] == [0, 0], said
    assert read_json(first.run / "train.json")["resumed_from_step"] == step
    assert [row["step"] for row in read_log(first.run / "log.jsonl")] == list(range(1, LAST + 1))
    assert losses(first.run) == pytest.approx(one, abs=TOLERANCE)
    assert [file.name for file in second.run.iterdir()] == ["log.txt"]
    assert "Didn't find an RNG file" not in (second.run / "log.txt").read_text()


@pytest.mark.slow
def test_the_best_checkpoint_and_the_adapter_of_the_first_machine_reach_the_other(machines: Any, cli_in: Cli) -> None:
    saving = {"max_steps": 8, "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    split = {"split": {"test_size": 12, "validation_size": 4, "seed": 1}}
    first, _ = both = machines(trainer=saving | best, dataset=split)  # its file lies on the first machine only
    found = []
    for _ in range(2):
        port = free_port()
        said = ended([machine.start(port) for machine in both])
        assert [code for code, _ in said] == [0, 0], said
        found.append(read_json(first.run / "metrics.json")["adapter"]["loss"])
        for file in ("metrics.json", "eval.json"):  # as if the last evaluation had been cut off
            (first.run / file).unlink()
    assert cli_in(first.folder, "eval", "run") == 0
    assert found == pytest.approx([read_json(first.run / "eval.json")["adapter"]["loss"]] * 2, abs=1e-5)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_whose_peer_dies_says_so_in_one_line(machines: Any, dead: int) -> None:
    both = machines(trainer={"max_steps": 1000})
    processes = started(both)
    processes[dead].kill()
    said = ended(processes)
    code, text = said[1 - dead]
    assert said[dead][0] == -signal.SIGKILL and code == 4, said
    assert text.count("error: ") == 1 and "Traceback" not in text
    assert f"error: process {1 - dead} of 2 cannot continue" in text.splitlines()[-1]


def test_what_ends_one_machine_alone_is_said_by_both(machines: Any) -> None:
    both = machines()
    (both[1].folder / "things.csv").unlink()
    port = free_port()
    said = ended([machine.start(port) for machine in both])
    assert [code for code, _ in said] == [3, 3], said
    assert all("things.csv" in text and text.count("error: ") == 1 for _, text in said), said


def test_machines_with_different_rows_are_refused(machines: Any) -> None:
    both = machines()
    with (both[1].folder / "things.csv").open("a") as file:
        file.write("048,one more apple,red fruit\n")
    port = free_port()
    said = ended([machine.start(port) for machine in both])
    assert [code for code, _ in said] == [4, 4], said
    assert all("data.train: " in text and "base: " not in text for _, text in said), said
