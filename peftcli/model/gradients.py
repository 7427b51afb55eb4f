"""Gradient norms of each layer's weight, without storing the gradients."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.adapters.module_layout import linear_widths
from peftcli.errors import Diverged
from peftcli.model.distributed import gather

Inputs = Mapping[str, Tensor]
FLOAT16_SCALE = 1024.0
"""Loss scale: small gradients would underflow in float16; the norms are scaled back."""


def gradient_norms(
    model: nn.Module, names: Sequence[str], batches: Sequence[Inputs], loss: Callable[[Any, Inputs], Tensor]
) -> dict[str, float]:
    """The norm of the loss's gradient for each layer's weight, averaged over batches, per root of the weight's size.

    The weights do not need gradients, so quantized layers are supported: the gradient of a weight is the sum over
    tokens of g xᵀ, with the layer's inputs x and the gradients g of its outputs.

    Args:
        model: not changed.
        names: names of linear layers.
        batches: inputs with labels; with several processes, those of this one.
        loss: of the model on a batch.

    Returns:
        For each name the root mean square of its gradient; the same on every process.

    Raises:
        Diverged: a gradient is not finite.
    """
    sums = dict.fromkeys(names, 0.0)
    scale = FLOAT16_SCALE if _dtype(model) == torch.float16 else 1.0

    def add(name: str, inputs: Tensor, gradient: Tensor) -> None:
        squares[name] += squared_norm(inputs, gradient)

    with _frozen(model), _watched(model, names, add):
        for batch in batches:
            squares = dict.fromkeys(names, 0.0)
            (loss(model, batch) * scale).backward()  # type: ignore[no-untyped-call]
            for name, square in squares.items():
                sums[name] += math.sqrt(square) / scale
    shares = gather((sums, len(batches)))
    count = max(1, sum(number for _, number in shares))
    found = {}
    for name in names:
        inputs, outputs = linear_widths(model.get_submodule(name)) or (1, 1)
        found[name] = sum(share[name] for share, _ in shares) / count / math.sqrt(inputs * outputs)
    broken = [name for name, norm in found.items() if not math.isfinite(norm)]
    if broken:
        raise Diverged(f"the gradient of {broken[0]} is not finite before training; set another model.dtype")
    return found


def gradient_matrices(
    model: nn.Module, names: Sequence[str], batches: Iterable[Inputs], loss: Callable[[Any, Inputs], Tensor]
) -> dict[str, Tensor]:
    """The gradient of each layer's weight, summed over batches: float32 on the CPU, (outputs, inputs).

    Args:
        model: not changed.
        names: names of linear layers.
        loss: of the model on a batch.
    """
    sums: dict[str, Tensor] = {}
    scale = FLOAT16_SCALE if _dtype(model) == torch.float16 else 1.0

    def add(name: str, inputs: Tensor, gradient: Tensor) -> None:
        product = (gradient.flatten(0, -2).float().t() @ inputs.flatten(0, -2).float()).cpu() / scale
        sums[name] = product if name not in sums else sums[name] + product

    with _frozen(model), _watched(model, names, add):
        for batch in batches:
            (loss(model, batch) * scale).backward()  # type: ignore[no-untyped-call]
    return sums


def squared_norm(inputs: Tensor, gradient: Tensor) -> float:
    """The squared Frobenius norm of a weight's gradient, computed in the cheaper of two ways.

    Args:
        inputs: (..., inputs) of a layer.
        gradient: (..., outputs), of the loss with respect to its outputs.

    >>> squared_norm(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]))
    45.0
    """
    x, g = inputs.flatten(0, -2).float(), gradient.flatten(0, -2).float()
    if len(x) ** 2 <= x.shape[-1] * g.shape[-1]:  # |Σ g xᵀ|² = Σ (x·x')(g·g') over all pairs of tokens
        return max(0.0, float(((x @ x.t()) * (g @ g.t())).sum()))
    return float((g.t() @ x).pow(2).sum())


@contextmanager
def _watched(model: nn.Module, names: Sequence[str], add: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    def watch(name: str) -> Callable[..., None]:
        def after(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            given = inputs[0].detach()
            if output.requires_grad:
                output.register_hook(lambda gradient: add(name, given, gradient))  # type: ignore[no-untyped-call]

        return after

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Disables dropout, and computes gradients only for activations, from the embeddings on."""
    training, wanted = model.training, [weight for weight in model.parameters() if weight.requires_grad]
    model.requires_grad_(False)
    model.eval()
    asked: Any = getattr(model, "get_input_embeddings", None)
    handle = None if asked is None else asked().register_forward_hook(_begin)
    try:
        with torch.enable_grad():
            yield
    finally:
        if handle is not None:
            handle.remove()
        for weight in wanted:
            weight.requires_grad_(True)
        model.train(training)


def _begin(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return output.detach().requires_grad_(True)


def _dtype(model: nn.Module) -> torch.dtype:
    return next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)


MOST_NAMED = 3
"""Number of tensors to name in a notice."""
_EXPERT = re.compile(r"\.experts\.\d+\.")


def missing_gradients(model: nn.Module) -> str | None:
    """Which trained tensors got no gradient in a step; None if all did.

    Args:
        model: after the backward pass of a step, before the gradients are removed.
    """
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    without = [name for name, weight in trained if weight.grad is None]
    if len(without) in (0, len(trained)):  # some optimizers step and remove gradients within the backward pass
        return None
    experts = [name for name in without if _EXPERT.search(name)]
    others = [name for name in without if name not in experts]
    parts = []
    if others:
        parts.append(f"{_first(others)}: the loss does not depend on them, so they stay as they are")
    if experts:
        parts.append(f"{_first(experts)} of experts that no token of this step was routed to")
    return f"{len(without)} of {len(trained)} trained tensors had no gradient in the first step: {'; '.join(parts)}"


def _first(names: Sequence[str]) -> str:
    plain = [name.removeprefix("module.").removeprefix("base_model.model.") for name in names[:MOST_NAMED]]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(plain)}{more}"
