"""Loads a recipe file into a validated, frozen `Recipe`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from peftcli.recipe.adapter_args import read_adapter
from peftcli.recipe.earlier_names import rename_earlier
from peftcli.recipe.gates import read_gates
from peftcli.recipe.messages import add_schema_problems
from peftcli.recipe.problems import Problems
from peftcli.recipe.rules import check_rules
from peftcli.recipe.schema import Recipe
from peftcli.recipe.source import apply_overrides, check_secrets, read_tree, resolve_paths
from peftcli.recipe.stages import read_stages
from peftcli.recipe.trainer_args import read_trainer


@dataclass(frozen=True)
class Loaded:
    """A recipe, notices for the user about how it was read, and its file."""

    recipe: Recipe
    notices: tuple[str, ...]
    path: Path
    of_run: bool = False
    """Whether the file is the copy in a run folder."""


def load_run_recipe(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Load the recipe of a run folder, which may use the key names of an earlier version.

    Args:
        overrides: as for `load_recipe`, with the current key names.

    Raises:
        RecipeError: as `load_recipe`.
    """
    return _load(path, overrides, of_run=True)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Load and validate a recipe.

    Args:
        path: the YAML file; messages show it as given here.
        overrides: `section.key=value` strings that override the file; paths in them are relative to the working
            directory.

    Raises:
        RecipeError: the recipe is not valid; the message lists all problems with their locations.
    """
    return _load(path, overrides, of_run=False)


def _load(path: Path, overrides: Sequence[str], *, of_run: bool) -> Loaded:
    problems = Problems(str(path))
    tree = read_tree(path, problems)
    if of_run:
        rename_earlier(tree)
    apply_overrides(tree, overrides, problems)
    check_secrets(tree, problems)
    relative = resolve_paths(tree, path, problems, of_run=of_run)
    arguments = read_trainer(tree, problems)
    adapter = read_adapter(tree, arguments, problems)
    stages = read_stages(tree, arguments, problems)
    gates = read_gates(tree, problems)
    check_rules(tree, problems, of_run=of_run)
    values = {"name": _default_name(path), **tree.values, **adapter, **stages, "trainer": arguments, "gates": gates}
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        add_schema_problems(error, tree, problems)
    problems.raise_if_any()
    assert recipe is not None
    recipe._relative = relative
    return Loaded(recipe, problems.notices(), path, of_run)


def _default_name(path: Path) -> str:
    """The file name without its extension; characters that are not allowed in a run name become dashes.

    >>> _default_name(Path("my recipes/products v2.yaml"))
    'products-v2'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip(".-")[:100] or "recipe"
