"""The cache folder: what is built once, found by a hash of what determines it, whole or absent."""

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
"""After so long without use an entry that can be made again is removed."""


def cache_root(cache: Path | None) -> Path:
    """The folder given, else `$PEFTCLI_CACHE`, else `~/.cache/peftcli`."""
    if cache is not None:
        return cache
    named = os.environ.get("PEFTCLI_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "peftcli"


def built_once(root: Path, name: str, build: Callable[[Path], None], *, mode: int = 0o777) -> Path:
    """The folder `root/name`, which `build` fills at first use.

    Two processes may ask at once: one builds, the other waits for it.

    Args:
        build: writes the files into the empty folder given.
        mode: of `root` where it is made here, less what the umask takes.

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
    # Only the holder of the lock stages, so what lies here was left by a process that was killed.
    for left in root.glob(f".{folder.name}.stage-*"):
        shutil.rmtree(left, ignore_errors=True)
    stage = Path(tempfile.mkdtemp(dir=root, prefix=f".{folder.name}.stage-"))
    try:
        build(stage)
        stage.chmod(0o755)
        os.rename(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def forget_unused(root: Path, keep_bytes: int) -> None:
    """Remove entries of a folder that were not used for a month, and the oldest beyond a number of bytes.

    An entry is as old as the last `mark_used` on it. One that another process still reads stays readable there.
    """
    entries = [entry for entry in root.glob("*") if entry.is_dir() and not entry.name.startswith(".")]
    total = 0
    facts = []
    for entry in entries:
        with suppress(FileNotFoundError):  # another process removes it at this moment
            facts.append((entry.stat().st_mtime, sum(file.stat().st_size for file in entry.iterdir()), entry))
    for used, size, entry in sorted(facts, reverse=True):
        total += size
        if total > keep_bytes or time.time() - used > UNUSED_SECONDS:
            shutil.rmtree(entry, ignore_errors=True)


def mark_used(entry: Path) -> None:
    """Make an entry the youngest; one in a folder that may only be read stays as old as it is."""
    if os.access(entry, os.W_OK):
        os.utime(entry)
