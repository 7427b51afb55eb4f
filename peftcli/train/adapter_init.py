"""Initializations of adapters: from the weights (PiSSA, OLoRA), the quantization error (LoftQ), the data (EVA), the
gradient (LoRA-GA, SHiRA).

None of them changes the base: what an initialization takes from a weight is subtracted from the output of LoRA, so that
a disabled adapter is the base, and the saved adapter works on it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, initialize_lora_eva_weights
from peft.tuners.shira import Linear as ShiraLinear
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peftcli.data.prepare import PreparedData
from peftcli.errors import DataError, RecipeError
from peftcli.methods.base import GRADIENT_BATCHES
from peftcli.model.files import Source, original_weights, turned_layers
from peftcli.model.gradients import gradient_matrices
from peftcli.model.scoring import pad_right
from peftcli.plan.plan import Plan
from peftcli.recipe.schema import AdapterSection
from peftcli.tasks.base import implementation
from peftcli.tasks.registry import TASKS
from peftcli.train.module_selection import sample_rows

NAME = "default"
FIRST = "start.safetensors"
"""In a checkpoint: what the LoRA of each layer began with."""
PRINCIPAL = ("pissa", "olora")

MOST_ROWS = 2048
LEAST_ROWS = 8
"""Rows of a batch; it goes on until the directions stand still."""
MOST_BATCHES = 4096
"""After which they will never stand still; some tens are usual."""

ENTRIES_AT_ONCE = 250_000_000
"""Entries of gradients that are in memory together, 1 GB of them; the rows are run again for the next ones."""
GAMMA = 64.0
"""How small LoRA-GA begins (Wang et al. 2024, section 4.1)."""


def init_kind(arguments: Any) -> str:
    """The way to begin that a recipe asks for, empty for LoRA's own."""
    word = arguments.get("init_lora_weights")
    return str(word).partition("_niter_")[0] if isinstance(word, str) else ""


class ResidualInit:
    """LoRA layers that begin as a part of their weight, without taking that part out of the weight.

    The layer computes W x + s (B A - B0 A0) x, which is what a residual weight W - s B0 A0 would give with B A on it.
    """

    def __init__(
        self,
        model: PeftModel,
        first_of: Callable[[str, LoraLayer], tuple[Tensor, Tensor]],
        resume_from: Path | None,
    ) -> None:
        """
        Args:
            first_of: gives the two matrices that a layer begins with; not asked where they lie in a checkpoint.
            resume_from: the checkpoint that the run goes on from.
        """
        self._model = model
        self._first: dict[str, tuple[Tensor, Tensor]] = {}
        self._hooks = []
        kept = load_file(resume_from / FIRST) if resume_from is not None else {}
        for name, layer in lora_layers(model):
            down, up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            if kept:
                first = kept[f"{name}.down"].to(down), kept[f"{name}.up"].to(up)
            else:
                first = first_of(name, layer)
            # Laid out like those that come from a checkpoint: other strides would round products in another way.
            self._first[name] = (first[0].to(down).contiguous(), first[1].to(up).contiguous())
            down.data, up.data = (part.clone() for part in self._first[name])
            self._hooks.append(layer.register_forward_hook(partial(_take_off, first=self._first[name])))

    def save(self, folder: Path) -> None:
        """Write what the layers began with into a checkpoint."""
        parts: dict[str, Tensor] = {}
        for name, (down, up) in self._first.items():
            parts |= {f"{name}.down": down.contiguous(), f"{name}.up": up.contiguous()}
        save_file(parts, folder / FIRST)

    def settle(self) -> None:
        """Make plain LoRA of twice the rank of it, which computes the same on the untouched base."""
        for hook in self._hooks:
            hook.remove()
        for name, layer in lora_layers(self._model):
            down, up = self._first[name]
            layer.lora_A[NAME].weight = torch.nn.Parameter(torch.cat([layer.lora_A[NAME].weight.data, down]))
            layer.lora_B[NAME].weight = torch.nn.Parameter(torch.cat([layer.lora_B[NAME].weight.data, -up], dim=1))
            layer.lora_A[NAME].out_features = layer.lora_B[NAME].in_features = 2 * layer.r[NAME]
            layer.r[NAME] *= 2
            layer.lora_alpha[NAME] = layer.scaling[NAME] * layer.r[NAME]
        config: Any = self._model.peft_config[NAME]
        config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
        config.r *= 2


