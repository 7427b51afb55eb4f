"""Stops a run early: a signal, a STOP file or the clock; each takes effect at the end of a step."""

import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, TracebackType

import psutil

from peftcli.errors import Aborted, Stopped
from peftcli.progress import Progress
from peftcli.signals import handle_stop_signals

STARTED = "PEFTCLI_STARTED"
"""Environment variable with the Unix time at which the launching process started."""


def seconds_since_start() -> float:
    """Seconds since this process, or the one that launched it, started; includes imports."""
    began = os.environ.get(STARTED)
    return time.time() - (float(began) if began else float(psutil.Process().create_time()))


class StopRequests:
    """Collects reasons to stop; as a context manager it handles SIGTERM and Ctrl-C.

    The first signal is a request, which the training loop honors at the end of its step. A second Ctrl-C aborts at
    once.
    """

    def __init__(
        self, run: Path, wall_clock: float | None, now: Callable[[], float] = seconds_since_start, limit_name: str = ""
    ) -> None:
        """
        Args:
            run: folder in which a file named STOP requests a stop.
            wall_clock: seconds since the start of the process, None for no limit.
            now: seconds since that start.
            limit_name: name of the limit in messages; empty for the time budget.
        """
        self._signal: str | None = None
        self._file = run / "STOP"
        self._limit = wall_clock
        self._now = now
        self._name = limit_name or (f"the time budget of {wall_clock:.0f} s" if wall_clock is not None else "")
        self._handlers = ExitStack()

    def __enter__(self) -> "StopRequests":
        self._handlers.enter_context(handle_stop_signals(self._on_signal))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handlers.close()

    def requested(self) -> str | None:
        """The signal or file that requests a stop, or None; the clock is not checked."""
        if self._signal is not None:
            return self._signal
        return f"a file named {self._file.name} in the run folder" if self._file.exists() else None

    def reason(self, reserve: float) -> str | None:
        """Why to stop now, or None.

        Args:
            reserve: seconds for saving and the final evaluation, which are part of the limit.
        """
        requested = self.requested()
        if requested is not None:
            return requested
        if self._limit is not None and self._now() + reserve >= self._limit:
            return self._name
        return None

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the limit; None without one."""
        return None if self._limit is None else self._limit - self._now()

    def is_clock(self, reason: str) -> bool:
        """Whether a reason is the time limit, which leaves time to finish, and not a signal."""
        return bool(self._name) and reason == self._name

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise Aborted("stopped at once; run the same command again to resume from the last checkpoint")
        self._signal = signal.Signals(number).name


class StoppableProgress:
    """Progress that interrupts work outside the training loop as soon as a stop is requested.

    The clock is left to the loop, which runs at least one step and saves a checkpoint, so that every session makes
    progress. Several processes would stop at different points and wait for each other, so there it only shows progress.
    """

    def __init__(self, shown: Progress, stops: StopRequests, what: str) -> None:
        """
        Args:
            shown: the progress display.
            what: the point reached, for the message, such as `before the first step`.
        """
        self._shown = shown
        self._stops = stops
        self._what = what
        self._single_process = os.environ.get("WORLD_SIZE", "1") == "1"

    def note(self, text: str) -> None:
        self._shown.note(text)

    def start(self, what: str, total: int) -> None:
        self._shown.start(what, total)
        self._check_stop()

    def advance(self, done: int, figures: Mapping[str, str] | None = None) -> None:
        self._shown.advance(done, figures)
        self._check_stop()

    def end(self) -> None:
        self._shown.end()

    def _check_stop(self) -> None:
        reason = self._stops.requested() if self._single_process else None
        if reason is not None:
            self._shown.end()
            raise Stopped(f"stopped by {reason} {self._what}; run the same command again to resume")


def forget_stop_file(run: Path) -> None:
    """Remove a STOP file that has been handled."""
    (run / "STOP").unlink(missing_ok=True)


def is_first_of_machine() -> bool:
    """Whether this process does the work that is done once per machine."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def is_first_process() -> bool:
    """Whether this process writes and prints for all."""
    return os.environ.get("RANK", "0") == "0"
