"""Several processes: the unchanged command line handed to `accelerate launch`, and what only the first one decides."""

import os
import shutil
import sys
from collections.abc import Callable
from typing import TypeVar

from peftcli.errors import MachineError, PeftcliError

T = TypeVar("T")


def launch_if_asked(num_processes: int | None) -> None:
    """Become `accelerate launch` when several processes are asked for and this is not one of them yet.

    The process is replaced, so no parent stays behind to be killed apart from its children.

    Raises:
        MachineError: accelerate's launcher is not installed.
    """
    if not num_processes or num_processes == 1 or "LOCAL_RANK" in os.environ:
        return
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    if shutil.which(launcher[0]) is None:
        raise MachineError("the Python interpreter cannot be found to launch several processes")
    words = [*launcher, "--num_processes", str(num_processes), "--num_machines", "1", "--mixed_precision", "no"]
    words += ["--dynamo_backend", "no", *([] if _has_gpu() else ["--cpu"]), "--module", "peftcli", *sys.argv[1:]]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(words[0], words)


def first_decides(work: Callable[[], T]) -> T:
    """Let the first of several processes do something to the run folder, and tell the others what came of it.

    Raises:
        PeftcliError: what the work raised, in every process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return work()
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState(cpu=not torch.cuda.is_available())
    outcome: list[T | PeftcliError | None] = [None]
    if state.is_main_process:
        try:
            outcome = [work()]
        except PeftcliError as problem:
            outcome = [problem]
    broadcast_object_list(outcome)
    found = outcome[0]
    if isinstance(found, PeftcliError):
        raise found
    return found  # type: ignore[return-value]  # None only where T has it


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
