"""Why a run stops early: a signal, a STOP file or the clock; each is heard at the end of a step."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

import psutil

from peftcli.errors import Aborted


def seconds_since_start() -> float:
    """Seconds since this process began, its imports included."""
    return time.time() - float(psutil.Process().create_time())


class StopRequests:
    """Collects reasons to stop; as a context it listens to SIGTERM and Ctrl-C.

    The first signal is a request, which the training loop honours at the end of its step. A second Ctrl-C ends at once.
    """

    def __init__(self, run: Path, wall_clock: float | None, now: Callable[[], float] = seconds_since_start) -> None:
        """
        Args:
            run: folder in which a file named STOP asks for a stop.
            wall_clock: seconds since the start of the process, None for no limit.
            now: seconds since that start.
        """
        self._signal: str | None = None
        self._file = run / "STOP"
        self._limit = wall_clock
        self._now = now
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequests":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned

    def reason(self, reserve: float) -> str | None:
        """Why to stop now, or None.

        Args:
            reserve: seconds that saving and the last evaluation will take, counted into the limit.
        """
        if self._signal is not None:
            return self._signal
        if self._file.exists():
            return f"a file named {self._file.name} in the run folder"
        if self._limit is not None and self._now() + reserve >= self._limit:
            return f"the time budget of {self._limit:.0f} s"
        return None

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise Aborted("stopped at once; the last checkpoint is whole")
        self._signal = signal.Signals(number).name


def forget_stop_file(run: Path) -> None:
    """Remove a STOP file that an earlier stop has answered."""
    (run / "STOP").unlink(missing_ok=True)


def is_first_process() -> bool:
    """Whether this process writes and prints for all."""
    return os.environ.get("RANK", "0") == "0"
