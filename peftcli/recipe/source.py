"""Reads a recipe file as UTF-8, parses it, and applies the `--set` values.

Local paths are made absolute here, and access tokens are rejected, because the recipe is copied into every run folder.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from peftcli.errors import RecipeError
from peftcli.filesystem import expand_path
from peftcli.nearest import nearest
from peftcli.recipe.paths import MODEL, OTHER_KEYS, data_keys
from peftcli.recipe.problems import KeyPath, Problems, Where, dotted, hide_secrets, is_secret, printable
from peftcli.recipe.yaml import Tree, parse_yaml

MAX_BYTES = 1_000_000

_HEX_KEY = re.compile(r"[0-9a-fA-F]{40}")
_SECRET_KEY = re.compile(r"(^|_)(key|token|secret|password)$", re.IGNORECASE)
_VARIABLES = (
    ("hf_", "HF_TOKEN"),
    ("sk-", "OPENAI_API_KEY"),
    ("AKIA", "AWS_ACCESS_KEY_ID"),
    ("gh", "GITHUB_TOKEN"),
)


def read_tree(path: Path, problems: Problems) -> Tree:
    """Read a recipe file.

    Raises:
        RecipeError: the file cannot be read as YAML. Other problems are added to `problems`.
    """
    value, tree = parse_yaml(_read_text(path, problems), problems)
    if value is None and not problems.found:
        _stop(problems, 1, "the file is empty; a recipe needs at least model.name and a dataset")
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else "a single value"
        _stop(
            problems,
            1,
            f"the top level is {kind}; a recipe is a mapping of sections such as model: and dataset:",
        )
    tree.values = value
    return tree


def apply_overrides(tree: Tree, overrides: Sequence[str], problems: Problems) -> None:
    """Apply `section.key=value` strings to the tree; missing sections are created.

    Raises:
        RecipeError: a value is not YAML.
    """
    seen: set[str] = set()
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip()
        where = f"--set {printable(hide_secrets(name))}"
        parts = tuple(name.split("."))
        if where not in problems.overrides:
            problems.overrides.append(where)
        if not equals or not all(parts):
            problems.add(where, "must have the form section.key=value")
            continue
        if not text.strip():
            problems.add(
                where,
                f"{name} has an empty value; give a value (is a shell variable unset?), or write {name}=null for the "
                "default",
            )
            continue
        if name in seen:
            problems.add(where, "is given twice; remove one")
            continue
        seen.add(name)
        above = _scalar_above(tree, parts)
        if above is not None:
            problems.add(where, f"{above} is a single value, so it has no keys to set; set {above} itself")
            continue
        # YAML reserves these first characters, but `gates.exact_match=>= 0.8` is meant as text.
        value, part = (text, None) if text[:1] in tuple(">|%@`") else parse_yaml(text, problems, where)
        tree.put(parts, value, where)
        tree.written.pop(parts, None)
        if part is not None:
            tree.spoiled |= {(*parts, *path) for path in part.spoiled}
            tree.empty |= {(*parts, *path) for path in part.empty}
            tree.written |= {(*parts, *path): number for path, number in part.written.items()}
            tree.places |= {(*parts, *path): where for path in part.places}


def _scalar_above(tree: Tree, parts: tuple[str, ...]) -> str | None:
    for end in range(1, len(parts)):
        value = tree.get(*parts[:end])
        if value is not None and not isinstance(value, dict):
            return ".".join(parts[:end])
    return None


def _read_text(path: Path, problems: Problems) -> str:
    try:
        if path.is_dir():
            raise RecipeError(f"{problems.file}: this is a folder; pass the recipe's YAML file in it")
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{problems.file}: no such file{_nearest_file(path)}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RecipeError(f"{problems.file}: cannot be read: {reason}") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(
            f"{problems.file}: larger than 1 MB; a recipe only has settings, put data into separate files"
        )
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        _stop(problems, 1, "the file is UTF-16; save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        _stop(problems, line, f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8")


def _nearest_file(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")]
    except (OSError, ValueError):
        return f"; the folder {printable(str(path.parent), 300)} does not exist either"
    near = nearest(path.name, sorted(names))
    return f"; did you mean {path.parent / near}?" if near else ""


def _stop(problems: Problems, where: Where, text: str) -> NoReturn:
    problems.add(where, text)
    problems.raise_if_any()
    raise AssertionError("a problem was just added")


def resolve_paths(tree: Tree, recipe: Path, problems: Problems, *, of_run: bool = False) -> frozenset[str]:
    """Make the paths in the tree absolute, in place.

    Paths in the file are relative to its folder, those of `--set` to the working directory.

    Args:
        of_run: the file is the copy in a run folder, whose paths are relative to where that folder really is.

    Returns:
        The dotted keys of the paths that were relative.
    """
    given, real = os.path.abspath(recipe.parent), os.path.realpath(recipe.parent)
    # Earlier versions wrote the paths of a run as seen from the name of its folder, also where that is a link.
    folders = (real, given) if of_run else (given, real)
    here = (os.path.abspath("."),)
    relative: set[str] = set()
    for path in _path_keys(tree, folders):
        holder = _holder(tree.values, path)
        value = holder.get(path[-1]) if holder is not None else None
        if holder is None or not isinstance(value, str) or not value or not _is_path(path, value, tree, problems):
            continue
        start = here if _is_override(tree, path) else folders
        expanded = _expanded(path, value, start[0], tree, problems)
        if expanded is None:
            continue
        holder[path[-1]] = _absolute(expanded, start)
        if not os.path.isabs(expanded):
            relative.add(dotted(path))
    output = tree.get("output_dir")
    if isinstance(output, str) and output:  # relative to the working directory, as the flag of the same name
        expanded = _expanded(("output_dir",), output, ".", tree, problems)
        tree.values["output_dir"] = output if expanded is None else expanded
    return frozenset(relative)


def _path_keys(tree: Tree, folders: Sequence[str]) -> list[KeyPath]:
    """The keys that may hold a path; `model.name` only if it is not a Hub id."""
    keys: list[KeyPath] = [*data_keys(tree.values), *OTHER_KEYS]
    stages = tree.get("stages")
    for index in range(len(stages) if isinstance(stages, list) else 0):
        keys += [("stages", index, "adapter", "init_from"), ("stages", index, "trainer", "deepspeed")]
    name = tree.get(*map(str, MODEL))
    start = (os.path.abspath("."),) if _is_override(tree, MODEL) else folders
    if isinstance(name, str) and any(_is_local(name, folder) for folder in start):
        keys.append(MODEL)
    return keys


def _is_override(tree: Tree, path: KeyPath) -> bool:
    """Whether a value comes from the command line."""
    return isinstance(tree.place(path), str)


def _is_path(path: KeyPath, value: str, tree: Tree, problems: Problems) -> bool:
    """Whether the value of a key is a path; a URL or a template in its place is a problem."""
    if path[-1] == "deepspeed" and value.startswith("{"):
        return False  # an inline configuration
    if path == ("model", "chat_template") and ("{%" in value or "{{" in value):
        text = "model.chat_template is a template; it must be the path of a template file"
        problems.add(tree.place(path), text)
        return False
    if "://" in value:
        text = (
            f"{dotted(path)} is a URL; it must be a local path (use dataset.name for a Hub id, dataset.url for a "
            "database)"
        )
        problems.add(tree.place(path), text)
        return False
    return True


def _expanded(path: KeyPath, value: str, folder: str, tree: Tree, problems: Problems) -> str | None:
    """A path with `~` and environment variables expanded; None if a variable is not set."""
    if not value.startswith("~") and os.path.lexists(os.path.join(folder, value)):
        return value
    try:
        return expand_path(value)
    except ValueError as problem:
        problems.add(
            tree.place(path), f"{dotted(path)} = {printable(value)}: {problem}; set it, or write the full path"
        )
        return None


def _is_local(name: str, folder: str) -> bool:
    if name.startswith(("./", "../", "/", "~", "$")) or name in (".", "..") or os.path.isabs(name):
        return True
    return bool(name) and os.path.isdir(os.path.join(folder, name))


def _absolute(value: str, folders: Sequence[str]) -> str:
    """A path in the first of the folders that has it; in the first one if none has."""
    found = [os.path.normpath(os.path.join(folder, value)) for folder in folders]
    return next((path for path in found if os.path.lexists(path)), found[0])


def _holder(values: Any, path: KeyPath) -> dict[str | int, Any] | None:
    for part in path[:-1]:
        if isinstance(part, int):
            values = values[part]
        else:
            values = values.get(part) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else None


def check_secrets(tree: Tree, problems: Problems) -> None:
    """Add a problem for each value that looks like a secret; the value itself is never shown."""
    for path, value in _texts(tree.values, ()):
        key = next((part for part in reversed(path) if isinstance(part, str)), "")
        hex_key = _SECRET_KEY.search(key) is not None and _HEX_KEY.fullmatch(value) is not None
        if not (is_secret(value) or hex_key):
            continue
        names = [name for start, name in _VARIABLES if start in value and not hex_key]
        variable = names[0] if names else "WANDB_API_KEY"
        problems.add(
            tree.place(path),
            f"{dotted(path)} looks like a secret, and a recipe is copied into every run folder; remove it, "
            f"revoke it if the file was shared, and set the environment variable {variable}",
        )
        tree.spoiled.add(path)


def _texts(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, (*path, index))
    elif isinstance(value, str):
        yield path, value
