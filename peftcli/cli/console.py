"""The terminal: progress and notes; library output goes to a log file, and control characters are escaped."""

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
from rich.progress import Progress, ProgressColumn, Task, TaskID
from rich.text import Text

from peftcli.cli.text import cells, terminal_width, wrapped
from peftcli.cli.text import printable as printable
from peftcli.plan.choices import EIGHT_BIT
from peftcli.results import DataJson, PlanJson

PLAIN_SECONDS = (10.0, 30.0)
"""Seconds before the first progress line, and between later ones, if the output is not a terminal."""


NO_TERMINAL_COLUMNS = 120
"""Width of tables if the output is not a terminal and COLUMNS is not set."""
BAR_COLUMNS = 12
SHED_FIRST = ("memory", "tokens/s", "images/s", "lr")
"""Figures that a narrow terminal omits first, in this order; then the bar, and then the others."""


def console(stream: TextIO) -> Console:
    """A console on a stream; text is never read as markup, and NO_COLOR is respected."""
    width = terminal_width(stream)
    if width is None:
        columns = os.environ.get("COLUMNS", "")
        width = int(columns) if columns.isdecimal() and int(columns) else NO_TERMINAL_COLUMNS
    return Console(file=stream, markup=False, highlight=False, width=width, soft_wrap=not stream.isatty())


class Shown:
    """Progress display: one live line on a terminal, occasional plain lines elsewhere."""

    def __init__(self, out: Console, *, speaks: bool = True) -> None:
        """
        Args:
            out: the console to print to.
            speaks: False for all but the first of several processes.
        """
        self._out = out
        self._speaks = speaks
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._what = ""
        self._total = 0
        self._begun = 0.0
        self._done = 0
        self._first = 0
        self._last_line = 0.0
        self._wait = PLAIN_SECONDS[0]
        self._figures: Mapping[str, str] = {}
        self._first_loss: str | None = None

    def note(self, text: str) -> None:
        if self._speaks:
            width = self._out.width if self._out.is_terminal else None
            self._out.print(wrapped(printable(text), width), soft_wrap=True)

    def start(self, what: str, total: int) -> None:
        self._what, self._total, self._figures, self._first_loss = what, total, {}, None
        self._begun = self._last_line = time.monotonic()
        self._first, self._done, self._wait = -1, 0, PLAIN_SECONDS[0]
        if self._speaks and self._out.is_terminal and not self._out.is_dumb_terminal:
            self._live = Progress(
                StatusColumn(self._out),
                console=self._out,
                transient=True,
                redirect_stdout=False,  # what the libraries print belongs in the log file
                redirect_stderr=False,
            )
            self._live.start()
            self._task = self._live.add_task(what, total=total or None, figures={})

    def advance(self, done: int, figures: Mapping[str, str] | None = None) -> None:
        if not self._speaks:
            return
        first_figures = bool(figures) and not self._figures
        if figures:
            self._figures = {**self._figures, **figures}
            self._first_loss = self._first_loss or figures.get("loss")
        if self._first < 0:
            self._first = done
        self._done = done
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=done, figures=self._figures)
            return
        now = time.monotonic()
        if first_figures or now - self._last_line >= self._wait:
            self._last_line, self._wait = now, PLAIN_SECONDS[1]
            self._line(self._remaining(done, now))

    def end(self) -> None:
        """Remove the live line; the last figures of a training stay on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = self._task = None
        if self._first_loss is not None:
            first = f"(first {self._first_loss}) " if self._figures["loss"] != self._first_loss else ""
            self._figures = {"loss": self._figures["loss"]}
            self._line(f"{first}in {duration(time.monotonic() - self._begun)}")
        self._figures, self._first_loss = {}, None

    def _line(self, rest: str) -> None:
        """Print the progress and its figures on a line that stays."""
        of = f"/{self._total}" if self._total else ""
        figures = " ".join(f"{name} {value}" for name, value in self._figures.items())
        self.note(" ".join(part for part in (f"{self._what} {self._done}{of}", figures, rest) if part))

    def _remaining(self, done: int, now: float) -> str:
        if done <= self._first or not self._total:
            return ""
        seconds = (now - self._begun) / (done - self._first) * (self._total - done)
        return f"left {duration(seconds)}"


class StatusColumn(ProgressColumn):
    """The whole live line: step and time left always, the figures and the bar as far as the terminal is wide enough."""

    def __init__(self, out: Console) -> None:
        super().__init__()
        self._out = out

    def render(self, task: Task) -> Text:
        left = "" if task.time_remaining is None or not task.total else f"left {duration(task.time_remaining)}"
        bar = ""
        if task.total:
            full, empty = ("#", "-") if self._out.options.ascii_only else ("\u2501", "\u2504")
            done = round(BAR_COLUMNS * min(1.0, task.completed / task.total))
            bar = full * done + empty * (BAR_COLUMNS - done)
        step = f"{task.completed:.0f}" + (f"/{task.total:.0f}" if task.total else "")
        line = status_line(task.description, bar, step, task.fields["figures"], left, self._out.width)
        return Text(line, no_wrap=True, overflow="crop")


def status_line(what: str, bar: str, step: str, figures: Mapping[str, str], left: str, width: int) -> str:
    """The live line of at most `width` columns, with as many figures as fit.

    >>> status_line("training", "", "6/40", {"loss": "3.42", "lr": "3e-03"}, "left 12s", 36)
    'training 6/40 loss 3.42 left 12s'
    """
    names = list(figures)
    shed = [*(name for name in SHED_FIRST if name in names), None]
    shed += [name for name in reversed(names) if name not in SHED_FIRST]
    while True:
        parts = [what, bar, step, *(printable(f"{name} {figures[name]}") for name in names), left]
        line = " ".join(part for part in parts if part)
        if cells(line) <= width or not shed:
            return line
        first = shed.pop(0)
        if first is None:
            bar = ""
        else:
            names.remove(first)


def duration(seconds: float) -> str:
    """Seconds in a readable form.

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
    """A summary of the plan and the data: what will be trained, and on which rows."""
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
    return lines + ([data_line(data), *unread_lines(data)] if data is not None else [])


