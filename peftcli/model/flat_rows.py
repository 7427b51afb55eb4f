"""Determines whether a model supports padding-free batches, for a plan, before its weights are loaded."""

import importlib.util

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from peftcli.model.padding_free import check_rows, enable_padding_free, state_layers
from peftcli.tiny.save import isolated
from peftcli.tiny.shrink import shrink

ATTENTION = "sdpa"
"""The attention that padding-free batches replace; a model without it uses padded batches."""
STATE_KERNELS = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}
"""Modules, with their packages, that transformers uses for linear attention and its convolutions if installed.

Source: `use_kernel_func_from_hub_with_fallback` in transformers/integrations/hub_kernels.py, which refuses
row boundaries without them.
"""
SPECIAL = ("pad", "bos", "eos", "sep", "cls", "mask")
UNKNOWN = (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError)
"""Errors of a tiny model with inconsistent sizes: then nothing is known, and training checks the real model."""


def why_not_flat(config: PreTrainedConfig) -> str:
    """Why a model does not support padding-free batches; empty if it does, or if unknown.

    This runs the same check as training, on a tiny random model with the same configuration. It takes a tenth of a
    second, and unlike a list of architectures it covers the options of a configuration (alibi, windows, encoder or
    decoder) and the models of later versions of transformers. Layers with a
    state are recognized by the configuration: what they carry over may be too small to measure in a random model.

    Args:
        config: of the real model; it is not changed.
    """
    try:
        if type(config.get_text_config()) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return ""  # custom code
        if state_layers(config):
            return _why_state_is_shared(config)
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


def _why_state_is_shared(config: PreTrainedConfig) -> str:
    """Why layers with a state would carry it from row to row; empty where training finds out.

    Only kernels for CUDA keep rows apart in them, which no tiny model on a CPU can run.
    """
    if torch.cuda.is_available() and all(importlib.util.find_spec(package) for package in STATE_KERNELS):
        return ""
    name = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.get_text_config())].__name__
    kinds = " and ".join(state_layers(config))
    return (
        f"the {kinds} layers of {name} would carry their state from row to row; only kernels for CUDA keep rows apart "
        f"there, such as those of {' and '.join(STATE_KERNELS.values())}, which are not here"
    )


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__


def _bare_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with only special tokens, for their ids."""
    words = [f"<{kind}>" for kind in SPECIAL]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{kind}_token": word for kind, word in zip(SPECIAL, words, strict=True)}
    )
