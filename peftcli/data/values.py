"""One value of a row: what it is, and its text where it has one."""

import datetime
import decimal
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from peftcli.recipe.template import written

EMPTY = "with nothing to learn (empty)"
EMPTY_PROMPT = "with an empty prompt"

_DATES = (datetime.date, datetime.time, datetime.timedelta)
_SCALARS = (bool, int, float, decimal.Decimal, uuid.UUID, *_DATES)


class SkipRow(Exception):
    """A row that makes no example; the text is the reason, as the counts show it."""


class InvalidValue(Exception):
    """A value that stops the run; the text is what stands behind the place in the message."""


def is_null(value: Any) -> bool:
    """Whether nothing stands there: None, or a float that is no number.

    >>> is_null(None), is_null(float("nan")), is_null("")
    (True, True, False)
    """
    return value is None or (isinstance(value, float) and value != value)


def type_name(kind: type) -> str:
    """The word for a type in messages and in the data report.

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
    """The text of a column that is used as it is.

    Raises:
        Unused: it holds no text.
    """
    if isinstance(value, str):
        return value
    raise SkipRow(f"with {name} null" if is_null(value) else _not_text(value, name))


def optional_text(value: Any, name: str) -> str:
    """The text of a column that may be absent; empty where it is, or holds white space only.

    Raises:
        Unused: it holds something that is no text.
    """
    text = "" if is_null(value) else whole_text(value, name)
    return text if text.strip() else ""


def template_text(value: Any, name: str) -> str:
    """What a value reads as within a template.

    Raises:
        Unused: nothing stands there, or nothing that has a plain text.
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
    """A list, or the list that a JSON text holds; empty for null and for an empty text.

    Raises:
        Unused: with the reason given, where it is neither.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):  # RecursionError: brackets within brackets, thousands deep
            raise SkipRow(reason) from None
    if value is None or value == "" or is_null(value) or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, list | tuple):
        raise SkipRow(reason)
    return value


def _not_text(value: Any, name: str) -> str:
    kind = type_name(type(value))
    articles = {"object": "an object", "true/false": "true or false", "bytes": "bytes"}
    return f"with {name} not text ({articles.get(kind, f'a {kind}')})"
