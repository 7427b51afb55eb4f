"""The recipe's file: found, read as UTF-8 and parsed, with the `--set` values laid over it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from peftcli.errors import RecipeError
from peftcli.nearest import nearest
from peftcli.recipe.problems import Problems, Where, hide_secrets, printable
from peftcli.recipe.yaml_text import Tree, parse_yaml

MAX_BYTES = 1_000_000


def read_tree(path: Path, problems: Problems) -> Tree:
    """Read a recipe file.

    Raises:
        RecipeError: the file cannot be read as YAML at all. Lesser faults are added to `problems`.
    """
    value, tree = parse_yaml(_read_text(path, problems), problems)
    if value is None and not problems.found:
        _stop(problems, 1, "the file is empty; a recipe needs at least model.name and a dataset")
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else "a single value"
        _stop(
            problems,
            1,
            f"{kind} stands at the top; a recipe is a mapping of sections such as model: and dataset:",
        )
    tree.values = value
    return tree


def lay_over(tree: Tree, overrides: Sequence[str], problems: Problems) -> None:
    """Lay `section.key=value` strings over the tree; a section that is absent is made.

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
            problems.add(where, "is not of the form section.key=value")
            continue
        if name in seen:
            problems.add(where, "is given twice; give it once")
            continue
        seen.add(name)
        above = _scalar_above(tree, parts)
        if above is not None:
            problems.add(where, f"{above} holds a single value, so nothing can be set below it")
            continue
        # YAML keeps these first characters for itself, but `gates.exact_match=>= 0.8` means its text.
        value, part = (text, None) if text[:1] in tuple(">|%@`") else parse_yaml(text, problems, where)
        tree.put(parts, value, where)
        if part is not None:
            tree.spoiled |= {(*parts, *path) for path in part.spoiled}
            tree.empty |= {(*parts, *path) for path in part.empty}
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
            raise RecipeError(f"{problems.file}: this is a folder; name the recipe's YAML file in it")
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{problems.file}: no such file{_nearest_file(path)}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RecipeError(f"{problems.file}: cannot be read: {reason}") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(
            f"{problems.file}: larger than 1 MB; a recipe is a page of settings, data has files of its own"
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
        return f"; there is no folder {printable(str(path.parent), 300)} either"
    near = nearest(path.name, sorted(names))
    return f"; did you mean {path.parent / near}?" if near else ""


def _stop(problems: Problems, where: Where, text: str) -> NoReturn:
    problems.add(where, text)
    problems.raise_if_any()
    raise AssertionError("a problem was just added")
