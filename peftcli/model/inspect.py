"""The structure of a base model from its configuration: dimensions, modules, trainable parameters.

No weights are loaded: the model is built on the meta device. Also finds the model: a tiny built-in one, a local
folder, a Hub id, or the stand-in of a smoke run.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftcli.adapters.build import peft_config
from peftcli.adapters.fused_experts import expert_weights, fused_names
from peftcli.adapters.module_layout import all_widths, end_name, hidden_width, parameter_owners
from peftcli.errors import MachineError, RecipeError
from peftcli.methods.registry import METHODS
from peftcli.model.flat_rows import why_not_flat
from peftcli.model.fused_norms import is_rms_norm, norm_problem
from peftcli.model.heads import build_empty, head_modules, is_within, keeps_statistics, positions_of
from peftcli.model.hub import explain_missing, look_for_network
from peftcli.model.quantized_files import stored_quantization
from peftcli.model.rehearsal import Rehearsal, rehearse
from peftcli.plan.machine import ModelFacts
from peftcli.plan.memory.model_shape import Experts, Linear, ModelDimensions, Norm
from peftcli.plan.optimizer import SMALL, Trained
from peftcli.recipe.local_config import refuse_encoder_decoder
from peftcli.recipe.schema import AdapterSection, ModelSection
from peftcli.tasks.registry import DEFAULT, TASKS
from peftcli.tiny.build import tiny_model

TINY = "tiny:"

ACTIVATIONS_KEPT = {"gelu_new": 4, "gelu_fast": 5, "quick_gelu": 3, "gelu_python": 3}
"""Tensors saved for the backward pass by activations written in Python; torch's own save only their input."""
ATTENTION = re.compile(r"(^|\.)(self_)?att(n|ention)\b|_attn\b|_attention\b")
BLOCK = re.compile(r"^(?P<before>.*?\.)(?P<number>\d+)\.(?P<name>.+)$")


def load_config(path: str, revision: str | None, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load the configuration of a model.

    Raises:
        MachineError: the folder or Hub id cannot be loaded.
    """
    look_for_network(path)
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as problem:
        raise MachineError(explain_missing(path, problem)) from problem


def inspect_model(
    path: str,
    config: PreTrainedConfig,
    task: str = DEFAULT,
    *,
    labels: tuple[str, ...] = (),
    trust_remote_code: bool = False,
    needs_weights: bool = True,
) -> ModelFacts:
    """Build the model on the meta device and read its structure.

    Args:
        labels: the outputs of the task head; empty for a language model.
        needs_weights: refuse a folder without weights; pickled ones are always refused.

    Raises:
        MachineError: the architecture has no model for the task, or only pickled weights.
        RecipeError: the weights are already quantized.
    """
    _refuse_pickles(path, needs_weights=needs_weights)
    stored = stored_quantization(path, config)
    model = build_empty(path, config, task, labels, trust_remote_code=trust_remote_code)
    head = head_modules(model, task, path)
    output = model.get_output_embeddings()
    names = {name: module for name, module in model.named_modules() if name}
    embedding = end_name(model, "input")
    output_layer = next((name for name, module in names.items() if module is output), None)
    text = config.get_text_config()
    beside = {name: one for name, one in names.items() if name != output_layer and not is_within(name, head)}
    several = text is not config and not TASKS[task].images
    kept = (*head, *filter(None, (embedding, output_layer)))
    towers = _towers(model, text.model_type, kept) if several else ()
    beside = {name: one for name, one in beside.items() if not is_within(name, towers)}
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
        reads_end=TASKS[task].labels_texts and "score" in head,  # transformers' name for a head on the last token
        convolutions=bool(convolutions),
        statistics=any(keeps_statistics(module) for module in names.values()),
        checkpointing=bool(model.supports_gradient_checkpointing),
        divisible=_is_divisible(model, names),
        not_flat=why_not_flat(config) if TASKS[task].generates else "",
        weights=tuple(name for name, _ in model.named_parameters()),
        experts=expert_weights(model),
        fused=fused_names(config),
        towers=towers,
        stored=stored,
    )


def _towers(model: PreTrainedModel, text_type: str, kept: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the parts beside the text model that own weights, such as a vision tower and its projector.

    Args:
        text_type: model type of the text model.
        kept: modules outside the text model that rows of text pass.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    roots = tuple(
        name
        for name, module in modules.items()
        if isinstance(module, PreTrainedModel) and module.config.model_type == text_type
    )
    if not roots:
        return ()
    needed = (*roots, *kept)
    found: list[str] = []
    for name, module in modules.items():
        around = any(one.startswith(f"{name}.") for one in needed)
        if around or is_within(name, (*needed, *found)) or next(module.parameters(), None) is None:
            continue
        found.append(name)
    return tuple(found)


def _is_divisible(model: torch.nn.Module, names: Mapping[str, torch.nn.Module]) -> bool:
    """Whether transformers' FSDP plan covers the blocks of the model; otherwise everything would be one shard group."""
    rules = getattr(model, "fsdp_plan", None) or {}
    return any("*" in rule and rule.partition(".*")[0] in names for rule in rules)


def _convolutions(modules: Mapping[str, torch.nn.Module]) -> tuple[str, ...]:
    """Names of 2D convolutions, except grouped ones, whose rank the groups would have to divide."""
    return tuple(name for name, module in modules.items() if isinstance(module, torch.nn.Conv2d) and module.groups == 1)


def trainable_counter(
    path: str,
    config: PreTrainedConfig,
    task: str,
    *,
    labels: tuple[str, ...] = (),
    trust_remote_code: bool = False,
) -> Callable[[AdapterSection], Trained]:
    """Returns a function that counts the trainable parameters of an adapter on this model, using PEFT itself."""

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
            f"{path}: has {pickled[0]} and no safetensors; a pickle can run code when loaded, so it is not read; "
            "convert it to safetensors"
        )
    if needs_weights:
        raise MachineError(f"{path}: no *.safetensors in this folder, so there are no weights to load; download them")


