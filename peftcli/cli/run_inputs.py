"""Opens a run with its base model and its rows where they are now, and names everything that is missing at once."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peftcli.cli.pointers import Pointers
from peftcli.data.input_files import FoundInputs, find_inputs
from peftcli.errors import DataError, MachineError, RecipeError
from peftcli.model.manifest import MissingBase
from peftcli.model.target import Target, open_target
from peftcli.progress import Progress
from peftcli.recipe.load import Loaded, load_run_recipe
from peftcli.recipe.paths import MODEL, with_paths
from peftcli.run_dir import RunDir

SCORING_KEYS = ("model.name", "dataset", "evaluation", "seed")
"""Keys that still matter once a run is trained; all others are part of its adapter."""
MODEL_KEY = "model.name"


@dataclass(frozen=True)
class OpenedTarget:
    """A run ready for use.

    Attributes:
        loaded: its recipe, with the current paths.
        same_rows: nothing on the command line changes what is scored, so the results are those of the run.
    """

    loaded: Loaded
    target: Target
    same_rows: bool


def point(loaded: Loaded, pointers: Pointers) -> Loaded:
    """A recipe with the base and the rows that the command line names.

    Raises:
        MachineError: the folder of the base does not exist.
        DataError: a file of the rows does not exist.
    """
    recipe = find_inputs(loaded.recipe, None, pointers.data, pointers.keys).recipe
    model = model_of(pointers, None)
    return replace(loaded, recipe=recipe if model is None else with_paths(recipe, {MODEL: model}))


def model_of(pointers: Pointers, loaded: Loaded | None) -> str | None:
    """The base that the command line names, an absolute path where it is a folder; None if it names none.

    Args:
        loaded: the recipe with the overrides applied; None to look at `--model` only.

    Raises:
        RecipeError: it is named twice.
        MachineError: there is no such folder.
    """
    is_set = MODEL_KEY in pointers.keys
    if pointers.model is None:
        return loaded.recipe.model.name if is_set and loaded is not None else None
    if is_set:
        raise RecipeError("--model and --set model.name are the same; remove one")
    if os.path.isdir(pointers.model):
        return os.path.abspath(pointers.model)
    if pointers.model.startswith((".", "/", "~")) or pointers.model.count("/") > 1:
        raise MachineError(f"--model {pointers.model}: no such folder; pass the folder of the base model, or a Hub id")
    return pointers.model


def open_run(name: str, pointers: Pointers, progress: Progress) -> OpenedTarget:
    """Open a run, or an adapter or a merged model in its run folder, with its base and its rows.

    Raises:
        RecipeError: a `--set` key is part of the trained adapter.
        MachineError: the base, and perhaps rows, are missing; or an adapter, its tokenizer or its base was changed.
        DataError: only rows are missing.
    """
    run = run_of(name)
    if run is None:
        open_target(name)  # says what is wrong with the folder
        raise RecipeError("this model has no run folder; pass --recipe to choose the test set")
    refuse_trained_keys(pointers, SCORING_KEYS, run)
    loaded = load_run_recipe(run.recipe, pointers.overrides)
    found = find_inputs(loaded.recipe, run, pointers.data, pointers.keys)
    model = model_of(pointers, loaded)
    try:
        target = open_target(name, model=model)
    except MissingBase as problem:
        raise MachineError(_missing(run, problem, found)) from problem
    refuse_model_of_merged(target, model, name)
    if found.missing:
        raise DataError(_missing(run, None, found))
    for note in found.notes:
        progress.note(note)
    recipe = found.recipe
    if Path(target.base.path).is_dir() and os.path.isabs(recipe.model.name) and not target.identity.get("smoke"):
        recipe = with_paths(recipe, {MODEL: target.base.path})
    # The weights that training started from are in the adapter.
    recipe = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"init_from": None})})
    same = not found.notes and set(pointers.keys) <= {MODEL_KEY} and (not pointers.data or run.inputs.is_file())
    return OpenedTarget(replace(loaded, recipe=recipe), target, same)


def open_model(name: str, pointers: Pointers, used: Sequence[str]) -> tuple[Target, Loaded | None]:
    """Open a target that needs its base but no rows, and the recipe of its run if there are overrides.

    Args:
        used: keys that the command reads.

    Raises:
        RecipeError: a `--set` key has no effect on the command, or there is no run that it could belong to.
        MachineError: the base is missing or was changed.
    """
    run, loaded = run_of(name), None
    if pointers.overrides:
        if run is None:
            raise RecipeError(f"--set: {name} has no run folder, so it has no recipe; remove --set")
        refuse_trained_keys(pointers, used, run)
        loaded = load_run_recipe(run.recipe, pointers.overrides)
    model = model_of(pointers, loaded)
    target = open_target(name, model=model)
    refuse_model_of_merged(target, model, name)
    return target, loaded


def run_of(name: str) -> RunDir | None:
    """The run that a path is, or in whose folder it lies."""
    folder = Path(name)
    return next((RunDir(one) for one in (folder, folder.parent) if (one / "recipe.yaml").is_file()), None)


def refuse_trained_keys(pointers: Pointers, used: Sequence[str], run: RunDir) -> None:
    """Refuse overrides that would silently have no effect.

    Args:
        used: keys and sections that have one.

    Raises:
        RecipeError: one has none.
    """
    wrong = [key for key in pointers.keys if not any(key == one or key.startswith(f"{one}.") for one in used)]
    if wrong:
        raise RecipeError(
            f"--set {wrong[0]}: {run.path} is already trained, so this key has no effect here; only {', '.join(used)} "
            "can be set"
        )


def refuse_model_of_merged(target: Target, model: str | None, name: str) -> None:
    """Refuse `--model` for a model that has no separate base.

    Raises:
        RecipeError: the target is one.
    """
    if model is not None and target.kind == "merged":
        raise RecipeError(f"--model {model}: {name} is a merged model and needs no base; remove --model")


def _missing(run: RunDir, base: MissingBase | None, found: FoundInputs) -> str:
    """One message for everything that is not where it was, with the option that points to it."""
    lines = [] if base is None else [f"the base model: not at {' or '.join(base.places)}; pass --model PATH"]
    lines += [f"{key}: not at {' or '.join(places)}; pass --data PATH" for key, places in found.missing]
    listed = "".join(f"\n  {line}" for line in lines)
    return f"{run.path}: files of this run were moved or removed; put them back, or pass where they are now{listed}"
