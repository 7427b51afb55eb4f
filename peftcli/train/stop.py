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
"""Environment variable with the Unix time at which the process began that launched this one."""


def seconds_since_start() -> float:
    """Seconds since this process began, its imports included, or the one that launched it."""
    began = os.environ.get(STARTED)
    return time.time() - (float(began) if began else float(psutil.Process().create_time()))


class StopRequests:
    """Collects reasons to stop; as a context it listens to SIGTERM and Ctrl-C.

    The first signal is a request, which the training loop honours at the end of its step. A second Ctrl-C ends at once.
    """

    def __init__(
        self, run: Path, wall_clock: float | None, now: Callable[[], float] = seconds_since_start, limit_name: str = ""
    ) -> None:
        """
        Args:
            run: folder in which a file named STOP asks for a stop.
            wall_clock: seconds since the start of the process, None for no limit.
            now: seconds since that start.
            limit_name: what to call the limit; the time budget where it is empty.
        """
        self._signal: str | None = None
        self._file = run / "STOP"
        self._limit = wall_clock
        self._now = now
        self._name = limit_name or (f"the time budget of {wall_clock:.0f} s" if wall_clock is not None else "")
        self._handlers = ExitStack()

    def __enter__(self) -> "StopRequests":
        self._handlers.enter_context(handle_stop_signals(self._hear))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handlers.close()

    def asked(self) -> str | None:
        """The signal or the file that asks for a stop, or None; the clock is not looked at."""
        if self._signal is not None:
            return self._signal
        return f"a file named {self._file.name} in the run folder" if self._file.exists() else None

    def reason(self, reserve: float) -> str | None:
        """Why to stop now, or None.

        Args:
            reserve: seconds that saving and the last evaluation will take, counted into the limit.
        """
        asked = self.asked()
        if asked is not None:
            return asked
        if self._limit is not None and self._now() + reserve >= self._limit:
            return self._name
        return None

    @property
    def seconds_left(self) -> float | None:
        """Until the limit, None where there is none."""
        return None if self._limit is None else self._limit - self._now()

    def is_clock(self, reason: str) -> bool:
        """Whether a reason is the limit, for which time was set aside, and no signal, which wants an end at once."""
        return bool(self._name) and reason == self._name

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise Aborted("stopped at once; the last checkpoint is whole")
        self._signal = signal.Signals(number).name


class StoppableProgress:
    """Progress that ends work outside the training loop as soon as a stop is asked for.

    The clock is left to the loop, which makes at least one step and a checkpoint, so that no session is for nothing.
    Several processes would not end at the same place and wait for each other, so there it only shows.
    """

    def __init__(self, shown: Progress, stops: StopRequests, what: str) -> None:
        """
        Args:
            shown: receives everything.
            what: how the message describes what was reached, such as `before the first step`.
        """
        self._shown = shown
        self._stops = stops
        self._what = what
        self._alone = os.environ.get("WORLD_SIZE", "1") == "1"

    def note(self, text: str) -> None:
        self._shown.note(text)

    def start(self, what: str, total: int) -> None:
        self._shown.start(what, total)
        self._heed()

    def advance(self, done: int, figures: Mapping[str, str] | None = None) -> None:
        self._shown.advance(done, figures)
        self._heed()

    def end(self) -> None:
        self._shown.end()

    def _heed(self) -> None:
        reason = self._stops.asked() if self._alone else None
        if reason is not None:
            self._shown.end()
            raise Stopped(f"stopped by {reason} {self._what}; the same command goes on")


def forget_stop_file(run: Path) -> None:
    """Remove a STOP file that an earlier stop has answered."""
    (run / "STOP").unlink(missing_ok=True)


def is_first_of_machine() -> bool:
    """Whether this process does for its machine what one process there has to do: the first one on each."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def is_first_process() -> bool:
    """Whether this process writes and prints for all."""
    return os.environ.get("RANK", "0") == "0"
