"""Fold an adapter into float weights one tensor at a time, so that no second copy of the model is ever in memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftcli.errors import MachineError
from peftcli.plan.plan import Base

Source = Callable[[str], Tensor]
"""Gives the base's tensor of a name."""


@dataclass(frozen=True)
class Folded:
    """The tensors of a merged model, made as they are asked for.

    Attributes:
        sizes: number of elements by name, in the order of `tensors`.
        tensors: makes the pairs of name and float tensor.
        unties: a tied embedding or output layer was trained whole, so the two may differ now.
    """

    sizes: dict[str, int]
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    unties: bool


def loaded_weights(model: PreTrainedModel) -> Source:
    """The weights that a loaded base computes with: its 4-bit layers unpacked, the others as they are."""
    import bitsandbytes.functional as bnb

    modules = dict(model.named_modules())
    state = model.state_dict(keep_vars=True)
    turned = {name for name, module in _skeleton(model).named_modules() if isinstance(module, Conv1D)}

    def read(name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        packed: Any = getattr(modules.get(owner), leaf, None)
        if getattr(packed, "quant_state", None) is not None:
            unpacked: Tensor = bnb.dequantize_4bit(packed.data, packed.quant_state)
            # GPT-2's layers hold their weight turned round; quantized they are linear layers like all others.
            return unpacked.t() if owner in turned else unpacked
        return Tensor.detach(state[name])

    return read


def end_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the embedding and of the output layer, empty where the model has no output layer."""
    paths = {module: name for name, module in model.named_modules()}
    embedding, output = paths.get(model.get_input_embeddings()), paths.get(model.get_output_embeddings())
    return (embedding, output) if embedding is not None and output is not None else ()


def original_weights(base: Base, model: PreTrainedModel) -> Source:
    """The weights as they lie in the base's safetensors files, read one by one.

    Args:
        base: whose files are read.
        model: the loaded base; where its output layer has no tensor of its own, the embedding's is meant.

    Raises:
        MachineError: a weight is not there under its name.
    """
    folder = Path(base.path)
    if not folder.is_dir():
        folder = Path(snapshot_download(base.path, revision=base.revision, allow_patterns=["*.safetensors*"]))
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as stream:
            files.update(dict.fromkeys(stream.keys(), file))

    ends = end_names(model)
    tied = {f"{ends[1]}.weight": f"{ends[0]}.weight"} if ends else {}

    def read(name: str) -> Tensor:
        name = name if name in files else tied.get(name, name)
        if name not in files:
            raise MachineError(f"{base.path}: its files hold no weight named {name}; merge with --into dequantized")
        with safe_open(str(files[name]), framework="pt") as stream:
            tensor: Tensor = stream.get_tensor(name)
        return tensor

    return read


def fold(base: PreTrainedModel, adapter: Path, source: Source) -> Folded:
    """Prepare the merge of an adapter, using PEFT's own arithmetic layer by layer.

    The structure is built a second time with weights that take no memory; only the layer at hand gets real ones, in
    float32, is merged, read and emptied.

    Args:
        base: the loaded base, whose names and ties count; its weights are not touched.
        adapter: the adapter's folder.
        source: of the base's weights.

    Raises:
        MachineError: this adapter cannot be merged.
    """
    skeleton = _skeleton(base)
    _hollow_out(skeleton)
    layers = _layers(PeftModel.from_pretrained(skeleton, str(adapter), torch_device="cpu"))
    names = skeleton_names(base)
    # Asked of the configuration: taking an adapter off leaves a trained end in the place of the tied one.
    ends = end_names(base) if base.config.get_text_config().tie_word_embeddings else ()
    unties = any(isinstance(layers.get(name), ModulesToSaveWrapper) for name in ends)
    if ends and not unties:
        names = [name for name in names if name != f"{ends[1]}.weight"]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            owner, _, leaf = name.rpartition(".")
            layer = layers.get(owner)
            if layer is None:
                yield name, source(name)
            elif isinstance(layer, ModulesToSaveWrapper):
                yield name, getattr(layer.modules_to_save[layer.active_adapters[0]], leaf).detach()
            else:
                yield name, _merge_layer(layer, owner, leaf, source)

    state = dict(base.state_dict(keep_vars=True))
    sizes = {name: _elements(state[name]) for name in names}
    return Folded(sizes, tensors, unties)


def _skeleton(base: PreTrainedModel) -> PreTrainedModel:
    """The model without quantization, on the meta device."""
    config = type(base.config).from_dict(base.config.to_dict())
    config.quantization_config = None
    del config.quantization_config
    with torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trusts(base))
    return skeleton


def trusts(model: PreTrainedModel) -> bool:
    """Whether a loaded model runs code of its own repository, which was allowed when it was loaded."""
    return not type(model).__module__.startswith("transformers.")


def skeleton_names(model: PreTrainedModel) -> list[str]:
    """Names of the tensors that a float copy of this model would save."""
    aside = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB")
    return [
        name
        for name in model.state_dict()
        if not name.endswith(aside) and ".quant_state." not in name and ".weight_format" not in name
    ]


def _hollow_out(skeleton: torch.nn.Module) -> None:
    # Not left on the meta device, since PEFT would put the adapter's weights there too.
    for module in skeleton.modules():
        for name, parameter in module.named_parameters(recurse=False):
            nothing = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(nothing, requires_grad=False))


def _layers(wrapped: PeftModel) -> dict[str, BaseTunerLayer | ModulesToSaveWrapper]:
    inner = wrapped.get_base_model()
    return {
        name: module
        for name, module in inner.named_modules()
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper))
    }


def _merge_layer(layer: BaseTunerLayer, owner: str, leaf: str, source: Source) -> Tensor:
    inner = layer.get_base_layer()
    empty = {name: parameter for name, parameter in inner.named_parameters(recurse=False)}
    for name in empty:
        real = source(f"{owner}.{name}").to("cpu", torch.float32)
        setattr(inner, name, torch.nn.Parameter(real.clone(), requires_grad=False))
    try:
        layer.merge(safe_merge=True)
    except (NotImplementedError, ValueError) as problem:
        raise MachineError(f"this adapter cannot be merged: {owner}: {problem or type(problem).__name__}") from problem
    merged: Tensor = getattr(inner, leaf).detach()
    assert not merged.is_meta and not any(weight.is_meta for weight in layer.parameters())
    layer.merged_adapters.clear()
    for name, parameter in empty.items():
        setattr(inner, name, parameter)
    return merged


def _elements(tensor: Tensor) -> int:
    shape = getattr(getattr(tensor, "quant_state", None), "shape", None)
    return int(torch.Size(shape).numel()) if shape is not None else int(tensor.numel())
