"""Finds the fixes in the messages of peftcli and applies them, so that tests can follow the advice."""

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from peftcli.recipe.schema import Recipe

_SECTIONS = "|".join(Recipe.model_fields)
_KEY = re.compile(rf"(?<![\w.(`/\"])(?P<key>(?:{_SECTIONS})(?:\.\w+)*): ?(?=[\w\"'{{\[-])")
_PLAIN = re.compile(r"-?[\w][\w.+-]*\w|\w")
_OTHER = re.compile(r" or (\w[\w.+-]*\w)(?=$|[,;])")
_CLOSING = {"{": "}", "[": "]"}


@dataclass(frozen=True)
class Offer:
    """A fix: keys of a recipe to set (None removes a key), as a nested mapping."""

    said: str
    keys: dict[str, Any]

    def applied(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """A recipe with the keys."""
        return _merged(copy.deepcopy(recipe), self.keys)


def offers(message: str, recipe: dict[str, Any]) -> list[Offer]:
    """The values of keys that a message offers, such as `set dataset.csv.quote: none`.

    Args:
        recipe: what the message is about; values that it has are descriptions and no offers.
    """
    found = list(dict.fromkeys(_values(re.sub(r"\([^()]*\blimits\.[^()]*\)", "", message))))
    made = [Offer(f"{key}: {value}", _nested(key.split("."), yaml.safe_load(value))) for key, value in found]
    return [one for one in made if one.applied(recipe) != recipe]


def nested_keys(path: Sequence[str], value: Any) -> dict[str, Any]:
    """The nested mapping for a dotted path."""
    return _nested(list(path), value)


def _values(message: str) -> Iterator[tuple[str, str]]:
    end = 0
    for match in _KEY.finditer(message):
        if match.start() < end:
            continue  # inside the value of another key
        text = message[match.end() :]
        value = _flow(text)
        if value is None:
            continue
        end = match.end() + len(value)
        yield match["key"], value
        other = _OTHER.match(text[len(value) :])
        if other is not None and not value.startswith(tuple(_CLOSING)):
            yield match["key"], other[1]


def _flow(text: str) -> str | None:
    """A YAML flow value at the beginning of a text."""
    if text[0] in "\"'":
        end = text.find(text[0], 1)
        return text[: end + 1] if end > 0 else None
    if text[0] not in _CLOSING:
        plain = _PLAIN.match(text)
        return plain.group() if plain is not None else None
    depth, quoted = 0, False
    for at, char in enumerate(text):
        if char == '"':
            quoted = not quoted
        elif not quoted and char in "{[":
            depth += 1
        elif not quoted and char in "}]":
            depth -= 1
            if depth == 0:
                return text[: at + 1]
    return None


def _nested(path: list[str], value: Any) -> dict[str, Any]:
    return {path[0]: value if len(path) == 1 else _nested(path[1:], value)}


def _merged(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    for key, value in more.items():
        if value is None:
            values.pop(key, None)
        elif isinstance(value, dict) and isinstance(values.get(key), dict):
            _merged(values[key], value)
        else:
            values[key] = value
    return values
