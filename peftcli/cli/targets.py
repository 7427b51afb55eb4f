"""Checks the folder that a command is given, before anything heavy is imported."""

from pathlib import Path

from peftcli.errors import RecipeError
from peftcli.nearest import nearest

MARKS = ("recipe.yaml", "peftcli.json", "adapter_config.json")
"""Files of which a run, an adapter or merged model of peftcli, and an adapter of another tool have at least one."""
BASE = "; for a base model, pass --recipe"


def check_target(name: str, *, takes_base: bool = False, with_recipe: bool = False) -> None:
    """Refuse a folder that is missing, or that contains no result of a training.

    Args:
        name: as given on the command line.
        takes_base: the command also evaluates a base model, which needs a recipe.
        with_recipe: a recipe was given, so the target may be the base model that it names.

    Raises:
        RecipeError: with the nearest name of a folder beside it.
    """
    folder = Path(name)
    if (takes_base and with_recipe) or any((folder / mark).is_file() for mark in MARKS):
        return
    if not folder.is_dir():
        raise missing_folder(folder, takes_base=takes_base)
    inside = sorted(child.name for child in folder.iterdir() if any((child / mark).is_file() for mark in MARKS))
    fix = (
        f"pass one of the folders in it, such as {folder / inside[0]}"
        if inside
        else "`peftcli train RECIPE` prints the run folder" + (BASE if takes_base else "")
    )
    raise RecipeError(
        f"{name}: not a run folder (no recipe.yaml), and not an adapter or merged model (no peftcli.json or "
        f"adapter_config.json); {fix}"
    )


def check_run(name: str) -> None:
    """Refuse a folder that is missing, or that is no run.

    Raises:
        RecipeError: as for `check_target`.
    """
    if not (Path(name) / "recipe.yaml").is_file():
        check_target(name)
        parent = Path(name).absolute().parent
        fix = f"pass {parent}" if (parent / "recipe.yaml").is_file() else "pass a run folder"
        raise RecipeError(f"{name}: not a run folder (no recipe.yaml); {fix}")


def missing_folder(folder: Path, *, takes_base: bool = False) -> RecipeError:
    """The error for a folder that does not exist."""
    if folder.is_file():
        return RecipeError(f"{folder}: this is a file; pass the run folder")
    try:
        beside = sorted(child.name for child in folder.absolute().parent.iterdir() if child.is_dir())
    except OSError:
        return RecipeError(f"{folder}: no such folder; {folder.absolute().parent} does not exist either")
    near = nearest(folder.name, beside)
    hint = f"; did you mean {folder.parent / near}?" if near else BASE if takes_base else ""
    return RecipeError(f"{folder}: no such folder{hint}")
