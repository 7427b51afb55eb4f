"""The report as Markdown; no text of a prompt or a recipe can leave the cell or the line it stands in."""

import re

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
    SideBySide,
    Span,
    Table,
)
from peftcli.report.format import DASH, clip, pieces, visible

LONGEST = 2000
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "`": "&#96;", "@": "&#64;"}
BRACKETS = {"trained": ("{+", "+}"), "dropped": (r"\[-", r"-\]")}
SMOKE = "**SMOKE RUN: a random stand-in, the numbers say nothing about the real model.**"


def render_markdown(report: Report) -> str:
    """Write a report as GitHub-flavoured Markdown; the plots are left to the page, their figures are here."""
    parts = [f"# {escaped(report.name)}", f"{escaped(report.status)} · {escaped(report.subtitle)}"]
    parts += [f"> {SMOKE}"] if report.smoke else []
    parts.append(escaped(report.verdict))
    if report.warnings:
        parts.append(_bullets(report.warnings))
    if report.tiles:
        notes = [(tile.label, tile.value + (f" ({tile.note})" if tile.note else "")) for tile in report.tiles]
        parts.append(_facts(tuple(notes)))
    if report.gates:
        rows = [[gate.name, gate.limit, gate.value, gate.outcome] for gate in report.gates]
        parts.append(_table(("Gate", "Limit", "Measured", "Outcome"), [[escaped(c) for c in row] for row in rows], {2}))
    for section in report.sections:
        parts.append(f"## {escaped(section.title)}")
        parts += [escaped(section.lead)] if section.lead else []
        parts += [written for block in section.blocks if (written := _block(block))]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Write any text so that Markdown shows it as it is, on one line.

    >>> escaped("a|b <i> `c` *d*"), escaped("max_length"), escaped("- no list")
    ('a&#124;b &lt;i&gt; &#96;c&#96; \\\\*d\\\\*', 'max_length', '\\\\- no list')
    """
    text = re.sub(r"[\\*\[\]~$#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", visible(text))
    text = re.sub(r"[&<>|`@]", lambda found: ENTITIES[found[0]], text).replace("://", ":&#47;/")
    text = re.sub(r"(?i)\bwww\.", lambda found: f"{found[0][:-1]}&#46;", text)
    text = re.sub(r"^(\s*)([-+=])(?!\d)", r"\1\\\2", text)
    return re.sub(r"^(\s*\d+)([.)])(?!\S)", r"\1\\\2", text)


def _block(block: Block) -> str:
    match block:
        case Table():
            return markdown_table(block)
        case SideBySide():
            return "\n\n".join(markdown_table(made) for stack in block.stacks for made in stack)
        case Facts():
            return _facts(block.pairs)
        case Notices():
            return _bullets(block.items)
        case Code():
            return f"{escaped(block.title)}:\n\n{_fenced(block.text)}"
        case Samples():
            return _table(block.columns, [[_said(said) for said in row] for row in block.rows], set())
        case Collapsed():
            return f"{escaped(block.title)}:\n\n{markdown_table(block.table)}"
        case Preview():
            return _preview(block)
        case Plots():
            return ""


def markdown_table(block: Table) -> str:
    """A table with its note behind it."""
    rows = [[_cell(cell, strong=index == block.strong) for index, cell in enumerate(row)] for row in block.rows]
    written = _table(block.columns, rows, set(block.numeric))
    return f"{written}\n\n{escaped(block.note)}" if block.note else written


def _table(columns: tuple[str, ...], rows: list[list[str]], numeric: set[int]) -> str:
    rules = ["---:" if index in numeric else "---" for index in range(len(columns))]
    lines = [[escaped(column) for column in columns], rules, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(cell: Cell, *, strong: bool) -> str:
    text = escaped(clip(cell.text, LONGEST))
    return f"**{text}**" if strong and text and cell.text != DASH else text


def _said(said: Answer) -> str:
    if said.text is None:
        return DASH
    parts = ["<br>" if piece.kind == "break" else escaped(piece.text) for piece in pieces(clip(said.text, LONGEST))]
    sign = {True: "✓ ", False: "✗ ", None: ""}[said.correct]
    return sign + ("".join(parts) or "(empty)")


def _preview(block: Preview) -> str:
    legend = ", ".join(_span(span) for span in block.legend)
    rows = [[escaped(row.place), escaped(row.about), "".join(map(_span, row.spans))] for row in block.rows]
    return f"{escaped(block.title)} ({legend}):\n\n{_table(('Row', 'Size', 'Text'), rows, set())}"


def _span(span: Span) -> str:
    before, after = BRACKETS.get(span.kind, ("", ""))
    parts = ["<br>" if piece.kind == "break" else escaped(piece.text) for piece in pieces(clip(span.text, LONGEST))]
    return f"{before}{''.join(parts)}{after}"


def _facts(pairs: tuple[tuple[str, str], ...]) -> str:
    return "\n".join(f"- {escaped(label)}: {escaped(clip(value, LONGEST))}" for label, value in pairs)


def _bullets(items: tuple[str, ...]) -> str:
    return "\n".join(f"- {escaped(clip(item, LONGEST))}" for item in items)


def _fenced(text: str) -> str:
    text = visible(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{text}\n{fence}"
