"""The paths in a recipe: which keys hold one, and the same recipe with its files in other places."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from peftcli.recipe.fields import freeze_mapping
from peftcli.recipe.problems import KeyPath
from peftcli.recipe.schema import Recipe

DATA_KEYS: tuple[KeyPath, ...] = (
    ("dataset", "path"),
    ("dataset", "test", "path"),
    ("dataset", "validation", "path"),
)
"""Files that hold rows; `dataset.sources` and `dataset.join` have one in each item."""
OTHER_KEYS: tuple[KeyPath, ...] = (
    ("model", "chat_template"),
    ("evaluation", "forgetting_text"),
    ("adapter", "init_from"),
    ("trainer", "deepspeed"),
)
MODEL: KeyPath = ("model", "name")
"""A path only where it is not a Hub id."""


def data_keys(values: Any) -> Iterator[KeyPath]:
    """The keys of a recipe that may name files with rows, the training rows first.

    Args:
        values: the recipe, or its values as read.
    """
    yield from DATA_KEYS[:1]
    for name in ("sources", "join"):
        rows = value_at(values, ("dataset", name))
        count = len(rows) if isinstance(rows, list | tuple) else 0
        yield from (("dataset", name, index, "path") for index in range(count))
    yield from DATA_KEYS[1:]


def input_paths(recipe: Recipe) -> dict[KeyPath, str]:
    """The local files and folders that a recipe names, as absolute paths by key; a Hub id is none."""
    found = {key: value_at(recipe, key) for key in (MODEL, *data_keys(recipe), *OTHER_KEYS)}
    return {key: path for key, path in found.items() if isinstance(path, str) and os.path.isabs(path)}


def value_at(values: Any, path: KeyPath) -> Any:
    """A value of a recipe or of its sections, None where a part of the path is missing."""
    for part in path:
        if isinstance(part, int):
            values = values[part] if isinstance(values, list | tuple) and part < len(values) else None
        elif isinstance(values, BaseModel):
            values = getattr(values, part, None)
        else:
            values = values.get(part) if isinstance(values, Mapping) else None
    return values


def with_paths(recipe: Recipe, paths: Mapping[KeyPath, str]) -> Recipe:
    """A recipe with other values of existing keys."""
    for key, path in paths.items():
        recipe = _replaced(recipe, key, path)
    return recipe


def _replaced(value: Any, path: KeyPath, new: str) -> Any:
    if not path:
        return new
    part, rest = path[0], path[1:]
    if isinstance(part, int):
        return tuple(_replaced(item, rest, new) if index == part else item for index, item in enumerate(value))
    if isinstance(value, BaseModel):
        return value.model_copy(update={part: _replaced(getattr(value, part), rest, new)})
    return freeze_mapping(dict(value) | {part: _replaced(value[part], rest, new)})


def relative_path(path: str | Path, folder: str | Path) -> str:
    """A path as seen from a folder; if the folder is reached through a link, from where it really is."""
    return os.path.relpath(os.path.abspath(path), os.path.realpath(folder))


def path_from(folder: str | Path, relative: str) -> str:
    """The inverse of `relative_path`: the absolute path that a relative one from a folder names."""
    return os.path.normpath(os.path.join(os.path.realpath(folder), relative))
