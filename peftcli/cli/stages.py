"""A loaded recipe as its stages."""

import os
from dataclasses import replace

from peftcli.errors import RecipeError
from peftcli.plan.smoke import smoke_recipe
from peftcli.recipe.load import Loaded
from peftcli.recipe.stages import stage_recipes


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
