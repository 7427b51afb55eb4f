"""Templates over the columns of a row: `{column}` is replaced by its value, `{{` and `}}` are literal braces.

`{column.0.key}` accesses a nested value: each part after a dot is a key or a list index.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from peftcli.errors import RecipeError

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_LONGEST_POSITION = 9
"""Maximum digits of a list index; Python refuses to parse integers with thousands of digits."""


def template_columns(template: str) -> list[str]:
    """The columns, or paths into columns, that a template uses, without duplicates, in order.

    >>> template_columns("{question} {{literal}} {answers.0.text} {question}")
    ['question', 'answers.0.text']

    Raises:
        ValueError: the template is malformed; the message says how to fix it.
    """
    return list(dict.fromkeys(path for _, path in _pieces(template) if path is not None))


def render(template: str, row: Mapping[str, Any]) -> str:
    """Fill a template from a row; values are not interpreted as templates.

    >>> render("{name} costs {{{price}}}", {"name": "a {price}", "price": 3})
    'a {price} costs {3}'

    Raises:
        KeyError: the row does not have a column of the template.
        ValueError: the template is malformed.
    """
    return "".join(text if path is None else str(written(value_at(row, path))) for text, path in _pieces(template))


def compile_template(template: str, paths: Sequence[str]) -> Callable[..., str]:
    """A function that fills the template from the values of `paths`, one argument each, in that order.

    >>> compile_template("{{{b}}} {a} {b}", ["a", "b"])("x", "{y}")
    '{{y}} x {y}'

    Raises:
        ValueError: the template is malformed, or uses a path that is not in `paths`.
    """
    parts = [
        text.replace("{", "{{").replace("}", "}}") if path is None else f"{{{paths.index(path)}}}"
        for text, path in _pieces(template)
    ]
    return "".join(parts).format


def split_path(path: str, columns: Collection[str]) -> tuple[str, tuple[str, ...]] | None:
    """The column of a path and the steps into it, or None if there is no such column.

    A column name that contains dots takes precedence.

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
        LookupError: there is no such key or index.
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
    """The value of a column, or at a path within it.

    >>> value_at({"instances": [{"output": "yes"}]}, "instances.0.output")
    'yes'

    Raises:
        KeyError: the row has no value there.
    """
    found = split_path(path, row)
    if found is None:
        raise KeyError(path)
    try:
        return reach(row[found[0]], found[1])
    except LookupError:
        raise KeyError(path) from None


def written(value: Any) -> Any:
    """A list of strings joined with spaces; any other value unchanged.

    >>> written(["New", "York"]), written([1, 2]), written(3)
    ('New York', [1, 2], 3)
    """
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return " ".join(value)
    return value


def _pieces(template: str) -> list[tuple[str, str | None]]:
    """The template split into literal text (with None) and paths (with empty text)."""
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
                f"a single {piece} at character {match.start() + 1}; write {piece * 2} for a literal brace"
            )
        else:
            pieces.append(("", _checked(match.group(1))))
    pieces.append((template[end:], None))
    return pieces


def _checked(name: str) -> str:
    if not name.strip():
        raise ValueError("{} has no column name; write {column}, or {{}} for literal braces")
    if "[" in name:
        dotted = re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]?", r".\1", name)
        raise ValueError(f"{{{name}}} uses brackets; access nested values with dots, such as {{{dotted}}}")
    for char, what in ((":", "a format"), ("!", "a conversion")):
        if char in name:
            plain = name.partition(char)[0] or "column"
            raise ValueError(f"{{{name}}} has {what}, which templates do not support; write {{{plain}}}")
    return name


def fill_template(text: str, template: str) -> str:
    """Fill the columns of a template from a text.

    Raises:
        RecipeError: the template has several columns, and the text is not a JSON object with them.
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
