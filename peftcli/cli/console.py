"""The terminal: progress and notes; library output goes to a log file, control characters are escaped."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from peftcli.plan.choices import EIGHT_BIT
from peftcli.results import DataJson, PlanJson

PLAIN_SECONDS = (10.0, 30.0)
"""Before the first progress line of a stretch, and between later ones, where the output is no terminal."""


def console(stream: TextIO) -> Console:
    """A console on a stream; text is never read as markup, and NO_COLOR is obeyed."""
    width = None if stream.isatty() else int(os.environ.get("COLUMNS", "120"))
    return Console(file=stream, markup=False, highlight=False, width=width, soft_wrap=not stream.isatty())


class Shown:
    """Progress for a person: one live line on a terminal, a plain line now and then elsewhere."""

    def __init__(self, out: Console, *, speaks: bool = True) -> None:
        """
        Args:
            out: where to show it.
            speaks: False for all but the first of several processes.
        """
        self._out = out
        self._speaks = speaks
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._what = ""
        self._total = 0
        self._begun = 0.0
        self._first = 0
        self._last_line = 0.0
        self._wait = PLAIN_SECONDS[0]
        self._figures = ""

    def note(self, text: str) -> None:
        if self._speaks:
            self._out.print(printable(text))

    def start(self, what: str, total: int) -> None:
        self._what, self._total, self._figures = what, total, ""
        self._begun = self._last_line = time.monotonic()
        self._first, self._wait = -1, PLAIN_SECONDS[0]
        if self._speaks and self._out.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._out,
                transient=True,
                redirect_stdout=False,  # what the libraries print belongs into the log file
                redirect_stderr=False,
            )
            self._live.start()
            self._task = self._live.add_task(what, total=total or None, figures="")

    def advance(self, done: int, figures: Mapping[str, str] | None = None) -> None:
        if not self._speaks:
            return
        if figures:
            self._figures = " ".join(f"{name} {value}" for name, value in figures.items())
        if self._first < 0:
            self._first = done
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=done, figures=self._figures)
            return
        now = time.monotonic()
        if now - self._last_line >= self._wait:
            self._last_line, self._wait = now, PLAIN_SECONDS[1]
            of = f"/{self._total}" if self._total else ""
            self._out.print(f"{self._what} {done}{of} {self._figures} {self._left(done, now)}".rstrip())

    def end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = self._task = None

    def _left(self, done: int, now: float) -> str:
        if done <= self._first or not self._total:
            return ""
        seconds = (now - self._begun) / (done - self._first) * (self._total - done)
        return f"left {duration(seconds)}"


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(96), duration(4.2), duration(7325)
    ('1m 36s', '4.2s', '2h 2m')
    """
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m {whole % 60}s" if whole >= 60 else f"{whole}s"
    return f"{whole // 3600}h {whole % 3600 // 60}m"


def plan_lines(plan: PlanJson, data: DataJson | None) -> list[str]:
    """The plan and the data on a few lines: what will be trained, and on what."""
    chosen = plan.chosen
    trainable, batch = chosen["trainable"], chosen["batch"]
    lines = [f"{plan.name}: {chosen['adapter'].value} of {plan.model.architecture} ({plan.model.name})"]
    lines.append(f"  trainable {trainable.value}, {trainable.reason}")
    short = ("quantization.compute_dtype", EIGHT_BIT, "model.attention", "activation checkpointing")
    lines += [
        f"  {key} {chosen[key].value}: {chosen[key].reason}" for key in ("device", "model.dtype") if key in chosen
    ]
    lines.append("  " + ", ".join(f"{key} {chosen[key].value}" for key in short if key in chosen))
    lines.append(f"  batch {batch.value} {batch.reason}")
    lines += [f"  sharding {chosen[key].value}: {chosen[key].reason}" for key in ("sharding",) if key in chosen]
    return lines + ([data_line(data)] if data is not None else [])


def data_line(data: DataJson) -> str:
    """The facts of the data on one line."""
    tested = f"{data.test_rows:,}" if data.test_rows else "no"
    parts = [
        f"{data.train_rows:,} train and {tested} test rows of {data.rows:,} ({data.format})",
        f"{data.dropped_rows:,} dropped",
        f"{data.truncated_rows:,} truncated",
        *([f"{data.leaked_rows:,} test rows also in training"] if data.test_rows else []),
    ]
    if data.eos_trained_rows is not None and data.tokens is not None:  # rows with labels have no tokens to train
        tokens, trained = data.tokens.train or 0, data.tokens.trained or 0
        parts.append(f"{trained / tokens if tokens else 0.0:.0%} of {tokens:,} tokens trained")
        parts.append(f"end token trained in {data.eos_trained_rows:,}")
    return "  data: " + ", ".join(parts)


@dataclass(frozen=True)
class Streams:
    """Where we write while the libraries are kept quiet: for results, and for people."""

    out: TextIO
    err: TextIO


@contextmanager
def quiet(log: Path | None) -> Iterator[Streams]:
    """Send file descriptors 1 and 2 to a log file, and give streams that still reach the terminal.

    Descriptors, not `sys.stderr`: compiled libraries and child processes write there too. An error that passes
    through restores them first, so that its message reaches the terminal.

    Args:
        log: file that is appended to; None keeps nothing once the context is left.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with (
        os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace") as out,
        os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace") as err,
        log.open("ab") if log is not None else tempfile.TemporaryFile() as sink,
    ):
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        try:
            yield Streams(out, err)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(saved, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


def printable(text: str) -> str:
    """Text with control characters made visible, so that data can neither colour nor rewrite the terminal.

    >>> printable("a\\x1b[31mb")
    'a\\u241b[31mb'
    """
    return "".join(_visible(letter) for letter in text)


def _visible(letter: str) -> str:
    code = ord(letter)
    if letter == "\n" or code >= 0xA0 or 0x20 <= code < 0x7F:
        return "\ufffd" if 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069 or 0xD800 <= code < 0xE000 else letter
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"
