"""Quantized layers: how they are recognized, and the float weights that they compute with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

QUANTIZATION_FLAGS = ("is_loaded_in_4bit", "is_loaded_in_8bit")
"""Attributes by which transformers marks a quantized model, and PEFT and TRL know one."""


def is_quantized(model: nn.Module) -> bool:
    """Whether a model was loaded with quantized weights."""
    return any(getattr(model, mark, False) for mark in QUANTIZATION_FLAGS)


@contextmanager
def hide_quantization_flag(model: nn.Module) -> Iterator[None]:
    """Let PEFT work: some methods ask the model whether it is quantized, and not the layers that they stand on."""
    marked: Any = model
    before = {mark: True for mark in QUANTIZATION_FLAGS if getattr(model, mark, False)}
    for mark in before:
        setattr(marked, mark, False)
    try:
        yield
    finally:
        for mark in before:
            setattr(marked, mark, True)


def is_quantized_layer(module: nn.Module | None) -> bool:
    """Whether a layer's weight is stored in 4 or 8 bits."""
    weight = getattr(module, "weight", None)
    return getattr(weight, "quant_state", None) is not None or _is_int8(weight)


def dequantized_weight(module: Any) -> Tensor:
    """The weight of a packed layer as it computes with it, (outputs, inputs).

    Args:
        module: a layer of which `is_quantized_layer` is true.
    """
    weight = module.weight
    if _is_int8(weight):
        return dequantize_rows(weight.data, row_scale(module), torch.float32)
    # Of a CUDA machine this import takes seconds, and a base that is not quantized has no use for it.
    from bitsandbytes.functional import dequantize_4bit

    unpacked: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return unpacked


def dequantize_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights of an 8-bit layer, rounded once: the factor of a row is float32 whatever comes out.

    Args:
        codes: (outputs, inputs), int8.
        scale: (outputs,), float32.
    """
    return codes.to(dtype).mul_(scale.unsqueeze(1).mul(1 / 127))


def row_scale(module: Any) -> Tensor:
    """The largest absolute weight of each row of an 8-bit layer, which its 127 stands for.

    It lies with the weight; bitsandbytes' own forward moves it to the layer's state, and forgets it there once the
    weight is moved.
    """
    weight = module.weight
    scale: Tensor = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
    return scale.to(weight.device)


def _is_int8(weight: Any) -> bool:
    return torch.is_tensor(weight) and weight.dtype == torch.int8
