"""Allows only one process at a time to train in a run folder.

The lock is `flock` on a file that names its holder. `filelock`, which guards the cache, is not suitable: its native
lock uses `flock` too, but opens the file with O_TRUNC in 3.13, the oldest supported version, so that a refused process
erases the name of the holder; it treats a file system without locks (ENOLCK) like a held lock; it leaves the file in
the folder; and a forked worker keeps the lock of a killed parent. Its leases (from 3.30) outlive a process that was
killed in another container, where process ids cannot be checked, until they expire; `flock` ends with the process.
"""

import errno
import fcntl
import json
import os
import platform
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from peftcli.errors import MachineError
from peftcli.train.disk import cannot_write
from peftcli.train.stop import is_first_process

NAME = ".lock"
TOUCH_SECONDS = 30.0
"""Interval at which the holder of a lock updates its file time."""
STALE_SECONDS = 150.0
"""A holder on another machine that has not updated the file time for so long is considered dead."""
OTHER = "or set another output_dir"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Holder:
    """The process that trains in a run folder.

    Attributes:
        machine: unique per machine and boot; containers of one machine share it.
        since: Unix time, seconds.
    """

    pid: int
    host: str
    machine: str
    since: float


class RunLock:
    """Locks a run folder against other processes, as a context manager.

    The kernel holds the lock and releases it when this process ends in any way. The file names the holder, and its
    modification time is a heartbeat, for file systems on which kernel locks do not work across machines. Of several
    processes of one run, only the first takes the lock.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / NAME
        self._descriptor: int | None = None
        self._made_folder = False
        self._released = threading.Event()
        self._touching: threading.Thread | None = None

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def close(self) -> None:
        """Release the lock, as `release` does."""
        self.release()

    def acquire(self) -> None:
        """Lock the folder, and create it if needed.

        A read-only folder is not locked, because nobody can train in it.

        Raises:
            MachineError: another process trains there, or the folder cannot be created.
        """
        if not is_first_process():
            return
        self._make_folder()
        if not os.access(self.path.parent, os.W_OK):
            return
        try:
            self._descriptor = _take(self.path)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        # Otherwise a worker process that outlives a killed parent would keep the lock.
        os.register_at_fork(after_in_child=self._forget)
        self._touching = threading.Thread(target=self._touch, args=(self._descriptor,), daemon=True)
        self._touching.start()

    def release(self) -> None:
        """Unlock the folder and remove the file, if it is locked."""
        if self._descriptor is None:
            return
        self._released.set()
        if self._touching is not None:
            self._touching.join()
        # Removed while locked: a process that has just opened the old file notices the removal and opens a new one.
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None
        if self._made_folder:
            with suppress(OSError):  # not empty: it contains a run
                self.path.parent.rmdir()

    def _make_folder(self) -> None:
        folder = self.path.parent
        self._made_folder = not os.path.isdir(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error

    def _forget(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _touch(self, descriptor: int) -> None:
        while not self._released.wait(TOUCH_SECONDS):
            with suppress(OSError):  # a network drive may be unavailable for a while
                os.utime(descriptor)


def _take(path: Path) -> int:
    """Lock a file for this process and write the holder into it.

    Returns:
        The descriptor of the open file; closing it unlocks the file.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            locked = _lock(descriptor, path)
            if _is_at(descriptor, path):
                _refuse_living(descriptor, path, locked)
                _write_holder(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the holder released and removed it in between


def _lock(descriptor: int, path: Path) -> bool:
    """Request the lock from the kernel; False if the file system does not support locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise MachineError(f"{_being_trained(path, _read_holder(descriptor))}; stop it, {OTHER}") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _refuse_living(descriptor: int, path: Path, locked: bool) -> None:
    """Refuse a recently touched file whose holder may be out of reach of the kernel's lock."""
    holder = _read_holder(descriptor)
    if holder is None or (locked and holder.machine == _machine()):
        return
    silent = _now_at(path.parent) - os.fstat(descriptor).st_mtime
    if silent < STALE_SECONDS:
        raise MachineError(
            f"{_being_trained(path, holder)}, last seen {max(0, silent):.0f} s ago; stop it, {OTHER}\n"
            f"if that process is certainly gone, remove {path}, or wait {STALE_SECONDS - silent:.0f} s"
        )


def _being_trained(path: Path, holder: Holder | None) -> str:
    if holder is None:
        return f"{path.parent} is being trained by another process"
    then = time.localtime(holder.since)
    today = time.strftime("%Y-%m-%d", then) == time.strftime("%Y-%m-%d")
    since = time.strftime("%H:%M" if today else "%Y-%m-%d %H:%M", then)
    return f"{path.parent} is being trained by process {holder.pid} on {holder.host} since {since}"


def _write_holder(descriptor: int) -> None:
    holder = Holder(os.getpid(), platform.node(), _machine(), time.time())
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(holder)).encode() + b"\n", 0)
    os.fsync(descriptor)


def _read_holder(descriptor: int) -> Holder | None:
    """The holder written in the file; None if it is empty or incomplete."""
    try:
        return Holder(**json.loads(os.pread(descriptor, 65536, 0)))
    except (ValueError, TypeError):
        return None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _now_at(folder: Path) -> float:
    """The current time by the clock of the folder's file system, which may be another machine's."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_mtime


def _machine() -> str:
    return _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else platform.node()
