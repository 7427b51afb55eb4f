"""The parts of a report before rendering as Markdown, HTML or terminal output: tables, facts, plots and samples."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from peftcli.report.format import DASH

Tone = Literal["", "good", "bad", "warn", "quiet"]
Inches = tuple[float, float]


@dataclass(frozen=True)
class Cell:
    """One cell of a table; the text also expresses the tone, so color is never the only sign.

    A `bar` of 0..1 is drawn behind the text, and a `shade` of 0..1 colors the cell; the text contains the same value.
    """

    text: str
    tone: Tone = ""
    bar: float | None = None
    shade: float | None = None


@dataclass(frozen=True)
class Table:
    """A table; the columns in `numeric` are right-aligned, and the `strong` one is bold."""

    kind: ClassVar[str] = "table"
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: frozenset[int] = frozenset()
    strong: int | None = None
    note: str = ""

    def without_empty_columns(self) -> "Table":
        """The table without empty columns, for narrow output; the first column stays."""
        columns = [
            at for at in range(len(self.columns)) if not at or any(row[at].text not in ("", DASH) for row in self.rows)
        ]
        return Table(
            columns=tuple(self.columns[at] for at in columns),
            rows=tuple(tuple(row[at] for at in columns) for row in self.rows),
            numeric=frozenset(number for number, at in enumerate(columns) if at in self.numeric),
            strong=columns.index(self.strong) if self.strong in columns else None,
            note=self.note,
        )


@dataclass(frozen=True)
class Facts:
    """Labels with their values."""

    kind: ClassVar[str] = "facts"
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Notices:
    """Messages that a reader should see."""

    kind: ClassVar[str] = "notices"
    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """A command to type."""

    kind: ClassVar[str] = "code"
    title: str
    text: str


@dataclass(frozen=True)
class Plot:
    """One drawing, rendered on demand.

    Attributes:
        draw: returns the SVG for a width and a height in inches.
        inches: width and height of the drawing.
        narrow_inches: the same for small screens; None if one drawing is enough.
        bars: the same as a table with bars, for output without graphics.
    """

    title: str
    draw: Callable[[Inches], str]
    inches: Inches
    note: str = ""
    narrow_inches: Inches | None = None
    bars: Table | None = None

    @cached_property
    def svg(self) -> str:
        return self.draw(self.inches)

    @cached_property
    def narrow(self) -> str:
        """The drawing for small screens, empty if there is none."""
        return "" if self.narrow_inches is None else self.draw(self.narrow_inches)


@dataclass(frozen=True)
class Plots:
    """Drawings side by side; the `wide` ones take a full row each."""

    kind: ClassVar[str] = "plots"
    wide: tuple[Plot, ...]
    small: tuple[Plot, ...]


@dataclass(frozen=True)
class Answer:
    """A model's answer to a prompt, and whether it matches the reference; None without a comparison."""

    text: str | None
    correct: bool | None = None


@dataclass(frozen=True)
class Samples:
    """Prompts with references and the answers of each model; columns without text are omitted."""

    kind: ClassVar[str] = "samples"
    columns: tuple[str, ...]
    rows: tuple[tuple[Answer, ...], ...]


@dataclass(frozen=True)
class Span:
    """A part of a row: `prompt` (input only), `trained` or `dropped` (truncated)."""

    kind: str
    text: str


@dataclass(frozen=True)
class PreviewRow:
    """A row of the data, with its location and its size in words."""

    place: str
    about: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Preview:
    """Rows with the use of each part in training; the kinds differ by more than their color."""

    kind: ClassVar[str] = "preview"
    title: str
    legend: tuple[Span, ...]
    rows: tuple[PreviewRow, ...]


@dataclass(frozen=True)
class Collapsed:
    """A table for interested readers: collapsed on the page, open in Markdown and in print."""

    kind: ClassVar[str] = "folded"
    title: str
    table: Table


@dataclass(frozen=True)
class SideBySide:
    """Stacks of small tables, side by side if there is space."""

    kind: ClassVar[str] = "beside"
    stacks: tuple[tuple[Table, ...], ...]


Block = Table | SideBySide | Facts | Notices | Code | Plots | Samples | Collapsed | Preview


@dataclass(frozen=True)
class Section:
    """A titled section of the report; `name` is its anchor."""

    name: str
    title: str
    blocks: tuple[Block, ...]
    lead: str = ""


@dataclass(frozen=True)
class Tile:
    """One of the few numbers at the top."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Gate:
    """A limit that the recipe sets, and whether it was met."""

    name: str
    limit: str
    value: str
    outcome: str
    tone: Tone

    @property
    def measured(self) -> bool:
        return self.value != DASH


@dataclass(frozen=True)
class Report:
    """The content of a report, in reading order; `kind` and `footer` describe what it is about."""

    name: str
    subtitle: str
    status: str
    status_tone: Tone
    smoke: bool
    verdict: str
    warnings: tuple[str, ...]
    tiles: tuple[Tile, ...]
    gates: tuple[Gate, ...]
    sections: tuple[Section, ...]
    kind: str = "run report"
    footer: str = "Written by peftcli from the JSON files of this run."


def table(
    columns: Iterable[str],
    rows: Iterable[Iterable[Cell | str]],
    *,
    numeric: Iterable[int] = (),
    note: str = "",
) -> Table:
    """Make a table from plain strings and cells; a dash is dimmed."""
    made = tuple(tuple(_cell(value) for value in row) for row in rows)
    return Table(tuple(columns), made, frozenset(numeric), note=note)


def facts(pairs: Iterable[tuple[str, str | None]]) -> Facts:
    """Make a list of facts; those with the value None do not apply and are omitted."""
    return Facts(tuple((label, value) for label, value in pairs if value is not None))


def _cell(value: Cell | str) -> Cell:
    if isinstance(value, Cell):
        return value
    return Cell(value, "quiet") if value == DASH else Cell(value)
