"""The trainable parameters of an adapter, counted by letting PEFT build it on a model without weights."""

import copy
from collections import Counter
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftcli.adapters.build import peft_config
from peftcli.errors import RecipeError
from peftcli.methods.registry import METHODS
from peftcli.plan.optimizer import SMALL, Trained
from peftcli.recipe.schema import AdapterSection


def count_trainable(model: PreTrainedModel, adapter: AdapterSection, task: str) -> Trained:
    """The trainable parameters, each stored one once.

    Args:
        model: on the meta device; it is changed.

    Raises:
        RecipeError: the method does not fit the model, in PEFT's words.
    """
    try:
        config, spare = peft_config(adapter, task), copy.deepcopy(model)
        try:
            with torch.device("meta"):
                wrapped = get_peft_model(model, config, low_cpu_mem_usage=not _needs_own_weights(adapter))
        except (NotImplementedError, RuntimeError):  # of a method that computes with the weights when it is built
            return _count_on_samples(spare, config)  # the other is half wrapped
    except (ValueError, TypeError, AssertionError, KeyError) as problem:
        said = " ".join(str(problem).split())[:400] or type(problem).__name__
        raise RecipeError(f"adapter.method {adapter.method} does not fit this model: {said}") from problem
    if not METHODS[adapter.method].prompts and not any(
        isinstance(one, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for one in wrapped.modules()
    ):
        raise RecipeError(f"adapter.method {adapter.method} found no module to stand on in {model.config.name_or_path}")
    return sort_trained(wrapped)


def sort_trained(model: torch.nn.Module) -> Trained:
    """The trainable parameters of a model, as an optimizer tells them apart."""
    embedded = {id(one.weight) for one in model.modules() if isinstance(one, torch.nn.Embedding)}
    parts = Counter[str]()
    for parameter in model.parameters():  # a shared one comes once
        size, shape = parameter.numel(), parameter.shape
        if not parameter.requires_grad or not size:
            continue
        parts["parameters"] += size
        if id(parameter) in embedded:
            parts["embeddings"] += size
        elif size < SMALL:
            parts["small"] += size
        parts["factors"] += size if len(shape) < 2 else size // shape[-1] + size // shape[-2]
    named = sum(one.numel() for _, one in model.named_parameters(remove_duplicate=False) if one.requires_grad)
    return Trained(**parts, repeated=named - parts["parameters"])


def _needs_own_weights(adapter: AdapterSection) -> bool:
    """Whether PEFT may not put weights of its own making in the place of those that a method hands it.

    It would do so while it builds without memory, and two layers that share a weight would then be counted as two.
    """
    method = METHODS[adapter.method]
    return method.prompts or method.targets == "whole" or bool(adapter.arguments.get("ensure_weight_tying"))


def count_on_layer(adapter: AdapterSection, task: str, inputs: int, outputs: int, *, bias: bool) -> int:
    """Number of trainable parameters of an adapter on one linear layer of these widths.

    Raises:
        RecipeError: the method does not fit such a layer, in PEFT's words.
    """
    alone = adapter.model_copy(update={"target_modules": ("layer",), "modules_to_save": None})
    config = peft_config(alone, task)
    config.task_type = config.modules_to_save = None  # it is no model of a task
    with torch.device("meta"):
        model = torch.nn.Sequential()
        model.add_module("layer", torch.nn.Linear(inputs, outputs, bias=bias))
    try:
        try:
            with torch.device("meta"):
                wrapped = get_peft_model(model, config, low_cpu_mem_usage=True)
        except (NotImplementedError, RuntimeError):
            hollow_out(model)
            wrapped = get_peft_model(model, config)
    except (ValueError, TypeError, AssertionError, KeyError) as problem:
        said = " ".join(str(problem).split())[:400] or type(problem).__name__
        raise RecipeError(
            f"adapter.method {adapter.method} does not fit a layer of {inputs} to {outputs}: {said}"
        ) from problem
    return sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)


def _count_on_samples(model: PreTrainedModel, config: PeftConfig) -> Trained:
    """Count on two layers of each shape, with zeros for weights: on all of them it would take minutes."""
    hollow_out(model)
    output = model.get_output_embeddings()
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not output and _is_target(name, config):
            shape = (type(module), tuple(module.weight.shape), module.bias is None)
            groups.setdefault(shape, []).append(name)
    samples = {name: len(names) / len(names[:2]) for names in groups.values() for name in names[:2]}
    config.target_modules = list(samples)
    if hasattr(config, "mask_fn"):
        config.mask_fn = _first_entries
    wrapped = get_peft_model(model, config)
    owners: dict[int, set[str]] = {}
    for name, parameter in wrapped.get_base_model().named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(next((one for one in samples if name.startswith(f"{one}.")), ""))
    counted = [
        (parameter.numel(), owners.get(id(parameter), {""}))
        for parameter in wrapped.parameters()
        if parameter.requires_grad
    ]
    # What several layers share is there once, however many they are.
    found = sum(round(size * (samples.get(next(iter(own)), 1.0) if len(own) == 1 else 1.0)) for size, own in counted)
    return sort_trained(wrapped).resized(found)


def _is_target(name: str, config: PeftConfig) -> bool:
    targets = config.target_modules
    return targets == "all-linear" or any(name == one or name.endswith(f".{one}") for one in targets or ())


def _first_entries(layer: Any, r: int, **_: Any) -> torch.Tensor:
    """A mask of as many entries as SHiRA's random one, without drawing among all of them."""
    mask = torch.zeros(layer.weight.shape)
    mask.view(-1)[: r * sum(layer.weight.shape)] = 1
    return mask


def hollow_out(model: torch.nn.Module) -> None:
    """Replace each weight by zeros of its shape that take no memory, on the CPU.

    Not left on the meta device, where PEFT would put the adapter's weights too, and where nothing can be computed.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            nothing = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(nothing, requires_grad=False))
