"""Several processes: the unchanged command line, handed to `accelerate launch`."""

import os
import shutil
import sys

from peftcli.errors import MachineError


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


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
