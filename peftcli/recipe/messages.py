"""Turns pydantic's errors into messages about the recipe: the key, its value, what is allowed, and the fix."""

import types
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from peftcli.nearest import nearest
from peftcli.recipe.aliases import NAME_ALIASES, VALUE_ALIASES
from peftcli.recipe.earlier_names import RENAMED_KEYS, new_value
from peftcli.recipe.library_args import installed_arguments
from peftcli.recipe.problems import (
    KeyPath,
    Problems,
    choice_text,
    dotted,
    hide_secrets,
    printable,
    show,
)
from peftcli.recipe.schema import Recipe
from peftcli.recipe.yaml import Tree

MANY_CHOICES = 8
"""With more choices than this, a message only names the closest one, if there is a close one."""

_TYPES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "string_too_short": "must not be empty",
    "finite_number": "must be a finite number",
}
_BOUNDS = {
    "greater_than": ("must be greater than", "gt"),
    "greater_than_equal": ("must be at least", "ge"),
    "less_than": ("must be less than", "lt"),
    "less_than_equal": ("must be at most", "le"),
}


def add_schema_problems(error: ValidationError, tree: Tree, problems: Problems) -> None:
    """Add each error of pydantic with its line, except for values that were already rejected."""
    for item in error.errors(include_url=False):
        path: KeyPath = tuple(item["loc"])
        if any(path[:end] in tree.spoiled for end in range(1, len(path) + 1)):
            continue
        if item["type"] == "missing":
            if path[:-1] or isinstance(tree.values, dict):
                problems.add(tree.place(path), f"{dotted(path)} is missing{_example(path)}")
        elif item["type"] == "extra_forbidden":
            problems.add(tree.place(path), dotted(path), partial(unknown_key, path))
        elif not any(spoiled[: len(path)] == path for spoiled in tree.spoiled):
            problems.add(tree.place(path), _sentence(item, path, tree))


def unknown_key(path: KeyPath, beside: Sequence[str] = ()) -> str:
    """A message for an unknown key, with the key that was probably meant.

    Args:
        beside: further valid keys of the section that are not in the schema.

    >>> unknown_key(("adapter", "lora_dropout"))
    'adapter.lora_dropout is not a recipe key; did you mean adapter.dropout?'
    """
    name = hide_secrets(dotted(path))
    section = tuple(part for part in path[:-1] if isinstance(part, str))
    meant = RENAMED_KEYS.get(dotted(path)) or _meant(section, str(path[-1]), beside)
    if meant is not None:
        return f"{name} is not a recipe key; did you mean {meant}?"
    keys = [*_schema_keys().get(".".join(section), []), *beside]
    where = f"the keys of {dotted(path[:-1])}" if section else "the sections and keys"
    return f"{name} is not a recipe key; {where} are {', '.join(keys)}"


def _meant(section: tuple[str, ...], word: str, beside: Sequence[str]) -> str | None:
    plain = word.lower().replace("-", "_")
    own = ".".join(section)
    keys = _schema_keys()
    siblings = [*keys.get(own, []), *beside]
    if plain in siblings:
        return _join(own, plain)
    alias = NAME_ALIASES.get(plain)
    if alias is not None:
        return alias
    others = [section for section in keys if section != own and plain in keys[section]]
    if len(others) == 1:
        return _join(others[0], plain)
    arguments = installed_arguments() or {}
    if plain in arguments and plain not in ("seed", "output_dir"):
        return f"trainer.{plain}"
    near = nearest(plain, siblings)
    if near is not None:
        return _join(own, near)
    everywhere = {key: _join(name, key) for name in reversed(keys) for key in keys[name]}
    everywhere |= {key: f"trainer.{key}" for key in arguments if key not in everywhere}
    near = nearest(plain, everywhere, least=0.8)
    return everywhere[near] if near is not None else None


def _join(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


@cache
def _schema_keys() -> dict[str, list[str]]:
    """The keys of each section by dotted name; the top level has the empty name."""
    keys: dict[str, list[str]] = {}

    def walk(model: type[BaseModel], name: str) -> None:
        # In a recipe, the arguments of a method are at the same level as the other keys.
        keys[name] = [key for key in model.model_fields if key != "arguments"]
        for key, info in model.model_fields.items():
            for section in _sections(info.annotation):
                walk(section, _join(name, key))

    walk(Recipe, "")
    return keys


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    if get_origin(annotation) is None:
        return []
    return [section for part in get_args(annotation) for section in _sections(part)]


def _example(path: KeyPath) -> str:
    examples: dict[KeyPath, str] = {
        ("model",): "; add at least model: {name: ...}",
        ("model", "name"): "; set it to a Hub id, a local folder or tiny:llama",
        ("dataset",): "; add at least dataset: {path: ...}",
    }
    return examples.get(path, "")


def _sentence(item: Any, path: KeyPath, tree: Tree) -> str:
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    name = dotted(path)
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        if path in tree.empty:
            return f"{name} is empty; write {name}: {{}} for its defaults, or remove the line"
        return f"{name} must be a section of keys, not {show(value)}"
    if kind == "recipe":
        text = context["text"]
    elif kind == "literal_error":
        text = _choices_of(context["expected"], new_value(path, value) or value)
    elif kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        limit = context[key]
        text = f"{words} {limit:d}" if isinstance(limit, int) else f"{words} {limit:g}"
    elif kind == "string_type" and path in tree.written:
        return f'{name} = {tree.written[path]}: must be text; put it in quotes: "{tree.written[path]}"'
    else:
        text = _TYPES.get(kind, "is not a valid value") + type_hint(kind.removesuffix("_type"), value)
    return f"{name} = {show(value)}: {text}"


def _choices_of(expected: str, value: Any) -> str:
    """Convert pydantic's `'a', 'b' or 'c'` to our format, with the closest choice."""
    choices = [part.strip().strip("'") for part in expected.replace(" or ", ", ").split(", ")]
    return choices_text(choices, value)


def choices_text(choices: list[str], value: Any) -> str:
    """The end of a message for a value that is not one of the choices.

    >>> choices_text(["auto", "bfloat16", "float16"], "bf16")
    'must be auto, bfloat16 or float16; did you mean bfloat16?'
    """
    near = None
    if value is False and "no" in choices:
        near = "no"
    elif isinstance(value, str):
        alias = VALUE_ALIASES.get(value.lower())
        near = nearest(value, [*choices, *(name for name, choice in VALUE_ALIASES.items() if choice in choices)])
        near = alias if alias in choices else VALUE_ALIASES.get(near or "", near)
    if near is not None and len(choices) > MANY_CHOICES:
        return f"is not one of the allowed values; did you mean {near}?"
    return f"must be {choice_text(choices)}" + (f"; did you mean {near}?" if near else "")


def type_hint(wanted: str, value: Any) -> str:
    """A hint for a common reason of a wrong type.

    >>> type_hint("bool", "yes")
    ' (YAML 1.2 reads yes as text)'
    """
    if wanted == "bool" and isinstance(value, str):
        return f" (YAML 1.2 reads {value} as text)" if value.lower() in ("yes", "no", "on", "off", "y", "n") else ""
    if wanted in ("int", "float") and isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return ""
        underscore = "_" in value
        return "; write it without underscores" if underscore else "; remove the quotes"
    if wanted in ("string", "str") and isinstance(value, bool | int | float):
        return f'; put it in quotes: "{printable(show(value))}"'
    return ""
