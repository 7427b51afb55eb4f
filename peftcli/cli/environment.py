"""Environment variables that torch reads once, when it is first imported or first asks for memory."""

import importlib.metadata
import os
import re
from pathlib import Path

NVIDIA = ("/dev/nvidiactl", "/dev/nvidia0")
"""Where Linux shows NVIDIA's GPUs."""
WSL = "/dev/dxg"
"""Where WSL shows GPUs."""
SPIN = ("GOMP_SPINCOUNT", "2000")
"""Idle OpenMP threads spin before they sleep. On cores shared with another process the default keeps both from working
(measured: 40 times slower); a short spin costs nothing when alone."""
ALLOCATOR = "expandable_segments:True"
"""Micro-batches of ever new lengths leave holes in memory that is cut into segments of fixed size.

Source: torch's notes on CUDA semantics, "Optimizing memory usage with PYTORCH_CUDA_ALLOC_CONF".
"""
ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Variables of torch's allocator; since torch 2.9 the first is the one for every device."""


def set_variables() -> None:
    """Set what torch reads later; what the user has set stays."""
    os.environ.setdefault(*SPIN)
    if any(name in os.environ for name in ALLOCATOR_NAMES) or not any(Path(file).exists() for file in NVIDIA):
        return
    name = allocator_variable()
    if name is not None:
        os.environ[name] = ALLOCATOR


def allocator_variable() -> str | None:
    """The variable that the installed torch reads, which is not imported for it; None where there is no torch."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    found = re.match(r"(\d+)\.(\d+)", version)
    known = found is not None and (int(found[1]), int(found[2])) < (2, 9)
    return ALLOCATOR_NAMES[1] if known else ALLOCATOR_NAMES[0]
