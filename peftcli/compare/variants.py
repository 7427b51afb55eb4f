"""Builds the variants of a comparison from recipes and `--vary`: their overrides and folder names."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.errors import RecipeError
from peftcli.recipe.load import load_recipe
from peftcli.recipe.problems import Problems
from peftcli.recipe.yaml import parse_yaml

LONGEST_NAME = 80
MOST_VARIANTS = 200
ROWS_KEY = "dataset.max_train_samples"
_PAIRS = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class Axis:
    """A key of the recipe and its values, as written."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """One run of a comparison.

    Attributes:
        name: of its folder; unique.
        recipe: the file.
        varied: key and value of each `--vary`, as written.
        overrides: all overrides of the recipe.
    """

    name: str
    recipe: Path
    varied: tuple[tuple[str, str], ...]
    overrides: tuple[str, ...]


def read_axes(texts: Sequence[str]) -> list[Axis]:
    """Parse the values of `--vary`.

    Raises:
        RecipeError: one does not have the form key=a,b, or repeats a key or a value.
    """
    axes = [_read_axis(text) for text in texts]
    for first, second in itertools.combinations(axes, 2):
        if first.key == second.key or second.key.startswith(f"{first.key}.") or first.key.startswith(f"{second.key}."):
            raise RecipeError(
                f"--vary {second.key} conflicts with --vary {first.key}; give all values of a key in one option"
            )
    return axes


def _read_axis(text: str) -> Axis:
    key, equals, rest = text.partition("=")
    key, values = key.strip(), split_values(rest)
    if not equals or not key or not all(values):
        raise RecipeError(f"--vary {text}: must have the form section.key=value,value, such as adapter.r=4,16,64")
    for index, value in enumerate(values):
        if value in values[:index]:
            raise RecipeError(f"--vary {key}: {value} is given twice; remove one")
    if key == ROWS_KEY:
        values = ["null" if value == "all" else value for value in values]
    return Axis(key, tuple(values))


def split_values(text: str) -> list[str]:
    """Split at commas, except inside brackets or quotes.

    >>> split_values("[q_proj],[q_proj, v_proj]"), split_values("'a,b', c")
    (['[q_proj]', '[q_proj, v_proj]'], ["'a,b'", 'c'])
    """
    values, open_, quote, begin = [], list[str](), "", 0
    for index, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in _PAIRS:
            open_.append(_PAIRS[char])
        elif open_ and char == open_[-1]:
            open_.pop()
        elif char == "," and not open_:
            values.append(text[begin:index].strip())
            begin = index + 1
    return [*values, text[begin:].strip()]


def make_variants(recipes: Sequence[Path], axes: Sequence[Axis], overrides: Sequence[str]) -> list[Variant]:
    """Every recipe with every combination of values; the last axis varies fastest.

    Args:
        overrides: from `--set`, for all variants.

    Raises:
        RecipeError: there are too many variants, or only one.
    """
    combinations = list(itertools.product(*([(axis.key, value) for value in axis.values] for axis in axes)))
    count = len(recipes) * len(combinations)
    if count == 1:
        raise RecipeError(
            "a comparison needs at least two variants; pass several recipes, or vary a key: --vary adapter.r=4,16"
        )
    if count > MOST_VARIANTS:
        raise RecipeError(f"{count} variants, but at most {MOST_VARIANTS} are allowed; give fewer values in --vary")
    names = unique(
        _folder_name(recipe, varied, several=len(recipes) > 1) for recipe in recipes for varied in combinations
    )
    named = any(text.partition("=")[0].strip() == "name" for text in overrides) or any(a.key == "name" for a in axes)
    found = []
    for name, (recipe, varied) in zip(names, itertools.product(recipes, combinations), strict=True):
        own = [f"{key}={value}" for key, value in varied]
        found.append(Variant(name, recipe, varied, (*overrides, *own, *([] if named else [f"name={name}"]))))
    return found


def check_variants(variants: Sequence[Variant]) -> None:
    """Load the recipe of every variant.

    Raises:
        RecipeError: with the problems of all variants; a problem that several variants share is listed once.
    """
    found: dict[str, list[str]] = {}
    for variant in variants:
        try:
            load_recipe(variant.recipe, variant.overrides)
        except RecipeError as problem:
            message = str(problem)
            for key, _ in variant.varied:
                message = message.replace(f"--set {key}", f"--vary {key}")
            found.setdefault(message, []).append(variant.name)
    if found:
        wrong = sum(map(len, found.values()))
        parts = [f"{_shortened(names)}: {message}" for message, names in found.items()]
        if any(key == "adapter.method" for variant in variants for key, _ in variant.varied):
            example = "--vary 'adapter={method: lora, r: 16},{method: ia3}'"
            parts.append(f"to compare methods with different keys, vary the whole section: {example}")
        raise RecipeError(f"{wrong} of {len(variants)} variants cannot be trained\n" + "\n".join(parts))


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _folder_name(recipe: Path, varied: Sequence[tuple[str, str]], *, several: bool) -> str:
    """A name such as lora-r4 that is valid for a folder and a run."""
    parts = [recipe.stem] if several or not varied else []
    for key, text in varied:
        parts += list(_words("rows" if key == ROWS_KEY else key.rpartition(".")[2], _value(text)))
    made = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip(".-")
    return made[:LONGEST_NAME] or "variant"


def _words(key: str, value: Any) -> Iterator[str]:
    """Strings, lists of strings and true switches are clear by themselves; a number needs its key."""
    if isinstance(value, dict):
        for inner, part in value.items():
            yield from _words(str(inner), part)
    elif isinstance(value, str):
        yield value
    elif value is True:
        yield key
    elif isinstance(value, list) and all(isinstance(part, str) for part in value):
        yield from value
    else:
        written = "all" if value is None else "-".join(map(str, value)) if isinstance(value, list) else str(value)
        yield f"{key}{'' if len(key) == 1 else '-'}{written.lower()}"


def _value(text: str) -> Any:
    """The value parsed as YAML; invalid YAML is returned as it is, since loading the recipe reports it."""
    try:
        return parse_yaml(text, Problems(""), "")[0]
    except RecipeError:
        return text


def unique(names: Iterator[str]) -> list[str]:
    """The names, with a number appended to repeated ones.

    >>> unique(iter(["a", "b", "a"]))
    ['a', 'b', 'a-2']
    """
    found: list[str] = []
    for name in names:
        made, number = name, 1
        while made.lower() in (one.lower() for one in found):  # some file systems are case-insensitive
            number += 1
            made = f"{name}-{number}"
        found.append(made)
    return found
