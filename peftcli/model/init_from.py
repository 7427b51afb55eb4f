"""`adapter.init_from`: starts a training from an adapter that was trained before."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from peftcli.errors import RecipeError
from peftcli.model.adapter_weights import CONFIG, WEIGHTS
from peftcli.model.heads import is_within
from peftcli.model.load import PREFIX
from peftcli.model.manifest import EARLIER, read_manifest, refuse_other_base
from peftcli.plan.plan import Base
from peftcli.run_dir import RunDir, read_json

SHOWN = 3
"""Tensors named in a message."""


def adapter_folder(path: str) -> Path:
    """The folder of the adapter that a recipe names: a run or the adapter itself.

    Raises:
        RecipeError: no adapter lies there, or one that stands on those of earlier stages.
    """
    folder = RunDir(Path(path)).adapter if (Path(path) / "recipe.yaml").is_file() else Path(path)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise RecipeError(
            f"adapter.init_from {path}: no adapter there ({CONFIG} and {WEIGHTS}); name a run or its adapter"
        )
    if (folder / EARLIER).is_dir():
        raise RecipeError(
            f"adapter.init_from {path}: this adapter stands on those of earlier stages; merge that run and name the "
            "merged model in model.name"
        )
    return folder


def load_initial_weights(model: PeftModel, path: str, base: Base) -> str:
    """Give an adapter the weights of one that was trained before; what that one lacks stays as it is.

    Args:
        model: with the recipe's adapter, not trained yet.
        path: of a run or an adapter.
        base: under the adapter.

    Returns:
        What was taken over, for people.

    Raises:
        RecipeError: the adapter is of another method, or does not fit.
        MachineError: it stands on another base.
    """
    folder = adapter_folder(path)
    config = model.active_peft_config
    method = read_json(folder / CONFIG).get("peft_type")
    if method != str(config.peft_type.value):
        raise RecipeError(
            f"adapter.init_from {path}: a {method} adapter, and the recipe trains {config.peft_type.value}"
        )
    identity = read_manifest(folder)
    if identity is not None:
        refuse_other_base(identity, base)
    given, own = load_file(folder / WEIGHTS), get_peft_model_state_dict(model, save_embedding_layers=False)
    other = identity is not None and not _same_labels(identity["base"], base)
    taken = {}
    for name, tensor in given.items():
        mine = own.get(name)
        of_head = is_within(name.removeprefix(PREFIX), base.head)
        if of_head and other:
            continue  # of the same size it would still be that of other labels
        if mine is not None and mine.shape == tensor.shape:
            taken[name] = tensor
        elif not of_head:
            raise RecipeError(f"adapter.init_from {path}: {_unfit(name, tensor, mine)}")
    set_peft_model_state_dict(model, own | taken)  # PEFT wants a head whole, also where it stays as it is
    fresh = [name for name in own if name not in taken]
    return f"  starts from {path}: {len(taken)} of {len(own)} tensors" + (f", new {_some(fresh)}" if fresh else "")


def _same_labels(stated: Mapping[str, Any], base: Base) -> bool:
    return (stated.get("task"), stated.get("problem"), tuple(stated.get("labels") or ())) == (
        base.task,
        base.problem_type,
        base.labels,
    )


def _unfit(name: str, tensor: torch.Tensor, mine: torch.Tensor | None) -> str:
    bare = name.removeprefix(PREFIX)
    if mine is None:
        return f"the recipe's adapter has no place for {bare}; add its module to adapter.target_modules"
    return (
        f"{bare} is {_size(tensor)} there and {_size(mine)} here; give adapter the arguments that it was trained with"
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name.removeprefix(PREFIX) for name in names[:SHOWN]) + more


def _size(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))
