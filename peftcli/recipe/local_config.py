"""What the config.json of a local base model already excludes, read without transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftcli.errors import RecipeError
from peftcli.recipe.schema import ModelSection, Recipe
from peftcli.tasks.registry import TASKS

DEQUANTIZABLE = {"mxfp4": "MXFP4", "fp8": "FP8"}
"""Formats of weights that transformers dequantizes while loading, by `quant_method`."""


def check_local_config(recipe: Recipe) -> None:
    """Check a recipe against the config.json of its base, if that is a local folder.

    Raises:
        RecipeError: the model is an encoder-decoder, or its files are quantized in a way that cannot be undone.
    """
    config = read_config(recipe.model.name)
    refuse_encoder_decoder(recipe.model, bool(config.get("is_encoder_decoder")), str(config.get("model_type")))
    packed = config.get("quantization_config")
    if isinstance(packed, dict):
        refuse_stored(recipe.model.name, str(packed.get("quant_method") or "unknown"))


def read_config(name: str) -> Mapping[str, Any]:
    """The config.json of a local folder; empty if there is none, or if it is damaged, which loading it reports."""
    try:
        content = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def refuse_encoder_decoder(model: ModelSection, is_encoder_decoder: bool, kind: str) -> None:
    """Refuse an encoder-decoder model for a task that generates text.

    Raises:
        RecipeError: it is one.
    """
    if is_encoder_decoder and TASKS[model.task].generates:
        raise RecipeError(
            f"model.name {model.name}: {kind} is an encoder-decoder model, which reads the prompt in one half and "
            "writes the answer in the other; model.task: causal-lm trains decoder-only models on prompt and answer in "
            "one sequence; use a decoder-only model such as Qwen3, Llama or Gemma, or the Seq2SeqTrainer of "
            "transformers for this one"
        )


def refuse_stored(path: str, method: str) -> None:
    """Refuse a model whose weights are stored in a format that transformers cannot dequantize while loading.

    Args:
        method: `quant_method` of its configuration; empty if its weights are not quantized.

    Raises:
        RecipeError: it is one.
    """
    if method and method not in DEQUANTIZABLE:
        raise RecipeError(
            f"model.name {path}: its weights are already quantized ({method}), and transformers cannot dequantize them "
            f"while loading, which training and merging need (only {' and '.join(DEQUANTIZABLE.values())}); use the "
            "repository with the full weights and let `quantization: {bits: 4}` quantize them"
        )
