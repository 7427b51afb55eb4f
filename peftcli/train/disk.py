"""Disk space of a run: how much it needs, how much is free, and whether the folder is writable."""

import errno
import os
import re
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from peftcli.errors import MachineError, RecipeError
from peftcli.plan.optimizer import FLOAT32_BYTES, Trained, optimizer_bytes
from peftcli.report.format import several, size
from peftcli.run_dir import RunDir
from peftcli.train.checkpoint import list_checkpoints

QUOTA = "PEFTCLI_QUOTA"
"""Environment variable with a folder and its quota, such as /data=20GiB."""
KAGGLE_QUOTA = ("/kaggle/working", 20 * 10**9)
"""Folder that Kaggle saves after a session, and its quota in bytes."""
SMALL_FILES_BYTES = 2 * 2**20
"""Small files of a checkpoint: manifest, arguments, random states, and a trainer state of a few thousand log rows."""
TOKENIZER_BYTES = 32 * 2**20
"""More than the tokenizer files of nearly every model; a vocabulary of 262,144 takes about this much."""
RESERVE_BYTES = 64 * 2**20
"""For the log, the report and the rest of a run folder."""
PROBE_BYTES = 4096
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_REASONS = {
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user has no permission",
    errno.EPERM: "this user has no permission",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "this user's disk quota is used up",
    errno.ENOTDIR: "a part of the path is a file",
}


@dataclass(frozen=True)
class Forecast:
    """Maximum disk space of a run in bytes.

    Attributes:
        checkpoint_bytes: of one checkpoint.
        checkpoints: number that exist at once, including the one being written.
        adapter_bytes: of the adapter folder.
        merge_bytes: of the merged model, 0 without one.
        reserve_bytes: for the other files of the run.
    """

    checkpoint_bytes: int
    checkpoints: int
    adapter_bytes: int
    merge_bytes: int
    reserve_bytes: int

    @property
    def total(self) -> int:
        return self.checkpoint_bytes * self.checkpoints + self.adapter_bytes + self.merge_bytes + self.reserve_bytes


@dataclass(frozen=True)
class DiskSpace:
    """Free space of a file system, or of a folder with a quota."""

    free: int
    place: str


def forecast(
    trained: Trained,
    *,
    optimizer: str,
    keep: int,
    width: int = FLOAT32_BYTES,
    merged_bytes: int = 0,
    tokenizer_bytes: int = TOKENIZER_BYTES,
) -> Forecast:
    """Compute the disk space that a run needs.

    Args:
        optimizer: `trainer.optim`, a name of transformers; an unknown one counts as AdamW.
        keep: `trainer.save_total_limit`, plus one if the best checkpoint is kept besides the newest.
        width: bytes of a trainable weight, in training and in the files.
        merged_bytes: of the weights of the merged model, 0 without one.
        tokenizer_bytes: of the tokenizer files, which are in each of the folders.
    """
    saved = (trained.parameters + trained.repeated) * width + tokenizer_bytes
    return Forecast(
        checkpoint_bytes=saved + optimizer_bytes(optimizer, trained, width) + SMALL_FILES_BYTES,
        # Rotation keeps at least two, and happens after the new one has its final name.
        checkpoints=max(keep, 2) + 1,
        adapter_bytes=saved,
        merge_bytes=merged_bytes + tokenizer_bytes if merged_bytes else 0,
        reserve_bytes=RESERVE_BYTES,
    )


def tokenizer_bytes(folder: Path) -> int:
    """At most the bytes of the tokenizer files of an adapter folder; a usual maximum for a model that is not local.

    A tokenizer is saved as indented JSON, which is up to twice as long as the original.
    """
    starts = (
        "tokenizer",
        "vocab",
        "merges",
        "special_tokens",
        "added_tokens",
        "chat_template",
        "spiece",
        "sentencepiece",
    )
    files = [path for path in folder.glob("*") if path.is_file() and path.name.startswith(starts)]
    return 2 * sum(path.stat().st_size for path in files) + SMALL_FILES_BYTES // 32 if files else TOKENIZER_BYTES


def merge_forecast(weights_bytes: int, adapter: Path) -> Forecast:
    """The disk space that a merge needs: the merged weights, the small files beside an adapter, and the report."""
    names = ("adapter_model.safetensors", "adapter_model.bin")
    small = sum(path.stat().st_size for path in adapter.glob("*") if path.is_file() and path.name not in names)
    return Forecast(0, 0, 0, weights_bytes + small, SMALL_FILES_BYTES)


def free_bytes(folder: Path) -> int:
    """Bytes that this user can still write in a folder, which need not exist yet.

    Raises:
        RecipeError: PEFTCLI_QUOTA is not a folder and a size.
    """
    return probe_disk_space(folder).free


