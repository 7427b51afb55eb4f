"""Each file of fixtures/broken_recipes/ holds one fault; its first line is the message that the user must see."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from advice import Offer, nested_keys, offers

from peftcli.errors import RecipeError
from peftcli.recipe.load import load_recipe

FOLDER = Path(__file__).parents[2] / "fixtures" / "broken_recipes"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_broken_recipe_gets_exactly_its_message(path: Path) -> None:
    first = path.read_bytes().splitlines()[0].decode("utf-8", "replace")
    assert first.startswith("# expect: "), "the first line names the message"
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).replace(str(path), "FILE") == first.removeprefix("# expect: ")
    assert "\n" not in str(caught.value), "one fault, one line"
    assert caught.value.exit_code == 2


def test_there_are_enough_broken_recipes() -> None:
    assert len(FILES) >= 35


# Advice: each fix that a message offers is applied, and must lead to success or to another problem.

MESSAGES = {path: path.read_bytes().splitlines()[0].decode("utf-8", "replace")[len("# expect: ") :] for path in FILES}
KEY = r"[a-z][a-z_\d]*(?:\.[a-z][a-z_\d]*(?:\[\d\])?)*"
BY_HAND = re.compile(
    r"(write|remove|put|set|give|quote|indent|save|add|check|close|use|needs|in quotes|never closed|did you mean \*"
    r"|refers to|are|with spaces|must be a (?:section|mapping)|access nested values|a recipe is"
    r"|set twice; the first)[^;]*$"
)
"""The end of a message about the notation, or about a value that only a person knows."""


def _fixes(message: str, recipe: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Recipes after each fix of a message."""
    text = message.partition(": ")[2]
    key = (re.match(KEY, text) or [""])[0]
    path = [int(part) if part.isdigit() else part for part in re.findall(r"[a-z][a-z_\d]*|\d+", key)]
    if key and (
        near := re.search(
            rf"(?:did you mean|use|write) ({KEY}|[\w-]+|\{{.*?\}}|\d+\w+)(?:: (\S+?))?(?:,| or |\?|$)", text
        )
    ):
        yield from _nearest(near, path, recipe)
    if match := re.search(r"cannot be set here: set ([a-z.]+)(?:: (\w+) or (\w+))?", text):
        for value in match.groups()[1:] if match[2] else [None]:
            moved = _moved(recipe, path, match[1].split(".")) if value is None else _without(recipe, path)
            yield moved if value is None else Offer("", nested_keys(match[1].split("."), value)).applied(moved)
    if match := re.search(rf"^({KEY}).* (?:excludes|and|contradicts) ({KEY})(?: = \w+)? ?(?:\(line|exclude)", text):
        kept = re.search(rf"; keep ({KEY})$", text)
        for one in {match[1], match[2]} - ({kept[1]} if kept and "." in kept[1] else set()):
            yield _without(recipe, one.split("."))
    if re.search(r"; remove (it|the line|one of the two|the column)|or remove the (line|column)", text):
        yield _without(recipe, path)
    if match := re.search(r"must be ((?:[\w-]+, )*[\w-]+ or [\w-]+)(?:;|$| \()", text):
        yield from (_set(recipe, path, yaml.safe_load(one)) for one in re.split(", | or ", match[1]))
    if match := re.search(r"must be (at least|greater than|less than) (\d+)", text):
        yield _set(recipe, path, int(match[2]) + {"at least": 0, "greater than": 1, "less than": -0.5}[match[1]])
    if match := re.search(r"such as (\[.*?\]|\".*?\"|\w+)|quotes: (\".*\")$", text):
        yield _set(recipe, path, yaml.safe_load(match[1] or match[2]))
    if "must be a whole number" in text or "must be a finite number" in text:
        yield _set(recipe, path, 8)
    if match := re.search(r"such as (\w+), (\w+) or (\w+)", text):
        yield from (_set(recipe, path, one) for one in match.groups())
    if "has q_proj twice" in text:
        yield _set(recipe, path, ["q_proj"])
    if match := re.search(rf"({KEY}) needs ({KEY}); add it, or use one template in ({KEY})", text):
        yield _set(recipe, match[2].split("."), "{a}")
        yield _set(_without(recipe, match[1].split(".")), match[3].split("."), "{a}")
    if match := re.search(r"set (dataset\.\w+)(?: \(files\) or (dataset\.\w+))?(?: |$)", text):
        yield from (_set(recipe, one.split("."), "rows") for one in match.groups() if one)
    if "did you mean" not in text and "cannot be set" not in text:
        yield from (one.applied(recipe) for one in offers(text.replace("...", "rows"), recipe))


def _nearest(near: re.Match[str], path: list[Any], recipe: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "{" in near[1]:  # a template
        old = re.findall(r"\{[^}]*\}", near.string)[0]
        yield _set(recipe, path, str(_get(recipe, path)).replace(old, near[1]))
    elif near[2] is not None:
        yield Offer("", nested_keys(near[1].split("."), yaml.safe_load(near[2]))).applied(_without(recipe, path))
    elif "is not a" in near.string or " was " in near.string:
        yield _moved(recipe, path, near[1].split("."))
    else:
        yield _set(recipe, path, near[1])


def _get(values: Any, path: list[Any]) -> Any:
    for part in path:
        values = values[part]
    return values


def _set(recipe: dict[str, Any], path: list[Any], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(recipe)
    _get(changed, path[:-1])[path[-1]] = value
    return changed


def _without(recipe: dict[str, Any], path: list[Any]) -> dict[str, Any]:
    changed = copy.deepcopy(recipe)
    section = _get(changed, path[:-1])
    section.pop(path[-1])
    return changed if section or len(path) == 1 else _without(changed, path[:-1])


def _moved(recipe: dict[str, Any], path: list[Any], to: list[str]) -> dict[str, Any]:
    return Offer("", nested_keys(to, _get(recipe, path))).applied(_without(recipe, path))


def _parsed(path: Path) -> dict[str, Any] | None:
    """The recipe, if the fault is not in its notation."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError):
        return None
    return values if isinstance(values, dict) else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_advice_of_a_message_leads_to_success_or_to_another_problem(path: Path, tmp_path: Path) -> None:
    message = MESSAGES[path]
    recipe = None if path.stem.startswith("yaml_") else _parsed(path)
    fixed = [] if recipe is None else [one for one in _fixes(message, recipe) if one != recipe]
    if not fixed:
        assert BY_HAND.search(message), f"what should a person do? {message}"
    for one in fixed:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(one, sort_keys=False))
        try:
            load_recipe(tmp_path / "recipe.yaml")
        except RecipeError as problem:
            assert _problem(str(problem)) != _problem(message), (one, str(problem))


def _problem(message: str) -> str:
    """The problem of a message, without its place and its fix."""
    return re.sub(r"^\S+?:\d+: |line \d+", "", message).partition("; ")[0]


def test_most_messages_about_recipes_have_a_fix_that_is_followed() -> None:
    recipes = {path: None if path.stem.startswith("yaml_") else _parsed(path) for path in FILES}
    followed = [path for path, one in recipes.items() if one is not None and list(_fixes(MESSAGES[path], one))]
    assert len(followed) >= 60
