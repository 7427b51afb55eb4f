"""From a recipe file to a checked, frozen `Recipe`: the door that everything below trusts."""

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
    """A recipe, what the user should know about how it was read, and the file it came from."""

    recipe: Recipe
    notices: tuple[str, ...]
    path: Path
    of_run: bool = False
    """Whether the file is the copy that a run folder holds."""


def load_run_recipe(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Load the recipe of a run folder, whose keys may have the names of the version that wrote it.

    Args:
        overrides: as for `load_recipe`; their keys have the names of today.

    Raises:
        RecipeError: as `load_recipe`.
    """
    return _load(path, overrides, of_run=True)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Load a recipe and check all of it.

    Args:
        path: the YAML file; messages show it as it is given here.
        overrides: `section.key=value` strings, laid over the file, to which paths in them are relative.

    Raises:
        RecipeError: at least one problem; the text lists every one with its place.
    """
    return _load(path, overrides, of_run=False)


def _load(path: Path, overrides: Sequence[str], *, of_run: bool) -> Loaded:
    problems = Problems(str(path))
    tree = read_tree(path, problems)
    if of_run:
        rename_earlier(tree)
    apply_overrides(tree, overrides, problems)
    check_secrets(tree, problems)
    relative = resolve_paths(tree, path, problems)
    arguments = read_trainer(tree, problems)
    adapter = read_adapter(tree, arguments, problems)
    stages = read_stages(tree, arguments, problems)
    gates = read_gates(tree, problems)
    check_rules(tree, problems)
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
    """The file's name without its ending, with every sign that a run's name cannot have made a dash.

    >>> _default_name(Path("my recipes/products v2.yaml"))
    'products-v2'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip(".-")[:100] or "recipe"
