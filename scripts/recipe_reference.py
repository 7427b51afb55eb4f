"""Print docs/recipe.md, the reference of recipe keys, from the pydantic schema; with --write, write the file."""

import ast
import inspect
import re
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, PlainValidator
from pydantic.fields import FieldInfo

from peftcli.recipe.fields import GATE_NAMES
from peftcli.recipe.schema import Recipe

PAGE = Path(__file__).parent.parent / "docs" / "recipe.md"
INTRODUCTION = """\
# Recipe reference

<!-- Written by scripts/recipe_reference.py from the schema; do not edit. -->

A recipe is one YAML file. Unknown keys, duplicate keys, wrong types and contradictions are errors, and
`peftcli validate RECIPE` lists all of them at once. `--set section.key=value` changes a key on the command line.

Paths in a recipe are relative to the recipe's file; `output_dir`, and paths in `--set`, are relative to the working
directory. `~` and environment variables are expanded. YAML anchors, aliases and merge keys (`<<`) work. Durations are
written `90s`, `10min` or `8h30m`. Shares are numbers from 0 to 1.

`trainer` takes any argument of the installed `SFTConfig`, and `adapter` takes the arguments of the chosen
[method](methods.md) under PEFT's names. Old argument names are translated with a notice.
"""
READERS = {
    "read_seconds": "duration",
    "read_tokens": "`auto` or a whole number of at least 1",
    "read_answered_rows": "whole number, at least 1, or `all`",
    "read_share": "number from 0 to 1",
    "read_template": "template",
    "read_test_size": "share or number of rows",
    "read_name": "letters, digits, `.`, `_`, `-`",
    "read_method": "name of a method",
    "read_encoding": "name of an encoding",
    "read_delimiter": "one character",
    "read_quote": "one character or `none`",
    "read_target_modules": "`all-linear`, list of names, regular expression, or `{select: gradient, budget: 0.5%}`",
    "read_layers": "list of numbers, or `{select: gradient, budget: 0.5%}`",
    "freeze_names": "name or list of names",
    "read_where": "columns with a value, a list of values, or a limit",
}
"""What the readers of values that have a notation of their own accept."""
DEFAULTS = {("", "name"): "name of the file"}
"""Defaults that the reader of recipes fills in."""
BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def main() -> None:
    """Print the page, or write it."""
    if "--write" in sys.argv[1:]:
        PAGE.write_text(recipe_reference(), encoding="utf-8")
    else:
        sys.stdout.write(recipe_reference())


def recipe_reference() -> str:
    """The whole page."""
    parts = [INTRODUCTION, *_sections("", Recipe, {}), "## `gates`\n", _gates()]
    return "\n".join(parts).rstrip("\n") + "\n"


def _sections(path: str, section: type[BaseModel], described: dict[type[BaseModel], str]) -> Iterator[str]:
    """The table of a section, then those of the sections in it; a class that has a table already gets no second one."""
    described[section] = path
    meanings = attribute_docstrings(section)
    yield f"## {f'`{path}`' if path else 'Top level'}\n"
    yield f"{inspect.getdoc(section)}\n"
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    inner: list[tuple[str, type[BaseModel]]] = []
    for name, field in section.model_fields.items():
        if path == "adapter" and name == "arguments":
            continue  # a recipe writes them next to the other keys
        value, meaning = value_text(field), meanings.get(name, "")
        for found in _models(field.annotation):
            if "section" not in value:
                continue  # written as one value, not as a section
            below = described.get(found) or _inner_path(path, name, field)
            described[found] = below
            value = value.replace("section", f"[section](#{_anchor(below)})")
            meaning = meaning or inspect.getdoc(found) or ""
            inner.append((below, found))
        if name == "gates":
            value = "[limits by name](#gates)"
        rows.append(_row(name, value, DEFAULTS.get((path, name)) or _default(field), meaning))
    yield "\n".join(rows) + "\n"
    for below, found in inner:
        if below.startswith(path) and below not in ("", path) and _is_below(below, path):
            yield from _sections(below, found, described)


def _is_below(below: str, path: str) -> bool:
    return below.rpartition(".")[0] == path


def _anchor(path: str) -> str:
    """The id of a heading, as GitHub and MkDocs make it."""
    return re.sub(r"[^a-z0-9_-]", "", path.lower())


def _inner_path(path: str, name: str, field: FieldInfo) -> str:
    whole = f"{path}.{name}" if path else name
    return f"{whole}[]" if "tuple" in str(field.annotation) else whole


def _row(*cells: str) -> str:
    name, value, default, meaning = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
    return f"| `{name}` | {value} | {default} | {meaning} |"


def attribute_docstrings(section: type[BaseModel]) -> dict[str, str]:
    """The string under each field of a class and of those that it inherits from."""
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        if cls is BaseModel or not issubclass(cls, BaseModel):
            continue
        body = ast.parse(inspect.getsource(cls)).body[0]
        assert isinstance(body, ast.ClassDef)
        for one, following in zip(body.body, body.body[1:], strict=False):
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and isinstance(following, ast.Expr):
                value = following.value
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found[one.target.id] = inspect.cleandoc(value.value)
    return found


def value_text(field: FieldInfo) -> str:
    """What a field accepts, in words."""
    reader = _reader(field.metadata)
    return reader or _type_text(field.annotation, field.metadata)


def _type_text(annotation: Any, metadata: Any = ()) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _reader(more) or _type_text(inner, more)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        kinds = [_type_text(kind, metadata) for kind in get_args(annotation) if kind is not type(None)]
        return " or ".join(dict.fromkeys(kinds))
    if origin is tuple:
        item = _type_text(get_args(annotation)[0])
        return "limits by name" if item == "Gate" else f"list of {item}"
    if origin is not None and issubclass(origin, Mapping):
        return "arguments by name"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    plain = {str: "text", bool: "`true` or `false`", int: "whole number", float: "number"}
    return plain.get(annotation, getattr(annotation, "__name__", str(annotation))) + _bounds(metadata)


def _reader(metadata: Any) -> str | None:
    for one in metadata:
        if isinstance(one, BeforeValidator | PlainValidator):
            known = READERS.get(getattr(one.func, "__name__", ""))
            if known is not None:
                return known
    return None


def _bounds(metadata: Any) -> str:
    words = []
    for one in metadata:
        limits = getattr(one, "metadata", None) or [one]
        for limit in limits:
            words += [f"{word} {getattr(limit, key)}" for key, word in BOUNDS.items() if hasattr(limit, key)]
    return f", {' and '.join(dict.fromkeys(words))}" if words else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default_factory() if field.default_factory is not None else field.default  # type: ignore[call-arg]
    if value is None or value == () or isinstance(value, BaseModel | Mapping):
        return ""
    return f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{value}`"


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for inner in get_args(annotation):
        yield from _models(inner)


def _gates() -> str:
    names = ", ".join(f"`{name}`" for name in GATE_NAMES)
    return (
        'Limits such as `exact_match: ">= 0.8"`, written as `>=`, `<=`, `>` or `<` and a number. A limit that is not '
        f"met ends the command with exit code 7. See [evaluation and gates](evaluation.md).\n\nNames: {names}.\n"
    )


if __name__ == "__main__":
    main()
