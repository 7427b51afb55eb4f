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
"""Environment variable with the time at which everything must be on the disk."""
MARGIN_SECONDS = 1800.0
"""Between the end of the proposed budget and that of the session: for saving files and a copy of the run folder."""
ROUND_SECONDS = 300.0
"""Proposed budgets are whole multiples of this."""
SESSIONS = (
    ("Kaggle", ("KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_URL_BASE"), 12 * 3600.0),
    ("Colab", ("COLAB_RELEASE_TAG", "COLAB_GPU"), 12 * 3600.0),
)
"""Service, variables that it sets, longest session. Kaggle's image is made from Colab's, so Kaggle comes first."""
FAR_SECONDS = 1e11
"""A Unix time above this is after the year 5138, so it was counted in milliseconds."""


@dataclass(frozen=True)
class Deadline:
    """A time at which the machine is taken away.

    Attributes:
        at: Unix time, seconds.
        text: as the environment writes it.
    """

    at: float
    text: str

    @property
    def name(self) -> str:
        """What a stop is called that it caused."""
        return f"{DEADLINE}={self.text}"


@dataclass(frozen=True)
class NotebookLimit:
    """The longest session of a notebook service.

    Attributes:
        seconds: from its start to its end, at most.
        started: Unix time of its start, None where the machine does not tell.
    """

    name: str
    seconds: float
    started: float | None

    def sentence(self, now: float) -> str:
        """Propose a time budget that ends before the session does."""
        gone = now - self.started if self.started is not None else 0.0
        left = math.floor((self.seconds - gone - MARGIN_SECONDS) / ROUND_SECONDS) * ROUND_SECONDS
        head = f"{self.name} ends a session after {duration_text(self.seconds)} at the latest"
        if gone >= 60:
            head += f", and {duration_text(gone // 60 * 60)} of it are gone"
        if left < ROUND_SECONDS:
            return f"{head}; start a new session for a long run"
        return f"{head}; budget.wall_clock: {duration_text(left)} would end this run whole before that"


def deadline(now: float) -> Deadline | None:
    """The deadline that PEFTCLI_DEADLINE names, None where it is not set.

    Args:
        now: Unix time, seconds.

    Raises:
        RecipeError: the value is no time, has no zone, or has passed.
    """
    text = os.environ.get(DEADLINE, "").strip()
    if not text:
        return None
    at = _unix_time(text)
    if at <= now:
        raise RecipeError(
            f"{DEADLINE}={text} has passed: it is {_iso(at)}, and now is {_iso(now)}; set a later time, or unset it"
        )
    return Deadline(at, text)


def notebook_limit(environment: Mapping[str, str] | None = None, now: float | None = None) -> NotebookLimit | None:
    """The session of the notebook service that this runs on, None elsewhere.

    Args:
        environment: variables to recognise it by; those of this process when None.
        now: Unix time, seconds.
    """
    variables = os.environ if environment is None else environment
    for name, marks, seconds in SESSIONS:
        if any(mark in variables for mark in marks):
            return NotebookLimit(name, seconds, session_start(time.time() if now is None else now, seconds))
    return None


def session_start(now: float, longest: float) -> float | None:
    """Unix time at which this machine or container started, None where neither can be that of the session.

    In a container the boot time is that of the machine around it, which may be months old, and process 1 is the
    container's first; where both are possible, the later one counts.

    Args:
        longest: seconds; what began longer ago is not the session.
    """
    begun = [float(psutil.boot_time())]
    with suppress(psutil.Error):  # hidden from us
        begun.append(float(psutil.Process(1).create_time()))
    return max((at for at in begun if now - longest < at <= now), default=None)


def session_note(wall_clock: float | None, now: float) -> str | None:
    """What to tell somebody on a notebook service who set no limit of time; None where there is nothing to tell.

    Args:
        wall_clock: `budget.wall_clock`, seconds, None where it is not set.
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
        The seconds, None for no limit, and the deadline's name, empty where the budget is the limit.

    >>> wall_clock_limit(3600.0, Deadline(1600.0, "1600"), 1000.0), wall_clock_limit(60.0, None, 1000.0)
    ((600.0, 'PEFTCLI_DEADLINE=1600'), (60.0, ''))
    """
    if until is None or (wall_clock is not None and wall_clock <= until.at - started):
        return wall_clock, ""
    return until.at - started, until.name


def _unix_time(text: str) -> float:
    may_be = "must be a Unix time in seconds, or a date, time and zone such as 2026-11-21T18:00:00Z"
    if re.fullmatch(r"\d+(?:\.\d+)?", text):
        if float(text) > FAR_SECONDS:
            raise RecipeError(f"{DEADLINE}={text}: {may_be}; this would be one in milliseconds")
        return float(text)
    try:
        found = datetime.fromisoformat(text.upper())
    except ValueError:
        raise RecipeError(f"{DEADLINE}={text}: {may_be}") from None
    if found.tzinfo is None:
        raise RecipeError(f"{DEADLINE}={text}: {may_be}; the zone is missing")
    return found.timestamp()


def _iso(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
