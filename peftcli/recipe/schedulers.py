"""The learning rate schedulers of the installed transformers, and their arguments."""

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from peftcli.nearest import nearest
from peftcli.recipe.argument_values import limit_fault, type_error
from peftcli.recipe.library_args import Argument, class_body, package_folder, source_text
from peftcli.recipe.messages import choices_text
from peftcli.recipe.problems import KeyPath, choice_text, show
from peftcli.recipe.signatures import parameters

DEFAULT = "linear"
LEARNING_RATE = 2e-4
"""Default learning rate of a recipe."""
MEASURED = ("reduce_lr_on_plateau", "greedy")
"""Schedulers that depend on the evaluation loss during training."""
_FILE = "optimization.py"
_GIVEN = ("self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
"""Parameters that the trainer sets."""
_BEHIND = {
    "get_reduce_on_plateau_schedule": ("torch", "optim/lr_scheduler.py", "ReduceLROnPlateau"),
    "get_greedy_schedule": ("transformers", _FILE, "GreedyLR"),
}
"""Classes that get the keyword arguments of a function."""
_SHAPES = ("linear", "cosine", "1-sqrt")
_CHOICES = {
    "warmup_type": _SHAPES,
    "decay_type": _SHAPES,
    "mode": ("min",),  # a lower loss is better
    "threshold_mode": ("rel", "abs"),
}
_LIMITS: Mapping[str, tuple[tuple[str, float], ...]] = {
    "factor": ((">", 0), ("<", 1)),
    "patience": ((">=", 0),),
    "cooldown": ((">=", 0),),
    "warmup": ((">=", 0),),
    "threshold": ((">=", 0),),
    "eps": ((">=", 0),),
    "window_size": ((">=", 1),),
    "reset_start": ((">=", 0),),
    "min_lr": ((">=", 0),),
    "max_lr": ((">", 0),),
    "min_lr_rate": ((">=", 0),),
    "min_lr_ratio": ((">=", 0),),
    "warmup_lr_rate": ((">=", 0),),
    "num_cycles": ((">", 0),),
    "num_decay_steps": ((">=", 0),),
    "num_stable_steps": ((">=", 0),),
    "timescale": ((">=", 1),),
    "lr_end": ((">=", 0),),
    "power": ((">", 0),),
}
"""Limits of the arguments, from the computations and checks in the functions.

Source: transformers/optimization.py 5.23, torch/optim/lr_scheduler.py 2.13.
"""
_ONE_OF = {"min_lr": ("min_lr", "min_lr_rate")}
"""A scheduler with the first argument needs exactly one of the group, unless it has a default; the same source."""


@cache
def scheduler_parameters(scheduler: str) -> dict[str, tuple[Argument, bool]] | None:
    """The arguments in `lr_scheduler_kwargs`, each with whether it is required; None if unknown."""
    function = _functions().get(scheduler)
    if function is None:
        return None
    package, file, owner = _BEHIND.get(function, ("transformers", _FILE, ""))
    found = parameters(package, file, "__init__" if owner else function, owner)
    return None if found is None else {name: one for name, one in found.items() if name not in _GIVEN}


def scheduler_faults(arguments: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Problems with the scheduler in the trainer arguments: the key, and the message.

    Args:
        arguments: with their current names and valid types.
    """
    scheduler = arguments.get("lr_scheduler_type", DEFAULT)
    takes = scheduler_parameters(scheduler)
    given = arguments.get("lr_scheduler_kwargs") or {}
    if takes is None or not isinstance(given, Mapping):
        return
    for name, value in given.items():
        path: KeyPath = ("lr_scheduler_kwargs", name)
        if name not in takes:
            yield path, _unknown(str(name), scheduler, list(takes))
        elif (fault := _value_fault(takes[name][0], value)) is not None:
            yield path, f"trainer.lr_scheduler_kwargs.{name} = {show(value)}: {fault}"
    yield from _missing(scheduler, takes, given)
    if scheduler == "polynomial":
        yield from _end_fault(arguments, given)
    if scheduler in MEASURED and arguments.get("eval_strategy", "no") == "no":
        text = f"trainer.lr_scheduler_type: {scheduler} needs an evaluation loss; add eval_strategy: steps or epoch"
        yield ("lr_scheduler_type",), text


@cache
def _functions() -> dict[str, str]:
    """The function of each scheduler, by the scheduler's name."""
    folder = package_folder("transformers")
    if folder is None:
        return {}
    names = {
        target.id: node.value.value
        for node in class_body(folder / "trainer_utils.py", "SchedulerType")
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = re.findall(r"^    SchedulerType\.(\w+): (\w+),$", source_text(folder / _FILE), re.MULTILINE)
    return {str(names[member]): function for member, function in found if member in names}


def _unknown(name: str, scheduler: str, takes: list[str]) -> str:
    problem = f"trainer.lr_scheduler_kwargs.{name} is not an argument of {scheduler}"
    if name == "num_warmup_steps":
        return f"{problem}; set trainer.warmup_steps"
    if not takes:
        return f"{problem}, which has none; remove it"
    near = nearest(name, takes)
    return f"{problem}; did you mean {near}?" if near else f"{problem}; use one of {', '.join(takes)}"


def _value_fault(argument: Argument, value: Any) -> str | None:
    choices = _CHOICES.get(argument.name)
    if choices is not None:
        return None if value in choices else choices_text([*choices], value)
    kinds = argument.kinds
    if "float" in kinds:  # a list has one value per parameter group, and their number is not known to a recipe
        kinds -= {"list"}
    fault = type_error(Argument(argument.name, kinds, argument.choices), value)
    return fault or limit_fault(value, _LIMITS.get(argument.name, ()))


def _missing(
    scheduler: str, takes: Mapping[str, tuple[Argument, bool]], given: Mapping[str, Any]
) -> Iterator[tuple[KeyPath, str]]:
    needed: list[tuple[str, ...]] = [(name,) for name, (_, required) in takes.items() if required]
    needed += [group for first, group in _ONE_OF.items() if first in takes and "none" in takes[first][0].kinds]
    key = "lr_scheduler_kwargs" if given else "lr_scheduler_type"
    for group in needed:
        present = [name for name in group if given.get(name) is not None]
        if not present:
            example = f"lr_scheduler_kwargs: {{{group[-1]}: {'0.1' if len(group) > 1 else '10'}}}"
            text = f"trainer.lr_scheduler_type: {scheduler} needs {choice_text(group)}; add {example}"
            yield (key,), text
        elif len(present) > 1:
            text = f"trainer.lr_scheduler_kwargs has {' and '.join(present)}, but {scheduler} allows one; remove one"
            yield ("lr_scheduler_kwargs",), text


def _end_fault(arguments: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    end, start = given.get("lr_end", 1e-7), arguments.get("learning_rate", LEARNING_RATE)
    if isinstance(end, int | float) and isinstance(start, int | float) and start <= end:
        text = f"trainer.lr_scheduler_type: polynomial ends at a learning rate of {end:g} (lr_end), which must be less "
        yield ("lr_scheduler_type",), text + f"than learning_rate, {start:g}; lower lr_scheduler_kwargs.lr_end"
