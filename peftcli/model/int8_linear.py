"""8-bit linear layers that compute with dequantized weights in floating point.

LLM.int8's own matmul also rounds the inputs to 8 bits, except columns in which any row of the batch has an outlier, so
an answer depends on the other rows of its batch; on a CPU it does so only in evaluation, which then measures another
model than the trained one.

Source: Dettmers et al. 2022, arXiv:2208.07339, and `matmul` in bitsandbytes/autograd/_functions.py, 0.50.
"""

from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor

from peftcli.adapters.quantized import dequantize_rows, row_scale


class Int8FloatLinear(Linear8bitLt):  # type: ignore[misc]  # bitsandbytes is untyped
    """An 8-bit layer that computes like a linear layer with its dequantized weights."""

    def forward(self, x: Tensor) -> Tensor:
        """The output in the dtype of the inputs, or of autocast."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        result: Tensor = _Product.apply(x, self.weight.data, row_scale(self), bias)  # type: ignore[no-untyped-call]
        return result


class _Product(torch.autograd.Function):
    """x Wᵀ + b, whose backward pass dequantizes W again: saving it as floats would lose the benefit of 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return torch.nn.functional.linear(x, dequantize_rows(codes, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        codes, scale = ctx.saved_tensors
        gradient, of_inputs, of_bias = gradients[0], None, None
        if ctx.needs_input_grad[0]:
            of_inputs = gradient @ dequantize_rows(codes, scale, gradient.dtype)
        if ctx.needs_input_grad[3]:
            of_bias = gradient.flatten(0, -2).sum(0)
        return of_inputs, None, None, of_bias


def compute_in_float(model: torch.nn.Module) -> None:
    """Make all 8-bit layers of a model compute with dequantized weights, in training and evaluation."""
    for module in model.modules():
        if type(module) is Linear8bitLt:
            module.__class__ = Int8FloatLinear
