"""One process at a time trains in a run folder.

The lock is `flock` on a file that names its holder. `filelock`, which guards the cache, cannot replace it. Its native
lock takes `flock` too, but opens the file with O_TRUNC in 3.13, the oldest version supported, so that whoever is
refused erases the name of the holder; takes a file system without locks (ENOLCK) for one where the lock is held; leaves
the file in the folder; and lets a forked worker keep the lock of a killed parent. Its leases (from 3.30) outlive a
killed process until they expire when that ran in another container, whose process ids cannot be looked up; `flock` ends
with it.
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
"""Between two signs of life of the process that holds a lock."""
STALE_SECONDS = 150.0
"""Without a sign of life for so long, a holder on another machine is taken for dead."""
OTHER = "or name another output_dir"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Holder:
    """Who trains in a run folder.

    Attributes:
        machine: differs between any two machines, and after a restart of one; containers of one machine share it.
        since: Unix time, seconds.
    """

    pid: int
    host: str
    machine: str
    since: float


class RunLock:
    """A run folder that no other process may train in, for as long as the context lasts.

    The kernel holds the lock and lets go of it when this process ends in whatever way. The file names the holder, and
    its time is a sign of life, for file systems on which the kernel's locks do not reach from machine to machine. Of
    several processes of one run only the first locks.
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
        """Let go of the folder, as `release` does."""
        self.release()

    def acquire(self) -> None:
        """Lock the folder, which is made where it is not there.

        A folder that may only be read is not locked: nobody can train in it.

        Raises:
            MachineError: another process trains there, or the folder cannot be made.
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
        # A worker process that outlives a killed parent would else keep the lock.
        os.register_at_fork(after_in_child=self._forget)
        self._touching = threading.Thread(target=self._touch, args=(self._descriptor,), daemon=True)
        self._touching.start()

    def release(self) -> None:
        """Unlock the folder and remove the file; nothing happens where no lock is held."""
        if self._descriptor is None:
            return
        self._released.set()
        if self._touching is not None:
            self._touching.join()
        # Removed while it is held: whoever opened the old file meanwhile sees that its name is gone, and opens anew.
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None
        if self._made_folder:
            with suppress(OSError):  # not empty: a run is in it
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
            with suppress(OSError):  # a network drive that is away for a while; the next touch may reach it
                os.utime(descriptor)


def _take(path: Path) -> int:
    """Lock the file of a path for this process and write who holds it.

    Returns:
        The open file's descriptor; closing it unlocks.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            reaches = _lock(descriptor, path)
            if _is_at(descriptor, path):
                _refuse_living(descriptor, path, reaches)
                _write_holder(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder let go and removed it between our two calls


def _lock(descriptor: int, path: Path) -> bool:
    """Ask the kernel for the lock; False where the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise MachineError(f"{_being_trained(path, _read_holder(descriptor))}; stop it, {OTHER}") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _refuse_living(descriptor: int, path: Path, reaches: bool) -> None:
    """Refuse a file that a process wrote whom the kernel's lock may not reach, and that was touched lately."""
    holder = _read_holder(descriptor)
    if holder is None or (reaches and holder.machine == _machine()):
        return
    silent = _now_at(path.parent) - os.fstat(descriptor).st_mtime
    if silent < STALE_SECONDS:
        raise MachineError(
            f"{_being_trained(path, holder)}, with a sign of life {max(0, silent):.0f} s ago; stop it, {OTHER}\n"
            f"if that process is gone for certain, remove {path}, or wait {STALE_SECONDS - silent:.0f} s"
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
    """Who wrote the file, None where it is empty or torn."""
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
    """The time by the clock that stamps the files of a folder, which may be another machine's."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_mtime


def _machine() -> str:
    return _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else platform.node()
