"""Trains whole modules: the last blocks of a model, its embeddings, or all of it, with the base kept beside them.

A float copy of each module is trained and replaces the base module while the adapter is enabled. Embeddings and output
layer are left to PEFT's `modules_to_save`, which ties them where the base does and which TRL's loss can read.
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
class WholeConfig(PeftConfig):  # type: ignore[misc]  # peft's types are not followed
    """Configuration of training whole modules.

    Attributes:
        last_layers: number of blocks, counted from the output, that are trained.
        layers: numbers of the blocks that are trained, in place of `last_layers`.
        head: train what stands behind the last block: the last norm and the output layer.
        embeddings: train what stands before the first block: the embeddings of tokens and positions.
        everything: train all modules.
        target_modules, modules_to_save: what the keys above stand for in a model; found when they are None.
        trainable_token_indices: rows of the embedding that are trained, such as those of new tokens.
    """

    last_layers: int = 0
    layers: list[int] | None = None
    head: bool = False
    embeddings: bool = False
    everything: bool = False
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | None = None
    # PEFT asks every configuration for it when it matches modules.
    target_parameters: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.WHOLE


class WholeLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A module beside a trained copy of itself."""

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
        """Add a copy of the base."""
        self.whole_copy[adapter_name] = float_copy(self.get_base_layer())
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @property
    def weight(self) -> Tensor:
        """The one that is computed with, for code that reads it past the forward."""
        found: Tensor = self._used().weight  # type: ignore[assignment]
        return found

    @property
    def bias(self) -> Tensor | None:
        """The one that is computed with."""
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
            raise ValueError(f"adapters {', '.join(names)}: whole modules of one adapter at a time can be used")
        return self.whole_copy[names[0]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the copy makes of the inputs, in the dtype in which the base would have made it."""
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
        """Make the copies equal to the base again."""
        base = dict(float_copy(self.get_base_layer()).named_parameters())
        for copied in self.whole_copy.values():
            for name, own in copied.named_parameters():
                own.data = base[name].data.to(own.device, own.dtype)

    def free_base(self) -> None:
        """Give the memory of the base's own weights back; only the copies can be used from then on."""
        free_weights(self.get_base_layer())

    def narrow(self) -> None:
        """Give the copies the dtype of the base, as loading them does; over quantized weights they stay float32."""
        dtype = next(float_copy(self.get_base_layer()).parameters()).dtype
        self.whole_copy.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the copy's values into the base.

        Raises:
            ValueError: the base is quantized, or several adapters are to be merged.
        """
        names = [name for name in adapter_names or self.active_adapters if name in self.whole_copy]
        if self.merged or not names:
            return
        if len(names) > 1:
            raise ValueError(f"adapters {', '.join(names)}: only one of them can take the place of the base")
        base = self.get_base_layer()
        if is_quantized_layer(base):
            raise ValueError("trained weights do not go into quantized ones; merge into the dequantized base")
        own = dict(_tensors(self.whole_copy[names[0]]))
        for name, value in _tensors(base):
            self._before_merge[name] = value.data
            value.data = own[name].data.detach().to(value.device, value.dtype, copy=True)
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        """Give the base its own values back."""
        for name, value in _tensors(self.get_base_layer()):
            value.data = self._before_merge.pop(name, value.data)
        self.merged_adapters.clear()


class WholeModel(BaseTuner):  # type: ignore[misc]
    """Puts trained copies beside the modules of a model."""

    prefix = "whole_"
    tuner_layer_cls = WholeLayer

    def _pre_injection_hook(self, model: nn.Module, config: WholeConfig, adapter_name: str) -> None:
        if config.everything and is_quantized(model):
            raise ValueError(
                "full tuning would train quantized weights, which have no gradient; train without quantization"
            )
        parts = read_layout(model)
        if config.target_modules is None:
            saved = list(config.modules_to_save or [])
            wanted = _wanted(config, parts)
            inner = [name for name in wanted if name not in parts.ends and not any(_under(name, one) for one in saved)]
            config.target_modules = inner
            config.modules_to_save = saved + [name for name in wanted if name in parts.ends] or None
        config.target_modules = config.target_modules or DUMMY_TARGET_MODULES
        tied = _tied_output(model, parts)
        config.modules_to_tie = None
        if tied is not None and set(parts.ends) & set(config.modules_to_save or ()):
            # PEFT copies the embedding and lets the other end share the copy.
            kept = [name for name in config.modules_to_save or () if name not in parts.ends]
            config.modules_to_save = [*kept, *(name for name in (parts.embedding,) if name is not None)]
            config.modules_to_tie = [tied]

    def _check_tied_modules(self, model: nn.Module, peft_config: WholeConfig) -> None:
        """PEFT's own check only knows LoRA's way; ours is in the hook before."""

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
        """Put a module in the place of another; an embedding with trained rows gives its own back as it is."""
        if isinstance(child, TrainableTokensWrapper):
            setattr(parent, child_name, new_module)  # PEFT would hand it the rows' result, which is no parameter
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Copies are as wide as their base; who trains them makes them wider."""


def free_weights(module: nn.Module) -> None:
    """Put nothing in the place of each weight of a module, on its device and in its dtype."""
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            nothing = torch.empty(0, dtype=weight.dtype, device=weight.device)
            setattr(part, name, nn.Parameter(nothing, requires_grad=False))


def float_copy(module: nn.Module) -> nn.Module:
    """A copy of a module whose weights are numbers: those of a quantized layer unpacked, in float32."""
    if not is_quantized_layer(module):
        return deepcopy(module)
    weight = dequantized_weight(module).float()
    outputs, inputs = weight.shape
    bias = getattr(module, "bias", None)
    if issubclass(getattr(module, "source_cls", nn.Linear), Conv1D):
        # GPT-2's layers hold their weight turned round, and so does every adapter that is saved of them.
        turned: nn.Module = Conv1D(outputs, inputs)
        turned.weight = nn.Parameter(weight.t().contiguous())
        turned.bias = nn.Parameter(module.get_parameter("bias").detach().float().clone())
        return turned
    linear = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().float().clone())
    return linear


def _wanted(config: WholeConfig, parts: ModelLayout) -> list[str]:
    wanted = full_targets(
        parts,
        last_layers=config.last_layers,
        layers=config.layers,
        head=config.head,
        embeddings=config.embeddings,
        everything=config.everything,
    )
    if not wanted and not config.trainable_token_indices and not config.modules_to_save:
        raise ValueError("nothing is trained; set last_layers, layers, head or embeddings")
    return wanted


def _tied_output(model: nn.Module, parts: ModelLayout) -> str | None:
    """Name of the output layer where it shares its weight with the embedding."""
    if parts.embedding is None or parts.output is None:
        return None
    first, last = model.get_submodule(parts.embedding), model.get_submodule(parts.output)
    config = getattr(model, "config", None)
    stated = bool(getattr(getattr(config, "get_text_config", lambda: config)(), "tie_word_embeddings", False))
    shared = getattr(first, "weight", None) is getattr(last, "weight", None)
    return parts.output if shared or stated else None


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and what a module counts in training, such as the running means of a batch norm."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _float_dtype(module: nn.Module) -> torch.dtype:
    return next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), torch.float32)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


def _under(name: str, saved: str) -> bool:
    return f".{name}.".find(f".{saved}.") >= 0
