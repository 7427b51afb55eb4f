"""Quantized layers: how to recognize them, and their dequantized weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

QUANTIZATION_FLAGS = ("is_loaded_in_4bit", "is_loaded_in_8bit")
"""Attributes with which transformers marks a quantized model, and by which PEFT and TRL recognize one."""


def is_quantized(model: nn.Module) -> bool:
    """Whether a model was loaded with quantized weights."""
    return any(getattr(model, flag, False) for flag in QUANTIZATION_FLAGS)


@contextmanager
def hide_quantization_flag(model: nn.Module) -> Iterator[None]:
    """Make PEFT treat the model as unquantized: some methods check the model's flag instead of their target layers."""
    flagged: Any = model
    before = {flag: True for flag in QUANTIZATION_FLAGS if getattr(model, flag, False)}
    for flag in before:
        setattr(flagged, flag, False)
    try:
        yield
    finally:
        for flag in before:
            setattr(flagged, flag, True)


def is_quantized_layer(module: nn.Module | None) -> bool:
    """Whether a layer's weight is stored in 4 or 8 bits."""
    weight = getattr(module, "weight", None)
    return getattr(weight, "quant_state", None) is not None or _is_int8(weight)


def dequantized_weight(module: Any) -> Tensor:
    """The dequantized weight of a quantized layer, (outputs, inputs).

    Args:
        module: a layer for which `is_quantized_layer` is true.
    """
    weight = module.weight
    if _is_int8(weight):
        return dequantize_rows(weight.data, row_scale(module), torch.float32)
    # This import takes seconds on a CUDA machine, and an unquantized base model does not need it.
    from bitsandbytes.functional import dequantize_4bit

    dequantized: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return dequantized


def dequantize_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The dequantized weights of an 8-bit layer, rounded once: the scale of a row is float32 for every output dtype.

    Args:
        codes: (outputs, inputs), int8.
        scale: (outputs,), float32.
    """
    return codes.to(dtype).mul_(scale.unsqueeze(1).mul(1 / 127))


def row_scale(module: Any) -> Tensor:
    """The largest absolute weight of each row of an 8-bit layer, which code 127 represents.

    It is an attribute of the weight; bitsandbytes' forward moves it to the layer's state, and loses it there when the
    weight is moved.
    """
    weight = module.weight
    scale: Tensor = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
    return scale.to(weight.device)


def _is_int8(weight: Any) -> bool:
    return torch.is_tensor(weight) and weight.dtype == torch.int8
