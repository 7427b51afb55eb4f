"""Bottleneck adapters: a small feed-forward network after a layer, inside the residual connection.

Source: Houlsby et al. 2019, arXiv:1902.00751; placement and sizes of Pfeiffer et al. 2021, arXiv:2005.00247.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from peftcli.adapters.module_layout import all_widths, hidden_width, linear_widths
from peftcli.plan.module_layout import bottleneck_targets

NOT_MERGEABLE = "a bottleneck adapter is not linear, so it cannot be folded into a weight; use the adapter unmerged"
FIRST_STD = 0.01
"""Standard deviation of the initial down-projection (Houlsby et al. 2019, section 3.6)."""


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]  # mypy does not follow peft
    """Configuration of bottleneck adapters.

    Attributes:
        placement: `houlsby` (after attention and feed-forward) or `pfeiffer` (after feed-forward only).
        reduction_factor: hidden size divided by the width of the bottleneck.
        non_linearity: name of an activation in transformers.
        dropout: dropout probability of the bottleneck's inputs.
        target_modules: linear layers that get an adapter after them, instead of those that the placement selects.
        layers: indices of the blocks that get adapters, None for all; only used with `placement`.
    """

    placement: str = "houlsby"
    reduction_factor: float = 16.0
    non_linearity: str = "relu"
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    layers: list[int] | None = None
    modules_to_save: list[str] | None = None
    # PEFT reads this attribute of every configuration when it matches modules.
    target_parameters: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.BOTTLENECK
        if self.non_linearity not in ACT2FN:
            raise ValueError(f"non_linearity {self.non_linearity}: must be one of {', '.join(sorted(ACT2FN))}")
        if self.reduction_factor <= 0:
            raise ValueError(f"reduction_factor {self.reduction_factor}: must be above 0")


class BottleneckLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer followed by a bottleneck: y + up(act(down(y)))."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_width",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        widths = linear_widths(base_layer)
        if widths is None:
            raise ValueError(f"a bottleneck adapter needs a linear layer, not {type(base_layer).__name__}")
        self.base_layer = base_layer
        self.hidden = widths[1]
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_width: dict[str, int] = {}
        self.activation = ACT2FN[config.non_linearity]
        self.dropout = nn.Dropout(config.dropout)
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = [adapter_name]
        self.add(adapter_name, config)

    if TYPE_CHECKING:  # nn.Module types every other attribute as a tensor or a module

        def __getattr__(self, name: str) -> Any: ...

    def add(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter that is initialized to the identity."""
        width = max(1, int(self.hidden / config.reduction_factor))
        down, up = nn.Linear(self.hidden, width), nn.Linear(width, self.hidden)
        nn.init.normal_(down.weight, std=FIRST_STD)
        for zeros in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zeros)
        self.bottleneck_width[adapter_name] = width
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        device = self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        # float32 for every base model: the dtype of quantized weights is not one to compute in.
        if device is not None and not any(weight.is_meta for weight in down.parameters()):
            down.to(device)
            up.to(device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the layer plus those of the active adapters, in the dtype of the layer's output."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                result = result + self._added(name, result).to(result.dtype)
        return result

    def _added(self, name: str, result: Tensor) -> Tensor:
        down, up = self.bottleneck_down[name], self.bottleneck_up[name]
        if not torch.is_autocast_enabled(result.device.type):
            result = result.to(next(down.parameters()).dtype)
        added: Tensor = up(self.activation(down(self.dropout(result))))
        return added

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not supported.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(NOT_MERGEABLE)

    def unmerge(self) -> None:
        """Do nothing, since nothing can be merged."""


class BottleneckModel(BaseTuner):  # type: ignore[misc]
    """Adds bottleneck adapters after the layers of a model that write to its residual stream."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _pre_injection_hook(self, model: nn.Module, config: BottleneckConfig, adapter_name: str) -> None:
        if config.target_modules is None:
            linears, hidden = all_widths(model), hidden_width(model)
            config.target_modules = bottleneck_targets(linears, hidden, config.placement, config.layers)

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.add(adapter_name, peft_config)
            return
        layer = BottleneckLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise ValueError(NOT_MERGEABLE)
