"""Base models whose files are already quantized: dequantized while loading where transformers can."""

from typing import Any

from transformers import FineGrainedFP8Config, Mxfp4Config, PreTrainedConfig

from peftcli.recipe.local_config import DEQUANTIZABLE, refuse_stored

CONFIGS = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
"""The configurations of `DEQUANTIZABLE` formats, by `quant_method`.

Source: `dequantize` in transformers/utils/quantization_config.py, 5.23.
"""


def stored_quantization(path: str, config: PreTrainedConfig) -> str:
    """The format of a model's files, such as FP8; empty if they are not quantized.

    Raises:
        RecipeError: transformers cannot dequantize that format while loading.
    """
    method = quantization_method(config)
    refuse_stored(path, method)
    return DEQUANTIZABLE[method] if method else ""


def quantization_method(config: PreTrainedConfig) -> str:
    """`quant_method` of a configuration; empty if its weights are not quantized."""
    packed = _packed(config)
    if packed is None:
        return ""
    method = packed.get("quant_method")
    return str(getattr(method, "value", method) or "unknown")


def dequantizing(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that dequantize the weights of a model; empty if they are not quantized."""
    method, packed = quantization_method(config), _packed(config) or {}
    if method not in CONFIGS:
        return {}
    # transformers replaces the list of the file by the one that is passed.
    kept = {"modules_to_not_convert": packed.get("modules_to_not_convert")}
    return {"quantization_config": CONFIGS[method](dequantize=True, **kept)}


def _packed(config: PreTrainedConfig) -> dict[str, Any] | None:
    for one in (config, config.get_text_config()):
        packed = getattr(one, "quantization_config", None)
        if packed is not None:
            return dict(packed) if isinstance(packed, dict) else dict(packed.to_dict())
    return None
