"""Checks the values of library arguments against the types and choices in the libraries' source."""

from collections.abc import Sequence
from typing import Any

from peftcli.recipe.library_args import Argument
from peftcli.recipe.messages import choices_text, type_hint
from peftcli.recipe.problems import choice_text

_KIND_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping",
    "list": "a list",
    "none": "null",
}
_LIMIT_WORDS = {">": "greater than", ">=": "at least", "<": "less than", "<=": "at most"}


def type_error(argument: Argument, value: Any) -> str | None:
    """What is wrong with the type or the choice of a value, or None."""
    kinds = argument.kinds
    if argument.choices and isinstance(value, str):
        open_ended = tuple(word for word in argument.choices if word.endswith("_"))
        if value in argument.choices or value.startswith(open_ended):
            return None
        message = choices_text([*argument.choices], value)
        same = next((word for word in argument.choices if word.lower() == value.lower()), None)
        return message if same is None or "did you mean" in message else f"{message}; did you mean {same}?"
    if "any" in kinds or any(_is_kind(value, kind) for kind in kinds if kind != "str" or not argument.choices):
        return None
    if argument.choices and kinds <= {"str", "none"}:
        return choices_text([*argument.choices], value)
    order = [kind for kind in _KIND_WORDS if kind in kinds]
    if "float" in order and "int" in order:
        order.remove("int")
    words = [_KIND_WORDS[kind] for kind in order]
    hint = next((hint for kind in order if (hint := type_hint(kind, value))), "")
    return f"must be {choice_text(words)}{hint}"


def limit_fault(value: Any, limits: Sequence[tuple[str, float]]) -> str | None:
    """What is wrong with a number that is not finite or outside limits such as `(">", 0)`; None for other types."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if value != value or value in (float("inf"), float("-inf")):
        return "must be a finite number"
    for sign, limit in limits:
        met = {">": value > limit, ">=": value >= limit, "<": value < limit, "<=": value <= limit}[sign]
        if not met:
            return f"must be {_LIMIT_WORDS[sign]} {limit:g}"
    return None


def nested_type_error(value: Any) -> str | None:
    """What is wrong with a non-finite number, also inside a mapping or a list."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return next((fault for item in items if (fault := nested_type_error(item))), None)
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return "must contain finite numbers only"
    return None


def _is_kind(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or kind == "bool":
        return isinstance(value, bool) and kind == "bool"
    if kind == "none":
        return value is None
    classes: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "dict": dict, "list": list}
    return isinstance(value, classes[kind])
