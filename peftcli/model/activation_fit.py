"""Fits the activation memory of an adapter by running PEFT's own code on a few small layers."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from peftcli.adapters.build import peft_config
from peftcli.methods.registry import METHODS
from peftcli.model.load import DTYPES
from peftcli.plan.memory.training_setup import ActivationFit, terms
from peftcli.plan.plan import Plan
from peftcli.recipe.schema import AdapterSection

SCALED = "feedforward_modules"
"""Argument of IA3 that names the layers whose inputs, not outputs, it scales."""
WIDTHS = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (2, 3), (3, 3), (1, 3), (3, 1), (4, 1), (1, 4))
"""Inputs and outputs of the test layers, in units of their width."""
TOKENS = (16, 48)
UNIT = 128
"""Minimum width; that of published models is a multiple of it."""


def fit_activation_memory(plan: Plan) -> dict[str, ActivationFit] | None:
    """The activation memory of the plan's adapter, by the last part of the layer name; "" is for all other layers.

    Empty if the forecast models the method itself, or if the method targets no linear layers; None if it does not run
    on small layers, so that only LoRA's tensors can be counted.
    """
    method = METHODS[plan.adapter.method]
    if method.counted or method.prompts or not plan.targets or method.targets in ("norms", "embeddings"):
        return {}
    dtype, autocast = DTYPES[plan.base.dtype], bool(plan.trainer.get("bf16") or plan.trainer.get("fp16"))
    found = {}
    named = plan.adapter.arguments.get(SCALED) or ()
    for name in ("", *({leaf.rsplit(".", 1)[-1] for leaf in named} if isinstance(named, list | tuple) else ())):
        fitted = _fit(plan.adapter, plan.task, dtype, autocast=autocast, scales_inputs=bool(name))
        if fitted is None:
            return None
        found[name] = fitted
    return found


def _fit(
    adapter: AdapterSection, task: str, dtype: torch.dtype, *, autocast: bool, scales_inputs: bool
) -> ActivationFit | None:
    """Run a few layers and solve for the coefficients; None if the method does not run on small layers."""
    arguments = {name: value for name, value in adapter.arguments.items() if name != SCALED}
    alone = adapter.model_copy(update={"target_modules": ("layer",), "modules_to_save": None, "arguments": arguments})
    rows, counted, reads = [], [], False
    unit = _unit(adapter)
    for inputs, outputs in ((unit * one, unit * other) for one, other in WIDTHS):
        config = peft_config(alone, task)
        config.task_type = config.modules_to_save = None
        if hasattr(config, SCALED):
            setattr(config, SCALED, {"layer"} if scales_inputs else set())
        try:
            layer = _adapted(config, inputs, outputs, dtype, casts=not autocast)
            found = [_saved_bytes(layer, tokens, inputs, dtype, autocast=autocast) for tokens in TOKENS]
        except (ValueError, TypeError, AssertionError, RuntimeError):
            return None
        own = sum(part.numel() for part in layer.parameters() if part.requires_grad)
        reads = found[0][1]
        for tokens, (kept, _) in zip(TOKENS, found, strict=True):
            rows.append(terms(tokens, inputs, outputs))
            counted.append(kept - (2 * own if autocast else 0))  # the forecast counts these as weights
    scale = np.array(rows).max(0)
    solved = np.linalg.lstsq(np.array(rows) / scale, np.array(counted, float), rcond=None)[0] / scale
    return ActivationFit(reads, tuple(float(one) for one in solved))


def _unit(adapter: AdapterSection) -> int:
    """A width divisible by the method's size arguments, and not smaller than its rank."""
    names = METHODS[adapter.method].must_divide
    numbers = [adapter.arguments.get(name, METHODS[adapter.method].defaults.get(name)) for name in names]
    unit = math.lcm(UNIT, *(number for number in numbers if isinstance(number, int) and number > 0))
    return unit * max(1, -(-2 * (adapter.r or 0) // unit))


def _adapted(config: PeftConfig, inputs: int, outputs: int, dtype: torch.dtype, *, casts: bool) -> torch.nn.Module:
    model = torch.nn.Sequential()
    model.add_module("layer", torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about test layers that no user has
        layer: torch.nn.Module = get_peft_model(model, config).train()
    for part in layer.parameters():
        if part.requires_grad:
            part.data = part.data.float()
    for module in layer.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = casts  # as in training
    return layer


def _saved_bytes(
    layer: torch.nn.Module, tokens: int, inputs: int, dtype: torch.dtype, *, autocast: bool
) -> tuple[int, bool]:
    """Bytes saved in a forward pass, except parameters and input, and whether the input is saved."""
    owned = {_place(part) for part in (*layer.parameters(), *layer.buffers())}
    given = torch.zeros(1, tokens, inputs, dtype=dtype, requires_grad=True) * 1
    with _keeping() as tensors, torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        layer(given)
    kept = {_place(one): one.untyped_storage().nbytes() for one in tensors}
    reads = kept.pop(_place(given), None) is not None
    return sum(size for place, size in kept.items() if place not in owned), reads


@contextmanager
def _keeping() -> Iterator[list[Tensor]]:
    """The tensors that autograd saves inside; referenced, so that their memory is not reused."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        # The parts of a sparse tensor have an address, the tensor itself has none.
        kept.extend([tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
