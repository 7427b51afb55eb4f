"""The report on a terminal: the blocks that Markdown and the page show, written with rich.

No text of a run can colour or rewrite the terminal. What a reader should not miss comes last, since the rest may have
scrolled away: notices behind the tables of a section, warnings and verdict behind all sections.
"""

import re
from collections.abc import Collection, Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, JustifyMethod, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from peftcli.report.blocks import (
    Answer,
    Block,
    Cell,
    Code,
    Collapsed,
    Facts,
    Notices,
    Plots,
    Preview,
    Report,
    Samples,
    Section,
    SideBySide,
    Span,
    Table,
    Tone,
)
from peftcli.report.format import DASH, clip, visible

LONGEST, LONGEST_ANSWER = 2000, 120
"""Characters of a cell, and of an answer of a model."""
WIDEST_ANSWER = 46
BAR, GAP, SCARCE = 14, 2, 12
"""Width of a bar, between columns, and of a column that may be broken."""
STYLES: dict[Tone, str] = {"": "", "good": "green", "bad": "bold red", "warn": "yellow", "quiet": "dim"}
SPANS = {"trained": "bold green", "dropped": "strike red"}
BRACKETS = {"trained": ("{+", "+}"), "dropped": ("[-", "-]")}
BREAK = re.compile(r" (?![↑↓→%])")
SIGNS = {True: "✓ ", False: "✗ ", None: ""}
SMOKE = "smoke run: a random stand-in, the numbers say nothing about the real model"


def render_terminal(report: Report, out: Console, names: Collection[str] | None = None) -> None:
    """Print a report.

    Args:
        names: of the sections to print; all when None.
    """
    shown = [section for section in report.sections if names is None or section.name in names]
    if report.smoke:
        out.print(SMOKE, style="yellow")
    for section in shown:
        if len(shown) > 1:
            out.print(Text(visible(section.title), style="bold underline"))
        print_blocks(section.blocks, out)
        out.print()
    for gate in report.gates:
        line = f"gate {gate.name} {gate.limit}: {gate.outcome}" + (f" ({gate.value})" if gate.measured else "")
        out.print(_styled(line, gate.tone))
    for warning in report.warnings:
        out.print(_note(warning))
    if report.verdict:
        out.print(Text(visible(report.verdict)))


def print_blocks(blocks: Sequence[Block], out: Console) -> None:
    """Print blocks with an empty line between them, the notices last."""
    printed = False
    for block in sorted(blocks, key=lambda one: isinstance(one, Notices)):
        parts = list(_block(block, out))
        if printed and parts:
            out.print()
        for part in parts:
            out.print(part)
        printed = printed or bool(parts)


def section_blocks(sections: Sequence[Section | None]) -> list[Block]:
    """The blocks of some sections in their order; those that do not apply are None."""
    return [block for section in sections if section is not None for block in section.blocks]


def _block(block: Block, out: Console) -> Iterator[RenderableType]:
    match block:
        case Table():
            yield from _table(block, out)
        case SideBySide():
            for number, made in enumerate(made for stack in block.stacks for made in stack):
                yield from ([""] if number else [])
                yield from _table(made, out)
        case Facts():
            yield _facts(block)
        case Notices():
            yield from map(_note, block.items)
        case Code():
            yield Text(f"{visible(block.title)}: {visible(block.text)}")
        case Plots():
            for plot in (*block.wide, *block.small):
                yield from _table(plot.bars, out) if plot.bars is not None else ()
        case Samples():
            yield _samples(block)
        case Collapsed():
            yield Text(visible(block.title), style="bold")
            yield from _table(block.table, out)
        case Preview():
            yield from _preview(block, colour=out.color_system is not None and not out.no_color)


def _table(block: Table, out: Console) -> Iterator[RenderableType]:
    """A table without the columns in which no row has a value, and its note.

    Numbers, and short names of rows, stay on one line; where there is no room for that, the headings above them are
    broken, and where that is not enough, the columns are printed in parts, each with the names of the rows.
    """
    block = block.without_empty_columns()
    titles = [visible(title) for title in block.columns]
    whole = _whole_columns(block, out.width)
    everything = list(range(len(titles)))
    if _least_width(block, titles, whole, everything) > out.width:
        titles = [BREAK.sub("\n", title) if at in whole else title for at, title in enumerate(titles)]
    for number, columns in enumerate(_parts(block, titles, whole, out.width)):
        yield from [""] if number else []
        yield _rich_table(block, titles, whole, columns)
    if block.note:
        yield Text(visible(block.note), style="dim")


