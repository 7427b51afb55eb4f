"""Reads the layout of a loaded model, which decides where our tuners go."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from peftcli.plan.module_layout import ModelLayout, layout_of


def read_layout(model: nn.Module) -> ModelLayout:
    """The modules of a model that own parameters, grouped by their position in the model.

    Raises:
        ValueError: one of them contains another, so it cannot be copied by itself.
    """
    return layout_of(parameter_owners(model), end_name(model, "input"), end_name(model, "output"))


def parameter_owners(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that own parameters, in order."""
    return tuple(
        name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
    )


def end_name(model: nn.Module, side: str) -> str | None:
    """Name of the embedding (`input`) or of the output layer (`output`), None if there is none."""
    getter = getattr(model, f"get_{side}_embeddings", None)
    try:
        end = getter() if getter is not None else None
    except NotImplementedError:
        return None
    return next((name for name, module in model.named_modules() if module is end), None) if end is not None else None


def all_widths(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Input and output features of all linear layers by name, in order."""
    found = {name: linear_widths(module) for name, module in model.named_modules()}
    return {name: widths for name, widths in found.items() if widths is not None}


def linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """Input and output features of a linear layer, quantized or not; None for any other module."""
    if isinstance(module, nn.Linear):
        return int(module.in_features), int(module.out_features)
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


def hidden_width(model: nn.Module) -> int:
    """Hidden size of the model, 0 if the configuration does not have it."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    widths = (getattr(text, key, None) for key in ("hidden_size", "n_embd", "d_model", "dim"))
    return next((width for width in widths if isinstance(width, int)), 0)
