"""Liger's Triton kernels for rotary embeddings, gated activations and norms in place of a model's own Python.

Its loss is left out: TRL's fused loss scores the trained tokens alone. liger-kernel replaces functions of a modeling
module and methods of the layers; what it replaced is written down, so that all of it can be put back. The model is run
before and after, and compared.
"""

import importlib
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftcli.model.oom import is_out_of_memory
from peftcli.model.padding_free import rounding_limit

PATCHES = "liger_kernel.transformers.monkey_patch"
"""Module of liger-kernel that replaces layers."""
LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}
CHECKED_TOKENS = 15
MISSING = object()
"""In place of the earlier value of a name that was not there."""


@dataclass
class LigerLayers:
    """What liger-kernel replaced in a model.

    Attributes:
        problem: why nothing is replaced, None where something is.
        changes: each namespace and name that was changed, with what it held before.
    """

    problem: str | None = None
    changes: list[tuple[MutableMapping[str, Any], str, Any]] = field(default_factory=list)

    def restore(self) -> None:
        """Put back what was there before."""
        for names, name, before in reversed(self.changes):
            if before is MISSING:
                names.pop(name, None)
            else:
                names[name] = before
        self.changes.clear()


def enable_liger_layers(model: PreTrainedModel, dtype: torch.dtype, *, norms: bool) -> LigerLayers:
    """Let a model compute its layers by Liger's kernels, where that gives what it gives without them.

    Args:
        model: the base, with its adapter inside.
        dtype: of the computation in training.
        norms: replace the RMS norms too.
    """
    patches = importlib.import_module(PATCHES)
    kind = model.config.model_type
    if kind not in patches.MODEL_TYPE_TO_APPLY_LIGER_FN:
        return LigerLayers(f"liger-kernel has none for the model type {kind}")
    before = _probe(model, dtype)
    layers = LigerLayers()
    forward = model.__dict__.get("forward")
    with _recorded(model, layers):
        patches._apply_liger_kernel_to_instance(
            model, rope=True, swiglu=True, geglu=True, rms_norm=norms, layer_norm=False, **LOSSES
        )
    layers.problem = "liger-kernel replaces its loss too" if model.__dict__.get("forward") is not forward else None
    layers.problem = layers.problem or _difference(model, dtype, before)
    if layers.problem is not None:
        layers.restore()
    return layers


@contextmanager
def _recorded(model: nn.Module, layers: LigerLayers) -> Iterator[None]:
    """Write down what changes in the modules of a model and in the Python module of its class."""
    spaces: list[MutableMapping[str, Any]] = [vars(sys.modules[type(model).__module__])]
    spaces += [module.__dict__ for module in model.modules()]
    held = [dict(space) for space in spaces]
    yield
    for space, before in zip(spaces, held, strict=True):
        for name in space.keys() | before.keys():
            if space.get(name, MISSING) is not before.get(name, MISSING):
                layers.changes.append((space, name, before.get(name, MISSING)))


def _probe(model: PreTrainedModel, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The logits of a few tokens, and the gradient that arrives at their embeddings, both in float32."""
    was_training = model.training
    model.eval()
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    ids = (torch.arange(CHECKED_TOKENS, device=device) * 7 + 3) % model.config.get_text_config().vocab_size
    narrow = dtype in (torch.bfloat16, torch.float16)
    try:
        with torch.enable_grad(), torch.autocast(device.type, dtype if narrow else None, enabled=narrow):
            inputs = embeddings(ids[None]).detach().requires_grad_()
            logits = model(inputs_embeds=inputs, use_cache=False).logits.float()
        weights = torch.linspace(-1.0, 1.0, logits.shape[-1], device=device)
        (gradient,) = torch.autograd.grad((logits * weights).sum() / logits.shape[-1], inputs)
    finally:
        model.train(was_training)
    return logits.detach(), gradient.float()


def _difference(model: PreTrainedModel, dtype: torch.dtype, before: tuple[Tensor, Tensor]) -> str | None:
    """How the replaced layers differ from a model's own by more than rounding; None where they do not."""
    try:
        found = _probe(model, dtype)
    # Triton has errors of its own, and what a compiler that is missing raises is the operating system's.
    except Exception as problem:
        if is_out_of_memory(problem):
            raise
        return f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
    limit = rounding_limit(dtype, found[0].device)
    for name, one, other in zip(("logits", "gradients"), found, before, strict=True):
        difference = float((one - other).square().mean().sqrt() / other.std())
        if not difference <= limit:  # true for NaN too
            return f"with Liger's kernels its {name} differ by {difference:.2g} of their standard deviation"
    return None
