"""JSON objects as frozen dataclasses: `parse` checks the types, `dump` writes the same keys again."""

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

EXPECTED = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
OMIT_NONE = {"omit_none": True}
"""Metadata of a field whose key is left out, and not written as null, while it is None."""
OTHER_KEYS = {"other_keys": True}
"""Metadata of a mapping that takes all keys of its object that no other field names."""


def renamed_from(key: str) -> dict[str, str]:
    """Metadata of a field that earlier files have under another key, which is read where the field's own is missing."""
    return {"renamed_from": key}


class WrongType(ValueError):
    """A value of a JSON object that its dataclass does not allow."""


def parse(kind: type[T], value: Any, where: str = "") -> T:
    """Make a dataclass of a JSON object.

    A missing key and null give the field's default, a number that is not finite is null, and a key that no field
    names is ignored.

    Args:
        kind: a dataclass; its fields may be numbers, text, booleans, `tuple[X, ...]`, `Mapping[str, X]`, dataclasses,
            each of them or None, and `Any`.
        where: names the object in a message.

    Raises:
        WrongType: with the key, what is there and what is expected.
    """
    if not isinstance(value, dict):
        raise _wrong(where, value, "an object")
    hints, known = _hints(kind), fields(kind)  # type: ignore[arg-type]  # a dataclass, as the docstring asks
    found: dict[str, Any] = {}
    for one in known:
        if "other_keys" in one.metadata:
            named = {other.name for other in known}
            rest = {key: part for key, part in value.items() if key not in named}
            found[one.name] = _convert(hints[one.name], rest, where)
        elif (key := _key_of(one, value)) is not None:
            found[one.name] = _convert(hints[one.name], value[key], f"{where}.{key}".lstrip("."))
        elif _is_required(one):
            raise WrongType(f"{f'{where}.{one.name}'.lstrip('.')} is missing")
    return kind(**{name: part for name, part in found.items() if part is not None})


def dump(value: Any) -> Any:
    """The JSON form of a dataclass, and of lists and objects of them."""
    if is_dataclass(value):
        made: dict[str, Any] = {}
        for one in fields(value):
            part = getattr(value, one.name)
            if "other_keys" in one.metadata:
                made |= dump(part)
            elif part is not None or "omit_none" not in one.metadata:
                made[one.name] = dump(part)
        return made
    if isinstance(value, Mapping):
        return {key: dump(part) for key, part in value.items()}
    return [dump(part) for part in value] if isinstance(value, list | tuple) else value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _key_of(one: Field[Any], value: Mapping[str, Any]) -> str | None:
    """The key of an object that holds the value of a field: its own, its earlier one, or None where neither does."""
    keys = (one.name, one.metadata.get("renamed_from"))
    return next((key for key in keys if key is not None and value.get(key) is not None), None)


def _is_required(one: Field[Any]) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (only,) = (part for part in arguments if part is not type(None))
        return _convert(only, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(where, value, "a list")
        return tuple(_convert(arguments[0], part, f"{where}[{at}]") for at, part in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")
        return {key: _convert(arguments[1], part, f"{where}.{key}".lstrip(".")) for key, part in value.items()}
    if is_dataclass(hint):
        return parse(hint, value, where)  # type: ignore[arg-type]
    return value if hint is Any else _scalar(hint, value, where)


def _scalar(hint: type, value: Any, where: str) -> Any:
    if hint in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            return None
        if hint is float or isinstance(value, int):
            return value
        if value.is_integer():
            return int(value)
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise _wrong(where, value, EXPECTED[hint])


def _wrong(where: str, value: Any, expected: str) -> WrongType:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return WrongType(f"{where or 'the content'} is {shown}, but {expected} is expected")
