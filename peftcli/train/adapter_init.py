"""Adapter initialization from the weights (PiSSA, OLoRA), the quantization error (LoftQ), the data (EVA) or the
gradient (LoRA-GA, SHiRA).

None of them changes the base: the initial product of LoRA's matrices is subtracted from the layer's output instead of
from its weight, so a disabled adapter gives the base, and the saved adapter works on it.
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
"""File in a checkpoint with the initial LoRA weights of each layer."""
PRINCIPAL = ("pissa", "olora")

MOST_ROWS = 2048
LEAST_ROWS = 8
"""Minimum rows per batch of EVA, which runs until its directions converge."""
MOST_BATCHES = 4096
"""Number of batches after which EVA gives up; a few dozen are usual."""

ENTRIES_AT_ONCE = 250_000_000
"""Gradient elements in memory at once, 1 GB; the rows are run again for the next ones."""
GAMMA = 64.0
"""LoRA-GA's stability parameter (Wang et al. 2024, section 4.1)."""


def init_kind(arguments: Any) -> str:
    """The initialization that a recipe sets, empty for LoRA's default."""
    word = arguments.get("init_lora_weights")
    return str(word).partition("_niter_")[0] if isinstance(word, str) else ""


class ResidualInit:
    """LoRA layers initialized with a part of their weight, which is not removed from the weight.

    The layer computes W x + s (B A - B0 A0) x, the same as B A on a residual weight W - s B0 A0.
    """

    def __init__(
        self,
        model: PeftModel,
        initial_weights: Callable[[str, LoraLayer], tuple[Tensor, Tensor]],
        resume_from: Path | None,
    ) -> None:
        """
        Args:
            initial_weights: returns the two initial matrices of a layer; not called if a checkpoint has them.
            resume_from: the checkpoint from which the run resumes.
        """
        self._model = model
        self._first: dict[str, tuple[Tensor, Tensor]] = {}
        self._hooks = []
        stored = load_file(resume_from / FIRST) if resume_from is not None else {}
        for name, layer in lora_layers(model):
            down, up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            if stored:
                first = stored[f"{name}.down"].to(down), stored[f"{name}.up"].to(up)
            else:
                first = initial_weights(name, layer)
            # Contiguous like those from a checkpoint: other strides would round matmuls differently.
            self._first[name] = (first[0].to(down).contiguous(), first[1].to(up).contiguous())
            down.data, up.data = (part.clone() for part in self._first[name])
            self._hooks.append(layer.register_forward_hook(partial(_subtract_initial, first=self._first[name])))

    def save(self, folder: Path) -> None:
        """Write the initial weights into a checkpoint."""
        parts: dict[str, Tensor] = {}
        for name, (down, up) in self._first.items():
            parts |= {f"{name}.down": down.contiguous(), f"{name}.up": up.contiguous()}
        save_file(parts, folder / FIRST)

    def convert_to_plain_lora(self) -> None:
        """Convert to plain LoRA of twice the rank, which computes the same on the unchanged base."""
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


def _subtract_initial(
    layer: LoraLayer, inputs: tuple[Tensor, ...], output: Tensor, *, first: tuple[Tensor, Tensor]
) -> Tensor:
    if layer.disable_adapters or layer.merged:
        return output
    down, up = first
    cast = layer._cast_input_dtype(inputs[0], down.dtype)
    initial = torch.nn.functional.linear(torch.nn.functional.linear(cast, down), up) * layer.scaling[NAME]
    residual: Tensor = output - initial.to(output.dtype)
    return residual


def lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """The LoRA layers, with their name in the base."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and NAME in module.lora_A:
            yield name, module


def weight_of(layer: LoraLayer) -> Tensor:
    """The dequantized weight of the layer: (outputs, inputs), float32.

    Raises:
        RecipeError: it is not a linear layer.
    """
    weight: Tensor = dequantize_module_weight(layer.get_base_layer()).detach().float()
    if weight.dim() != 2:
        raise RecipeError(
            "adapter.init_lora_weights needs the weight matrix of a linear layer, but a target is a convolution; "
            "remove it"
        )
    transposed: Tensor = weight.T if getattr(layer, "fan_in_fan_out", False) else weight
    return transposed


def principal(weight: Tensor, r: int, scale: float, word: str) -> tuple[Tensor, Tensor]:
    """Two matrices whose product, times the scale, is the leading part of a weight.

    Args:
        weight: (outputs, inputs), float32.
        word: `pissa` for the singular value decomposition, `pissa_niter_N` for a randomized one with N iterations,
            `olora` for the QR decomposition.

    Returns:
        down: (r, inputs) and up: (outputs, r).

    Source: Meng et al. 2024, arXiv:2404.02948, section 3; Büyükakyüz 2024, arXiv:2406.01775, section 3.
    """
    if word == "olora":
        q, rest = torch.linalg.qr(weight)
        return rest[:r].contiguous(), q[:, :r].contiguous()
    rounds = word.partition("_niter_")[2]
    if rounds:
        with torch.random.fork_rng():  # keeps the row order, which is drawn later, the same in a resumed session
            u, s, v = torch.svd_lowrank(weight, q=r, niter=int(rounds))
    else:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        v = vh.T
    root = torch.sqrt(s[:r] / scale)
    return root[:, None] * v[:, :r].T, u[:, :r] * root


def initialize_from_quantization_error(model: PeftModel, original: Source) -> None:
    """Initialize with the leading part of the quantization error of each weight.

    Args:
        original: returns the unquantized weights, in the layout of their file.

    Source: Li et al. 2023, arXiv:2310.08659, algorithm 1 with one iteration; the quantized weights do not change.
    """
    transposed = turned_layers(model.get_base_model())
    for name, layer in lora_layers(model):
        dequantized = weight_of(layer)
        stored = original(f"{name}.weight").to(dequantized)
        original_weight = stored.T if name in transposed else stored
        down, up = principal(original_weight - dequantized, layer.r[NAME], layer.scaling[NAME], "pissa")
        layer.lora_A[NAME].weight.data.copy_(down)
        layer.lora_B[NAME].weight.data.copy_(up)


def leading_part(word: str) -> Callable[[str, LoraLayer], tuple[Tensor, Tensor]]:
    """Returns a function for the initial matrices of a layer as the leading part of its weight."""

    def leading(_: str, layer: LoraLayer) -> tuple[Tensor, Tensor]:
        return principal(weight_of(layer), layer.r[NAME], layer.scaling[NAME], word)

    return leading


def initialize_adapter(
    model: PeftModel, plan: Plan, data: PreparedData, tokenizer: PreTrainedTokenizerBase, resume_from: Path | None
) -> ResidualInit | None:
    """Initialize an adapter as the recipe says.

    Args:
        model: the wrapped model.
        resume_from: the checkpoint from which the run resumes, which contains the initial weights.

    Returns:
        The initial weights that are subtracted from the output; None for other initializations.

    Raises:
        RecipeError: a layer is too small for the rank.
        DataError: there are fewer rows than directions that EVA computes.
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
    """Initialize with the principal directions of each layer's inputs, and redistribute the ranks by need (EVA).

    Args:
        rows: token ids of training rows.
        pad_id: token id used for padding.
        pooled: some layers read one vector per row instead of one per token, as after an encoder's pooler.

    Raises:
        RecipeError: a layer has fewer inputs than directions to compute, or the directions do not converge.
        DataError: there are fewer rows than directions.

    Source: Paischer et al. 2024, arXiv:2410.07170.
    """
    rho = model.peft_config["default"].eva_config.rho
    layers = [one for one in model.modules() if isinstance(one, LoraLayer) and "default" in one.r]
    components = max(round(layer.r["default"] * rho) for layer in layers)
    narrowest = min(int(layer.in_features) for layer in layers)
    if components > narrowest:
        raise RecipeError(
            f"adapter.init_lora_weights eva needs {components} directions (r times {rho:g}, the rho of "
            f"adapter.eva_config), but a layer has only {narrowest} inputs; lower adapter.r"
        )
    device = next(model.parameters()).device
    batches = []
    for some in _eva_batches(rows, components, pooled=pooled):
        ids, _, mask = pad_right(list(some), list(some), pad_id)
        batches.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    seen = 0

    def forward(given: Any, inputs: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > MOST_BATCHES:
            raise RecipeError(
                f"adapter.init_lora_weights eva: the directions have not converged after {MOST_BATCHES} batches; lower "
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


def _eva_batches(rows: Sequence[list[int]], components: int, *, pooled: bool) -> list[Sequence[list[int]]]:
    """Batches with at least one input per direction: PEFT skips smaller ones, and loops forever if all are smaller.

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
        have = f"{inputs} {'rows' if pooled else 'tokens'} in the training rows"
        raise DataError(
            f"adapter.init_lora_weights eva needs {components} directions, but there are only {have}; lower adapter.r, "
            "or remove it"
        )
    return found


def _inputs(given: Any, positions: Tensor, _: str) -> Tensor:
    """The inputs of a layer without padding: (tokens or rows, width)."""
    found: Tensor = given[0] if isinstance(given, tuple | list) else given
    return (found[tuple(positions.T)] if found.dim() > 2 else found).contiguous()


def takes_gradient(adapter: AdapterSection) -> bool:
    """Whether an adapter is initialized from the gradient of training rows."""
    return init_kind(adapter.arguments) == "lora_ga" or adapter.arguments.get("mask") == "gradient"


def initialize_from_gradient(
    model: PeftModel, plan: Plan, data: PreparedData, tokenizer: PreTrainedTokenizerBase, resume_from: Path | None
) -> ResidualInit | None:
    """Initialize an adapter from the gradient of the loss on training rows.

    Every process uses the same rows, so that all of them initialize the same.

    Args:
        model: the wrapped model; the adapter does not change its output yet.
        resume_from: the checkpoint from which the run resumes, which contains the initial weights.

    Returns:
        For LoRA, the initial weights to subtract; None for SHiRA, which stores its indices.

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
                firsts[names[path]] = lora_ga_weights(gradient, layer.r[NAME], layer.scaling[NAME], names[path])
            else:
                select_largest_entries(layer, gradient)
    return ResidualInit(model, lambda name, _: firsts[name], None) if lora else None


def lora_ga_weights(gradient: Tensor, r: int, scale: float, name: str) -> tuple[Tensor, Tensor]:
    """LoRA-GA's two initial matrices, which bring its first step closest to that of full fine-tuning.

    Args:
        gradient: (outputs, inputs), float32, of the loss with respect to the weight.
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
            f"adapter.r = {r}: init_lora_weights lora_ga needs {2 * r} directions per gradient, but that of {name} "
            f"has {min(gradient.shape)}; lower adapter.r to {min(gradient.shape) // 2}"
        )
    with torch.random.fork_rng():  # keeps the row order, which is drawn later, the same in a resumed session
        u, _, v = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
    size = gradient.shape[0] ** 0.25 / GAMMA**0.5
    return v[:, :r].T * size, u[:, r : 2 * r] * size / scale


def select_largest_entries(layer: Any, gradient: Tensor) -> None:
    """Make SHiRA train the weights with the largest gradient, as many as its random mask has."""
    count = layer.shira_weight[NAME].numel()
    positions = gradient.abs().flatten().topk(count).indices.sort().values
    old = layer.shira_indices[NAME]
    indices = torch.stack([positions // gradient.shape[1], positions % gradient.shape[1]])
    layer.shira_indices[NAME] = indices.to(old.device, old.dtype)


def shira_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """The SHiRA layers, with their name in the base."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ShiraLinear) and NAME in module.shira_weight:
            yield name, module


def _parts(layers: Mapping[str, Any]) -> Iterator[list[str]]:
    """Groups of layers whose gradients fit in memory together."""
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
    raise AssertionError(f"{name}: its initial weights are in the checkpoint")
