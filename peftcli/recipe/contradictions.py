"""Rules between keys: what cannot stand together, and what cannot stand alone."""

import itertools
import re
from typing import Any

from peftcli.recipe.problems import KeyPath, Problems, dotted
from peftcli.recipe.template import template_columns
from peftcli.recipe.yaml_text import Tree

_APART: tuple[tuple[str, str, str], ...] = (
    ("path", "name", "rows come from files or from the Hub: keep one"),
    ("text", "prompt", "a row is one text, or a prompt and a completion: keep one kind"),
    ("text", "completion", "a row is one text, or a prompt and a completion: keep one kind"),
    ("text", "columns", "a row is made by templates or taken from columns: keep one"),
    ("prompt", "columns", "a row is made by templates or taken from columns: keep one"),
    ("completion", "columns", "a row is made by templates or taken from columns: keep one"),
    ("split", "test", "test rows are split off or have their own file: keep one"),
)


def find_contradictions(tree: Tree, problems: Problems) -> None:
    """Add a problem for keys that exclude each other, and for each key that lacks its partner."""
    dataset = tree.get("dataset")
    if isinstance(dataset, dict):
        _check_dataset(dataset, tree, problems)
    _check_model(tree, problems)


def _check_dataset(dataset: dict[str, Any], tree: Tree, problems: Problems) -> None:
    def given(key: str) -> bool:
        return dataset.get(key) is not None

    for first, second, why in _APART:
        if given(first) and given(second):
            _apart(("dataset", first), ("dataset", second), why, tree, problems)
    if not given("path") and not given("name") and not _spoiled(tree, "path", "name"):
        text = "dataset has no source; give dataset.path (files) or dataset.name (a data set of the Hub)"
        problems.add(tree.place(("dataset",)), text)
    for key, partner in (("prompt", "completion"), ("completion", "prompt")):
        if given(key) and not given(partner) and not given("text") and not _spoiled(tree, partner):
            text = f"dataset.{key} stands alone; give dataset.{partner} too, or one template in dataset.text"
            problems.add(tree.place(("dataset", key)), text)
    for key in ("config", "revision"):
        if given(key) and not given("name"):
            problems.add(
                tree.place(("dataset", key)),
                f"dataset.{key} belongs to a data set of the Hub; set dataset.name",
            )
    _check_columns(dataset.get("columns"), tree, problems)
    for key in ("text", "completion"):
        if isinstance(dataset.get(key), str) and _is_constant(dataset[key]):
            text = f"dataset.{key} names no column, so all rows are equal; write {{column}} where a column goes"
            problems.add(tree.place(("dataset", key)), text)


def _check_columns(columns: Any, tree: Tree, problems: Problems) -> None:
    path = ("dataset", "columns")
    if columns == {}:
        problems.add(tree.place(path), "dataset.columns is empty; name a column in it, or remove the line")
    if not isinstance(columns, dict):
        return
    kinds = [kind for kind in (("text",), ("messages",), ("prompt", "completion")) if any(map(columns.get, kind))]
    for first, second in itertools.pairwise(kinds):
        one = next(key for key in first if columns.get(key))
        two = next(key for key in second if columns.get(key))
        _apart((*path, one), (*path, two), "a row has one kind: keep one", tree, problems)
    for key, partner in (("prompt", "completion"), ("completion", "prompt")):
        if columns.get(key) and not columns.get(partner) and len(kinds) == 1:
            text = f"dataset.columns.{key} stands alone; name the column of the {partner} too"
            problems.add(tree.place((*path, key)), text)


def _check_model(tree: Tree, problems: Problems) -> None:
    revision = tree.get("model", "revision")
    if tree.get("model", "trust_remote_code") is not True or _spoiled(tree, "trust_remote_code", section="model"):
        return
    if not isinstance(revision, str) or not re.fullmatch(r"[0-9a-f]{40}", revision):
        problems.add(
            tree.place(("model", "trust_remote_code")),
            "model.trust_remote_code runs code from the repository, so model.revision must pin a commit "
            "(40 characters of 0-9 and a-f)",
        )


def _apart(first: KeyPath, second: KeyPath, why: str, tree: Tree, problems: Problems) -> None:
    """Report at the later of the two, naming the place of the other."""
    places = {path: tree.place(path) for path in (first, second)}
    both_lines = all(isinstance(place, int) for place in places.values())
    if (both_lines and places[first] > places[second]) or isinstance(places[first], str):  # type: ignore[operator]
        first, second = second, first
    other = places[first]
    shown = f"line {other}" if isinstance(other, int) else other
    problems.add(places[second], f"{dotted(second)} excludes {dotted(first)} ({shown}); {why}")


def _spoiled(tree: Tree, *keys: str, section: str = "dataset") -> bool:
    return any((section, key) in tree.spoiled for key in keys)


def _is_constant(template: str) -> bool:
    try:
        return bool(template) and not template_columns(template)
    except ValueError:
        return False
