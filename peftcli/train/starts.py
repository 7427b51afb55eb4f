"""Where LoRA begins: as a part of the weights, as what quantization lost, or as the directions of the data.

None of them changes the base: what a LoRA begins with as a part of a weight is taken off its output again, so that the
adapter switched off is the base and the adapter saved works on it.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftcli.data.prepare import PreparedData
from peftcli.errors import RecipeError
from peftcli.model.files import Source, original_weights, turned_layers
from peftcli.plan.plan import Plan
from peftcli.recipe.rules import SEQUENCE
from peftcli.train.data_starts import MOST_ROWS, begin_from_data

NAME = "default"
FIRST = "start.safetensors"
"""In a checkpoint: what the LoRA of each layer began with."""
PRINCIPAL = ("pissa", "olora")


def kind_of(arguments: Any) -> str:
    """The way to begin that a recipe asks for, empty for LoRA's own."""
    word = arguments.get("init_lora_weights")
    return str(word).partition("_niter_")[0] if isinstance(word, str) else ""


class Start:
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


def begin_from_quantization(model: PeftModel, original: Source) -> None:
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


def begin(model: PeftModel, plan: Plan, data: PreparedData, pad_id: int, resume_from: Path | None) -> Start | None:
    """Let LoRA begin where the recipe says.

    Returns:
        What has to be kept and settled, None where nothing has.
    """
    word = plan.adapter.arguments.get("init_lora_weights")
    kind = kind_of(plan.adapter.arguments)
    if kind in PRINCIPAL:
        return Start(model, leading_part(str(word)), resume_from)
    if kind == "loftq":
        begin_from_quantization(model, original_weights(plan.base, model.get_base_model()))
    if kind == "eva":
        rows = data.train.store.examples.column("input_ids").take(data.train.rows[:MOST_ROWS])
        pooled = plan.task == SEQUENCE
        begin_from_data(model, rows.to_pylist(), pad_id, pooled=pooled)
    return None
