"""Processor, memory and text encoding: of the machine, and of the container around this process."""

import locale
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from peftcli.doctor.verdict import OK, WARN, Verdict
from peftcli.model.hardware import core_quota, memory_limit
from peftcli.report.format import several, size

SMALL_BYTES = 2 * 2**30
"""The libraries take about 1 GiB before the first weight."""


@dataclass(frozen=True)
class Host:
    """The processor and the memory.

    Attributes:
        cores: that the system shows to this process.
        quota_cores: share of processor time that the container allows, in cores; None for no limit.
        threads: what OMP_NUM_THREADS says, None where it is not set to a number.
        memory_bytes: of the machine.
        free_bytes: that could be had now.
        limit_bytes: what the container allows, None for no limit.
        used_bytes: what the container uses of that.
    """

    cores: int
    quota_cores: float | None
    threads: int | None
    memory_bytes: int
    free_bytes: int
    limit_bytes: int | None = None
    used_bytes: int = 0

    @property
    def usable_bytes(self) -> int:
        """The memory of the machine or, where that is less, of the container."""
        return self.memory_bytes if self.limit_bytes is None else min(self.memory_bytes, self.limit_bytes)

    @property
    def left_bytes(self) -> int:
        """What is free of it."""
        if self.limit_bytes is None:
            return self.free_bytes
        return max(0, min(self.free_bytes, self.limit_bytes - self.used_bytes))


def probe_host(root: Path = Path("/")) -> Host:
    """Ask the system.

    Args:
        root: where `proc` and `sys` lie.
    """
    memory = psutil.virtual_memory()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit, used = memory_limit(root)
    return Host(
        cores=cores,
        quota_cores=core_quota(root),
        threads=int(threads) if threads.isdecimal() else None,
        memory_bytes=memory.total,
        free_bytes=memory.available,
        limit_bytes=limit if limit is not None and limit < memory.total else None,
        used_bytes=used,
    )


def judge_cores(host: Host, processor: str) -> Verdict:
    """Hold the threads that the libraries would start against the time that the container gives."""
    there = f"{several(host.cores, 'core', 'cores')}, {processor}"
    quota = host.quota_cores
    if quota is None or quota >= host.cores:
        return Verdict("processor", OK, there)
    there += f"; the container allows the time of {quota:g}"
    if host.threads is not None and host.threads <= math.ceil(quota):
        return Verdict("processor", OK, f"{there}, and OMP_NUM_THREADS is {host.threads}")
    return Verdict("processor", WARN, there, f"export OMP_NUM_THREADS={max(1, math.floor(quota))}")


def judge_memory(host: Host) -> Verdict:
    """Say how much memory there is, and warn where the libraries alone would fill it."""
    there = f"{size(host.left_bytes)} free of {size(host.usable_bytes)}"
    if host.limit_bytes is not None:
        there += f", which the container allows of {size(host.memory_bytes)}"
    if host.left_bytes < SMALL_BYTES:
        return Verdict("memory", WARN, there, "end other programs: the libraries alone take about 1 GiB")
    return Verdict("memory", OK, there)


def encodings() -> dict[str, str]:
    """How this process reads and writes text, by what it does so for."""
    terminal = sys.stdout.encoding or "utf-8"  # a stream in memory has none
    return {"files": locale.getencoding(), "names of files": sys.getfilesystemencoding(), "the terminal": terminal}


def judge_encoding(found: dict[str, str]) -> Verdict:
    """Warn where the libraries would read or write text in something else than UTF-8."""
    other = {what: name for what, name in found.items() if name.lower().replace("-", "").replace("_", "") != "utf8"}
    if not other:
        return Verdict("encoding", OK, "UTF-8")
    there = ", ".join(f"{name} for {what}" for what, name in other.items())
    return Verdict("encoding", WARN, there, "export PYTHONUTF8=1")
