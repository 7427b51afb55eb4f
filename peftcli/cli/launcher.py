"""Several processes: the same command line under `accelerate launch`, and what only rank 0 decides."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from peftcli.cli.commands import load
from peftcli.cli.environment import NVIDIA, WSL
from peftcli.cli.recipes import loaded_stages
from peftcli.errors import MachineError, MemoryExhausted, PeerLost, PeftcliError
from peftcli.plan.choices import processes_that_share
from peftcli.plan.machine import SHARES_BATCH
from peftcli.train.stop import STARTED

T = TypeVar("T")
EXIT_FILE = "PEFTCLI_EXIT_FILE"
"""Names the file in which the first process leaves its exit code; set for the launcher and its children."""
CARDS = (*NVIDIA, WSL)
"""Where Linux and WSL show NVIDIA's cards; without them torch need not be asked."""
PR_SET_PDEATHSIG = 1
"""Option of Linux's prctl: the signal that a process gets when its parent dies."""


def launch(name: str, overrides: Sequence[str], num_processes: int | None, *, smoke: bool) -> int | None:
    """Train in as many processes as are asked for, or as there are cards that can share the recipe's steps.

    Returns:
        The exit code of the first process, or None where this process is to train.

    Raises:
        RecipeError: the recipe says something that it may not.
    """
    if num_processes is None and not smoke:
        return launch_if_asked(processes_for(name, overrides), shares_batch=True)
    return launch_if_asked(num_processes)


def processes_for(name: str, overrides: Sequence[str]) -> int:
    """Processes that a recipe is trained with where nobody gives a number: one for each card that can share its steps.

    Raises:
        RecipeError: the recipe says something that it may not.
    """
    if _is_launched() or not any(Path(place).exists() for place in CARDS):
        return 1
    trainers = [stage.recipe.trainer for stage in loaded_stages(load(name, overrides, smoke=False), smoke=False)]
    import torch

    return processes_that_share(trainers, torch.cuda.device_count())


def launch_if_asked(num_processes: int | None, *, shares_batch: bool = False) -> int | None:
    """Run the unchanged command line in several processes, where that is asked for and this is not one of them.

    On GPUs the launcher is `accelerate launch`, with the machine's accelerate configuration; on a CPU it is torch's
    own, since accelerate starts several processes there through MPI only. A signal to this process goes to the
    launcher, which hands it to its children; should this process die, the launcher is told to stop as well.

    Args:
        num_processes: None or 1 for no launcher.
        shares_batch: the processes share the rows of a step, in place of taking as many each.

    Returns:
        The exit code of the first process, or None where nothing was launched.
    """
    if not num_processes or num_processes == 1 or _is_launched():
        return None
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "exit"
        threads = str(max(1, (os.cpu_count() or 1) // num_processes))
        settings = {"OMP_NUM_THREADS": threads, STARTED: str(time.time()), **os.environ, EXIT_FILE: str(answer)}
        if shares_batch:
            settings[SHARES_BATCH] = "1"
        if _has_gpu():
            words = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(num_processes), *_port()]
        else:
            words = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
            settings["ACCELERATE_USE_CPU"] = "true"
        command = [sys.executable, "-m", *words, "--module", "peftcli", *sys.argv[1:]]
        launcher = subprocess.Popen(command, env=settings, preexec_fn=_end_with_parent)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, _: launcher.send_signal(received))
        code = launcher.wait()
        return int(answer.read_text()) if answer.is_file() else (code or 1)


def _port() -> list[str]:
    """The words that have accelerate look for a free port, where its configuration settles nothing about that.

    Left alone it takes 29500, on which another training may be listening. Several machines must agree on a port.
    """
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if Path(default_config_file).is_file():
        settled = load_config_from_file(None)
        if settled.main_process_port is not None or settled.num_machines > 1:
            return []
    return ["--main_process_port", "0"]


def hand_over(code: int) -> int:
    """Give an exit code to the process that launched this one; a launcher takes any but 0 for a crash.

    Returns:
        The code with which this process should end.
    """
    if EXIT_FILE not in os.environ:
        return code
    answer = Path(os.environ[EXIT_FILE])
    alone = code == MemoryExhausted.exit_code
    lost = code == MachineError.exit_code  # the first process may have been killed, and the others tell it by this code
    if os.environ.get("RANK", "0") == "0" or ((alone or lost) and not answer.exists()):
        answer.write_text(str(code))
    # A process that alone runs out of memory ends as a crash: the launcher then ends the others, which wait for it.
    return code if code == 1 or alone else 0


def _is_launched() -> bool:
    return EXIT_FILE in os.environ or "LOCAL_RANK" in os.environ


def _end_with_parent() -> None:
    # Linux only; elsewhere a killed parent leaves the launcher, which a signal to it still ends.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def several_processes(timeout_seconds: float) -> Iterator[None]:
    """Join the processes of this training, where it has several, and leave them once all have come to the end.

    Args:
        timeout_seconds: that one waits for the others at a place that all must reach.

    Raises:
        PeerLost: another process has ended, or cannot be reached.
    """
    if not _has_others():
        yield
        return
    import torch
    from accelerate import PartialState

    from peftcli.model.distributed import contact_was_lost, tell_others, told_by_other

    try:
        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=timeout_seconds))
        yield
        _leave()
    except PeftcliError as problem:
        if problem.in_all:
            _leave()
        else:
            tell_others(problem)
        raise
    except Exception as problem:
        if not contact_was_lost(problem):
            raise
        cause = told_by_other() or f"{_said(problem)}; the cause is in the output of that process"
        raise PeerLost(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot go on, since another one has ended or "
            f"cannot be reached ({cause}); the same command, given again on every machine, goes on from the last "
            "checkpoint"
        ) from problem


def _leave() -> None:
    """Leave the other processes; from here on this one ends by itself, with its own exit code.

    A launcher takes any code but 0 for a crash, and ends the processes beside the first that it sees end.
    """
    from peftcli.model.distributed import destroy_process_group

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    destroy_process_group()


def first_decides(work: Callable[[], T]) -> T:
    """Let the first of several processes do something to the run folder, and tell the others what came of it.

    Raises:
        PeftcliError: what the work raised, in every process.
    """
    if not _has_others():
        return work()
    from peftcli.model.distributed import from_first

    return from_first(work)


def all_do(work: Callable[[], T]) -> T:
    """Let each of several processes do something on its machine, and fail in all of them where it fails in one.

    Raises:
        PeftcliError: what the work raised in the first process in which it failed.
    """
    if not _has_others():
        return work()
    from peftcli.model.distributed import in_all

    return in_all(work)


def _has_others() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _said(problem: Exception) -> str:
    """What a backend says first, without the place in its source that gloo begins with."""
    text = re.sub(r"^\[\S+:\d+\] ", "", " ".join(str(problem).split()))
    return text.partition(". ")[0][:200]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
