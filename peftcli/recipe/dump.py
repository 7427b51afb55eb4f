"""Writes a recipe as YAML for the run folder, and computes its fingerprint and the difference of two recipes."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from peftcli.recipe.fields import Gate, duration_text
from peftcli.recipe.paths import MODEL, OTHER_KEYS, data_keys, relative_path, value_at
from peftcli.recipe.problems import KeyPath, dotted, show
from peftcli.recipe.schema import AdapterSection, Recipe
from peftcli.recipe.yaml import read_scalar

_DURATIONS = (("budget", "wall_clock"), ("budget", "save_every"))


class _Writer(yaml.SafeDumper):
    """Quotes exactly the strings that YAML 1.2 would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal lists twice instead of using aliases."""
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent list items below their key."""
        super().increase_indent(flow, False)


def _write_text(writer: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        is_text = isinstance(read_scalar(text), str)
    except ValueError:
        is_text = False
    plain = is_text and text == text.strip() and text.isprintable()
    return writer.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Writer.add_representer(str, _write_text)


def dump_recipe(recipe: Recipe, path: Path) -> str:
    """The YAML text of a recipe to be saved at `path`; loading it from there gives an equal recipe.

    Paths that were relative are written relative to the folder of `path`, as seen from where that folder really is;
    absolute paths stay absolute. Keys that were not set and have their default value are omitted.
    """
    values = _given(recipe)
    values["name"] = recipe.name
    for key in (MODEL, *data_keys(values), *OTHER_KEYS):
        if dotted(key) in recipe._relative and (target := value_at(values, key)) is not None:
            section = value_at(values, key[:-1])
            section[str(key[-1])] = _relative_path(target, path.parent, is_model=key == MODEL)
    for name, last in _DURATIONS:
        seconds = values.get(name, {}).get(last)
        if seconds is not None:
            values[name][last] = duration_text(seconds)
    order = [key for key in Recipe.model_fields if key in values]
    ordered = {key: values[key] for key in order}
    return yaml.dump(ordered, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=110)


def fingerprint(recipe: Recipe) -> str:
    """SHA-256 of all effective values, including defaults and absolute paths, as 64 hexadecimal digits."""
    canonical = json.dumps(_effective(recipe), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """One line for each key whose effective value differs, such as `adapter.r: 16 -> 64`.

    A default value that only one of the two sets explicitly is not a difference.
    """
    before, after = (dict(_leaves(_effective(recipe), ())) for recipe in (old, new))
    keys = [*before, *(key for key in after if key not in before)]
    absent = object()

    def text(values: dict[str, Any], key: str) -> str:
        return show(values[key]) if key in values else "not set"

    differing = [key for key in keys if before.get(key, absent) != after.get(key, absent)]
    return [f"{key}: {text(before, key)} -> {text(after, key)}" for key in differing]


def _effective(recipe: Recipe) -> dict[str, Any]:
    return {key: _plain(value, whole=True) for key, value in recipe}


def _given(section: BaseModel) -> dict[str, Any]:
    return _beside({key: _plain(getattr(section, key), whole=False) for key in _written_keys(section)})


def _beside(values: dict[str, Any]) -> dict[str, Any]:
    """Move the arguments of a method to the level of the other keys, as in a recipe."""
    arguments: dict[str, Any] = values.pop("arguments", {})
    return values | arguments


def _written_keys(section: BaseModel) -> list[str]:
    """Keys that were set, or whose value is not the default."""
    fields = type(section).model_fields
    given = section.model_fields_set
    if isinstance(section, AdapterSection):  # defaults of the method do not count as set
        return [key for key in fields if key in given]
    default = {key: _default(field) for key, field in fields.items()}
    keys = [key for key in fields if key in given or getattr(section, key) != default[key]]
    # An empty trainer or gates section came from the loader, not from the file.
    return [key for key in keys if key not in ("trainer", "gates", "stages") or getattr(section, key)]


def _default(field: FieldInfo) -> Any:
    # Not pydantic's own function, which copies the default: a frozen mapping cannot be copied.
    return field.default if field.default_factory is None else field.default_factory()  # type: ignore[call-arg]


def _plain(value: Any, *, whole: bool) -> Any:
    if isinstance(value, BaseModel):
        return _beside({key: _plain(item, whole=True) for key, item in value}) if whole else _given(value)
    if isinstance(value, tuple) and value and isinstance(value[0], Gate):
        return {gate.name: gate.text for gate in value}
    if isinstance(value, tuple | list):
        return [_plain(item, whole=whole) for item in value]
    if hasattr(value, "items"):
        return {key: _plain(item, whole=whole) for key, item in value.items()}
    return value


def _relative_path(target: str, folder: Path, *, is_model: bool) -> str:
    relative = relative_path(target, folder)
    # A relative model path needs `./`: `models/tiny` would be read as a Hub id.
    return f"./{relative}" if relative.startswith("~") or (is_model and not relative.startswith("..")) else relative


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    else:
        yield dotted(path), value
