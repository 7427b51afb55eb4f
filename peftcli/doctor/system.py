"""Checks of processor, memory, text encoding, disks and session limits; none of them needs torch."""

import locale
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
from huggingface_hub import constants

from peftcli.cache import cache_root
from peftcli.doctor.check import FAIL, OK, WARN, Check, refused
from peftcli.errors import PeftcliError
from peftcli.model.hardware import core_quota, memory_limit
from peftcli.recipe.fields import duration_text
from peftcli.report.format import several, size
from peftcli.train.deadline import Deadline, NotebookLimit
from peftcli.train.disk import check_writable, probe_disk_space

SMALL_BYTES = 2 * 2**30
"""The libraries take about 1 GiB before the first weight."""

SMALL_RUN_BYTES = 2 * 2**30
"""A run of a 7B model with rank 64 on two projections keeps about so much: three checkpoints and an adapter."""
SMALL_CACHE_BYTES = 2**30


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


def check_cores(host: Host, processor: str) -> Check:
    """Hold the threads that the libraries would start against the time that the container gives."""
    there = f"{several(host.cores, 'core', 'cores')}, {processor}"
    quota = host.quota_cores
    if quota is None or quota >= host.cores:
        return Check("processor", OK, there)
    there += f"; the container allows the time of {quota:g}"
    if host.threads is not None and host.threads <= math.ceil(quota):
        return Check("processor", OK, f"{there}, and OMP_NUM_THREADS is {host.threads}")
    return Check("processor", WARN, there, f"export OMP_NUM_THREADS={max(1, math.floor(quota))}")


def check_memory(host: Host) -> Check:
    """Say how much memory there is, and warn where the libraries alone would fill it."""
    there = f"{size(host.left_bytes)} free of {size(host.usable_bytes)}"
    if host.limit_bytes is not None:
        there += f", which the container allows of {size(host.memory_bytes)}"
    if host.left_bytes < SMALL_BYTES:
        return Check("memory", WARN, there, "end other programs: the libraries alone take about 1 GiB")
    return Check("memory", OK, there)


def encodings() -> dict[str, str]:
    """How this process reads and writes text, by what it does so for."""
    terminal = sys.stdout.encoding or "utf-8"  # a stream in memory has none
    return {"files": locale.getencoding(), "names of files": sys.getfilesystemencoding(), "the terminal": terminal}


def check_encoding(found: dict[str, str]) -> Check:
    """Warn where the libraries would read or write text in something else than UTF-8."""
    other = {what: name for what, name in found.items() if name.lower().replace("-", "").replace("_", "") != "utf8"}
    if not other:
        return Check("encoding", OK, "UTF-8")
    there = ", ".join(f"{name} for {what}" for what, name in other.items())
    return Check("encoding", WARN, there, "export PYTHONUTF8=1")


@dataclass(frozen=True)
class DiskPath:
    """A folder that is written to.

    Attributes:
        free_bytes: what may still be written there.
        quota: what a quota allows there, in words, empty where none counts.
        problem: why nothing can be written there, None where it can.
    """

    free_bytes: int
    quota: str = ""
    problem: PeftcliError | None = None

    @property
    def text(self) -> str:
        free = "of unknown size" if self.free_bytes == sys.maxsize else f"{size(self.free_bytes)} free"
        return f"{free} under a quota of {self.quota}" if self.quota else free


def probe_disk(folder: Path) -> DiskPath:
    """Ask what is free in a folder, and write a small file there.

    Raises:
        RecipeError: PEFTCLI_QUOTA is set to something else than a folder and a size.
    """
    room = probe_disk_space(folder)
    quota = room.place.partition(" with its quota of ")[2]
    try:
        check_writable(folder)
    except PeftcliError as problem:
        return DiskPath(room.free, quota, problem)
    return DiskPath(room.free, quota)


def check_disks() -> list[Check]:
    """The disks under the working folder and under both caches."""
    asked = (
        ("disk", Path.cwd(), check_disk),
        ("data cache", cache_root(None), check_cache),
        ("model cache", Path(constants.HF_HUB_CACHE), check_model_cache),
    )
    found = []
    for name, folder, judge in asked:
        try:
            found.append(judge(probe_disk(folder)))
        except PeftcliError as problem:
            found.append(refused(name, problem))
    return found


def check_disk(place: DiskPath) -> Check:
    """Whether runs can be written here."""
    if place.problem is not None:
        found = refused("disk", place.problem)
        return Check("disk", FAIL, found.found, "go to another folder, or name another output_dir")
    if place.free_bytes < SMALL_RUN_BYTES:
        fix = "free some space; `peftcli doctor RECIPE` says what a run needs"
        return Check("disk", WARN, f"{place.text} in the working folder", fix)
    return Check("disk", OK, f"{place.text} in the working folder, where runs are written")


def check_cache(place: DiskPath) -> Check:
    """Whether tokenized rows can be kept."""
    fix = "name another folder in the environment variable PEFTCLI_CACHE"
    if place.problem is not None:
        return Check("data cache", FAIL, refused("", place.problem).found, fix)
    if place.free_bytes < SMALL_CACHE_BYTES:
        return Check("data cache", WARN, f"{place.text} for tokenized rows", f"free some space, or {fix}")
    return Check("data cache", OK, f"{place.text} for tokenized rows")


def check_model_cache(place: DiskPath) -> Check:
    """Whether models can be downloaded; those that are there can be read in any case."""
    if place.problem is not None:
        there = "it may only be read, so no other model can be downloaded"
        return Check("model cache", WARN, there, "name another folder in the environment variable HF_HOME")
    if place.free_bytes < SMALL_CACHE_BYTES:
        return Check("model cache", WARN, f"{place.text} for downloads", "free some space, or set HF_HOME")
    return Check("model cache", OK, f"{place.text} for downloads")


def check_session(
    limit: NotebookLimit | None, until: Deadline | None, now: float, *, budget: float | None = None, runs: bool = False
) -> Check:
    """Say when the machine is taken away, and warn where a recipe's run would not end before that.

    Args:
        limit: the session of a notebook service, None elsewhere.
        until: what PEFTCLI_DEADLINE says.
        now: Unix time, seconds.
        budget: `budget.wall_clock` of the recipe, seconds.
        runs: a recipe was named.
    """
    if until is not None:
        left = max(60.0, (until.at - now) // 60 * 60)
        return Check("session", OK, f"PEFTCLI_DEADLINE ends every run in {duration_text(left)}")
    if limit is None:
        return Check("session", OK, "no notebook service with a time limit was recognised")
    there, _, fix = limit.sentence(now).partition("; ")
    if budget is None:
        return Check("session", WARN, there, fix) if runs else Check("session", OK, f"{there}; {fix}")
    gone = now - limit.started if limit.started is not None else 0.0
    if budget > limit.seconds - gone:
        there = f"the recipe's budget of {duration_text(budget)} is longer than the session: {there}"
        return Check("session", WARN, there, fix)
    return Check("session", OK, f"{there}; the recipe's budget of {duration_text(budget)} is shorter")
