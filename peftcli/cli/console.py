"""The terminal: progress, notes and tables; library output goes to a log file, control characters are escaped."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from peftcli.plan.choices import EIGHT_BIT

PLAIN_SECONDS = (10.0, 30.0)
"""Before the first progress line of a stretch, and between later ones, where the output is no terminal."""

METRICS = (
    ("loss", "loss (nats per trained token)", "{:.4f}"),
    ("perplexity", "perplexity", "{:.4g}"),
    ("token_accuracy", "token accuracy", "{:.4f}"),
    ("exact_match", "exact match", "{:.4f}"),
    ("chrf", "chrF (0 to 100)", "{:.2f}"),
    ("unfinished_answers", "answers that did not stop", "{:.4f}"),
    ("accuracy", "accuracy", "{:.4f}"),
    ("precision", "precision", "{:.4f}"),
    ("recall", "recall", "{:.4f}"),
    ("f1", "F1", "{:.4f}"),
    ("f1_macro", "F1, macro", "{:.4f}"),
    ("f1_weighted", "F1, weighted", "{:.4f}"),
    ("entity_precision", "entity precision", "{:.4f}"),
    ("entity_recall", "entity recall", "{:.4f}"),
    ("entity_f1", "entity F1", "{:.4f}"),
    ("token_entity_f1", "F1 of words, entity or not", "{:.4f}"),
    ("mse", "mean squared error", "{:.4g}"),
    ("mae", "mean absolute error", "{:.4g}"),
    ("pearson", "Pearson correlation", "{:.4f}"),
    ("spearman", "Spearman correlation", "{:.4f}"),
    ("r2", "R squared", "{:.4f}"),
)


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


def metric_table(models: Mapping[str, Mapping[str, Any] | None]) -> Table:
    """The metrics of several models side by side; a dash stands for a figure that was not measured."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("on the test rows")
    shown = {name: found for name, found in models.items() if found is not None}
    for name in shown:
        table.add_column(name, justify="right")
    of_tokens = any("perplexity" in found for found in shown.values())
    writes = any("perplexity" in found for found in shown.values())
    for key, label, form in METRICS:
        if key == "loss" and not writes:
            label = "loss (of rows or tagged words)"
        values = [found.get(key) for found in shown.values()]
        label = label if of_tokens else label.removesuffix(" (nats per trained token)")
        if any(value is not None for value in values):
            table.add_row(label, *("-" if value is None else form.format(value) for value in values))
    return table


def retention_line(retention: Mapping[str, Any]) -> str:
    """What became of the loss on the text that forgetting is measured on."""
    base, adapter, change = (retention[key] for key in ("base_loss", "adapter_loss", "change"))
    written = ["-" if loss is None else f"{loss:.4f}" for loss in (base, adapter)]
    grown = "" if change is None else f" ({change:+.4f} nats per token)"
    name = printable(str(retention["path"]))
    return f"forgetting: loss on {retention['tokens']:,} tokens of {name}, {' -> '.join(written)}{grown}"


def sample_table(samples: Sequence[Mapping[str, Any]]) -> Table:
    """Prompts with the reference and the answers before and after."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    names = ["prompt", "reference"]
    names += [name for name in ("base", "adapter", "merged") if any(s.get(name) is not None for s in samples)]
    for name in names:
        table.add_column(name, overflow="fold", max_width=46)
    for sample in samples:
        table.add_row(*(Text(_short(sample.get(name))) for name in names))
    return table


def _short(value: Any) -> str:
    if value is None:
        return "-"
    text = " ".join(printable(str(value)).split())
    return text if len(text) <= 120 else text[:117] + "..."


def plan_lines(plan: Mapping[str, Any], data: Mapping[str, Any] | None) -> list[str]:
    """The plan and the data on a few lines: what will be trained, and on what."""
    chosen = {decision["key"]: decision for decision in plan["decisions"]}
    lines = [
        f"{plan['name']}: {chosen['adapter']['value']} of {plan['model']['architecture']} ({plan['model']['name']})"
    ]
    lines.append(f"  trainable {chosen['trainable']['value']}, {chosen['trainable']['reason']}")
    names = ("device", "model.dtype")
    short = ("quantization.compute_dtype", EIGHT_BIT, "model.attention", "activation checkpointing")
    lines += [f"  {name} {chosen[name]['value']}: {chosen[name]['reason']}" for name in names if name in chosen]
    lines.append("  " + ", ".join(f"{name} {chosen[name]['value']}" for name in short if name in chosen))
    lines.append(f"  batch {chosen['batch']['value']} {chosen['batch']['reason']}")
    lines += [
        f"  sharding {chosen[name]['value']}: {chosen[name]['reason']}" for name in ("sharding",) if name in chosen
    ]
    return lines + ([data_line(data)] if data is not None else [])


def data_line(data: Mapping[str, Any]) -> str:
    """The facts of the data on one line."""
    tested = f"{data['test_rows']:,}" if data["test_rows"] else "no"
    parts = [
        f"{data['train_rows']:,} train and {tested} test rows of {data['rows']:,} ({data['format']})",
        f"{data['dropped_rows']:,} dropped",
        f"{data['truncated_rows']:,} truncated",
        *([f"{data['leaked_rows']:,} test rows also in training"] if data["test_rows"] else []),
    ]
    if "eos_trained_rows" in data:  # rows with labels have no tokens to train
        tokens = data["tokens"]
        share = tokens["trained"] / tokens["train"] if tokens["train"] else 0.0
        parts.append(f"{share:.0%} of {tokens['train']:,} tokens trained")
        parts.append(f"end token trained in {data['eos_trained_rows']:,}")
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
