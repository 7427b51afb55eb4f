"""Recipes by path or by the name of a bundled one, loaded as their stages."""

import os
from dataclasses import replace
from pathlib import Path

from peftcli.errors import RecipeError
from peftcli.plan.smoke import smoke_recipe
from peftcli.recipe.load import Loaded
from peftcli.recipe.stages import stage_recipes
from peftcli.run_dir import RunDir

PACKAGE = Path(__file__).resolve().parent.parent
SHIPPED = (PACKAGE / "recipes", PACKAGE.parent / "recipes")
"""Folders of the bundled recipes: in an installed package, and in a checkout."""


def find_recipe(name: str) -> Path:
    """The file of a recipe; for a run folder, the recipe in it.

    Raises:
        RecipeError: neither a file nor a bundled recipe.
    """
    path = Path(name)
    if is_run_folder(path):
        return RunDir(path).recipe
    if path.exists() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path
    for folder in SHIPPED:
        shipped = folder / f"{name}.yaml"
        if shipped.is_file():
            return shipped
    known = sorted({file.stem for folder in SHIPPED if folder.is_dir() for file in folder.glob("*.yaml")})
    raise RecipeError(f"{name}: no such file, and no bundled recipe of that name; bundled are {', '.join(known)}")


def is_run_folder(path: Path) -> bool:
    """Whether a path is a run folder, whose own recipe may be used."""
    return path.is_dir() and RunDir(path).recipe.is_file()


def loaded_stages(loaded: Loaded, *, smoke: bool) -> list[Loaded]:
    """Each stage as a separate recipe; the last one, in the run's own folder, has the run's name.

    Args:
        smoke: the recipe is for a smoke run.

    Raises:
        RecipeError: accelerate is configured to use FSDP.
    """
    recipes = stage_recipes(loaded.recipe)
    if len(recipes) > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        # The plan of one stage does not know the other stages.
        raise RecipeError(
            "stages: accelerate is configured to use FSDP, but merging the result of a stage needs unsharded weights; "
            "disable FSDP, or train each stage as a separate run"
        )
    if len(recipes) > 1:
        recipes[-1] = recipes[-1].model_copy(update={"name": loaded.recipe.name})
    if smoke and loaded.recipe.stages:
        # Shrink again, because a stage's trainer settings override those of the smoke run.
        recipes = [smoke_recipe(recipe).model_copy(update={"name": recipe.name}) for recipe in recipes]
    return [replace(loaded, recipe=recipe) for recipe in recipes]