def _rich_table(block: Table, titles: Sequence[str], whole: Collection[int], columns: Sequence[int]) -> RichTable:
    made = RichTable(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    for at in columns:
        justify: JustifyMethod = "right" if at in block.numeric else "left"
        made.add_column(Text(titles[at]), justify=justify, overflow="fold", no_wrap=at in whole)
    widths = {at: max((len(row[at].text) for row in block.rows), default=0) for at in columns}
    for row in block.rows:
        made.add_row(*(_cell(row[at], widths[at], strong=at == block.strong) for at in columns))
    return made


def _parts(block: Table, titles: Sequence[str], whole: Collection[int], width: int) -> list[list[int]]:
    """The columns in parts that fit; the first one is in each."""
    parts = [[0]]
    for at in range(1, len(titles)):
        if len(parts[-1]) > 1 and _least_width(block, titles, whole, [*parts[-1], at]) > width:
            parts.append([0])
        parts[-1].append(at)
    return parts


def _whole_columns(block: Table, width: int) -> frozenset[int]:
    """The columns whose cells should stay on one line: numbers, and names of rows where they are short."""
    names = max((cell_len(row[0].text) for row in block.rows), default=0)
    return block.numeric | ({0} if names <= width // 3 else set())


def _least_width(block: Table, titles: Sequence[str], whole: Collection[int], columns: Sequence[int]) -> int:
    """What some columns of a table take, as little as SCARCE for each that may be broken."""
    widths = [
        max(map(cell_len, [*titles[at].split("\n"), *(row[at].text for row in block.rows)])) if at in whole else SCARCE
        for at in columns
    ]
    return sum(widths) + GAP * (len(widths) - 1)


def _cell(cell: Cell, width: int, *, strong: bool) -> Text:
    """A cell; a bar stands before its figure, which is as wide as the widest of the column."""
    text = visible(clip(cell.text, LONGEST)).replace("\N{NO-BREAK SPACE}", " ")
    if cell.bar is not None:
        text = f"{_bar(cell.bar):<{BAR}} {text:>{width}}"
    return Text(text, style="bold" if strong and cell.text != DASH else STYLES[cell.tone])


def _bar(ratio: float) -> str:
    """A bar of text; a ratio that is not 0 has at least a thin one.

    >>> _bar(0.5), _bar(0.001), _bar(0)
    ('#######', '|', '')
    """
    return "#" * round(BAR * ratio) or ("|" if ratio else "")


def _facts(block: Facts) -> RichTable:
    made = RichTable.grid(padding=(0, 2, 0, 0))
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for label, value in block.pairs:
        made.add_row(Text(visible(label)), Text(visible(clip(value, LONGEST))))
    return made


def _samples(block: Samples) -> RichTable:
    made = RichTable(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in block.columns:
        made.add_column(Text(visible(title)), overflow="fold", max_width=WIDEST_ANSWER)
    for row in block.rows:
        made.add_row(*map(_said, row))
    return made


def _said(said: Answer) -> Text:
    if said.text is None:
        return Text(DASH, style="dim")
    style = {True: "green", False: "", None: ""}[said.correct]
    return Text(SIGNS[said.correct] + (visible(clip(said.text.strip(), LONGEST_ANSWER)) or "(empty)"), style=style)


def _preview(block: Preview, *, colour: bool) -> Iterator[Text]:
    legend = Text(", ").join(_span(span, colour) for span in block.legend)
    yield Text().append(f"{visible(block.title)}: ", style="bold").append_text(legend)
    for row in block.rows:
        yield Text(visible(f"{row.place}: {row.about}"), style="bold")
        yield Text().join(_span(span, colour) for span in row.spans)


def _span(span: Span, colour: bool) -> Text:
    text = visible(clip(span.text, LONGEST))
    if colour:
        return Text(text, style=SPANS.get(span.kind, "dim"))
    before, after = BRACKETS.get(span.kind, ("", ""))
    return Text(f"{before}{text}{after}")


def _note(text: str) -> Text:
    return _styled(f"note: {text}", "warn")


def _styled(text: str, tone: Tone) -> Text:
    return Text(visible(text), style=STYLES[tone])
