"""How long this machine is available: a deadline from the environment, and the limits of notebook services."""

import math
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

import psutil

from peftcli.errors import RecipeError
from peftcli.recipe.fields import duration_text

DEADLINE = "PEFTCLI_DEADLINE"
"""Environment variable with the time by which everything must be saved."""
MARGIN_SECONDS = 1800.0
"""Between the end of the suggested budget and that of the session: time for copying the run folder."""
ROUND_SECONDS = 300.0
"""Suggested budgets are multiples of this."""
SESSIONS = (
    ("Kaggle", ("KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_URL_BASE"), 12 * 3600.0),
    ("Colab", ("COLAB_RELEASE_TAG", "COLAB_GPU"), 12 * 3600.0),
)
"""Service, variables that it sets, maximum session. Kaggle's image is based on Colab's, so Kaggle comes first."""
FAR_SECONDS = 1e11
"""A Unix time above this is after the year 5138, so it is in milliseconds."""


@dataclass(frozen=True)
class Deadline:
    """A time at which the machine becomes unavailable.

    Attributes:
        at: Unix time, seconds.
        text: as written in the environment.
    """

    at: float
    text: str

    @property
    def name(self) -> str:
        """The name of this limit in messages."""
        return f"{DEADLINE}={self.text}"


@dataclass(frozen=True)
class NotebookLimit:
    """The maximum session of a notebook service.

    Attributes:
        seconds: maximum duration.
        started: Unix time of its start; None if unknown.
    """

    name: str
    seconds: float
    started: float | None

    def sentence(self, now: float) -> str:
        """Suggest a time budget that ends before the session does."""
        elapsed = now - self.started if self.started is not None else 0.0
        left = math.floor((self.seconds - elapsed - MARGIN_SECONDS) / ROUND_SECONDS) * ROUND_SECONDS
        head = f"{self.name} ends a session after at most {duration_text(self.seconds)}"
        if elapsed >= 60:
            head += f", of which {duration_text(elapsed // 60 * 60)} have passed"
        if left < ROUND_SECONDS:
            return f"{head}; start a new session for a long run"
        return f"{head}; set budget.wall_clock: {duration_text(left)} so that this run finishes before that"


def deadline(now: float) -> Deadline | None:
    """The deadline of PEFTCLI_DEADLINE; None if it is not set.

    Args:
        now: Unix time, seconds.

    Raises:
        RecipeError: the value is not a time, has no time zone, or has passed.
    """
    text = os.environ.get(DEADLINE, "").strip()
    if not text:
        return None
    at = _unix_time(text)
    if at <= now:
        raise RecipeError(
            f"{DEADLINE}={text} has passed: that is {_iso(at)}, and it is {_iso(now)}; set a later time, or unset it"
        )
    return Deadline(at, text)


def notebook_limit(environment: Mapping[str, str] | None = None, now: float | None = None) -> NotebookLimit | None:
    """The session limit of the notebook service that this runs on; None elsewhere.

    Args:
        environment: variables to detect it by; None for those of this process.
        now: Unix time, seconds.
    """
    variables = os.environ if environment is None else environment
    for name, marks, seconds in SESSIONS:
        if any(mark in variables for mark in marks):
            return NotebookLimit(name, seconds, session_start(time.time() if now is None else now, seconds))
    return None


def session_start(now: float, longest: float) -> float | None:
    """Unix time at which this machine or container started; None if neither can be the start of the session.

    In a container, the boot time is that of the host, which may be months ago, and process 1 is the first one of the
    container; if both are possible, the later one counts.

    Args:
        longest: seconds; anything that started longer ago is not the session.
    """
    begun = [float(psutil.boot_time())]
    with suppress(psutil.Error):  # not visible
        begun.append(float(psutil.Process(1).create_time()))
    return max((at for at in begun if now - longest < at <= now), default=None)


def session_note(wall_clock: float | None, now: float) -> str | None:
    """A note for users of a notebook service without a time limit; None if there is nothing to say.

    Args:
        wall_clock: `budget.wall_clock`, seconds; None if it is not set.
        now: Unix time, seconds.
    """
    if wall_clock is not None or os.environ.get(DEADLINE, "").strip():
        return None
    limit = notebook_limit(now=now)
    return None if limit is None else limit.sentence(now)


def wall_clock_limit(wall_clock: float | None, until: Deadline | None, started: float) -> tuple[float | None, str]:
    """The earlier one of budget and deadline: seconds since the start of the process, and its name.

    Args:
        wall_clock: `budget.wall_clock`, seconds since the start of the process, None for no budget.
        started: Unix time of that start, seconds.

    Returns:
        The seconds, None for no limit, and the deadline's name, empty if the budget is the limit.

    >>> wall_clock_limit(3600.0, Deadline(1600.0, "1600"), 1000.0), wall_clock_limit(60.0, None, 1000.0)
    ((600.0, 'PEFTCLI_DEADLINE=1600'), (60.0, ''))
    """
    if until is None or (wall_clock is not None and wall_clock <= until.at - started):
        return wall_clock, ""
    return until.at - started, until.name


def _unix_time(text: str) -> float:
    allowed = "must be a Unix time in seconds, or a date, time and zone such as 2026-11-21T18:00:00Z"
    if re.fullmatch(r"\d+(?:\.\d+)?", text):
        if float(text) > FAR_SECONDS:
            raise RecipeError(f"{DEADLINE}={text}: {allowed}; this looks like milliseconds")
        return float(text)
    try:
        found = datetime.fromisoformat(text.upper())
    except ValueError:
        raise RecipeError(f"{DEADLINE}={text}: {allowed}") from None
    if found.tzinfo is None:
        raise RecipeError(f"{DEADLINE}={text}: {allowed}; the time zone is missing")
    return found.timestamp()


def _iso(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