def unread_lines(data: DataJson) -> list[str]:
    """What nothing reads of each source that has such columns or keys."""
    several = len(data.sources) > 1
    return [
        f"  not read{f' of {source.path}' if several else ''}: {unread}"
        for source in data.sources
        if (unread := source.not_read()) is not None
    ]


def data_line(data: DataJson) -> str:
    """The statistics of the data on one line."""
    from peftcli.data.stats import EQUAL, is_wanted  # here, because the light commands import this module

    tested = f"{data.test_rows:,}" if data.test_rows else "no"
    read_as = data.format if data.problem in (None, "single-label") else f"{data.format}, {data.problem}"
    duplicates = data.dropped.get(EQUAL) or 0
    wanted = sum(count or 0 for reason, count in data.dropped.items() if is_wanted(reason))
    parts = [
        f"{data.train_rows:,} train and {tested} test rows of {data.rows:,} ({read_as})",
        *([f"{duplicates:,} duplicates left out"] if duplicates else []),
        *([f"{wanted - duplicates:,} left out by dataset.where"] if wanted > duplicates else []),
        f"{(data.dropped_rows or 0) - wanted:,} dropped",
        f"{data.truncated_rows:,} truncated",
        *([f"{data.leaked_rows:,} test rows also in training"] if data.test_rows else []),
    ]
    if data.eos_trained_rows is not None and data.tokens is not None:  # labeled rows have no trained tokens
        tokens, trained = data.tokens.train or 0, data.tokens.trained or 0
        parts.append(f"{trained / tokens if tokens else 0.0:.0%} of {tokens:,} tokens trained")
        parts.append(f"end token trained in {data.eos_trained_rows:,}")
    return "  data: " + ", ".join(parts)


@dataclass(frozen=True)
class Streams:
    """Streams that still reach the terminal while library output goes to the log: results and messages."""

    out: TextIO
    err: TextIO


@contextmanager
def quiet(log: Path | None) -> Iterator[Streams]:
    """Send file descriptors 1 and 2 to a log file, and return streams that still reach the terminal.

    This redirects descriptors and not only `sys.stderr`, because compiled libraries and child processes write to them
    too. If an error is raised, the descriptors are restored first, so that its message reaches the terminal.

    Args:
        log: file to append to; None discards the output.
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
