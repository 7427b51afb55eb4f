"""Recipes by path or, for those that ship with the package, by name."""

from pathlib import Path

from peftcli.errors import RecipeError

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
