"""Adapters of earlier stages folded into a loaded base, so that the next one starts from their result."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel

from peftcli.adapters.quantized import is_packed, taken_for_floats, unpacked_weight
from peftcli.errors import MachineError
from peftcli.model.tensors import WEIGHTS, explain_unfit, hash_files
from peftcli.plan.plan import Plan

PREFIX = "base_model.model."
"""What PEFT writes before the names of the base."""


def absorb(model: PreTrainedModel, folders: Sequence[str]) -> PreTrainedModel:
    """Fold adapters into a base, one after the other.

    A quantized layer that one of them changes becomes a layer of floats: packed again it would not be what was trained.

    Args:
        model: the loaded base; its weights are changed.
        folders: of the adapters, in the order in which they were trained.

    Raises:
        MachineError: one cannot be folded.
    """
    for folder in folders:
        try:
            unpack_layers(model, changed_layers(model, Path(folder)))
            with taken_for_floats(model):
                wrapped = PeftModel.from_pretrained(model, folder, torch_device=str(model.device))
                model = wrapped.merge_and_unload(safe_merge=True)
        except (OSError, RuntimeError, ValueError, KeyError) as problem:
            raise MachineError(explain_unfit(Path(folder), problem)) from problem
    if folders:
        model.requires_grad_(False)
    return model


def with_earlier(plan: Plan, folders: Sequence[str]) -> Plan:
    """The plan of a stage whose base is folded with the adapters of the stages before."""
    return replace(plan, base=replace(plan.base, absorbed=tuple(folders))) if folders else plan


def base_hash(base: str | None, folders: Sequence[str]) -> str | None:
    """What tells a base, with the adapters that are folded into it, from any other.

    Args:
        base: hash of its own weights.
    """
    if not folders:
        return base
    parts = [str(base), *(hash_files(Path(folder))[WEIGHTS] for folder in folders)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def changed_layers(model: torch.nn.Module, folder: Path) -> list[str]:
    """Names of the quantized layers that an adapter has weights for."""
    with safe_open(str(folder / WEIGHTS), framework="pt") as stream:
        keys = [key.removeprefix(PREFIX) for key in stream.keys()]  # noqa: SIM118  # no mapping, only named like one
    return [
        name
        for name, module in model.named_modules()
        if is_packed(module) and any(key.startswith(f"{name}.") for key in keys)
    ]


def unpack_layers(model: torch.nn.Module, names: Sequence[str]) -> None:
    """Replace quantized layers by linear layers of the weights that they compute with."""
    for name in names:
        packed: Any = model.get_submodule(name)
        weight = unpacked_weight(packed)
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=packed.bias is not None, device="meta")
        plain.weight = torch.nn.Parameter(weight.to(_dtype_of(packed, model)), requires_grad=False)
        if packed.bias is not None:
            plain.bias = torch.nn.Parameter(packed.bias.data, requires_grad=False)
        model.set_submodule(name, plain)


def _dtype_of(packed: Any, model: torch.nn.Module) -> torch.dtype:
    """The dtype of a packed layer's products: what 4 bits are unpacked to, or that of the model."""
    if getattr(packed, "compute_dtype", None) is not None:
        asked: torch.dtype = packed.compute_dtype
        return asked
    return next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
