"""Checks of processor, memory, text encoding, disks and session limits, without torch."""

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
"""The libraries need about 1 GiB before the first weight is loaded."""

SMALL_RUN_BYTES = 2 * 2**30
"""About the size of a run of a 7B model with rank 64 on two projections: three checkpoints and an adapter."""
SMALL_CACHE_BYTES = 2**30


@dataclass(frozen=True)
class Host:
    """The processor and the memory.

    Attributes:
        cores: available to this process.
        quota_cores: CPU quota of the container, in cores; None for no limit.
        threads: value of OMP_NUM_THREADS, None if it is not a number.
        memory_bytes: of the machine.
        free_bytes: available now.
        limit_bytes: memory limit of the container, None for no limit.
        used_bytes: memory used by the container.
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
        """The memory of the machine, or of the container if that is less."""
        return self.memory_bytes if self.limit_bytes is None else min(self.memory_bytes, self.limit_bytes)

    @property
    def left_bytes(self) -> int:
        """The free part of `usable_bytes`."""
        if self.limit_bytes is None:
            return self.free_bytes
        return max(0, min(self.free_bytes, self.limit_bytes - self.used_bytes))


def probe_host(root: Path = Path("/")) -> Host:
    """Query the system.

    Args:
        root: parent folder of `proc` and `sys`.
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
    """Compare the threads that the libraries would start with the CPU quota of the container."""
    found = f"{several(host.cores, 'core', 'cores')}, {processor}"
    quota = host.quota_cores
    if quota is None or quota >= host.cores:
        return Check("processor", OK, found)
    found += f"; the CPU quota of the container is {quota:g}"
    if host.threads is not None and host.threads <= math.ceil(quota):
        return Check("processor", OK, f"{found}, and OMP_NUM_THREADS is {host.threads}")
    return Check("processor", WARN, found, f"export OMP_NUM_THREADS={max(1, math.floor(quota))}")


def check_memory(host: Host) -> Check:
    """Show the free memory, and warn if the libraries alone would fill it."""
    found = f"{size(host.left_bytes)} free of {size(host.usable_bytes)}"
    if host.limit_bytes is not None:
        found += f", the limit of the container; the machine has {size(host.memory_bytes)}"
    if host.left_bytes < SMALL_BYTES:
        return Check("memory", WARN, found, "end other programs: the libraries alone need about 1 GiB")
    return Check("memory", OK, found)


def encodings() -> dict[str, str]:
    """The encodings that this process uses for files, file names and the terminal."""
    terminal = sys.stdout.encoding or "utf-8"  # an in-memory stream has none
    return {"files": locale.getencoding(), "file names": sys.getfilesystemencoding(), "the terminal": terminal}


def check_encoding(found: dict[str, str]) -> Check:
    """Warn if the libraries would not use UTF-8 for text."""
    other = {what: name for what, name in found.items() if name.lower().replace("-", "").replace("_", "") != "utf8"}
    if not other:
        return Check("encoding", OK, "UTF-8")
    listed = ", ".join(f"{name} for {what}" for what, name in other.items())
    return Check("encoding", WARN, listed, "export PYTHONUTF8=1")


@dataclass(frozen=True)
class DiskPath:
    """A folder that peftcli writes to.

    Attributes:
        free_bytes: free space for this user.
        quota: description of the quota, empty for none.
        problem: why the folder is not writable, None if it is.
    """

    free_bytes: int
    quota: str = ""
    problem: PeftcliError | None = None

    @property
    def text(self) -> str:
        free = "unknown free space" if self.free_bytes == sys.maxsize else f"{size(self.free_bytes)} free"
        return f"{free} with a quota of {self.quota}" if self.quota else free


def probe_disk(folder: Path) -> DiskPath:
    """Read the free space of a folder, and write a small file to it.

    Raises:
        RecipeError: PEFTCLI_QUOTA is not a folder and a size.
    """
    space = probe_disk_space(folder)
    quota = space.place.partition(" with its quota of ")[2]
    try:
        check_writable(folder)
    except PeftcliError as problem:
        return DiskPath(space.free, quota, problem)
    return DiskPath(space.free, quota)


def check_disks() -> list[Check]:
    """The disks of the working folder and of both caches."""
    folders = (
        ("disk", Path.cwd(), check_disk),
        ("data cache", cache_root(None), check_cache),
        ("model cache", Path(constants.HF_HUB_CACHE), check_model_cache),
    )
    checks = []
    for name, folder, check in folders:
        try:
            checks.append(check(probe_disk(folder)))
        except PeftcliError as problem:
            checks.append(refused(name, problem))
    return checks


def check_disk(disk: DiskPath) -> Check:
    """Whether runs can be written to the working folder."""
    if disk.problem is not None:
        found = refused("disk", disk.problem)
        return Check("disk", FAIL, found.found, "change to another folder, or set another output_dir")
    if disk.free_bytes < SMALL_RUN_BYTES:
        fix = "free some space; `peftcli doctor RECIPE` shows what a run needs"
        return Check("disk", WARN, f"{disk.text} in the working folder", fix)
    return Check("disk", OK, f"{disk.text} in the working folder, where runs are written")


def check_cache(disk: DiskPath) -> Check:
    """Whether tokenized rows can be cached."""
    fix = "set the environment variable PEFTCLI_CACHE to another folder"
    if disk.problem is not None:
        return Check("data cache", FAIL, refused("", disk.problem).found, fix)
    if disk.free_bytes < SMALL_CACHE_BYTES:
        return Check("data cache", WARN, f"{disk.text} for tokenized rows", f"free some space, or {fix}")
    return Check("data cache", OK, f"{disk.text} for tokenized rows")


def check_model_cache(disk: DiskPath) -> Check:
    """Whether models can be downloaded; cached models can be read in any case."""
    if disk.problem is not None:
        found = "read-only, so no other model can be downloaded"
        return Check("model cache", WARN, found, "set the environment variable HF_HOME to another folder")
    if disk.free_bytes < SMALL_CACHE_BYTES:
        return Check("model cache", WARN, f"{disk.text} for downloads", "free some space, or set HF_HOME")
    return Check("model cache", OK, f"{disk.text} for downloads")


def check_session(
    limit: NotebookLimit | None, until: Deadline | None, now: float, *, budget: float | None = None, runs: bool = False
) -> Check:
    """Show when the session ends, and warn if a recipe's run may not finish before that.

    Args:
        limit: session limit of a notebook service, None elsewhere.
        until: from PEFTCLI_DEADLINE.
        now: Unix time, seconds.
        budget: `budget.wall_clock` of the recipe, seconds.
        runs: whether a recipe is checked.
    """
    if until is not None:
        left = max(60.0, (until.at - now) // 60 * 60)
        return Check("session", OK, f"PEFTCLI_DEADLINE ends every run in {duration_text(left)}")
    if limit is None:
        return Check("session", OK, "no notebook service with a time limit was detected")
    found, _, fix = limit.sentence(now).partition("; ")
    if budget is None:
        return Check("session", WARN, found, fix) if runs else Check("session", OK, f"{found}; {fix}")
    elapsed = now - limit.started if limit.started is not None else 0.0
    if budget > limit.seconds - elapsed:
        found = f"the recipe's budget of {duration_text(budget)} is longer than the rest of the session: {found}"
        return Check("session", WARN, found, fix)
    return Check("session", OK, f"{found}; the recipe's budget of {duration_text(budget)} is shorter")
