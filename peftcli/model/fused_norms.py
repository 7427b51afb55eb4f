"""RMSNorm in torch's fused operator: one kernel forward and one backward in place of about ten.

The Python RMSNorm of Llama and most later models casts its input to float32, normalizes it, rounds the result to the
number format of the model and multiplies it by the weight. The operator does the same without the rounding in between,
and for the backward pass it keeps the input and one number a row, where Python keeps a float32 copy of the input.

Only a module whose own forward gives the values and gradients of the operator is replaced. `torch.rms_norm` itself
is not called, because autocast on CUDA casts its input to float32 (torch 2.13, aten/src/ATen/autocast_mode.h).
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.model.oom import is_out_of_memory
from peftcli.model.varlen_attention import CANNOT_RUN

OPERATOR = "_fused_rms_norm"
"""In torch.ops.aten. It has a CUDA kernel from torch 2.9 on; elsewhere it is put together from other operators."""
EPSILONS = ("variance_epsilon", "eps")
"""Attributes of transformers' modules."""
LEAST_SCALE = 1e-3
"""Of the check's inputs; the gradients of smaller ones would leave float16."""
VALUE_ROUNDINGS, GRADIENT_ROUNDINGS = 2, 8
"""Machine epsilons that the check allows.

A value of the Python norm is rounded twice, one of the operator once, each by half an epsilon of the value: 1.5 in all.
A gradient is `r (gw - x mean(gw x))` with normed `x`, whose product `gw` Python rounds: with |x| up to 4 it differs by
at most half an epsilon of 1 + 4 times the largest `r gw`, and by one rounding in each of the two results.
"""


@dataclass
class FusedNorms:
    """What was replaced in a model.

    Attributes:
        modules: number of modules that use the operator.
        left: class names of the RMS norms that were left as they are, with the reason.
    """

    modules: int = 0
    left: dict[str, str] = field(default_factory=dict)


def has_fused_kernel(device_type: str) -> bool:
    """Whether torch computes RMSNorm in one kernel on a kind of device."""
    if not hasattr(torch.ops.aten, OPERATOR):
        return False
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{OPERATOR}", device_type.upper()))


def enable_fused_norms(model: nn.Module, device: torch.device) -> FusedNorms:
    """Let the RMS norms of a model use torch's operator where it computes what they do.

    Args:
        device: that the model computes on.
    """
    found = FusedNorms()
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None or not is_rms_norm(module):
            continue
        problem = norm_problem(module, weight.dtype, device)
        if problem is None:
            module.forward = MethodType(_forward, module)
            found.modules += 1
        else:
            found.left[type(module).__name__] = problem
    return found


def disable_fused_norms(model: nn.Module) -> None:
    """Give every RMS norm back its own forward."""
    for module in model.modules():
        if is_rms_norm(module) and getattr(module.__dict__.get("forward"), "__func__", None) is _forward:
            del module.__dict__["forward"]


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is called an RMS norm, and computes it in Python."""
    named = "RMSNorm" in type(module).__name__ and not isinstance(module, nn.RMSNorm)
    return named and isinstance(getattr(module, "weight", None), Tensor)


def norm_problem(module: nn.Module, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why torch's operator cannot take the place of a norm; None where it can.

    A copy of the module with random weights computes a few rows, forward and backward, and so does the operator. One
    row is so small that the epsilon shows, and the gradient of the output is not contiguous, as that of a norm over
    heads is.
    """
    epsilon, weight = _epsilon(module), module._parameters.get("weight")
    if epsilon is None or set(module._parameters) != {"weight"} or weight is None or weight.dim() != 1:
        return "it is not one weight with an epsilon"
    try:
        with _as_in_training(dtype, device):
            return _difference(module, weight.shape[0], epsilon, dtype, device)
    except CANNOT_RUN as problem:
        if is_out_of_memory(problem):
            raise
        return f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"


def _epsilon(module: Any) -> float | None:
    found = (getattr(module, name, None) for name in EPSILONS)
    return next((float(value) for value in found if isinstance(value, float)), None)


@contextmanager
def _as_in_training(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    narrow = dtype in (torch.bfloat16, torch.float16)
    with torch.enable_grad(), torch.autocast(device.type, dtype if narrow else None, enabled=narrow):
        yield


def _difference(module: nn.Module, width: int, epsilon: float, dtype: torch.dtype, device: torch.device) -> str | None:
    drawn = torch.Generator().manual_seed(0)
    weight = nn.Parameter((0.5 + torch.rand(width, generator=drawn)).to(device, dtype))
    scales = torch.tensor([1.0, max(math.sqrt(epsilon), LEAST_SCALE), 30.0])[None, :, None]
    rows = ((torch.randn((2, 3, width), generator=drawn) + 0.5) * scales).to(device, dtype)
    coming = torch.randn((3, 2, width), generator=drawn).to(device, dtype)
    own = copy.copy(module)
    own._parameters = {"weight": weight}
    expected, found = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    values = own(expected), _fused(found, weight, epsilon)
    if not _is_near(*values, VALUE_ROUNDINGS):
        return "its values are not those of torch's rms_norm"
    for value in values:
        torch.autograd.backward(value.transpose(0, 1), coming)
    assert expected.grad is not None and found.grad is not None  # leaves
    near = _is_near(expected.grad, found.grad, GRADIENT_ROUNDINGS)
    return None if near else "its gradients are not those of torch's rms_norm"


def _is_near(expected: Tensor, found: Tensor, roundings: int) -> bool:
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return False
    # The sum over a row is made in float32, in any order.
    limit = roundings * torch.finfo(found.dtype).eps + found.shape[-1] * torch.finfo(torch.float32).eps
    largest = expected.float().abs().amax(-1, keepdim=True)
    return bool(((expected.float() - found.float()).abs() <= limit * largest).all())  # false for NaN too


def _fused(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    result: Tensor = torch.ops.aten._fused_rms_norm(x, list(weight.shape), weight, epsilon)[0]
    return result


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # A weight that is trained in float32 beside 16-bit inputs widens the output, which the operator does not.
    if args or kwargs or self.weight.dtype != x.dtype:
        other: Tensor = type(self).forward(self, x, *args, **kwargs)
        return other
    epsilon = _epsilon(self)
    assert epsilon is not None  # checked before
    return _fused(x, self.weight, epsilon)
