"""A file with the finished parts of a long job: one part a line, so that a killed job continues after the last."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from peftcli.errors import MachineError, RecipeError


class Journal:
    """The parts of a job, appended one by one; a context manager that holds a lock on the file.

    Attributes:
        count: number of whole parts.
        totals: sums of the numbers in the parts, by key.
    """

    def __init__(self, path: Path, job: Mapping[str, str], *, restart: bool) -> None:
        """Open the journal of a job, or begin one.

        A line that a killed process did not finish is removed.

        Args:
            path: of the file.
            job: what decides the content of the parts, with a name for messages each.
            restart: begin again if the file is the journal of another job.

        Raises:
            MachineError: another process is writing it.
            RecipeError: it is the journal of another job.
        """
        self.path = path
        self.count = 0
        self.totals: dict[str, int] = {}
        self._file: BinaryIO = path.open("a+b")
        try:
            self._lock()
            self._end = self._read(dict(job), restart=restart)
            self._file.truncate(self._end)
            if self._end == 0:
                self._begin(dict(job))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, part: Mapping[str, Any]) -> None:
        """Add a part; it is on the disk when this returns."""
        self._write(part)
        self._count(part)

    def parts(self) -> Iterator[dict[str, Any]]:
        """All parts, from the beginning."""
        with self.path.open("rb") as file:
            file.readline()
            for _ in range(self.count):
                yield json.loads(file.readline())

    def remove(self) -> None:
        """Delete the file, since the job is done."""
        self.path.unlink()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MachineError(
                f"{self.path}: another process is writing it; wait for it, or name another output file"
            ) from None

    def _read(self, job: dict[str, str], *, restart: bool) -> int:
        """Count the whole parts; returns the position after the last, 0 to begin."""
        self._file.seek(0)
        found = _line(self._file.readline())
        if found is None:
            return 0
        if found != job:
            if restart:
                return 0
            changed = [name for name in {**found, **job} if found.get(name) != job.get(name)]
            raise RecipeError(
                f"{self.path}: was begun with another {' and '.join(changed)}; pass --overwrite to begin again, or use "
                "the command that began it"
            )
        end = self._file.tell()
        while (part := _line(self._file.readline())) is not None:
            self._count(part)
            end = self._file.tell()
        return end

    def _begin(self, job: dict[str, str]) -> None:
        self.count, self.totals = 0, {}
        self._write(job)

    def _count(self, part: Mapping[str, Any]) -> None:
        self.count += 1
        for name, value in part.items():
            if isinstance(value, int):
                self.totals[name] = self.totals.get(name, 0) + value

    def _write(self, value: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _line(line: bytes) -> dict[str, Any] | None:
    """The object on a line; None at the end of the file, or if the line is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except ValueError:  # blocks that never reached the disk are read as zeros
        return None
    return value if isinstance(value, dict) else None
