"""LoRA's product added in one pass: the same sum, without two tensors of the layer's width in between.

PEFT computes `result + B(A(x)) * scaling`: a product, its scaled copy and the sum each pass through memory, and so does
the scaled gradient on the way back. Here the second product is added to the result while it is made.
"""

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

KINDS = ("Linear", "Linear4bit")
"""PEFT's classes whose forward is the one above."""


def enable_fused_lora(model: nn.Module) -> int:
    """Let the plain LoRA layers of a model add their product in one pass.

    Returns:
        Number of layers that do.
    """
    joined = [module for module in model.modules() if _is_plain(module)]
    for module in joined:
        module.forward = MethodType(_forward, module)
    return len(joined)


def disable_fused_lora(model: nn.Module) -> None:
    """Give every layer back PEFT's own forward."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.__dict__.pop("forward", None)


def _is_plain(module: nn.Module) -> bool:
    """Whether a layer is LoRA and nothing more, on floats or on 4 bits."""
    kind = type(module)
    if not (
        isinstance(module, LoraLayer) and kind.__module__.startswith("peft.tuners.lora.") and kind.__name__ in KINDS
    ):
        return False
    seconds = module.lora_B.values()
    return not module.lora_variant and all(type(one) is nn.Linear and one.bias is None for one in seconds)


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names = self.active_adapters
    if args or kwargs or self.disable_adapters or self.merged or len(names) != 1:
        other: Tensor = type(self).forward(self, x, *args, **kwargs)
        return other
    name = names[0]
    result: Tensor = self.base_layer(x)
    inner = self.lora_A[name](self.lora_dropout[name](self._cast_input_dtype(x, self.lora_A[name].weight.dtype)))
    if inner.dtype != result.dtype:  # a sum in the wider of the two, as PEFT makes it
        summed: Tensor = result + self.lora_B[name](inner) * self.scaling[name]
        return summed.to(result.dtype)
    outer = self.lora_B[name].weight.t()
    joined = torch.addmm(result.flatten(0, -2), inner.flatten(0, -2), outer, alpha=self.scaling[name])
    return joined.view(result.shape)
