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
from peftcli.doctor.check import FAIL, OK, WARN, Verdict, refused
from peftcli.errors import PeftcliError
from peftcli.model.hardware import core_quota, memory_limit
from peftcli.recipe.fields import duration_text
from peftcli.report.format import several, size
from peftcli.train.deadline import Deadline, Limit
from peftcli.train.disk import check_writable, probe_room

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


@dataclass(frozen=True)
class Place:
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


def probe_place(folder: Path) -> Place:
    """Ask what is free in a folder, and write a small file there.

    Raises:
        RecipeError: PEFTCLI_QUOTA is set to something else than a folder and a size.
    """
    room = probe_room(folder)
    quota = room.place.partition(" with its quota of ")[2]
    try:
        check_writable(folder)
    except PeftcliError as problem:
        return Place(room.free, quota, problem)
    return Place(room.free, quota)


def disk_verdicts() -> list[Verdict]:
    """The disks under the working folder and under both caches."""
    asked = (
        ("disk", Path.cwd(), judge_disk),
        ("data cache", cache_root(None), judge_cache),
        ("model cache", Path(constants.HF_HUB_CACHE), judge_models),
    )
    found = []
    for name, folder, judge in asked:
        try:
            found.append(judge(probe_place(folder)))
        except PeftcliError as problem:
            found.append(refused(name, problem))
    return found


def judge_disk(place: Place) -> Verdict:
    """Whether runs can be written here."""
    if place.problem is not None:
        found = refused("disk", place.problem)
        return Verdict("disk", FAIL, found.there, "go to another folder, or name another output_dir")
    if place.free_bytes < SMALL_RUN_BYTES:
        mend = "free some space; `peftcli doctor RECIPE` says what a run needs"
        return Verdict("disk", WARN, f"{place.text} in the working folder", mend)
    return Verdict("disk", OK, f"{place.text} in the working folder, where runs are written")


def judge_cache(place: Place) -> Verdict:
    """Whether tokenized rows can be kept."""
    mend = "name another folder in the environment variable PEFTCLI_CACHE"
    if place.problem is not None:
        return Verdict("data cache", FAIL, refused("", place.problem).there, mend)
    if place.free_bytes < SMALL_CACHE_BYTES:
        return Verdict("data cache", WARN, f"{place.text} for tokenized rows", f"free some space, or {mend}")
    return Verdict("data cache", OK, f"{place.text} for tokenized rows")


def judge_models(place: Place) -> Verdict:
    """Whether models can be downloaded; those that are there can be read in any case."""
    if place.problem is not None:
        there = "it may only be read, so no other model can be downloaded"
        return Verdict("model cache", WARN, there, "name another folder in the environment variable HF_HOME")
    if place.free_bytes < SMALL_CACHE_BYTES:
        return Verdict("model cache", WARN, f"{place.text} for downloads", "free some space, or set HF_HOME")
    return Verdict("model cache", OK, f"{place.text} for downloads")


def judge_session(
    limit: Limit | None, until: Deadline | None, now: float, *, budget: float | None = None, runs: bool = False
) -> Verdict:
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
        return Verdict("session", OK, f"PEFTCLI_DEADLINE ends every run in {duration_text(left)}")
    if limit is None:
        return Verdict("session", OK, "no notebook service with a time limit was recognised")
    there, _, mend = limit.sentence(now).partition("; ")
    if budget is None:
        return Verdict("session", WARN, there, mend) if runs else Verdict("session", OK, f"{there}; {mend}")
    gone = now - limit.started if limit.started is not None else 0.0
    if budget > limit.seconds - gone:
        there = f"the recipe's budget of {duration_text(budget)} is longer than the session: {there}"
        return Verdict("session", WARN, there, mend)
    return Verdict("session", OK, f"{there}; the recipe's budget of {duration_text(budget)} is shorter")
