"""The structure of a base model from its configuration alone: no weight is loaded."""

from collections.abc import Callable
from pathlib import Path

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftcli.errors import MachineError, RecipeError
from peftcli.adapters.build import peft_config
from peftcli.model.hub import explain_missing, look_for_network
from peftcli.model.shape import read_shape
from peftcli.plan.facts import ModelFacts
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
    path: str, config: PreTrainedConfig, *, note: str = "", trust_remote_code: bool = False
) -> ModelFacts:
    """Build the model on the meta device and name its parts.

    Raises:
        MachineError: the architecture is not a causal language model, or holds only pickled weights.
        RecipeError: the weights are quantized already.
    """
    _refuse_pickles(path)
    packed = getattr(config, "quantization_config", None)
    if packed is not None:
        method = packed.get("quant_method") if isinstance(packed, dict) else getattr(packed, "quant_method", None)
        raise RecipeError(
            f"model.name {path}: its weights are quantized already ({method}); name the repository with the full "
            "weights and let `quantization: {bits: 4}` quantize them"
        )
    model = _meta_model(path, config, trust_remote_code=trust_remote_code)
    output = model.get_output_embeddings()
    names = {name: module for name, module in model.named_modules() if name}
    output_layer = next((name for name, module in names.items() if module is output), None)
    text = config.get_text_config()
    return ModelFacts(
        path=path,
        architecture=type(model).__name__,
        parameters=model.num_parameters(),
        modules=tuple(names),
        linear=tuple(
            name
            for name, module in names.items()
            if isinstance(module, (torch.nn.Linear, Conv1D)) and name != output_layer
        ),
        output_layer=output_layer,
        positions=getattr(text, "max_position_embeddings", None),
        sdpa=bool(getattr(model, "_supports_sdpa", True)),
        note=note,
        shape=read_shape(model, text),
    )


def trainable_counter(
    path: str, config: PreTrainedConfig, task: str, *, trust_remote_code: bool = False
) -> Callable[[AdapterSection], int]:
    """A function that counts the trainable parameters of an adapter on this model, by letting PEFT build it there."""

    def count(adapter: AdapterSection) -> int:
        model = _meta_model(path, config, trust_remote_code=trust_remote_code)
        try:
            with torch.device("meta"):
                wrapped = get_peft_model(model, peft_config(adapter, task), low_cpu_mem_usage=True)
        except ValueError as problem:
            raise RecipeError(f"adapter: {' '.join(str(problem).split())[:400]}") from problem
        if not any(isinstance(module, BaseTunerLayer) for module in wrapped.modules()):
            raise RecipeError(f"adapter.method {adapter.method} found no module to stand on in {path}")
        return sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)

    return count


def _meta_model(path: str, config: PreTrainedConfig, *, trust_remote_code: bool) -> PreTrainedModel:
    # A copy, since building a model writes into its configuration.
    config = type(config).from_dict(config.to_dict())
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError) as problem:
        kind = getattr(config, "model_type", "?")
        raise MachineError(f"{path}: a model of type {kind} is no causal language model of transformers") from problem
    return model


def _refuse_pickles(path: str) -> None:
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
    if pickled:
        raise MachineError(
            f"{path}: holds {pickled[0]} and no safetensors; a pickle can run code when it is loaded, so it is not "
            "read; convert it to safetensors"
        )
    raise MachineError(f"{path}: no *.safetensors in this folder, so no weights to load")
