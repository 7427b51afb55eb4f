"""Tiny models in the cache: what determines one, and how it is written there."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from peftcli.tiny.tokenizer import asset


def content_hash(*parts: object) -> str:
    """Twelve hex digits over the shipped text and anything that JSON can write."""
    digest = hashlib.sha256(asset("corpus.txt") + b"\0" + asset("chats.jsonl"))
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:12]


def shape_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The values of a config that determine the weights, for `content_hash`."""
    named = {"transformers_version", "_name_or_path", "_commit_hash"}
    return {key: value for key, value in config.to_dict().items() if key not in named}


def write_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    card: str,
) -> None:
    """Write a model in Hugging Face format with its tokenizer and model card, and show no progress bar."""
    write_weights(folder, model, card)
    tokenizer.save_pretrained(folder)
    if model.can_generate():
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ).save_pretrained(folder)


def write_weights(folder: Path, model: PreTrainedModel, card: str) -> None:
    """Write a model without a tokenizer, and its model card."""
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
    """Seeded random numbers on one CPU thread, float32 and gradients inside; outside nothing has changed."""
    before_threads, before_dtype = torch.get_num_threads(), torch.get_default_dtype()
    modes = torch.inference_mode(False), torch.enable_grad(), torch.device("cpu")
    with torch.random.fork_rng(devices=[]), modes[0], modes[1], modes[2]:
        # `torch.manual_seed` would seed the GPUs too, whose state is not put back.
        torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            torch.set_num_threads(1)
            yield
        finally:
            torch.set_num_threads(before_threads)
            torch.set_default_dtype(before_dtype)
