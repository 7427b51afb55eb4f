"""Checkpointed layers that save no random state, because they draw no random numbers.

torch saves the states of its generators before each checkpointed layer and sets them again for the second forward
pass, so that dropout drops the same numbers. Each of that takes a GPU's host longer than launching several kernels. A
layer that draws nothing computes the same without it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

PRESERVE = "preserve_rng_state"
"""Argument of `torch.utils.checkpoint.checkpoint`."""


class RandomStateCheckpoint:
    """The checkpoint function of one layer, which finds out in its first pass whether the layer draws random numbers.

    Attributes:
        checkpoint: the function that it takes the place of.
        draws: whether the layer draws random numbers, None before its first pass.
    """

    def __init__(self, checkpoint: Callable[..., Any], device: torch.device) -> None:
        """
        Args:
            checkpoint: torch's, with its settings.
            device: that the layer computes on.
        """
        self.checkpoint = checkpoint
        self.draws: bool | None = None
        self._device = device

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a layer so that it can run again in the backward pass."""
        if self.draws is False:
            return self.checkpoint(function, *args, **{**kwargs, PRESERVE: False})
        if self.draws:
            return self.checkpoint(function, *args, **kwargs)
        before = _states(self._device)
        found = self.checkpoint(function, *args, **kwargs)
        self.draws = any(not torch.equal(*pair) for pair in zip(before, _states(self._device), strict=True))
        return found


def skip_random_states(model: nn.Module, device: torch.device) -> int:
    """Let the checkpointed layers of a model save no random state where they draw no random numbers.

    Returns:
        Number of layers that find out; those for which a state was asked for or refused are left as they are.
    """
    layers = list(_checkpointed(model))
    for layer in layers:
        layer._gradient_checkpointing_func = RandomStateCheckpoint(layer._gradient_checkpointing_func, device)
    return len(layers)


def save_random_states(model: nn.Module) -> None:
    """Give checkpointed layers back the function that they had."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        given = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(given, RandomStateCheckpoint):
            module.__dict__["_gradient_checkpointing_func"] = given.checkpoint


def _checkpointed(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None and PRESERVE not in getattr(function, "keywords", {}):
                yield module


def _states(device: torch.device) -> list[Tensor]:
    on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_gpu]
