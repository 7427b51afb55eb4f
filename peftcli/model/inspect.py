"""The structure of a base model from its configuration alone: no weight is loaded."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from peftcli.adapters.module_layout import all_widths, end_name, hidden_width, parameter_owners
from peftcli.errors import MachineError, RecipeError
from peftcli.model.flat_rows import why_not_flat
from peftcli.model.heads import build_empty, head_modules, is_within, positions_of
from peftcli.model.hub import explain_missing, look_for_network
from peftcli.model.shape import read_shape
from peftcli.model.statistics import keeps_statistics
from peftcli.model.trainable import count_trainable
from peftcli.plan.machine import ModelFacts
from peftcli.plan.optimizer import Trained
from peftcli.recipe.rules import CAUSAL, SEQUENCE
from peftcli.recipe.schema import AdapterSection


def load_config(path: str, revision: str | None, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load the configuration of a model.

    Raises:
        MachineError: the folder or the Hub id cannot be had.
    """
    look_for_network(path)
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as problem:
        raise MachineError(explain_missing(path, problem)) from problem


def inspect_model(
    path: str,
    config: PreTrainedConfig,
    task: str = CAUSAL,
    *,
    labels: tuple[str, ...] = (),
    trust_remote_code: bool = False,
    needs_weights: bool = True,
) -> ModelFacts:
    """Build the model on the meta device and name its parts.

    Args:
        labels: what the head of the task gives; none for a language model.
        needs_weights: refuse a folder that holds none; pickled ones are refused in any case.

    Raises:
        MachineError: the architecture has no model for the task, or holds only pickled weights.
        RecipeError: the weights are quantized already.
    """
    _refuse_pickles(path, needs_weights=needs_weights)
    packed = getattr(config, "quantization_config", None)
    if packed is not None:
        method = packed.get("quant_method") if isinstance(packed, dict) else getattr(packed, "quant_method", None)
        raise RecipeError(
            f"model.name {path}: its weights are quantized already ({method}); name the repository with the full "
            "weights and let `quantization: {bits: 4}` quantize them"
        )
    model = build_empty(path, config, task, labels, trust_remote_code=trust_remote_code)
    head = head_modules(model, task, path)
    output = model.get_output_embeddings()
    names = {name: module for name, module in model.named_modules() if name}
    embedding = end_name(model, "input")
    output_layer = next((name for name, module in names.items() if module is output), None)
    text = config.get_text_config()
    beside = {name: one for name, one in names.items() if name != output_layer and not is_within(name, head)}
    linear = tuple(name for name, module in beside.items() if isinstance(module, (torch.nn.Linear, Conv1D)))
    convolutions = () if linear else _convolutions(beside)
    return ModelFacts(
        path=path,
        architecture=type(model).__name__,
        parameters=model.num_parameters(),
        modules=tuple(names),
        linear=linear or convolutions,
        output_layer=output_layer,
        positions=positions_of(config),
        norms=tuple(name for name, module in names.items() if "norm" in type(module).__name__.lower()),
        embeddings=() if embedding is None else (embedding,),
        sdpa=bool(getattr(model, "_supports_sdpa", True)),
        shape=read_shape(model, text),
        owners=parameter_owners(model),
        widths=all_widths(model),
        hidden=hidden_width(model),
        head=head,
        reads_end=task == SEQUENCE and "score" in head,  # so transformers calls a head on the last token
        convolutions=bool(convolutions),
        statistics=any(keeps_statistics(module) for module in names.values()),
        checkpointing=bool(model.supports_gradient_checkpointing),
        divisible=_is_divisible(model, names),
        not_flat=why_not_flat(config) if task == CAUSAL else "",
    )


def _is_divisible(model: torch.nn.Module, names: Mapping[str, torch.nn.Module]) -> bool:
    """Whether transformers' plan of parts names the blocks of the model; with no block in it all would be one part."""
    rules = getattr(model, "fsdp_plan", None) or {}
    return any("*" in rule and rule.partition(".*")[0] in names for rule in rules)


def _convolutions(modules: Mapping[str, torch.nn.Module]) -> tuple[str, ...]:
    """Names of the convolutions of images; those in groups aside, whose rank the groups would have to divide."""
    return tuple(name for name, module in modules.items() if isinstance(module, torch.nn.Conv2d) and module.groups == 1)


def trainable_counter(
    path: str,
    config: PreTrainedConfig,
    task: str,
    *,
    labels: tuple[str, ...] = (),
    trust_remote_code: bool = False,
) -> Callable[[AdapterSection], Trained]:
    """A function that counts the trainable parameters of an adapter on this model, by letting PEFT build it there."""

    def count(adapter: AdapterSection) -> Trained:
        model = build_empty(path, config, task, labels, trust_remote_code=trust_remote_code)
        return count_trainable(model, adapter, task)

    return count


def _refuse_pickles(path: str, *, needs_weights: bool) -> None:
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
    if pickled:
        raise MachineError(
            f"{path}: holds {pickled[0]} and no safetensors; a pickle can run code when it is loaded, so it is not "
            "read; convert it to safetensors"
        )
    if needs_weights:
        raise MachineError(f"{path}: no *.safetensors in this folder, so no weights to load")