def probe_disk_space(folder: Path) -> DiskSpace:
    """Free space in a folder: that of the file system, or less if a quota applies.

    Raises:
        RecipeError: PEFTCLI_QUOTA is not a folder and a size.
    """
    real = Path(os.path.realpath(folder))
    existing = next(path for path in (real, *real.parents) if os.path.exists(path))
    found = os.statvfs(existing)
    # Some network drives do not report their size; then only a failed write shows that they are full.
    free = found.f_bavail * found.f_frsize if found.f_blocks else sys.maxsize
    spaces = [DiskSpace(free, f"the disk under {existing}")]
    for limited, allowed in _quotas():
        if real.is_relative_to(limited):
            spaces.append(DiskSpace(max(0, allowed - _used(limited)), f"{limited} with its quota of {size(allowed)}"))
    return min(spaces, key=lambda space: space.free)


def check_disk_space(run: Path, needs: Forecast) -> None:
    """Refuse a run that does not fit on its disk; its existing checkpoints count as free space.

    Args:
        run: the run folder at the start of training (empty with --overwrite).

    Raises:
        MachineError: the run needs more than is free.
        RecipeError: PEFTCLI_QUOTA is not a folder and a size.
    """
    space = probe_disk_space(run)
    existing = min(
        sum(_used(folder) for _, folder in list_checkpoints(RunDir(run).checkpoints)),
        needs.checkpoint_bytes * needs.checkpoints,
    )
    if needs.total - existing <= space.free:
        return
    raise MachineError(
        f"{run} needs {size(needs.total - existing)} more, but {space.place} has {size(space.free)} left: "
        f"{_parts(needs)}" + (f", minus {size(existing)} that already exist" if existing else "") + f"\n{_fix(needs)}"
    )


def has_space_for_checkpoint(folder: Path, needed: int) -> str | None:
    """Why the next checkpoint would not fit; None if it does.

    Args:
        needed: bytes of one checkpoint.
    """
    space = probe_disk_space(folder)
    if needed <= space.free:
        return None
    return f"a checkpoint needs {size(needed)}, but {space.place} has {size(space.free)} left"


def check_writable(folder: Path) -> None:
    """Write and remove a small file in the output folder, so that a failure occurs now and not after hours.

    A folder that does not exist yet is not created; its nearest parent is tested.

    Raises:
        MachineError: a file cannot be written there.
    """
    parent = _nearest(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=parent, prefix=".peftcli-probe-") as probe:
            probe.write(b"\0" * PROBE_BYTES)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(path: Path, error: OSError) -> MachineError:
    """The error for a path of the run folder that cannot be written."""
    reason = _REASONS.get(error.errno or 0) or error.strerror or str(error)
    fix = "free some space, or set another output_dir" if _is_full(error) else "set another output_dir"
    return MachineError(f"{path} cannot be written: {reason}; {fix}")


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _nearest(folder: Path) -> Path:
    """The folder itself or the nearest parent that exists."""
    path = Path(os.path.abspath(folder))
    for parent in (path, *path.parents):
        if os.path.islink(parent) and not os.path.exists(parent):
            raise MachineError(
                f"{parent} is a link to {os.readlink(parent)}, which does not exist; create that folder, or set "
                "another output_dir"
            )
        if os.path.exists(parent):
            break
    if not os.path.isdir(parent):
        raise MachineError(f"{parent} is a file, not a folder; set another output_dir")
    return parent


def _quotas() -> list[tuple[Path, int]]:
    """Folders with a quota in bytes."""
    found = []
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        found.append((Path(KAGGLE_QUOTA[0]), KAGGLE_QUOTA[1]))
    if text := os.environ.get(QUOTA, "").strip():
        match = re.fullmatch(rf"(/.*)=\s*(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})", text)
        if match is None:
            raise RecipeError(
                f"{QUOTA}={text}: must be a folder with its full path and a size, such as /data=20GiB (one of "
                f"{', '.join(_UNITS)})"
            )
        found.append((Path(os.path.realpath(match[1])), int(float(match[2]) * _UNITS[match[3]])))
    return found


def _used(folder: Path) -> int:
    """Bytes of the files in a folder; links are not followed, and unreadable files do not count."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # removed between the two calls, or hidden
                total += os.lstat(os.path.join(path, name)).st_size
    return total


def _parts(needs: Forecast) -> str:
    parts = []
    if needs.checkpoints:
        parts.append(f"{several(needs.checkpoints, 'checkpoint', 'checkpoints')} of {size(needs.checkpoint_bytes)}")
    if needs.adapter_bytes:
        parts.append(f"the adapter {size(needs.adapter_bytes)}")
    if needs.merge_bytes:
        parts.append(f"the merged model {size(needs.merge_bytes)}")
    return ", ".join([*parts, f"{size(needs.reserve_bytes)} for the rest"])


def _fix(needs: Forecast) -> str:
    fixes = ["free some space"]
    if needs.checkpoints > 3:
        fixes.append("lower trainer.save_total_limit")
    if needs.adapter_bytes:
        fixes.append("lower adapter.r")
    other = (
        "set an output_dir on another disk" if needs.checkpoints else "pass --output-dir with a folder on another disk"
    )
    return ", ".join([*fixes, f"or {other}"])
