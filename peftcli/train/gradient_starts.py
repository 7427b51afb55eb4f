"""Adapters that begin where the gradient points: LoRA along it, and SHiRA on the entries where it is largest."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.shira import Linear as ShiraLinear
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peftcli.data.prepare import PreparedData
from peftcli.errors import RecipeError
from peftcli.methods.base import GRADIENT_BATCHES
from peftcli.model.gradients import gradient_matrices
from peftcli.plan.plan import Plan
from peftcli.recipe.schema import AdapterSection
from peftcli.train.first_rows import drawn_rows, reader
from peftcli.train.starts import NAME, Start, kind_of, lora_layers

ENTRIES_AT_ONCE = 250_000_000
"""Entries of gradients that are in memory together, 1 GB of them; the rows are run again for the next ones."""
GAMMA = 64.0
"""How small LoRA-GA begins (Wang et al. 2024, section 4.1)."""


def takes_gradient(adapter: AdapterSection) -> bool:
    """Whether an adapter begins by the gradient of training rows."""
    return kind_of(adapter.arguments) == "lora_ga" or adapter.arguments.get("mask") == "gradient"


def begin_from_gradient(
    model: PeftModel, plan: Plan, data: PreparedData, tokenizer: PreTrainedTokenizerBase, resume_from: Path | None
) -> Start | None:
    """Let an adapter begin by the gradient of the loss on training rows.

    Every process measures the same rows, so that all of them begin alike.

    Args:
        model: the wrapped model, whose adapter changes nothing yet.
        resume_from: the checkpoint that the run goes on from, in which the beginning lies.

    Returns:
        For LoRA what has to be kept and settled; None for SHiRA, whose file holds its entries.

    Raises:
        RecipeError: a layer is too small for the rank.
    """
    lora = kind_of(plan.adapter.arguments) == "lora_ga"
    if resume_from is not None:
        return Start(model, _never, resume_from) if lora else None
    layers: dict[str, Any] = dict(lora_layers(model) if lora else shira_layers(model))
    batches = int(plan.adapter.arguments.get("gradient_batches", GRADIENT_BATCHES))
    rows = drawn_rows(plan, len(data.train.rows), batches)
    make, loss = reader(plan, data, tokenizer, model)
    firsts: dict[str, tuple[Tensor, Tensor]] = {}
    for part in _parts(layers):
        names = {f"{name}.base_layer": name for name in part}
        gradients = gradient_matrices(model.get_base_model(), list(names), map(make, rows), loss)
        for path, gradient in gradients.items():
            layer = layers[names[path]]
            if lora:
                firsts[names[path]] = along(gradient, layer.r[NAME], layer.scaling[NAME], names[path])
            else:
                take_largest(layer, gradient)
    return Start(model, lambda name, _: firsts[name], None) if lora else None


def along(gradient: Tensor, r: int, scale: float, name: str) -> tuple[Tensor, Tensor]:
    """The two matrices that LoRA-GA begins with, so that its first step is nearest to that of full tuning.

    Args:
        gradient: (outputs, inputs), float32, of the loss by the weight.
        scale: of the layer's update.
        name: of the layer, for messages.

    Returns:
        down: (r, inputs) and up: (outputs, r).

    Raises:
        RecipeError: the weight has fewer than 2 r directions.

    Source: Wang et al. 2024, arXiv:2407.05000, section 3.3 and algorithm 1.
    """
    if 2 * r > min(gradient.shape):
        raise RecipeError(
            f"adapter.r = {r}: init_lora_weights lora_ga takes {2 * r} directions of each gradient, and that of {name} "
            f"has {min(gradient.shape)}; lower adapter.r to {min(gradient.shape) // 2}"
        )
    with torch.random.fork_rng():  # the order of the rows is drawn after this, also in a session that goes on
        u, _, v = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
    size = gradient.shape[0] ** 0.25 / GAMMA**0.5
    return v[:, :r].T * size, u[:, r : 2 * r] * size / scale


def take_largest(layer: Any, gradient: Tensor) -> None:
    """Let SHiRA train the entries of a weight whose gradient is largest, as many as its random mask has."""
    count = layer.shira_weight[NAME].numel()
    places = gradient.abs().flatten().topk(count).indices.sort().values
    kept = layer.shira_indices[NAME]
    indices = torch.stack([places // gradient.shape[1], places % gradient.shape[1]])
    layer.shira_indices[NAME] = indices.to(kept.device, kept.dtype)


def shira_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """The layers with a SHiRA of their own, by their name in the base."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ShiraLinear) and NAME in module.shira_weight:
            yield name, module


def _parts(layers: Mapping[str, Any]) -> Iterator[list[str]]:
    """Names of layers whose gradients are in memory together."""
    part: list[str] = []
    entries = 0
    for name, layer in layers.items():
        size = layer.in_features * layer.out_features
        if part and entries + size > ENTRIES_AT_ONCE:
            yield part
            part, entries = [], 0
        part.append(name)
        entries += size
    if part:
        yield part


def _never(name: str, layer: LoraLayer) -> tuple[Tensor, Tensor]:
    raise AssertionError(f"{name}: the checkpoint holds what it began with")
