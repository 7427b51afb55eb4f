"""The cache folder: entries are keyed by a hash of their inputs, built once, and either complete or absent."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from peftcli.errors import MachineError

UNUSED_SECONDS = 30 * 86400.0
"""Entries that can be rebuilt are removed after this time without use."""


def cache_root(cache: Path | None) -> Path:
    """`cache` if given, else `$PEFTCLI_CACHE`, else `~/.cache/peftcli`."""
    if cache is not None:
        return cache
    named = os.environ.get("PEFTCLI_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "peftcli"


def built_once(root: Path, name: str, build: Callable[[Path], None], *, mode: int = 0o777) -> Path:
    """The folder `root/name`, built at first use.

    If two processes call this at the same time, one builds and the other waits.

    Args:
        build: writes the files into the empty folder that it gets.
        mode: permissions of `root` if it is created here, minus the umask.

    Raises:
        MachineError: the cache cannot be written.
    """
    folder = root / name
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True, mode=mode)
        with FileLock(root / f".{name}.lock"):
            if not folder.is_dir():
                _build(root, folder, build)
    except OSError as error:
        raise MachineError(
            f"{folder} could not be written: {error}; free some space there, "
            "or name another folder in the environment variable PEFTCLI_CACHE"
        ) from error
    return folder


def _build(root: Path, folder: Path, build: Callable[[Path], None]) -> None:
    # Only the process that holds the lock has a staging folder, so any other is from a process that was killed.
    for stale in root.glob(f".{folder.name}.stage-*"):
        shutil.rmtree(stale, ignore_errors=True)
    stage = Path(tempfile.mkdtemp(dir=root, prefix=f".{folder.name}.stage-"))
    try:
        build(stage)
        stage.chmod(0o755)
        os.rename(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def forget_unused(root: Path, keep_bytes: int) -> None:
    """Remove entries that were not used for a month, and the least recently used ones beyond a total size.

    The age of an entry counts from the last `mark_used`. A process that has an entry open can still read it.
    """
    entries = [entry for entry in root.glob("*") if entry.is_dir() and not entry.name.startswith(".")]
    total = 0
    found = []
    for entry in entries:
        with suppress(FileNotFoundError):  # another process may be removing it
            found.append((entry.stat().st_mtime, sum(file.stat().st_size for file in entry.iterdir()), entry))
    for used, size, entry in sorted(found, reverse=True):
        total += size
        if total > keep_bytes or time.time() - used > UNUSED_SECONDS:
            shutil.rmtree(entry, ignore_errors=True)


def mark_used(entry: Path) -> None:
    """Set the last use of an entry to now; does nothing in a read-only folder."""
    if os.access(entry, os.W_OK):
        os.utime(entry)
