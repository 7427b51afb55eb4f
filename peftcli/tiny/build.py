"""Builds the models named `tiny:...`, and random stand-ins for real models, without a network."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import transformers
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
from peftcli.tiny.images import NAMES as IMAGE_NAMES
from peftcli.tiny.images import tiny_image_model
from peftcli.tiny.llama import FOLDER, POSITIONS, TOKENIZER, llama_tokenizer, tiny_llama
from peftcli.tiny.save import content_hash, isolated, random_card, shape_of, stand_in_card, write_model, write_weights
from peftcli.tiny.shrink import shrink
from peftcli.tiny.tokenizer import asset, make_encoder_tokenizer
from peftcli.tiny.tokenizer_files import files_digest, taken_over

# Increase it with every change in this folder that changes the written files.
VERSION = 2
VOCABULARY_TOKENS = 1024
RANDOM = ("gpt2", "qwen3", "bert")
NAMES = ("tiny:llama", *(f"tiny:{family}" for family in RANDOM), *IMAGE_NAMES)


def tiny_model(name: str, cache: Path | None = None) -> Path:
    """The folder of a model `tiny:...` in Hugging Face format, built at first use.

    Args:
        name: one of `NAMES`.
        cache: the cache folder; by default `$PEFTCLI_CACHE`, else `~/.cache/peftcli`.

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


def stand_in(
    config: PreTrainedConfig,
    cache: Path | None = None,
    *,
    tokenizer_folder: Path | None = None,
    end: str | None = None,
    longest: int = 0,
) -> Path:
    """The folder of a tiny random model with the architecture and the module names of a real one.

    With the real tokenizer it has the real vocabulary, special tokens and maximum length; without it, it uses the
    tokenizer of tiny:llama (for an encoder, that of tiny:bert).

    Args:
        config: the config of the real model; its weights are not needed.
        cache: as for `tiny_model`.
        tokenizer_folder: folder of the real tokenizer, whose files are copied; None if it is not available.
        end: end token to add to a substitute tokenizer.
        longest: row length in tokens that a model with a substitute tokenizer must support.

    Raises:
        MachineError: transformers has no model class for this config, or the cache cannot be written.
    """
    tokenizer, auto = _tokenizer_and_class(config)
    card = stand_in_card(config.model_type)
    name = f"stand-in-{config.get_text_config().model_type}"
    if tokenizer_folder is not None:
        return _with_own_tokenizer(name, config, auto, tokenizer_folder, card, cache_root(cache))
    if end is not None and end not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"eos_token": end})
    small = shrink(config, tokenizer)
    if 0 < (getattr(small, "max_position_embeddings", None) or 0) <= longest:
        small.max_position_embeddings = longest + 2  # positions start at 1 or 2 in some families
    tokenizer.model_max_length = min(POSITIONS, getattr(small, "max_position_embeddings", None) or POSITIONS)
    return _random_folder(name, small, auto, tokenizer, card, cache_root(cache))


def _with_own_tokenizer(
    name: str, config: PreTrainedConfig, auto: Any, tokenizer_folder: Path, card: str, root: Path
) -> Path:
    """A stand-in with the files of the real tokenizer, and the class that the real weights were saved from."""
    small = shrink(config, None)
    own = _own_class(config)

    def build(folder: Path) -> None:
        with isolated(seed=0):
            model: PreTrainedModel = own(small) if own is not None else auto.from_config(small)
        write_weights(folder, model.eval(), card)
        for file in taken_over(tokenizer_folder):
            copy = folder / file.relative_to(tokenizer_folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)

    parts = (shape_of(small), (own or auto).__name__, files_digest(tokenizer_folder))
    return built_once(root, f"{name}-{content_hash(VERSION, *parts)}", build)


def _own_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that the weights were saved from; None if it is from another library or not a text-only model."""
    name = next(iter(config.architectures or []), "")
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        return None
    text_only = config.get_text_config() is config
    return found if text_only and getattr(found, "config_class", None) is type(config) else None


def _build_random(family: str, root: Path) -> Path:
    config = AutoConfig.for_model(family)
    tokenizer, auto = _tokenizer_and_class(config)
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

    added = sorted(token for token, id_ in tokenizer.get_vocab().items() if id_ >= VOCABULARY_TOKENS)
    files = (asset(FOLDER, TOKENIZER),) if auto is AutoModelForCausalLM else (asset("corpus.txt"), asset("chats.jsonl"))
    learned = [hashlib.sha256(file).hexdigest() for file in files]
    digest = content_hash(VERSION, shape_of(config), auto.__name__, learned, tokenizer.chat_template, *added)
    return built_once(root, f"{name}-{digest}", build)


def _tokenizer_and_class(config: PreTrainedConfig) -> tuple[PreTrainedTokenizerFast, Any]:
    """The tokenizer and the auto class for a config: causal, or masked for an encoder."""
    text = config.get_text_config()
    causal = type(text) in MODEL_FOR_CAUSAL_LM_MAPPING
    masked = type(text) in MODEL_FOR_MASKED_LM_MAPPING
    saved_as_causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or [])
    if masked and not saved_as_causal:
        return make_encoder_tokenizer(VOCABULARY_TOKENS, POSITIONS), AutoModelForMaskedLM
    if causal:
        return llama_tokenizer(), AutoModelForCausalLM
    raise MachineError(
        f"no stand-in can be built for the model type {config.model_type!r}: transformers has no causal or masked "
        "language model of this type; run without --smoke, or use a model of another type"
    )
