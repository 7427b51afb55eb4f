"""Environment variables that torch reads once: on import, or on its first memory allocation."""

import importlib.metadata
import os
import re
from pathlib import Path

NVIDIA = ("/dev/nvidiactl", "/dev/nvidia0")
"""Device files of NVIDIA GPUs on Linux."""
WSL = "/dev/dxg"
"""Device file of GPUs on WSL."""
SPIN = ("GOMP_SPINCOUNT", "2000")
"""Idle OpenMP threads spin before they sleep. On cores shared with another process, the default slows both down
(measured: 40 times slower); a short spin costs nothing when the process has the cores to itself."""
ALLOCATOR = "expandable_segments:True"
"""Micro-batches of varying length fragment memory that is allocated in segments of fixed size.

Source: torch's notes on CUDA semantics, "Optimizing memory usage with PYTORCH_CUDA_ALLOC_CONF".
"""
ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Environment variables of torch's allocator; since torch 2.9 the first one applies to every device."""


def set_variables() -> None:
    """Set the variables that torch reads later, except those that the user has set."""
    os.environ.setdefault(*SPIN)
    if any(name in os.environ for name in ALLOCATOR_NAMES) or not any(Path(file).exists() for file in NVIDIA):
        return
    name = allocator_variable()
    if name is not None:
        os.environ[name] = ALLOCATOR


def allocator_variable() -> str | None:
    """The variable that the installed torch reads, found without importing torch; None if torch is not installed."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    found = re.match(r"(\d+)\.(\d+)", version)
    is_older = found is not None and (int(found[1]), int(found[2])) < (2, 9)
    return ALLOCATOR_NAMES[1] if is_older else ALLOCATOR_NAMES[0]
