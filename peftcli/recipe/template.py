"""Templates over the columns of a row: `{column}` stands for its value, `{{` and `}}` for braces.

`{column.0.key}` reaches into a nested value: what follows a dot is a key or the position in a list.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from peftcli.errors import RecipeError

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_LONGEST_POSITION = 9
"""Digits of a list position; more are a key at best, and Python refuses to read thousands of them."""


def template_columns(template: str) -> list[str]:
    """The columns, or paths from a column on, that a template names, each once, in order.

    >>> template_columns("{question} {{literal}} {answers.0.text} {question}")
    ['question', 'answers.0.text']

    Raises:
        ValueError: the template is not well formed; the text says what to write.
    """
    return list(dict.fromkeys(path for _, path in _pieces(template) if path is not None))


def render(template: str, row: Mapping[str, Any]) -> str:
    """Fill a template from a row; a value never acts as a template itself.

    >>> render("{name} costs {{{price}}}", {"name": "a {price}", "price": 3})
    'a {price} costs {3}'

    Raises:
        KeyError: the row lacks a column that the template names.
        ValueError: the template is not well formed.
    """
    return "".join(text if path is None else str(written(value_at(row, path))) for text, path in _pieces(template))


def compile_template(template: str, paths: Sequence[str]) -> Callable[..., str]:
    """A function that fills the template from the texts of `paths`, one argument for each, in that order.

    >>> compile_template("{{{b}}} {a} {b}", ["a", "b"])("x", "{y}")
    '{{y}} x {y}'

    Raises:
        ValueError: the template is not well formed, or names what is not in `paths`.
    """
    places = [
        text.replace("{", "{{").replace("}", "}}") if path is None else f"{{{paths.index(path)}}}"
        for text, path in _pieces(template)
    ]
    return "".join(places).format


def split_path(path: str, columns: Collection[str]) -> tuple[str, tuple[str, ...]] | None:
    """The column that a path begins with and the steps from there, or None where there is no such column.

    A column whose own name holds the dots wins.

    >>> split_path("a.b.0", ["a", "a.b"]), split_path("No.", ["No."]), split_path("c.d", ["a"])
    (('a.b', ('0',)), ('No.', ()), None)
    """
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        column = ".".join(parts[:length])
        if column in columns:
            return column, tuple(parts[length:])
    return None


def reach(value: Any, steps: Sequence[str]) -> Any:
    """The value that the steps lead to.

    >>> reach([{"output": "yes"}], ["0", "output"])
    'yes'

    Raises:
        LookupError: there is no such key or position.
    """
    for step in steps:
        if isinstance(value, Mapping):
            value = value[step]
        elif isinstance(value, list | tuple) and step.isdecimal() and len(step) <= _LONGEST_POSITION:
            value = value[int(step)]
        else:
            raise KeyError(step)
    return value


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or what stands at a path within it.

    >>> value_at({"instances": [{"output": "yes"}]}, "instances.0.output")
    'yes'

    Raises:
        KeyError: the row has nothing there.
    """
    found = split_path(path, row)
    if found is None:
        raise KeyError(path)
    try:
        return reach(row[found[0]], found[1])
    except LookupError:
        raise KeyError(path) from None


def written(value: Any) -> Any:
    """A list of words as one text, with a space between them; any other value as it is.

    >>> written(["New", "York"]), written([1, 2]), written(3)
    ('New York', [1, 2], 3)
    """
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return " ".join(value)
    return value


def _pieces(template: str) -> list[tuple[str, str | None]]:
    """The template cut into literal texts (with None) and paths (with an empty text)."""
    pieces: list[tuple[str, str | None]] = []
    end = 0
    for match in _PIECE.finditer(template):
        pieces.append((template[end : match.start()], None))
        end = match.end()
        piece = match.group()
        if piece in ("{{", "}}"):
            pieces.append((piece[0], None))
        elif match.group(1) is None:
            raise ValueError(
                f"a single {piece} at character {match.start() + 1}; write {piece * 2} for the brace itself"
            )
        else:
            pieces.append(("", _checked(match.group(1))))
    pieces.append((template[end:], None))
    return pieces


def _checked(name: str) -> str:
    if not name.strip():
        raise ValueError("{} names no column; write {column}, or {{}} for the braces themselves")
    if "[" in name:
        dotted = re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]?", r".\1", name)
        raise ValueError(f"{{{name}}} asks for an index; behind the column, write dots, such as {{{dotted}}}")
    for sign, what in ((":", "a format"), ("!", "a conversion")):
        if sign in name:
            plain = name.partition(sign)[0] or "column"
            raise ValueError(f"{{{name}}} asks for {what}; a template takes whole columns only, such as {{{plain}}}")
    return name


def fill_template(text: str, template: str) -> str:
    """Put what was asked into the columns of a template.

    Raises:
        RecipeError: it has several columns and the text is no JSON object with them.
    """
    columns = template_columns(template)
    if len(columns) == 1 and not text.lstrip().startswith("{"):
        return render(template, {columns[0]: text})
    try:
        row = json.loads(text)
    except json.JSONDecodeError:
        row = None
    missing = [name for name in columns if not isinstance(row, dict) or split_path(name, row) is None]
    if missing:
        example = json.dumps({name: "..." for name in columns})
        raise RecipeError(f"the prompt template is {template!r}; give a JSON object such as {example}, or --raw")
    return render(template, row)
