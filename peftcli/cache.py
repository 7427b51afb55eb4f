"""The cache folder: entries are keyed by a hash of their inputs, built once, complete or absent, and verified.

Each entry has the size and the hash of its files. They are checked whenever the entry is used, and a damaged entry is
rebuilt. If the cache cannot be written, entries are stored in a temporary folder of the process.
"""

import atexit
import errno
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout

from peftcli.errors import MachineError
from peftcli.filesystem import apply_umask

UNUSED_SECONDS = 30 * 86400.0
"""Entries that can be rebuilt are removed after this time without use."""
SUMS = "sums.json"
"""File of an entry with the size and the hash of each of its other files."""
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSYS, errno.ENOLCK)
"""Errors of a cache that cannot be written at all; a temporary folder is used instead."""
SILENT_SECONDS = 2.0
"""How long a process waits for another one before it says so."""
BLOCK_BYTES = 2**20
WHOLE_BYTES = 2**30
"""Files up to this size are hashed completely; for larger ones `SAMPLED_BLOCKS` evenly spaced blocks are hashed."""
SAMPLED_BLOCKS = 256

Note = Callable[[str], None]


def cache_root(cache: Path | None) -> Path:
    """`cache` if given, else `$PEFTCLI_CACHE`, else `~/.cache/peftcli`."""
    if cache is not None:
        return cache
    named = os.environ.get("PEFTCLI_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "peftcli"


def built_once(
    root: Path, name: str, build: Callable[[Path], None], *, mode: int = 0o777, note: Note | None = None
) -> Path:
    """The folder `root/name`, built at first use and rebuilt if it is damaged.

    If two processes call this at the same time, one builds and the other waits.

    Args:
        build: writes the files into the empty folder that it gets.
        mode: permissions of `root` if it is created here, minus the umask.
        note: gets a line about an entry that was rebuilt or not stored; stderr by default.

    Raises:
        MachineError: the disk of the cache is full.
    """
    note = note or _to_stderr
    folder = root / name
    if folder.is_dir() and entry_damage(folder) is None:
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True, mode=mode)
        lock = FileLock(root / f".{name}.lock")
        _acquire(lock, folder, note)
    except OSError as error:
        if error.errno in UNWRITABLE:
            return _build_unstored(name, build, note, error)
        raise _full(folder, error) from error
    except NotImplementedError as error:  # a file system without locks
        return _build_unstored(name, build, note, error)
    try:  # not `with lock`, which would acquire it a second time and release it once
        damage = entry_damage(folder) if folder.is_dir() else ""  # another process may have built it meanwhile
        if damage:
            note(f"note: the cache entry {folder} is damaged ({damage}) and is rebuilt")
        if damage is not None:
            try:
                _build(root, folder, build)
            except OSError as error:
                raise _full(folder, error) from error
    finally:
        lock.release()
    return folder


def _acquire(lock: FileLock, folder: Path, note: Note) -> None:
    """Take a lock; after a while, say what it waits for."""
    try:
        lock.acquire(timeout=SILENT_SECONDS)
    except Timeout:
        note(f"note: another process is building {folder} in the cache; waiting for it to finish")
        lock.acquire()


def _full(folder: Path, error: OSError) -> MachineError:
    return MachineError(
        f"{folder} could not be written: {error}; free some space there, "
        "or name another folder in the environment variable PEFTCLI_CACHE"
    )


def entry_damage(folder: Path) -> str | None:
    """What is wrong with an entry; None if its files are those that were built.

    Empty for an entry of an earlier version, which has no hashes and is rebuilt once.
    """
    if not (folder / SUMS).is_file():
        return ""
    try:
        sums: dict[str, Any] = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        for name, (size, digest) in sums.items():
            file = folder / name
            found = file.stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
            if file_hash(file) != digest:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{SUMS}: {error}"
    return None


def file_hash(file: Path) -> str:
    """The 128-bit hash of a file; for large files, of evenly spaced blocks."""
    total = xxhash.xxh3_128()
    with file.open("rb") as stream:
        for start in _block_starts(file.stat().st_size):
            stream.seek(start)
            total.update(stream.read(BLOCK_BYTES))
    return total.hexdigest()


def _block_starts(size: int) -> Iterator[int]:
    if size <= WHOLE_BYTES:
        yield from range(0, size, BLOCK_BYTES)
        return
    last = size - BLOCK_BYTES
    yield from (last * number // (SAMPLED_BLOCKS - 1) for number in range(SAMPLED_BLOCKS))


def _build(root: Path, folder: Path, build: Callable[[Path], None]) -> None:
    # Only the process that holds the lock has a staging folder, so any other is from a process that was killed.
    for stale in root.glob(f".{folder.name}.stage-*"):
        shutil.rmtree(stale, ignore_errors=True)
    stage = Path(tempfile.mkdtemp(dir=root, prefix=f".{folder.name}.stage-"))
    try:
        _fill(stage, build)
        if folder.is_dir():
            os.rename(folder, stage.with_name(f"{stage.name}-damaged"))  # processes that still read it keep its files
            shutil.rmtree(stage.with_name(f"{stage.name}-damaged"), ignore_errors=True)
        os.rename(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _fill(stage: Path, build: Callable[[Path], None]) -> None:
    """Build an entry with the hashes of its files, with the permissions of the umask."""
    build(stage)
    files = [file for file in sorted(stage.rglob("*")) if file.is_file() and file.name != SUMS]
    sums = {file.relative_to(stage).as_posix(): [file.stat().st_size, file_hash(file)] for file in files}
    (stage / SUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
    apply_umask(stage)


def _build_unstored(name: str, build: Callable[[Path], None], note: Note, error: OSError | NotImplementedError) -> Path:
    """Build an entry for this process only, since the cache cannot be written."""
    home = Path(tempfile.mkdtemp(prefix="peftcli-cache-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    reason = getattr(error, "strerror", None) or str(error)
    where = getattr(error, "filename", None) or "the cache"
    note(
        f"note: the cache cannot be written ({where}: {reason}), so this process uses a temporary folder; set "
        "PEFTCLI_CACHE to a writable folder"
    )
    folder = home / name
    folder.mkdir()
    _fill(folder, build)
    return folder


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")


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
