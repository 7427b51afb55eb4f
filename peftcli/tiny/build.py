"""The models named `tiny:...`, and random stand-ins for real models: built here, without a network."""

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from peftcli.cache import built_once, cache_root
from peftcli.errors import MachineError, RecipeError
from peftcli.nearest import nearest
from peftcli.tiny.cache import content_hash, isolated, shape_of, write_model
from peftcli.tiny.cards import random_card, stand_in_card
from peftcli.tiny.images import NAMES as IMAGE_NAMES
from peftcli.tiny.images import tiny_image_model
from peftcli.tiny.llama import POSITIONS, tiny_llama
from peftcli.tiny.shrink import shrink
from peftcli.tiny.tokenizer import make_causal_tokenizer, make_encoder_tokenizer

# Raised with every change of this folder's code that changes what is written.
VERSION = 1
VOCABULARY_TOKENS = 1024
RANDOM = ("gpt2", "qwen3", "bert")
NAMES = ("tiny:llama", *(f"tiny:{family}" for family in RANDOM), *IMAGE_NAMES)


def tiny_model(name: str, cache: Path | None = None) -> Path:
    """The folder of a model `tiny:...` in Hugging Face format, made at first use.

    Args:
        name: one of `NAMES`.
        cache: where the folder is kept; by default `$PEFTCLI_CACHE`, else `~/.cache/peftcli`.

    Raises:
        RecipeError: there is no such tiny model.
        MachineError: the cache cannot be written.
    """
    if name == "tiny:llama":
        return tiny_llama(cache_root(cache))
    if name in IMAGE_NAMES:
        return tiny_image_model(name, cache)
    if name in NAMES:
        return _build_random(name.removeprefix("tiny:"), cache_root(cache))
    raise RecipeError(
        f"model.name = {name}: the tiny models are {', '.join(NAMES)}; did you mean {nearest(name, NAMES, least=0)}?"
    )


def stand_in(config: PreTrainedConfig, cache: Path | None = None) -> Path:
    """The folder of a random tiny model with the architecture and the module names of a real one.

    Its tokenizer is that of tiny:llama (for an encoder, that of tiny:bert); nothing is pretrained.

    Args:
        config: of the real model; its weights are not needed.
        cache: as for `tiny_model`.

    Raises:
        MachineError: transformers has no model class for this config, or the cache cannot be written.
    """
    tokenizer, auto = _tokenizer_and_class(config, POSITIONS)
    small = shrink(config, tokenizer)
    tokenizer.model_max_length = min(POSITIONS, getattr(small, "max_position_embeddings", None) or POSITIONS)
    card = stand_in_card(config.model_type)
    return _random_folder(f"stand-in-{small.model_type}", small, auto, tokenizer, card, cache_root(cache))


def _build_random(family: str, root: Path) -> Path:
    config = AutoConfig.for_model(family)
    tokenizer, auto = _tokenizer_and_class(config, POSITIONS)
    small = shrink(config, tokenizer)
    small.max_position_embeddings = POSITIONS
    return _random_folder(f"tiny-{family}", small, auto, tokenizer, random_card(family), root)


def _random_folder(
    name: str,
    config: PreTrainedConfig,
    auto: Any,
    tokenizer: PreTrainedTokenizerFast,
    card: str,
    root: Path,
) -> Path:
    def build(folder: Path) -> None:
        with isolated(seed=0):
            model: PreTrainedModel = auto.from_config(config)
        write_model(folder, model.eval(), tokenizer, card)

    digest = content_hash(VERSION, shape_of(config), auto.__name__, tokenizer.chat_template)
    return built_once(root, f"{name}-{digest}", build)


def _tokenizer_and_class(config: PreTrainedConfig, max_length: int) -> tuple[PreTrainedTokenizerFast, Any]:
    """The tokenizer and the auto class that a config's model wants: causal, or masked for an encoder."""
    text = config.get_text_config()
    causal = type(text) in MODEL_FOR_CAUSAL_LM_MAPPING
    masked = type(text) in MODEL_FOR_MASKED_LM_MAPPING
    says_causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or [])
    if masked and not says_causal:
        return make_encoder_tokenizer(VOCABULARY_TOKENS, max_length), AutoModelForMaskedLM
    if causal:
        return make_causal_tokenizer(VOCABULARY_TOKENS, max_length), AutoModelForCausalLM
    raise MachineError(
        f"the model type {config.model_type!r} has no stand-in: transformers knows no causal or masked "
        "language model of it; run without --smoke, or name a model of another type"
    )
