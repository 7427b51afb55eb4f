"""Folds an adapter into floating-point weights one layer at a time, without a second copy of the model in memory.

Adapters that cannot be merged are refused before the base model is loaded.
"""

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor
from transformers import PreTrainedModel

from peftcli.adapters.quantized import hide_quantization_flag
from peftcli.errors import MachineError, MemoryExhausted
from peftcli.methods.base import Method
from peftcli.methods.registry import METHODS
from peftcli.model.files import Source, end_names, skeleton_of
from peftcli.model.hardware import available_memory
from peftcli.model.inspect import drop_parameters
from peftcli.report.format import size


@dataclass(frozen=True)
class FoldedWeights:
    """The tensors of a merged model, computed lazily.

    Attributes:
        sizes: number of elements by name, in the order of `tensors`.
        tensors: yields pairs of a name and a floating-point tensor.
        unties: whether a tied embedding or output layer was trained, so that the two may differ now.
        largest_layer: number of elements of the largest layer that the adapter changes.
    """

    sizes: dict[str, int]
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    unties: bool
    largest_layer: int = 0


def fold(base: PreTrainedModel, adapter: Path, source: Source) -> FoldedWeights:
    """Prepare the merge of an adapter, with PEFT's own `merge`, layer by layer.

    The model is built a second time on the meta device; only the current layer gets real weights, in float32.

    Args:
        base: the loaded base model, for its tensor names and tied weights; it is not changed.
        adapter: the adapter folder.
        source: returns the base weights by name.

    Raises:
        MachineError: this adapter cannot be merged.
        MemoryExhausted: its method needs all weights at once, and RAM does not hold them.
    """
    skeleton = skeleton_of(base)
    drop_parameters(skeleton)
    method = method_of(adapter)
    if method is not None and method.from_weights:
        _check_room_to_fill(base, method)
        _fill(skeleton, source)
    wrapped = PeftModel.from_pretrained(skeleton, str(adapter), torch_device="cpu")
    layers = _layers(wrapped)
    names = skeleton_names(base)
    # From the configuration, because unloading an adapter leaves a trained layer in place of the tied one.
    tied = getattr(base.config.get_text_config(), "tie_word_embeddings", False)  # image models have no such layers
    ends = end_names(base) if tied else ()
    unties = _untied([layers.get(name) for name in ends])
    if ends and not unties:
        names = [name for name in names if name != f"{ends[1]}.weight"]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        merged: tuple[str, dict[str, Tensor]] = ("", {})
        done: set[int] = set()
        for name in names:
            owner, _, leaf = _place(name, layers)
            layer = layers.get(owner)
            if layer is not None:
                done |= _adapter_weights(layer).keys()
            if layer is None:
                yield name, source(name)
            elif isinstance(layer, ModulesToSaveWrapper):
                yield name, layer.modules_to_save[layer.active_adapters[0]].state_dict()[leaf].detach()
            else:
                if merged[0] != owner:
                    merged = (owner, _merge_layer(layer, owner, source))
                yield name, merged[1][leaf]
        _refuse_leftovers(wrapped, done)

    state = dict(base.state_dict(keep_vars=True))
    sizes = {name: _elements(state[name]) for name in names}
    changed = Counter[str]()
    for name, elements in sizes.items():
        owner = name.rpartition(".")[0]
        if isinstance(layers.get(owner), BaseTunerLayer):
            changed[owner] += elements
    return FoldedWeights(sizes, tensors, unties, max(changed.values(), default=0))


def _untied(ends: list[object]) -> bool:
    """Whether the embedding or the output layer was trained separately from the other."""
    weights = [end.weight for end in ends if isinstance(end, ModulesToSaveWrapper)]
    return bool(weights) and not (len(weights) == len(ends) and weights[0] is weights[-1])


def _check_room_to_fill(base: PreTrainedModel, method: Method) -> None:
    state = dict(base.state_dict(keep_vars=True))
    needed, free = 4 * sum(_elements(state[name]) for name in skeleton_names(base)), available_memory()
    if needed > free:
        raise MemoryExhausted(
            f"{method.title} needs all weights of the base in float32 to be merged: {size(needed)} of RAM, and "
            f"{size(free)} are free; nothing was written, and the adapter is unchanged; merge on a machine with more "
            "RAM, or use the adapter unmerged"
        )


def _fill(skeleton: PreTrainedModel, source: Source) -> None:
    for path, module in skeleton.named_modules():
        for name in [name for name, _ in module.named_parameters(recurse=False)]:
            real = source(f"{path}.{name}").to("cpu", torch.float32)
            setattr(module, name, torch.nn.Parameter(real, requires_grad=False))


def bare_base(model: PeftModel) -> PreTrainedModel:
    """The base model with its original module names; the adapter is unloaded for good."""
    base: PreTrainedModel = model.get_base_model()
    if not hasattr(model.base_model, "unload"):
        return base
    # Some methods refuse to work on a quantized model, even to unload.
    with hide_quantization_flag(base):
        bare: PreTrainedModel = model.unload()
    return bare


