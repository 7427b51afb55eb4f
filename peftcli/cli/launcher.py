"""Several processes: the same command line under `accelerate launch`, and work that only rank 0 does."""

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
"""Names the file in which the first process saves its exit code; set for the launcher and its children."""
GPU_FILES = (*NVIDIA, WSL)
"""Device files of NVIDIA GPUs on Linux and WSL; without them torch need not be imported to count GPUs."""
PR_SET_PDEATHSIG = 1
"""Option of Linux's prctl: the signal that a process gets when its parent dies."""


def launch(name: str, overrides: Sequence[str], num_processes: int | None, *, smoke: bool) -> int | None:
    """Train in the requested number of processes, or in one for each GPU that can share the recipe's batch.

    Returns:
        The exit code of the first process, or None if this process should train.

    Raises:
        RecipeError: the recipe is invalid.
    """
    if num_processes is None and not smoke:
        return launch_if_asked(processes_for(name, overrides), shares_batch=True)
    return launch_if_asked(num_processes)


def processes_for(name: str, overrides: Sequence[str]) -> int:
    """Default number of processes for a recipe: one for each GPU that can share its batch.

    Raises:
        RecipeError: the recipe is invalid.
    """
    if _is_launched() or not any(Path(file).exists() for file in GPU_FILES):
        return 1
    trainers = [stage.recipe.trainer for stage in loaded_stages(load(name, overrides, smoke=False), smoke=False)]
    import torch

    return processes_that_share(trainers, torch.cuda.device_count())


def launch_if_asked(num_processes: int | None, *, shares_batch: bool = False) -> int | None:
    """Run the unchanged command line in several processes, if requested and not already launched.

    On GPUs the launcher is `accelerate launch`, with the machine's accelerate configuration; on a CPU it is torchrun,
    because accelerate can start several CPU processes only through MPI. A signal to this process is forwarded to the
    launcher, which forwards it to its children; if this process dies, the launcher is stopped too.

    Args:
        num_processes: None or 1 for no launcher.
        shares_batch: the recipe's batch is split across the processes, instead of each taking all of it.

    Returns:
        The exit code of the first process, or None if nothing was launched.
    """
    if not num_processes or num_processes == 1 or _is_launched():
        return None
    with tempfile.TemporaryDirectory() as folder:
        exit_file = Path(folder) / "exit"
        threads = str(max(1, (os.cpu_count() or 1) // num_processes))
        settings = {"OMP_NUM_THREADS": threads, STARTED: str(time.time()), **os.environ, EXIT_FILE: str(exit_file)}
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
        return int(exit_file.read_text()) if exit_file.is_file() else (code or 1)


def _port() -> list[str]:
    """Arguments that make accelerate pick a free port, unless its configuration sets one.

    By default it uses 29500, which another training may already use. Several machines must agree on a port.
    """
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if Path(default_config_file).is_file():
        configured = load_config_from_file(None)
        if configured.main_process_port is not None or configured.num_machines > 1:
            return []
    return ["--main_process_port", "0"]


def hand_over(code: int) -> int:
    """Pass an exit code to the process that launched this one; a launcher treats any code but 0 as a crash.

    Returns:
        The code that this process should exit with.
    """
    if EXIT_FILE not in os.environ:
        return code
    exit_file = Path(os.environ[EXIT_FILE])
    out_of_memory = code == MemoryExhausted.exit_code
    lost = code == MachineError.exit_code  # the first process may have been killed; the others report it with this code
    if os.environ.get("RANK", "0") == "0" or ((out_of_memory or lost) and not exit_file.exists()):
        exit_file.write_text(str(code))
    # If only one process runs out of memory, it exits as a crash: the launcher then ends the others, which wait for it.
    return code if code == 1 or out_of_memory else 0


def _is_launched() -> bool:
    return EXIT_FILE in os.environ or "LOCAL_RANK" in os.environ


def _end_with_parent() -> None:
    # Linux only; elsewhere the launcher survives a killed parent, but a signal to the launcher still ends it.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def several_processes(timeout_seconds: float) -> Iterator[None]:
    """Join the processes of this training, if there are several, and leave the group once all have finished.

    Args:
        timeout_seconds: how long a process waits for the others in a collective operation.

    Raises:
        PeerLost: another process has exited or is unreachable.
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
        cause = told_by_other() or f"{_backend_message(problem)}; see the output of that process"
        raise PeerLost(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot continue: another one has exited or "
            f"is unreachable ({cause}); run the same command again on every machine to resume from the last checkpoint"
        ) from problem


def _leave() -> None:
    """Leave the process group; from here on this process exits on its own, with its own exit code.

    A launcher treats any code but 0 as a crash, and kills the other processes.
    """
    from peftcli.model.distributed import destroy_process_group

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    destroy_process_group()


def first_decides(work: Callable[[], T]) -> T:
    """Let the first of several processes change the run folder, and send its result to the others.

    Raises:
        PeftcliError: what the work raised, in every process.
    """
    if not _has_others():
        return work()
    from peftcli.model.distributed import from_first

    return from_first(work)


def all_do(work: Callable[[], T]) -> T:
    """Let each of several processes do some work on its machine, and fail in all of them if it fails in one.

    Raises:
        PeftcliError: what the work raised in the first process in which it failed.
    """
    if not _has_others():
        return work()
    from peftcli.model.distributed import in_all

    return in_all(work)


def _has_others() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _backend_message(problem: Exception) -> str:
    """The first sentence of a backend's error, without the source location that gloo puts in front."""
    text = re.sub(r"^\[\S+:\d+\] ", "", " ".join(str(problem).split()))
    return text.partition(". ")[0][:200]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
