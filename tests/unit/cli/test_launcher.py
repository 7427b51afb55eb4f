"""How many processes a training gets where nobody gives a number, and what they are told."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config import config_args

from peftcli.cli import launcher
from peftcli.errors import PeerLost
from peftcli.model.hardware import probe_machine


class Started(Exception):
    """In place of a launcher."""


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function that makes this a machine with some cards."""
    for name in ("LOCAL_RANK", "WORLD_SIZE", launcher.EXIT_FILE):
        monkeypatch.delenv(name, raising=False)

    def have(count: int) -> None:
        monkeypatch.setattr(launcher, "GPU_FILES", (str(tmp_path),) if count else ())
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(count))

    return have


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """A function that writes a recipe with some trainer arguments."""

    def write(trainer: str, more: str = "") -> str:
        path = tmp_path / "r.yaml"
        path.write_text(
            f"model: {{name: org/model}}\ndataset: {{path: a.csv, text: '{{a}}'}}\ntrainer: {trainer}\n{more}",
            encoding="utf-8",
        )
        return str(path)

    return write


@pytest.mark.parametrize(
    ("count", "trainer", "processes"),
    [
        (0, "{}", 1),
        (1, "{}", 1),
        (2, "{}", 2),
        (4, "{per_device_train_batch_size: 2}", 2),
        (2, "{per_device_train_batch_size: 1}", 1),
        (3, "{per_device_train_batch_size: 3, gradient_accumulation_steps: 2}", 3),
    ],
)
def test_each_card_gets_a_process_where_the_rows_of_a_step_can_be_shared(
    cards: Any, recipe: Any, count: int, trainer: str, processes: int
) -> None:
    cards(count)
    assert launcher.processes_for(recipe(trainer), []) == processes


def test_every_stage_must_be_able_to_share(cards: Any, recipe: Any) -> None:
    cards(2)
    stages = "stages:\n  - {name: one}\n  - {name: two, trainer: {per_device_train_batch_size: 1}}\n"
    assert launcher.processes_for(recipe("{}", stages), []) == 1
    assert launcher.processes_for(recipe("{}", stages.replace("1}", "2}")), []) == 2


@pytest.mark.parametrize("name", ["LOCAL_RANK", launcher.EXIT_FILE])
def test_a_process_of_a_launcher_starts_no_others(
    cards: Any, recipe: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cards(2)
    monkeypatch.setenv(name, "0")
    assert launcher.processes_for(recipe("{}"), []) == 1
    assert launcher.launch_if_asked(2) is None


@pytest.mark.parametrize("shares", [True, False])
def test_the_launcher_gets_the_command_line_and_its_processes_know_whether_they_share(
    cards: Any, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    cards(2)
    started: dict[str, Any] = {}

    def start(command: list[str], *, env: dict[str, str], preexec_fn: Any) -> None:
        started.update(command=command, env=env)
        raise Started

    monkeypatch.setattr(launcher.subprocess, "Popen", start)
    monkeypatch.setattr(launcher.sys, "argv", ["peftcli", "train", "r.yaml"])
    with pytest.raises(Started):
        launcher.launch_if_asked(2, shares_batch=shares)
    words = started["command"][1:]
    assert words[:5] == ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    assert words[-4:] == ["--module", "peftcli", "train", "r.yaml"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for key in ("PEFTCLI_SHARES_BATCH", "WORLD_SIZE"):
        monkeypatch.setenv(key, started["env"].get(key, "2" if key == "WORLD_SIZE" else ""))
    machine = probe_machine()
    assert machine.shares_batch is shares and machine.processes == 2


def test_a_process_that_alone_runs_out_of_memory_ends_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer = tmp_path / "exit"
    monkeypatch.setenv(launcher.EXIT_FILE, str(answer))
    monkeypatch.setenv("RANK", "1")
    assert launcher.hand_over(75) == 0 and not answer.exists()  # all of them stop, and the first one says so
    assert launcher.hand_over(5) == 5 and answer.read_text() == "5"
    monkeypatch.setenv("RANK", "0")
    assert launcher.hand_over(75) == 0 and answer.read_text() == "75"


def test_the_exit_code_is_that_of_a_process_that_outlives_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer = tmp_path / "exit"
    monkeypatch.setenv(launcher.EXIT_FILE, str(answer))
    monkeypatch.setenv("RANK", "1")
    assert launcher.hand_over(PeerLost.exit_code) == 0 and answer.read_text() == "4"


@pytest.mark.parametrize(
    ("configuration", "words"),
    [
        (None, ["--main_process_port", "0"]),
        ("num_machines: 1", ["--main_process_port", "0"]),
        ("main_process_port: 29777", []),
        ("num_machines: 2", []),
    ],
)
def test_accelerate_takes_a_free_port_unless_its_configuration_settles_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, configuration: str | None, words: list[str]
) -> None:
    path = tmp_path / "default_config.yaml"
    if configuration is not None:
        head = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\n"
        path.write_text(head + configuration + "\n", encoding="utf-8")
    monkeypatch.setattr(config_args, "default_config_file", str(path))
    assert launcher._port() == words


def test_accelerate_makes_a_free_port_of_those_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "none.yaml"))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    said = subprocess.run(
        [*command, *launcher._port(), "--no_python", "env"],
        env={**os.environ, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    ports = {line.partition("=")[2] for line in said.stdout.splitlines() if line.startswith("MASTER_PORT=")}
    assert len(ports) == 1 and not ports & {"0", "29500"}, said.stderr