def skeleton_names(model: PreTrainedModel) -> list[str]:
    """Names of the tensors that an unquantized copy of this model would save."""
    quantization_state = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB")
    return [
        name
        for name in model.state_dict()
        if not name.endswith(quantization_state) and ".quant_state." not in name and ".weight_format" not in name
    ]


def _layers(wrapped: PeftModel) -> dict[str, BaseTunerLayer | ModulesToSaveWrapper]:
    found = {}
    for name, module in wrapped.get_base_model().named_modules():
        if isinstance(module, TrainableTokensWrapper):
            found[name] = module.token_adapter  # next to the embedding, with the rows that are merged into it
        elif isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            found[name] = module
    return found


def _place(name: str, layers: Mapping[str, object]) -> tuple[str, str, str]:
    """Split a tensor's name after its module, or after the module around it that was trained as a whole."""
    above = name
    while above := above.rpartition(".")[0]:
        if isinstance(layers.get(above), ModulesToSaveWrapper):
            return above, ".", name[len(above) + 1 :]
    return name.rpartition(".")


def _nested(layer: BaseTunerLayer) -> Iterator[BaseTunerLayer]:
    """A layer and the layers that it wraps: PEFT nests one wrapper per parameter of a module (`target_parameters`)."""
    inner: object = layer
    while isinstance(inner, BaseTunerLayer):
        yield inner
        inner = getattr(inner, "base_layer", None)


def _adapter_weights(layer: BaseTunerLayer | ModulesToSaveWrapper) -> dict[int, str]:
    """The trained weights of a layer, by id, with the last parts of their names."""
    if isinstance(layer, ModulesToSaveWrapper):
        return {id(weight): name for name, weight in layer.modules_to_save.named_parameters(prefix="modules_to_save")}
    found: dict[int, str] = {}
    for part in _nested(layer):
        for kind in part.adapter_layer_names:
            holder = getattr(part, kind, None)
            if isinstance(holder, torch.nn.Module):
                found |= {id(weight): name for name, weight in holder.named_parameters(prefix=kind)}
    return found


def _refuse_leftovers(wrapped: PeftModel, done: set[int]) -> None:
    """Refuse a merge that left out a part of the adapter, which a comparison of outputs can miss.

    Args:
        done: ids of the weights that were merged; tied layers share theirs.

    Raises:
        MachineError: a layer of the adapter was not merged.
    """
    left = []
    for name, module in wrapped.get_base_model().named_modules():
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            weights = _adapter_weights(module)
            left += [f"{name}.{leaf}" for key, leaf in weights.items() if key not in done]
    if left:
        raise MachineError(
            f"{len(left)} tensors of the adapter did not take part in the merge, such as {left[0]}; the merged model "
            "was not saved; use the adapter unmerged"
        )


def _merge_layer(layer: BaseTunerLayer, owner: str, source: Source) -> dict[str, Tensor]:
    """The merged tensors of a layer, by the last part of their names."""
    # A copy, since each method replaces modules or weights in its own way when it merges.
    own = copy.deepcopy(layer)
    inner = own.get_base_layer()
    for name in [name for name, _ in inner.named_parameters(recurse=False)]:
        real = source(f"{owner}.{name}").to("cpu", torch.float32)
        setattr(inner, name, torch.nn.Parameter(real.clone(), requires_grad=False))
    try:
        for part in _nested(own):
            part.merge(safe_merge=True)
    except (NotImplementedError, ValueError) as problem:
        raise MachineError(f"this adapter cannot be merged: {owner}: {problem or type(problem).__name__}") from problem
    merged: dict[str, Tensor] = dict(own.get_base_layer().named_parameters(recurse=False))
    merged |= own.get_base_layer().named_buffers(recurse=False)
    assert not any(weight.is_meta for weight in merged.values())
    return {name: weight.detach() for name, weight in merged.items()}


def _elements(tensor: Tensor) -> int:
    shape = getattr(getattr(tensor, "quant_state", None), "shape", None)
    return int(torch.Size(shape).numel()) if shape is not None else int(tensor.numel())


def method_of(adapter: Path) -> Method | None:
    """The method of a saved adapter, None if it is not in the method table."""
    kind = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
    config = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    return next((one for one in METHODS.values() if config is not None and one.config == config.__name__), None)


def refuse_unmergeable(adapter: Path) -> None:
    """Refuse an adapter whose method cannot be merged.

    Raises:
        MachineError: with the reason and the alternative.
    """
    method = method_of(adapter)
    if method is not None and method.merge:
        raise MachineError(
            f"{adapter}: {method.title} cannot be merged: {method.merge}; use the adapter unmerged, "
            "`peftcli generate` and PEFT load it together with its base model"
        )
