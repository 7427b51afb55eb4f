"""Several processes: the unchanged command line handed to `accelerate launch`, and what only the first one decides."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

from peftcli.errors import PeftcliError

T = TypeVar("T")
LAUNCHED = "PEFTCLI_LAUNCHED"
"""Set for the launcher and its children, so that none of them launches again."""


def launch_if_asked(num_processes: int | None) -> None:
    """Become the launcher when several processes are asked for and this is not one of them yet.

    The process is replaced, so no parent stays behind that could be killed apart from its children. On GPUs the
    launcher is `accelerate launch`, with the machine's accelerate configuration; on a CPU it is torch's own, since
    accelerate starts several processes there through MPI only.

    Args:
        num_processes: None or 1 for no launcher.
    """
    if not num_processes or num_processes == 1 or LAUNCHED in os.environ or "LOCAL_RANK" in os.environ:
        return
    count = str(num_processes)
    if _has_gpu():
        words = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            count,
            "--module",
        ]
    else:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count, "--module"]
        os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(words[0], [*words, "peftcli", *sys.argv[1:]])


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
