"""Trains whole modules: the last blocks of a model, its embeddings, or all of it; the base weights stay available.

A float copy of each module is trained and used instead of the base module while the adapter is enabled. Embeddings and
the output layer go through PEFT's `modules_to_save`, which ties them as in the base model and works with TRL's loss.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftcli.adapters.module_layout import read_layout
from peftcli.adapters.quantized import dequantized_weight, is_quantized, is_quantized_layer
from peftcli.plan.module_layout import ModelLayout, full_targets


@dataclass
class WholeConfig(PeftConfig):  # type: ignore[misc]  # mypy does not follow peft
    """Configuration for training whole modules.

    Attributes:
        last_layers: number of trained blocks, counted from the output.
        layers: indices of the trained blocks, instead of `last_layers`.
        head: train what comes after the last block: the final norm and the output layer.
        embeddings: train what comes before the first block: token and position embeddings.
        everything: train all modules.
        target_modules, modules_to_save: the modules that the keys above select; derived from them if None.
        trainable_token_indices: trained rows of the embedding, such as those of new tokens.
    """

    last_layers: int = 0
    layers: list[int] | None = None
    head: bool = False
    embeddings: bool = False
    everything: bool = False
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | None = None
    # PEFT reads this attribute of every configuration when it matches modules.
    target_parameters: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.WHOLE


class WholeLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A frozen module and a trained copy of it."""

    adapter_layer_names = ("whole_copy",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, inference_mode: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.whole_copy = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._before_merge: dict[str, Tensor] = {}
        self._disable_adapters = False
        self._active_adapter = [adapter_name]
        self.add(adapter_name, inference_mode=inference_mode)

    def add(self, adapter_name: str, *, inference_mode: bool) -> None:
        """Add a copy of the base module."""
        self.whole_copy[adapter_name] = float_copy(self.get_base_layer())
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @property
    def weight(self) -> Tensor:
        """The weight in use, for code that reads it without calling forward."""
        found: Tensor = self._used().weight  # type: ignore[assignment]
        return found

    @property
    def bias(self) -> Tensor | None:
        """The bias in use."""
        found: Tensor | None = self._used().bias  # type: ignore[assignment]
        return found

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "whole_copy"):
                raise
            return getattr(self._used(), name)

    def _used(self) -> nn.Module:
        names = [name for name in self.active_adapters if name in self.whole_copy]
        if self.disable_adapters or self.merged or not names:
            base: nn.Module = self.get_base_layer()
            return base
        if len(names) > 1:
            raise ValueError(f"adapters {', '.join(names)}: only one adapter with whole modules can be active")
        return self.whole_copy[names[0]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the copy, in the dtype that the base module would return."""
        used = self._used()
        if used is self.get_base_layer():
            return used(*args, **kwargs)
        parameter = next(used.parameters())
        if torch.is_autocast_enabled(parameter.device.type):
            result = used(*args, **kwargs)
        else:
            result = used(*(_cast(value, parameter.dtype) for value in args), **kwargs)
        first = next((value for value in args if torch.is_tensor(value) and value.is_floating_point()), None)
        return _cast(result, _float_dtype(self.get_base_layer()) if first is None else first.dtype)

    def restore(self) -> None:
        """Reset the copies to the base weights."""
        base = dict(float_copy(self.get_base_layer()).named_parameters())
        for copied in self.whole_copy.values():
            for name, own in copied.named_parameters():
                own.data = base[name].data.to(own.device, own.dtype)

    def free_base(self) -> None:
        """Free the memory of the base weights; afterwards only the copies can be used."""
        free_weights(self.get_base_layer())

    def narrow(self) -> None:
        """Cast the copies to the dtype of the base, as loading does; copies of quantized weights stay float32."""
        dtype = next(float_copy(self.get_base_layer()).parameters()).dtype
        self.whole_copy.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Copy the trained values into the base module.

        Raises:
            ValueError: the base is quantized, or several adapters were given.
        """
        names = [name for name in adapter_names or self.active_adapters if name in self.whole_copy]
        if self.merged or not names:
            return
        if len(names) > 1:
            raise ValueError(f"adapters {', '.join(names)}: only one of them can replace the base weights")
        base = self.get_base_layer()
        if is_quantized_layer(base):
            raise ValueError("trained weights cannot be merged into quantized ones; merge into the dequantized base")
        own = dict(_tensors(self.whole_copy[names[0]]))
        for name, value in _tensors(base):
            self._before_merge[name] = value.data
            value.data = own[name].data.detach().to(value.device, value.dtype, copy=True)
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        """Restore the base weights."""
        for name, value in _tensors(self.get_base_layer()):
            value.data = self._before_merge.pop(name, value.data)
        self.merged_adapters.clear()


class WholeModel(BaseTuner):  # type: ignore[misc]
    """Adds trained copies to the modules of a model."""

    prefix = "whole_"
    tuner_layer_cls = WholeLayer

    def _pre_injection_hook(self, model: nn.Module, config: WholeConfig, adapter_name: str) -> None:
        if config.everything and is_quantized(model):
            raise ValueError(
                "full fine-tuning cannot train quantized weights, which have no gradient; train without quantization"
            )
        layout = read_layout(model)
        if config.target_modules is None:
            saved = list(config.modules_to_save or [])
            selected = _select(config, layout)
            inner = [
                name for name in selected if name not in layout.ends and not any(_under(name, one) for one in saved)
            ]
            config.target_modules = inner
            config.modules_to_save = saved + [name for name in selected if name in layout.ends] or None
        config.target_modules = config.target_modules or DUMMY_TARGET_MODULES
        tied = _tied_output(model, layout)
        config.modules_to_tie = None
        if tied is not None and set(layout.ends) & set(config.modules_to_save or ()):
            # PEFT copies the embedding and ties the output layer to the copy.
            others = [name for name in config.modules_to_save or () if name not in layout.ends]
            config.modules_to_save = [*others, *(name for name in (layout.embedding,) if name is not None)]
            config.modules_to_tie = [tied]

    def _check_tied_modules(self, model: nn.Module, peft_config: WholeConfig) -> None:
        """Do nothing: PEFT's check is for LoRA, and `_pre_injection_hook` has ours."""

    def _create_and_replace(
        self,
        peft_config: WholeConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, WholeLayer):
            target.add(adapter_name, inference_mode=peft_config.inference_mode)
            return
        layer = WholeLayer(target, adapter_name, inference_mode=peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replace a module; an embedding with trained rows is put back unchanged."""
        if isinstance(child, TrainableTokensWrapper):
            setattr(parent, child_name, new_module)  # PEFT would assign the computed weight, which is not a Parameter
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Do nothing: copies have the dtype of the base, and the trainer upcasts them."""


def free_weights(module: nn.Module) -> None:
    """Replace each weight of a module by an empty tensor with the same device and dtype."""
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            empty = torch.empty(0, dtype=weight.dtype, device=weight.device)
            setattr(part, name, nn.Parameter(empty, requires_grad=False))


def float_copy(module: nn.Module) -> nn.Module:
    """A copy of a module with floating-point weights; a quantized layer is dequantized to float32."""
    if not is_quantized_layer(module):
        return deepcopy(module)
    weight = dequantized_weight(module).float()
    outputs, inputs = weight.shape
    bias = getattr(module, "bias", None)
    if issubclass(getattr(module, "source_cls", nn.Linear), Conv1D):
        # GPT-2's layers store their weight transposed, and so do the saved adapters of such layers.
        transposed: nn.Module = Conv1D(outputs, inputs)
        transposed.weight = nn.Parameter(weight.t().contiguous())
        transposed.bias = nn.Parameter(module.get_parameter("bias").detach().float().clone())
        return transposed
    linear = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().float().clone())
    return linear


def _select(config: WholeConfig, layout: ModelLayout) -> list[str]:
    selected = full_targets(
        layout,
        last_layers=config.last_layers,
        layers=config.layers,
        head=config.head,
        embeddings=config.embeddings,
        everything=config.everything,
    )
    if not selected and not config.trainable_token_indices and not config.modules_to_save:
        raise ValueError("no module is trained; set last_layers, layers, head or embeddings")
    return selected


def _tied_output(model: nn.Module, layout: ModelLayout) -> str | None:
    """Name of the output layer if it shares its weight with the embedding."""
    if layout.embedding is None or layout.output is None:
        return None
    first, last = model.get_submodule(layout.embedding), model.get_submodule(layout.output)
    config = getattr(model, "config", None)
    configured = bool(getattr(getattr(config, "get_text_config", lambda: config)(), "tie_word_embeddings", False))
    shared = getattr(first, "weight", None) is getattr(last, "weight", None)
    return layout.output if shared or configured else None


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, such as the running means of a batch norm."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _float_dtype(module: nn.Module) -> torch.dtype:
    return next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), torch.float32)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


def _under(name: str, saved: str) -> bool:
    return f".{name}.".find(f".{saved}.") >= 0