def _take_off(layer: LoraLayer, inputs: tuple[Tensor, ...], output: Tensor, *, first: tuple[Tensor, Tensor]) -> Tensor:
    if layer.disable_adapters or layer.merged:
        return output
    down, up = first
    seen = layer._cast_input_dtype(inputs[0], down.dtype)
    taken = torch.nn.functional.linear(torch.nn.functional.linear(seen, down), up) * layer.scaling[NAME]
    kept: Tensor = output - taken.to(output.dtype)
    return kept


def lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """The layers with a LoRA of their own, by their name in the base."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and NAME in module.lora_A:
            yield name, module


def weight_of(layer: LoraLayer) -> Tensor:
    """The weight of the layer as it computes with it: (outputs, inputs), float32.

    Raises:
        RecipeError: it is no linear layer.
    """
    weight: Tensor = dequantize_module_weight(layer.get_base_layer()).detach().float()
    if weight.dim() != 2:
        raise RecipeError(
            "adapter.init_lora_weights begins at the matrix of a linear layer, and a target is a convolution; "
            "leave it out"
        )
    turned: Tensor = weight.T if getattr(layer, "fan_in_fan_out", False) else weight
    return turned


def principal(weight: Tensor, r: int, scale: float, word: str) -> tuple[Tensor, Tensor]:
    """The two matrices whose product, times the scale, is the leading part of a weight.

    Args:
        weight: (outputs, inputs), float32.
        word: `pissa` for the singular value decomposition, `pissa_niter_N` for N rounds of a randomised one, `olora`
            for the QR decomposition.

    Returns:
        down: (r, inputs) and up: (outputs, r).

    Source: Meng et al. 2024, arXiv:2404.02948, section 3; Büyükakyüz 2024, arXiv:2406.01775, section 3.
    """
    if word == "olora":
        q, rest = torch.linalg.qr(weight)
        return rest[:r].contiguous(), q[:, :r].contiguous()
    rounds = word.partition("_niter_")[2]
    if rounds:
        with torch.random.fork_rng():  # the order of the rows is drawn after this, also in a session that goes on
            u, s, v = torch.svd_lowrank(weight, q=r, niter=int(rounds))
    else:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        v = vh.T
    root = torch.sqrt(s[:r] / scale)
    return root[:, None] * v[:, :r].T, u[:, :r] * root


def initialize_from_quantization_error(model: PeftModel, original: Source) -> None:
    """Begin as the leading part of what quantization took from each weight.

    Args:
        original: gives the weights as they were before, in the layout of their file.

    Source: Li et al. 2023, arXiv:2310.08659, algorithm 1 with one round; the quantized weights stay as they are.
    """
    turned = turned_layers(model.get_base_model())
    for name, layer in lora_layers(model):
        packed = weight_of(layer)
        stored = original(f"{name}.weight").to(packed)
        whole = stored.T if name in turned else stored
        down, up = principal(whole - packed, layer.r[NAME], layer.scaling[NAME], "pissa")
        layer.lora_A[NAME].weight.data.copy_(down)
        layer.lora_B[NAME].weight.data.copy_(up)


def leading_part(word: str) -> Callable[[str, LoraLayer], tuple[Tensor, Tensor]]:
    """What gives the two matrices that a layer begins with as a part of its weight."""

    def leading(_: str, layer: LoraLayer) -> tuple[Tensor, Tensor]:
        return principal(weight_of(layer), layer.r[NAME], layer.scaling[NAME], word)

    return leading


def initialize_adapter(
    model: PeftModel, plan: Plan, data: PreparedData, tokenizer: PreTrainedTokenizerBase, resume_from: Path | None
) -> ResidualInit | None:
    """Initialize an adapter as the recipe says.

    Args:
        model: the wrapped model.
        resume_from: the checkpoint that the run resumes from, which holds the initial weights.

    Returns:
        The initial weights that were taken out of the base, None where none were.

    Raises:
        RecipeError: a layer is too small for the rank.
        DataError: the rows are fewer than the directions that EVA looks for.
    """
    word = plan.adapter.arguments.get("init_lora_weights")
    kind = init_kind(plan.adapter.arguments)
    if takes_gradient(plan.adapter):
        return initialize_from_gradient(model, plan, data, tokenizer, resume_from)
    if kind in PRINCIPAL:
        return ResidualInit(model, leading_part(str(word)), resume_from)
    if kind == "loftq":
        initialize_from_quantization_error(model, original_weights(plan.base, model.get_base_model()))
    if kind == "eva":
        rows = data.train.store.examples.column("input_ids").take(data.train.rows[:MOST_ROWS])
        pooled = TASKS[plan.task].labels_texts
        initialize_from_data(model, rows.to_pylist(), tokenizer.pad_token_id or 0, pooled=pooled)
    return None


def initialize_from_data(model: PeftModel, rows: Sequence[list[int]], pad_id: int, *, pooled: bool = False) -> None:
    """Begin as the principal directions of each layer's inputs, and give more rank to layers that need it.

    Args:
        rows: token ids of training rows.
        pad_id: token id that fills short rows.
        pooled: some layers read one vector a row and not one a token, as those behind an encoder's pooler do.

    Raises:
        RecipeError: a layer has fewer inputs than directions are looked for, or the directions never stand still.
        DataError: the rows are fewer than the directions.

    Source: Paischer et al. 2024, arXiv:2410.07170.
    """
    rho = model.peft_config["default"].eva_config.rho
    layers = [one for one in model.modules() if isinstance(one, LoraLayer) and "default" in one.r]
    components = max(round(layer.r["default"] * rho) for layer in layers)
    narrowest = min(int(layer.in_features) for layer in layers)
    if components > narrowest:
        raise RecipeError(
            f"adapter.init_lora_weights eva looks for {components} directions (r times {rho:g}, the rho of "
            f"adapter.eva_config) among the {narrowest} inputs of a layer; lower adapter.r"
        )
    device = next(model.parameters()).device
    batches = []
    for some in _shared_out(rows, components, pooled=pooled):
        ids, _, mask = pad_right(list(some), list(some), pad_id)
        batches.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    seen = 0

    def forward(given: Any, inputs: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > MOST_BATCHES:
            raise RecipeError(
                f"adapter.init_lora_weights eva: the directions still turn after {MOST_BATCHES} batches; lower "
                "adapter.r, or the tau of adapter.eva_config"
            )
        given(**inputs)

    initialize_lora_eva_weights(
        model,
        batches,
        forward_fn=forward,
        prepare_layer_inputs_fn=_inputs,
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )


def _shared_out(rows: Sequence[list[int]], components: int, *, pooled: bool) -> list[Sequence[list[int]]]:
    """Batches with an input for each direction: PEFT leaves out smaller ones, and waits for ever where all are.

    Raises:
        DataError: there are fewer inputs than directions.
    """
    found: list[Sequence[list[int]]] = []
    begin = inputs = 0
    for end, row in enumerate(rows, start=1):
        inputs += 1 if pooled else len(row)
        if inputs >= components and end - begin >= min(LEAST_ROWS, len(rows)):
            found.append(rows[begin:end])
            begin, inputs = end, 0
    if not found:
        have = f"{inputs} {'rows' if pooled else 'tokens'} of training"
        raise DataError(
            f"adapter.init_lora_weights eva looks for {components} directions in {have}; lower adapter.r, or leave it "
            "out"
        )
    return found


def _inputs(given: Any, places: Tensor, _: str) -> Tensor:
    """(tokens or rows, width), what a layer reads, filling left out."""
    found: Tensor = given[0] if isinstance(given, tuple | list) else given
    return (found[tuple(places.T)] if found.dim() > 2 else found).contiguous()


def takes_gradient(adapter: AdapterSection) -> bool:
    """Whether an adapter begins by the gradient of training rows."""
    return init_kind(adapter.arguments) == "lora_ga" or adapter.arguments.get("mask") == "gradient"


def initialize_from_gradient(
    model: PeftModel, plan: Plan, data: PreparedData, tokenizer: PreTrainedTokenizerBase, resume_from: Path | None
) -> ResidualInit | None:
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
    lora = init_kind(plan.adapter.arguments) == "lora_ga"
    if resume_from is not None:
        return ResidualInit(model, _never, resume_from) if lora else None
    layers: dict[str, Any] = dict(lora_layers(model) if lora else shira_layers(model))
    batches = int(plan.adapter.arguments.get("gradient_batches", GRADIENT_BATCHES))
    rows = sample_rows(plan, len(data.train.rows), batches)
    make, loss = implementation(TASKS[plan.task].batches)(plan, data, tokenizer, model)
    firsts: dict[str, tuple[Tensor, Tensor]] = {}
    for part in _parts(layers):
        names = {f"{name}.base_layer": name for name in part}
        gradients = gradient_matrices(model.get_base_model(), list(names), map(make, rows), loss)
        for path, gradient in gradients.items():
            layer = layers[names[path]]
            if lora:
                firsts[names[path]] = along(gradient, layer.r[NAME], layer.scaling[NAME], names[path])
            else:
                select_largest_entries(layer, gradient)
    return ResidualInit(model, lambda name, _: firsts[name], None) if lora else None


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


def select_largest_entries(layer: Any, gradient: Tensor) -> None:
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
