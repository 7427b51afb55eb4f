"""Whether a model can train rows in flat lines, found out for a plan before its weights are here."""

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
"""The attention that lines take the place of; a model without it is padded for that reason."""
STATE_KERNELS = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}
"""Modules, with their packages, that transformers computes linear attention and its convolutions by where they are.

Source: `use_kernel_func_from_hub_with_fallback` in transformers/integrations/hub_kernels.py, which refuses the
boundaries of rows without them.
"""
SPECIAL = ("pad", "bos", "eos", "sep", "cls", "mask")
UNKNOWN = (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError)
"""What a tiny model raises whose sizes do not go together: it tells nothing then, and training asks the real one."""


def why_not_flat(config: PreTrainedConfig) -> str:
    """Why the rows of a flat line would not stay apart in a model; empty where they do, or where nobody knows.

    A tiny random model of the same configuration is asked, by the same proof that training makes on the real one. It
    takes a tenth of a second, and unlike a list of architectures it knows the options of a configuration (alibi,
    windows, encoder or decoder) and the models of a later transformers. Layers with a state are known by the
    configuration: what they carry over may be too small to measure in a random model.

    Args:
        config: of the real model; it is not changed.
    """
    try:
        if type(config.get_text_config()) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return ""  # code of its own
        if state_layers(config):
            return _why_state_is_shared(config)
        with isolated(seed=0):
            small = shrink(config, _bare_tokenizer())
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                small, dtype=torch.float32, attn_implementation=ATTENTION
            )
            if not enable_padding_free(model):
                return f"{_name(model)} has an attention of its own, which cannot read rows by their edges"
            problem = check_rows(model).problem
            return "" if problem is None else f"{_name(model)} does not keep the rows of a line apart: {problem}"
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
    """A tokenizer with the special tokens and no others, for their ids."""
    words = [f"<{kind}>" for kind in SPECIAL]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{kind}_token": word for kind, word in zip(SPECIAL, words, strict=True)}
    )
