"""The weights of a base by name: as a loaded model computes with them, or as they lie in its files."""

from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftcli.adapters.module_layout import end_name
from peftcli.adapters.quantized import is_packed, unpacked_weight
from peftcli.errors import MachineError
from peftcli.plan.plan import Base

Source = Callable[[str], Tensor]
"""Gives the base's tensor of a name."""


def loaded_weights(model: PreTrainedModel) -> Source:
    """The weights that a loaded base computes with: its quantized layers unpacked, the others as they are."""
    modules = dict(model.named_modules())
    state = model.state_dict(keep_vars=True)
    turned = turned_layers(model)

    def read(name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and is_packed(modules.get(owner)):
            unpacked = unpacked_weight(modules[owner])
            # GPT-2's layers hold their weight turned round; quantized they are linear layers like all others.
            return unpacked.t() if owner in turned else unpacked
        return Tensor.detach(state[name])

    return read


def end_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the embedding and of the output layer, empty where the model has no output layer."""
    embedding, output = end_name(model, "input"), end_name(model, "output")
    return (embedding, output) if embedding is not None and output is not None else ()


def turned_layers(model: PreTrainedModel) -> set[str]:
    """Layers whose file holds their weight turned round, as GPT-2's does; quantized they are linear like all others."""
    # Asked of the structure without the adapter and without quantization, both of which put other modules there.
    return {name for name, module in skeleton_of(model).named_modules() if isinstance(module, Conv1D)}


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


def skeleton_of(base: PreTrainedModel) -> PreTrainedModel:
    """The model without quantization, on the meta device."""
    config = type(base.config).from_dict(base.config.to_dict())
    config.quantization_config = None
    del config.quantization_config
    with torch.device("meta"):
        skeleton: PreTrainedModel = type(base)._from_config(config)
    return skeleton
