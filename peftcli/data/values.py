"""Converts single values of a row to text."""

import ast
import datetime
import decimal
import json
import math
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from peftcli.recipe.template import written

EMPTY = "with nothing to learn (empty)"
EMPTY_PROMPT = "with an empty prompt"

_ARRAY = re.compile(r"\[[\d.\s+-]*\]")
"""An array of numbers as numpy prints it, without commas."""
_DATES = (datetime.date, datetime.time, datetime.timedelta)
_SCALARS = (bool, int, float, decimal.Decimal, uuid.UUID, *_DATES)


class SkipRow(Exception):
    """A row that is dropped; the text is the reason in the counts."""


class InvalidValue(Exception):
    """A value that stops the run; the text is the message after the location."""


def is_null(value: Any) -> bool:
    """Whether a value is missing: None or NaN.

    >>> is_null(None), is_null(float("nan")), is_null("")
    (True, True, False)
    """
    return value is None or (isinstance(value, float) and value != value)


def type_name(kind: type) -> str:
    """The name of a type in messages and in the data report.

    >>> [type_name(kind) for kind in (str, bool, float, list, dict, bytes)]
    ['text', 'true/false', 'number', 'list', 'object', 'bytes']
    """
    names: tuple[tuple[tuple[type, ...], str], ...] = (
        ((str,), "text"),
        ((bool,), "true/false"),
        ((int, float, decimal.Decimal), "number"),
        ((list, tuple), "list"),
        ((Mapping,), "object"),
        ((bytes, bytearray), "bytes"),
        (_DATES, "date"),
    )
    return next((name for kinds, name in names if issubclass(kind, kinds)), kind.__name__)


def whole_text(value: Any, name: str) -> str:
    """The text of a column that is used without a template.

    Raises:
        SkipRow: the value is not text.
    """
    if isinstance(value, str):
        return value
    raise SkipRow(f"with {name} null" if is_null(value) else _not_text(value, name))


def optional_text(value: Any, name: str) -> str:
    """The text of an optional column; empty if it is missing or only white space.

    Raises:
        SkipRow: the value is not text.
    """
    text = "" if is_null(value) else whole_text(value, name)
    return text if text.strip() else ""


def template_text(value: Any, name: str) -> str:
    """The text of a value inside a template.

    Raises:
        SkipRow: the value is missing or has no plain text form.
    """
    if isinstance(value, list):
        value = written(value)
    if isinstance(value, str):
        return value
    if is_null(value):
        raise SkipRow(f"with {name} null")
    if isinstance(value, float) and math.isinf(value):
        raise SkipRow(f"with {name} infinite")
    if isinstance(value, _SCALARS):
        return str(value)
    raise SkipRow(_not_text(value, name))


def parsed_list(value: Any, reason: str) -> Sequence[Any]:
    """A list, or a list in a string, as JSON or as Python prints it; empty for null and for an empty string.

    Raises:
        SkipRow: with the given reason, if it is neither.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):  # RecursionError: thousands of nested brackets
            value = python_list(value)
    if value is None or value == "" or is_null(value) or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, list | tuple):
        raise SkipRow(reason)
    return value


def python_list(text: str) -> Any:
    """A list as Python or numpy prints it, such as a cell that pandas wrote: ['a', 'b'], [0 1 0]; or the text itself.

    >>> python_list("['a', 'b']"), python_list("[0. 1.]"), python_list("a")
    (['a', 'b'], [0.0, 1.0], 'a')
    """
    text = text.strip()
    if not text.startswith("["):
        return text
    if _ARRAY.fullmatch(text):
        text = ", ".join(text.split()).replace("[, ", "[").replace(", ]", "]")
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: thousands of nested brackets
        return text


def _not_text(value: Any, name: str) -> str:
    kind = type_name(type(value))
    articles = {"object": "an object", "true/false": "true or false", "bytes": "bytes"}
    return f"with {name} not text ({articles.get(kind, f'a {kind}')})"