@dataclass(frozen=True)
class Located:
    """The model to load for a recipe.

    Attributes:
        path: local folder or Hub id.
        config: its configuration.
        rehearsal: the stand-in of a smoke run; None otherwise.
    """

    path: str
    config: PreTrainedConfig
    rehearsal: Rehearsal | None = None


def resolve_model(model: ModelSection, *, smoke: bool, longest: int = 0) -> Located:
    """Find or make the model of a recipe.

    Args:
        smoke: replace a real model by a tiny random one of the same architecture, without network access.
        longest: maximum tokens of a row in the recipe; needed by a smoke run.

    Raises:
        MachineError: the model cannot be loaded.
        RecipeError: there is no tiny model of that name, or it is an encoder-decoder model.
    """
    if model.name.startswith(TINY):
        path = str(tiny_model(model.name))
        return Located(path, load_config(path, None))
    if not smoke:
        trust = model.trust_remote_code
        config = load_config(model.name, model.revision, trust_remote_code=trust)
        refuse_encoder_decoder(model, bool(config.is_encoder_decoder), config.model_type)
        return Located(model.name, config)
    made = rehearse(model, longest)
    return Located(made.path, load_config(made.path, None), made)


def read_shape(model: PreTrainedModel, config: PreTrainedConfig) -> ModelDimensions | None:
    """Read the dimensions of a model.

    Args:
        model: on any device, including the meta device.
        config: of its text part.

    Returns:
        None if the model does not consist of blocks with linear layers.
    """
    inside = _blocks(model)
    linears = _linears(inside)
    hidden, heads = _number(config, "hidden_size", "n_embd"), _number(config, "num_attention_heads", "n_head")
    if not linears or not hidden or not heads or not _number(config, "vocab_size"):
        return None
    size = _head_size(linears, hidden, heads, config)
    queries, keys = heads * size, _key_heads(linears, size, heads, config) * size
    feed = [linear for linear in linears if not ATTENTION.search(linear.name) and ".experts." not in linear.name]
    mlp = max((linear.inputs for linear in feed if linear.outputs == hidden), default=0)
    layers = max(linear.count for linear in linears)
    norms = _norms(inside, size, heads, keys // size)
    return ModelDimensions(
        hidden=hidden,
        layers=layers,
        queries=queries,
        keys=keys,
        heads=heads,
        mlp=mlp,
        mlp_kept=_kept(feed, hidden, mlp, config),
        mlp_layers=max(
            (linear.count for linear in feed if linear.inputs == mlp and linear.outputs == hidden), default=0
        ),
        vocabulary=int(config.vocab_size),
        parameters=int(model.num_parameters()),
        linears=linears,
        norms=norms,
        final_norm=Norm(
            hidden, 1, all(norm.in_float32 for norm in norms), bool(norms) and all(norm.fusible for norm in norms)
        ),
        rotary=any("Rotary" in type(module).__name__ for module in model.modules()),
        fused_qkv=any(linear.outputs == queries + 2 * keys and ATTENTION.search(linear.name) for linear in linears),
        parallel=sum(norm.count for norm in norms if norm.width == hidden) == layers,
        experts=_experts(model, config),
    )


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of the blocks, named without the block number."""
    found = [(BLOCK.match(name), module) for name, module in model.named_modules()]
    return [(match["name"], module) for match, module in found if match is not None]


def _linears(inside: Iterable[tuple[str, nn.Module]]) -> tuple[Linear, ...]:
    counts: dict[tuple[str, int, int], int] = {}
    for name, module in inside:
        if isinstance(module, nn.Linear):
            key = (name, module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            key = (name, int(module.weight.shape[0]), int(module.weight.shape[1]))
        else:
            continue
        counts[key] = counts.get(key, 0) + 1
    return tuple(Linear(*key, count) for key, count in counts.items())


def _norms(inside: Iterable[tuple[str, nn.Module]], size: int, heads: int, key_heads: int) -> tuple[Norm, ...]:
    counts: dict[tuple[str, int, bool, bool], int] = {}
    checked: dict[tuple[type, int], bool] = {}
    for name, module in inside:
        weight = getattr(module, "weight", None)
        if "Norm" not in type(module).__name__ or not isinstance(weight, torch.Tensor):
            continue
        width, leaf = int(weight.shape[-1]), name.rsplit(".", 1)[-1]
        kind = type(module), width
        if kind not in checked:
            checked[kind] = is_rms_norm(module) and norm_problem(module, torch.float32, torch.device("cpu")) is None
        if width == size and leaf.startswith(("q_", "k_", "query_", "key_")):
            width *= heads if leaf.startswith("q") else key_heads
        key = (leaf, width, not isinstance(module, nn.LayerNorm), checked[kind])
        counts[key] = counts.get(key, 0) + 1
    return tuple(Norm(width, count, wide, fusible) for (_, width, wide, fusible), count in counts.items())


def _head_size(linears: Iterable[Linear], hidden: int, heads: int, config: Any) -> int:
    asked = getattr(config, "head_dim", None)
    if isinstance(asked, int):
        return asked
    wide = next((linear.outputs for linear in linears if linear.leaf == "q_proj"), hidden)
    return max(1, wide // heads)


def _key_heads(linears: Iterable[Linear], size: int, heads: int, config: Any) -> int:
    wide = next((linear.outputs for linear in linears if linear.leaf == "k_proj"), None)
    if wide is not None:
        return max(1, wide // size)
    return _number(config, "num_key_value_heads") or heads


def _kept(feed: Iterable[Linear], hidden: int, mlp: int, config: Any) -> int:
    """Number of tensors saved between the first and the last linear layer of the MLP."""
    names = ("hidden_activation", "hidden_act", "activation_function", "ffn_act_fn")
    name = next((value for value in (getattr(config, key, None) for key in names) if isinstance(value, str)), "")
    inner = {
        linear.name: linear.outputs for linear in feed if linear.inputs == hidden and linear.outputs in (mlp, 2 * mlp)
    }
    gated = sum(inner.values()) >= 2 * mlp
    # A gated MLP saves both factors and the input of the activation.
    return ACTIVATIONS_KEPT.get(name, 1) + (2 if gated else 0)


def _experts(model: nn.Module, config: Any) -> Experts | None:
    total = _number(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    stacked = [weight for weight in model.parameters() if weight.ndim == 3 and weight.shape[0] == total > 1]
    if not stacked:
        return None
    kinds = len({tuple(weight.shape) for weight in stacked})
    return Experts(
        parameters=sum(weight.numel() for weight in stacked),
        per_token=_number(config, "num_experts_per_tok", "moe_top_k") or 1,
        total=total,
        mlp=_number(config, "moe_intermediate_size", "intermediate_size"),
        layers=len(stacked) // kinds,
    )


def _number(config: Any, *names: str) -> int:
    """The first of some settings that is a number; 0 if none is."""
    return next((value for value in (getattr(config, name, None) for name in names) if isinstance(value, int)), 0)


def count_trainable(model: PreTrainedModel, adapter: AdapterSection, task: str) -> Trained:
    """The trainable parameters; shared ones count once.

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
        except (NotImplementedError, RuntimeError):  # the method needs weights at construction
            return _count_on_samples(spare, config)  # the first copy is partly wrapped
    except (ValueError, TypeError, AssertionError, KeyError) as problem:
        said = " ".join(str(problem).split())[:400] or type(problem).__name__
        raise RecipeError(f"adapter.method {adapter.method} does not fit this model: {said}") from problem
    if not METHODS[adapter.method].prompts and not any(
        isinstance(one, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for one in wrapped.modules()
    ):
        raise RecipeError(f"adapter.method {adapter.method} matches no module of {model.config.name_or_path}")
    return sort_trained(wrapped)


def sort_trained(model: torch.nn.Module) -> Trained:
    """The trainable parameters of a model, grouped as optimizers treat them."""
    embedded = {id(one.weight) for one in model.modules() if isinstance(one, torch.nn.Embedding)}
    parts = Counter[str]()
    for parameter in model.parameters():  # yields shared ones once
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
    """Whether PEFT must not replace the weights that a method passes to it.

    It would do so when building without memory, and two layers that share a weight would count twice.
    """
    method = METHODS[adapter.method]
    return method.prompts or method.targets == "whole" or bool(adapter.arguments.get("ensure_weight_tying"))


def count_on_layer(adapter: AdapterSection, task: str, inputs: int, outputs: int, *, bias: bool) -> int:
    """Number of trainable parameters of an adapter on one linear layer of these widths.

    Raises:
        RecipeError: the method does not fit the layer, in PEFT's words.
    """
    alone = adapter.model_copy(update={"target_modules": ("layer",), "modules_to_save": None})
    config = peft_config(alone, task)
    config.task_type = config.modules_to_save = None  # a plain layer has no task
    with torch.device("meta"):
        model = torch.nn.Sequential()
        model.add_module("layer", torch.nn.Linear(inputs, outputs, bias=bias))
    try:
        try:
            with torch.device("meta"):
                wrapped = get_peft_model(model, config, low_cpu_mem_usage=True)
        except (NotImplementedError, RuntimeError):
            drop_parameters(model)
            wrapped = get_peft_model(model, config)
    except (ValueError, TypeError, AssertionError, KeyError) as problem:
        said = " ".join(str(problem).split())[:400] or type(problem).__name__
        raise RecipeError(
            f"adapter.method {adapter.method} does not fit a layer of {inputs} to {outputs}: {said}"
        ) from problem
    return sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)


def _count_on_samples(model: PreTrainedModel, config: PeftConfig) -> Trained:
    """Count on two layers of each shape with zero weights; all layers would take minutes."""
    drop_parameters(model)
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
    # Shared parameters count once, however many layers use them.
    found = sum(round(size * (samples.get(next(iter(own)), 1.0) if len(own) == 1 else 1.0)) for size, own in counted)
    return sort_trained(wrapped).resized(found)


def _is_target(name: str, config: PeftConfig) -> bool:
    targets = config.target_modules
    return targets == "all-linear" or any(name == one or name.endswith(f".{one}") for one in targets or ())


def _first_entries(layer: Any, r: int, **_: Any) -> torch.Tensor:
    """A mask with as many entries as SHiRA's random one, without sampling from all of them."""
    mask = torch.zeros(layer.weight.shape)
    mask.view(-1)[: r * sum(layer.weight.shape)] = 1
    return mask


def drop_parameters(model: torch.nn.Module) -> None:
    """Replace each weight by zeros of its shape that take no memory, on the CPU.

    The meta device does not work: PEFT would put the adapter there too, and nothing could be computed.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            nothing = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(nothing, requires_grad=False))
