"""Fused experts, and which module names PEFT turns into adapters on them."""

from collections.abc import Mapping

from peft.utils import transformers_weight_conversion
from torch import nn
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping


def expert_weights(model: nn.Module) -> tuple[str, ...]:
    """Names of the matrices that hold all experts of a block, (experts, rows, columns), in order."""
    return tuple(name for name, weight in model.named_parameters() if weight.dim() == 3 and ".experts." in name)


def fused_names(config: PreTrainedConfig) -> Mapping[str, str]:
    """Names of modules of earlier checkpoints, each with the parameter that PEFT adapts in its place; LoRA only.

    Source: `_convert_peft_config_moe` in peft/utils/transformers_weight_conversion.py, 0.21.
    """
    kind = config.model_type
    if get_checkpoint_conversion_mapping(kind) is None:
        return {}
    family = transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN.get(kind)
    mapping: Mapping[str, str] = transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING.get(family, {})
    return mapping
