"""Local paths of a recipe: relative to the recipe's file when read, absolute afterwards."""

import os
from pathlib import Path
from typing import Any

from peftcli.recipe.problems import KeyPath, Problems, dotted
from peftcli.recipe.yaml_text import Tree

_PATH_KEYS: tuple[tuple[str, ...], ...] = (
    ("dataset", "path"),
    ("dataset", "test", "path"),
    ("model", "chat_template"),
    ("evaluation", "retention"),
    ("adapter", "init_from"),
    ("trainer", "deepspeed"),
)


def resolve_paths(tree: Tree, recipe: Path, problems: Problems) -> frozenset[str]:
    """Make the paths in the tree absolute, in place.

    Returns:
        The dotted keys whose path was relative.
    """
    folder = os.path.abspath(recipe.parent)
    relative: set[str] = set()
    keys: list[KeyPath] = [*_PATH_KEYS]
    for name in ("sources", "join"):
        rows = tree.get("dataset", name)
        keys += [("dataset", name, index, "path") for index in range(len(rows) if isinstance(rows, list) else 0)]
    stages = tree.get("stages")
    for index in range(len(stages) if isinstance(stages, list) else 0):
        keys += [("stages", index, "adapter", "init_from"), ("stages", index, "trainer", "deepspeed")]
    name = tree.get("model", "name")
    if isinstance(name, str) and _is_local(name, folder):
        keys.append(("model", "name"))
    for path in keys:
        holder = _holder(tree.values, path)
        value = holder.get(path[-1]) if holder is not None else None
        if holder is None or not isinstance(value, str) or not value:
            continue
        if path[-1] == "deepspeed" and value.startswith("{"):
            continue  # the configuration itself
        if path == ("model", "chat_template") and ("{%" in value or "{{" in value):
            text = "model.chat_template is a template; it takes the path of a file that holds one"
            problems.add(tree.place(path), text)
            continue
        if "://" in value:
            text = (
                f"{dotted(path)} is an address; it takes a local path (dataset.name takes a Hub id, dataset.url the "
                "address of a database)"
            )
            problems.add(tree.place(path), text)
            continue
        holder[path[-1]], was_relative = _absolute(value, folder)
        if was_relative:
            relative.add(dotted(path))
    return frozenset(relative)


def _is_local(name: str, folder: str) -> bool:
    if name.startswith(("./", "../", "/", "~")) or name in (".", "..") or os.path.isabs(name):
        return True
    return bool(name) and os.path.isdir(os.path.join(folder, name))


def _absolute(value: str, folder: str) -> tuple[str, bool]:
    expanded = os.path.expanduser(value)
    return os.path.normpath(os.path.join(folder, expanded)), not os.path.isabs(expanded)


def _holder(values: Any, path: KeyPath) -> dict[str | int, Any] | None:
    for part in path[:-1]:
        if isinstance(part, int):
            values = values[part]
        else:
            values = values.get(part) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else None
