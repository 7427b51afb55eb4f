"""What a report is made of, before it is Markdown, HTML or on a terminal: tables, facts, plots and samples."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from peftcli.report.format import DASH

Tone = Literal["", "good", "bad", "warn", "quiet"]
Inches = tuple[float, float]


@dataclass(frozen=True)
class Cell:
    """One cell of a table; its tone is said by the text as well, never by the colour alone.

    A `bar` of 0..1 is drawn behind the text, and a `shade` of 0..1 colours the cell; its figure says the same.
    """

    text: str
    tone: Tone = ""
    bar: float | None = None
    shade: float | None = None


@dataclass(frozen=True)
class Table:
    """A table; the columns named in `numeric` are aligned to the right, the `strong` one is set bold."""

    kind: ClassVar[str] = "table"
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: frozenset[int] = frozenset()
    strong: int | None = None
    note: str = ""

    def without_empty_columns(self) -> "Table":
        """The same without columns that have no value in any row, for where room is scarce; the first one stays."""
        kept = [
            at for at in range(len(self.columns)) if not at or any(row[at].text not in ("", DASH) for row in self.rows)
        ]
        return Table(
            columns=tuple(self.columns[at] for at in kept),
            rows=tuple(tuple(row[at] for at in kept) for row in self.rows),
            numeric=frozenset(number for number, at in enumerate(kept) if at in self.numeric),
            strong=kept.index(self.strong) if self.strong in kept else None,
            note=self.note,
        )


@dataclass(frozen=True)
class Facts:
    """Labels with their values."""

    kind: ClassVar[str] = "facts"
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Notices:
    """Sentences that a reader should see."""

    kind: ClassVar[str] = "notices"
    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Something to be typed."""

    kind: ClassVar[str] = "code"
    title: str
    text: str


@dataclass(frozen=True)
class Plot:
    """One drawing, made when it is asked for.

    Attributes:
        draw: gives the SVG for a width and a height in inches.
        inches: both, of the drawing.
        narrow_inches: the same for small screens; None where the one drawing does for all.
        bars: the same as a table with bars, for where nothing can be drawn.
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
        """The drawing for small screens, empty where there is none."""
        return "" if self.narrow_inches is None else self.draw(self.narrow_inches)


@dataclass(frozen=True)
class Plots:
    """Drawings side by side, where the first may have a line of its own."""

    kind: ClassVar[str] = "plots"
    wide: tuple[Plot, ...]
    small: tuple[Plot, ...]


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt, and whether that is the reference; None where nothing is compared."""

    text: str | None
    correct: bool | None = None


@dataclass(frozen=True)
class Samples:
    """Prompts with what was expected and what each model said; columns without any text are left out."""

    kind: ClassVar[str] = "samples"
    columns: tuple[str, ...]
    rows: tuple[tuple[Answer, ...], ...]


@dataclass(frozen=True)
class Span:
    """A stretch of a row: `prompt` (read), `trained` or `dropped` (cut off)."""

    kind: str
    text: str


@dataclass(frozen=True)
class PreviewRow:
    """A row of the data, with where it stands and its size in words."""

    place: str
    about: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Preview:
    """Rows with what the trainer does with each stretch; the kinds differ by more than their colour."""

    kind: ClassVar[str] = "preview"
    title: str
    legend: tuple[Span, ...]
    rows: tuple[PreviewRow, ...]


@dataclass(frozen=True)
class Collapsed:
    """A table for those who look for it: folded in the page, open in Markdown and in print."""

    kind: ClassVar[str] = "folded"
    title: str
    table: Table


@dataclass(frozen=True)
class SideBySide:
    """Stacks of small tables, side by side where there is room."""

    kind: ClassVar[str] = "beside"
    stacks: tuple[tuple[Table, ...], ...]


Block = Table | SideBySide | Facts | Notices | Code | Plots | Samples | Collapsed | Preview


@dataclass(frozen=True)
class Section:
    """A titled part of the report; `name` is its anchor."""

    name: str
    title: str
    blocks: tuple[Block, ...]
    lead: str = ""


@dataclass(frozen=True)
class Tile:
    """One of the few figures at the top."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Gate:
    """A limit that the recipe set, and what became of it."""

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
    """All that a report says, in reading order; `kind` and `footer` say of what it is one."""

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
    """Make a table from plain strings and cells; a dash is set quietly."""
    made = tuple(tuple(_cell(value) for value in row) for row in rows)
    return Table(tuple(columns), made, frozenset(numeric), note=note)


def facts(pairs: Iterable[tuple[str, str | None]]) -> Facts:
    """Make a list of facts; those whose value is None do not apply and are left out."""
    return Facts(tuple((label, value) for label, value in pairs if value is not None))


def _cell(value: Cell | str) -> Cell:
    if isinstance(value, Cell):
        return value
    return Cell(value, "quiet") if value == DASH else Cell(value)
