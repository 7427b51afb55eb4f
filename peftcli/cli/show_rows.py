"""Rows as the trainer sees them, and what to look at before the first step, as lines for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from peftcli.cli.printable import printable
from peftcli.data.spans import DROPPED, TRAINED, Part, shorten

STYLES = {TRAINED: "bold green", DROPPED: "strike red"}
BRACKETS = {TRAINED: ("{+", "+}"), DROPPED: ("[-", "-]")}


def preview_lines(data: Mapping[str, Any], *, colour: bool) -> list[Text]:
    """Rows as the trainer sees them, after a line that explains the marks; long rows without their middle.

    Args:
        data: content of `data.json`.
        colour: the marks are colours; else `{+trained+}` and `[-cut off-]`.
    """
    rows = data.get("preview") or []
    if not rows:
        return []
    marks = [_marked(Part(kind, word), colour) for kind, word in ((TRAINED, "trained"), (DROPPED, "cut off"))]
    lines = [Text("rows as the trainer sees them: ").append_text(_marked(Part("", "read"), colour))]
    for mark in marks:
        lines[0].append(", ").append_text(mark)
    for row in rows:
        tokens, trained = (f"{row[key]:,}" if row.get(key) is not None else "-" for key in ("tokens", "trained"))
        size = f"{tokens} tokens" + (f", {trained} trained" if row.get("trained", "") is not None else "")
        size = "an image" if row.get("tokens", "") is None else size
        lines.append(Text(f"{as_line(row.get('place'))}: {size}", style="bold" if colour else ""))
        parts = [Part(str(part.get("kind")), str(part.get("text"))) for part in row.get("parts") or []]
        lines.append(Text().join(_marked(part, colour) for part in shorten(parts)))
    return lines


def warning_lines(data: Mapping[str, Any]) -> list[str]:
    """What should be looked at before training, the worst first, one line each."""
    checks = data.get("checks") or []
    failed = [check.get("said") for check in checks if check.get("result") == "fail"]
    said = [*failed, *(data.get("warnings") or [])]
    return list(dict.fromkeys(as_line(text) for text in said if text))


def as_line(value: Any) -> str:
    """Any value as text on one line that can neither colour nor rewrite the terminal.

    >>> as_line("a\\n  b"), as_line(None)
    ('a b', '-')
    """
    return " ".join(printable(str("-" if value is None else value)).split())


def _marked(part: Part, colour: bool) -> Text:
    if colour:
        return Text(printable(part.text), style=STYLES.get(part.kind, "dim"))
    before, after = BRACKETS.get(part.kind, ("", ""))
    return Text(f"{before}{printable(part.text)}{after}")
