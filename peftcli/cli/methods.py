"""The body of `methods`: the table of methods for the terminal."""

import json
import sys
import textwrap
from collections.abc import Iterator, Sequence

import typer
from pydantic_core import PydanticCustomError

from peftcli.cli.text import JSON_OUTPUT, terminal_width, wrapped
from peftcli.errors import RecipeError
from peftcli.methods import registry
from peftcli.methods.base import LEFT_OUT, OPTIONS
from peftcli.methods.registry import METHODS, conflict_reasons, tasks_text
from peftcli.recipe.fields import read_method
from peftcli.recipe.library_args import recipe_arguments
from peftcli.tasks.registry import TASKS

WIDTH = 110
"""Columns of one method's details if the output is not a terminal."""
GAP = 2
"""Spaces between columns."""
NARROWEST = 20
"""Least columns of a text that wraps."""


def methods_command(name: str | None, *, as_json: bool) -> None:
    """Print the table, or one method."""
    if name is not None:
        try:
            name = read_method(name)
        except PydanticCustomError as problem:
            raise RecipeError(f"{name} {problem.message()}") from None
    if as_json:
        shown = registry.as_json() if name is None else registry.row(METHODS[name])
        JSON_OUTPUT.write(json.dumps(shown, ensure_ascii=False), sys.stdout)
        return
    for line in method_lines(name, terminal_width(sys.stdout)):
        typer.echo(line)


def method_lines(name: str | None = None, width: int | None = None) -> Iterator[str]:
    """The lines of the table, or the details of one method.

    Args:
        width: columns to wrap at; None for one line per row.
    """
    if name is not None:
        yield from _one(name, width)
        return
    rows: list[tuple[str, ...]] = [("method", "4-bit", "8-bit", "merge", "tasks", "what is trained")]
    for one in METHODS.values():
        marks = ("no" if why else "yes" for why in (one.four_bit, one.eight_bit, one.merge))
        rows.append((one.name, *marks, "all" if len(one.tasks) == len(TASKS) else tasks_text(one), one.what))
    yield from table_lines(rows, width)
    yield ""
    yield f"tasks: all means {', '.join(task.short for task in TASKS.values())}"
    yield ""
    yield "LoRA variants set by one more key"
    options = [(one.name, one.keys, one.what + (f"; needs {one.needs}" if one.needs else "")) for one in OPTIONS]
    yield from table_lines(options, width, indent="  ")
    yield ""
    yield "methods of the installed PEFT that are not supported"
    yield from table_lines(list(LEFT_OUT.items()), width, indent="  ")
    yield ""
    yield from wrapped(
        "`peftcli methods NAME` shows one method: its arguments, and the reason for each no", width
    ).split("\n")


def table_lines(rows: Sequence[Sequence[str]], width: int | None, indent: str = "") -> Iterator[str]:
    """Rows as aligned columns; the last column wraps within itself.

    Args:
        width: columns to wrap at; None for one line per row.
    """
    widths = [max(map(len, column)) + GAP for column in list(zip(*rows, strict=True))[:-1]]
    start = len(indent) + sum(widths)
    for *cells, last in rows:
        head = indent + "".join(f"{cell:<{wide}}" for cell, wide in zip(cells, widths, strict=True))
        room = sys.maxsize if width is None else max(NARROWEST, width - start)
        first, *rest = textwrap.wrap(last, room, break_on_hyphens=False, break_long_words=False) or [""]
        yield head + first
        yield from (" " * start + line for line in rest)


def _one(name: str, width: int | None) -> Iterator[str]:
    one = METHODS[name]
    shared = [f"{key} ({one.defaults.get(key)})" for key in one.argument_names]
    rows = [
        ("paper", one.paper),
        ("tasks", ", ".join(one.tasks)),
        ("4-bit", f"no: {one.four_bit}" if one.four_bit else "yes"),
        ("8-bit", f"no: {one.eight_bit}" if one.eight_bit else "yes"),
        ("merge", f"no: {one.merge}" if one.merge else "yes"),
        *(("not with", f"{conflict}: {reason}") for conflict, reason in conflict_reasons(one)),
        ("keys", ", ".join(shared) or "none (no r, alpha or dropout)"),
        ("arguments", ", ".join(recipe_arguments(name)) or "none"),
    ]
    yield from wrapped(f"{one.name}: {one.title}, {one.what}", width).split("\n")
    yield from table_lines(rows, WIDTH if width is None else width)
