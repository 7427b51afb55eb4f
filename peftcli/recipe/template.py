"""Templates over the columns of a row: `{column}` stands for its value, `{{` and `}}` for braces."""

import re
from collections.abc import Mapping
from typing import Any

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def template_columns(template: str) -> list[str]:
    """The columns that a template names, each once, in order.

    >>> template_columns("{question} {{literal}} {answer} {question}")
    ['question', 'answer']

    Raises:
        ValueError: the template is not well formed; the text says what to write.
    """
    columns: dict[str, None] = {}
    for match in _PIECE.finditer(template):
        piece = match.group()
        if piece in ("{{", "}}"):
            continue
        if match.group(1) is None:
            raise ValueError(
                f"a single {piece} at character {match.start() + 1}; write {piece * 2} for the brace itself"
            )
        columns[_checked(match.group(1))] = None
    return list(columns)


def render(template: str, row: Mapping[str, Any]) -> str:
    """Fill a template from a row; a value never acts as a template itself.

    >>> render("{name} costs {{{price}}}", {"name": "a {price}", "price": 3})
    'a {price} costs {3}'

    Raises:
        KeyError: the row lacks a column that the template names.
        ValueError: the template is not well formed.
    """
    template_columns(template)

    def fill(match: re.Match[str]) -> str:
        column = match.group(1)
        return match.group()[0] if column is None else str(row[column])

    return _PIECE.sub(fill, template)


def _checked(name: str) -> str:
    if not name.strip():
        raise ValueError("{} names no column; write {column}, or {{}} for the braces themselves")
    for sign, what in ((":", "a format"), ("!", "a conversion"), ("[", "an index"), (".", "an attribute")):
        if sign in name:
            plain = name.partition(sign)[0] or "column"
            raise ValueError(f"{{{name}}} asks for {what}; a template takes whole columns only, such as {{{plain}}}")
    return name
