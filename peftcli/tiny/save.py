"""Writes the tiny models and their model cards into the cache."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

HEAD = """\
---
license: apache-2.0
language: en
library_name: transformers
---
"""


def content_hash(*parts: object) -> str:
    """Twelve hex digits of a hash over values that JSON can represent."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def shape_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The values of a config that determine the weights, for `content_hash`."""
    irrelevant = {"transformers_version", "_name_or_path", "_commit_hash"}
    return {key: value for key, value in config.to_dict().items() if key not in irrelevant}


def write_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    card: str,
) -> None:
    """Write a model in Hugging Face format with its tokenizer and model card, without a progress bar."""
    write_weights(folder, model, card)
    tokenizer.save_pretrained(folder)
    if model.can_generate():
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ).save_pretrained(folder)


def write_weights(folder: Path, model: PreTrainedModel, card: str) -> None:
    """Write a model and its model card, without a tokenizer."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Run with a seed, one CPU thread, float32 and gradients; all global state is restored afterwards."""
    before_threads, before_dtype = torch.get_num_threads(), torch.get_default_dtype()
    modes = torch.inference_mode(False), torch.enable_grad(), torch.device("cpu")
    with torch.random.fork_rng(devices=[]), modes[0], modes[1], modes[2]:
        # `torch.manual_seed` would also seed the GPUs, whose state is not restored here.
        torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            torch.set_num_threads(1)
            yield
        finally:
            torch.set_num_threads(before_threads)
            torch.set_default_dtype(before_dtype)


def random_card(family: str) -> str:
    """The model card of a tiny model with random weights."""
    return f"""{HEAD}
# tiny:{family}

A {family} model with **random weights** for tests: it has the module names of the real architecture and knows
nothing. Its tokenizer is learned from the text that peftcli ships.

Licence: Apache-2.0.
"""


def image_card(name: str) -> str:
    """The model card of a tiny image model with random weights."""
    return f"""{HEAD}
# {name}

A model of images with **random weights** for tests: it has the module names of the real architecture and knows
nothing. It reads images of 32 x 32 pixels.

Licence: Apache-2.0.
"""


def stand_in_card(model_type: str) -> str:
    """The model card of a stand-in."""
    return f"""{HEAD}
# Stand-in for a {model_type} model

A tiny {model_type} model with **random weights**, built from a real config so that `peftcli train --smoke`
can walk the whole path without the real weights. It knows nothing; a figure measured on it tells nothing of
the real model.

Licence: Apache-2.0.
"""
