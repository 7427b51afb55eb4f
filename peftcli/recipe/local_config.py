"""What the config.json of a local base model already excludes, read without transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftcli.errors import RecipeError
from peftcli.recipe.schema import ModelSection, Recipe
from peftcli.tasks.registry import TASKS


def check_local_config(recipe: Recipe) -> None:
    """Check a recipe against the config.json of its base, if that is a local folder.

    Raises:
        RecipeError: the model is an encoder-decoder.
    """
    config = read_config(recipe.model.name)
    refuse_encoder_decoder(recipe.model, bool(config.get("is_encoder_decoder")), str(config.get("model_type")))


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
