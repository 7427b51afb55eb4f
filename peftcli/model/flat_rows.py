"""Determines whether a model supports padding-free batches, for a plan, before its weights are loaded."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from peftcli.model.padding_free import check_rows, enable_padding_free
from peftcli.tiny.save import isolated
from peftcli.tiny.shrink import shrink

ATTENTION = "sdpa"
"""The attention that padding-free batches replace; a model without it uses padded batches."""
SPECIAL = ("pad", "bos", "eos", "sep", "cls", "mask")
UNKNOWN = (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError)
"""Errors of a tiny model with inconsistent sizes: then nothing is known, and training checks the real model."""


def why_not_flat(config: PreTrainedConfig) -> str:
    """Why a model does not support padding-free batches; empty if it does, or if unknown.

    This runs the same check as training, on a tiny random model with the same configuration. It takes a tenth of a
    second, and unlike a list of architectures it covers the options of a configuration (alibi, windows, encoder or
    decoder) and the models of later versions of transformers.

    Args:
        config: of the real model; it is not changed.
    """
    try:
        if type(config.get_text_config()) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return ""  # custom code
        with isolated(seed=0):
            small = shrink(config, _bare_tokenizer())
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                small, dtype=torch.float32, attn_implementation=ATTENTION
            )
            if not enable_padding_free(model):
                return f"{_name(model)} has its own attention, which does not support row boundaries"
            problem = check_rows(model).problem
            return "" if problem is None else f"{_name(model)} mixes the rows of a padding-free batch: {problem}"
    except UNKNOWN:
        return ""


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__


def _bare_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with only special tokens, for their ids."""
    words = [f"<{kind}>" for kind in SPECIAL]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{kind}_token": word for kind, word in zip(SPECIAL, words, strict=True)}
    )
