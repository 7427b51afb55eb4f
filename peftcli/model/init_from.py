"""`adapter.init_from`: starts training from an existing adapter."""

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
from peftcli.model.manifest import EARLIER, check_adapter, read_manifest, refuse_other_base
from peftcli.plan.plan import Base
from peftcli.run_dir import RunDir, read_json

SHOWN = 3
"""Maximum number of tensors listed in a message."""


def adapter_folder(path: str) -> Path:
    """The folder of the adapter that a recipe names: a run or an adapter folder.

    Raises:
        RecipeError: there is no adapter, or it depends on earlier stages.
    """
    folder = RunDir(Path(path)).adapter if (Path(path) / "recipe.yaml").is_file() else Path(path)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise RecipeError(
            f"adapter.init_from {path}: no adapter there ({CONFIG} and {WEIGHTS}); set a run or an adapter folder"
        )
    if (folder / EARLIER).is_dir():
        raise RecipeError(
            f"adapter.init_from {path}: this adapter depends on adapters of earlier stages; merge that run and set "
            "model.name to the merged model"
        )
    return folder


def check_initial_weights(path: str) -> None:
    """Refuse an adapter to start from if a file of it differs from what was written.

    Raises:
        RecipeError: there is no adapter.
        MachineError: a file is missing, damaged or changed.
    """
    check_adapter(adapter_folder(path))


def load_initial_weights(model: PeftModel, path: str, base: Base) -> str:
    """Load the weights of an existing adapter into a new one; missing ones keep their initialization.

    Args:
        model: with the recipe's adapter, untrained.
        path: of a run or an adapter.
        base: under the adapter.

    Returns:
        A note on what was loaded.

    Raises:
        RecipeError: the adapter is of another method, or does not fit.
        MachineError: it has another base.
    """
    folder = adapter_folder(path)
    config = model.active_peft_config
    method = read_json(folder / CONFIG).get("peft_type")
    if method != str(config.peft_type.value):
        raise RecipeError(
            f"adapter.init_from {path}: a {method} adapter, but the recipe trains {config.peft_type.value}"
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
            continue  # even with the same size, it would be for other labels
        if mine is not None and mine.shape == tensor.shape:
            taken[name] = tensor
        elif not of_head:
            raise RecipeError(f"adapter.init_from {path}: {_unfit(name, tensor, mine)}")
    set_peft_model_state_dict(model, own | taken)  # PEFT requires a complete head, even if unchanged
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
        return f"the recipe's adapter has no {bare}; add its module to adapter.target_modules"
    return f"{bare} is {_size(tensor)} in that adapter, but {_size(mine)} in the recipe; use the same arguments"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name.removeprefix(PREFIX) for name in names[:SHOWN]) + more


def _size(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))
