"""Recipes by path or by shipped name, loaded as their stages."""

import os
from dataclasses import replace
from pathlib import Path

from peftcli.errors import RecipeError
from peftcli.plan.smoke import smoke_recipe
from peftcli.recipe.load import Loaded
from peftcli.recipe.stages import stage_recipes

PACKAGE = Path(__file__).resolve().parent.parent
SHIPPED = (PACKAGE / "recipes", PACKAGE.parent / "recipes")
"""Where the shipped recipes lie: in an installed package, and in a checkout."""


def find_recipe(name: str) -> Path:
    """The file of a recipe.

    Raises:
        RecipeError: neither a file nor a shipped recipe.
    """
    path = Path(name)
    if path.exists() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path
    for folder in SHIPPED:
        shipped = folder / f"{name}.yaml"
        if shipped.is_file():
            return shipped
    known = sorted({file.stem for folder in SHIPPED if folder.is_dir() for file in folder.glob("*.yaml")})
    raise RecipeError(f"{name}: no such file, and no shipped recipe of that name; shipped are {', '.join(known)}")


def loaded_stages(loaded: Loaded, *, smoke: bool) -> list[Loaded]:
    """Each stage as a recipe of its own; the last one, in the run's own folder, has the run's name.

    Args:
        smoke: the recipe is that of a rehearsal.

    Raises:
        RecipeError: accelerate's configuration asks for FSDP.
    """
    recipes = stage_recipes(loaded.recipe)
    if len(recipes) > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        # The plan of a stage does not see the others.
        raise RecipeError(
            "stages: accelerate's configuration asks for FSDP, and the result of a stage is folded into whole weights; "
            "take FSDP out there, or train the stages in runs of their own"
        )
    if len(recipes) > 1:
        recipes[-1] = recipes[-1].model_copy(update={"name": loaded.recipe.name})
    if smoke and loaded.recipe.stages:
        # Small again, since what a stage says of the trainer was laid over what a rehearsal had made small.
        recipes = [smoke_recipe(recipe).model_copy(update={"name": recipe.name}) for recipe in recipes]
    return [replace(loaded, recipe=recipe) for recipe in recipes]
