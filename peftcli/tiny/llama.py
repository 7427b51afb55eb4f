"""tiny:llama: a small Llama that was pretrained once and is shipped, so its weights are the same on every machine.

`scripts/pretrain_tiny_llama.py` creates `assets/tiny_llama`.
"""

import hashlib
from pathlib import Path

from safetensors.torch import load
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peftcli.cache import built_once
from peftcli.tiny.save import content_hash, isolated, shape_of, write_model
from peftcli.tiny.tokenizer import asset, wrap_causal_tokenizer

# Increase it with every change in this file that changes the written files.
VERSION = 3
POSITIONS = 512
FOLDER, WEIGHTS, TOKENIZER = "tiny_llama", "model.safetensors", "tokenizer.json"
"""The shipped folder under `peftcli.assets`, and its files."""


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer that tiny:llama was pretrained with, which every causal tiny model has."""
    return wrap_causal_tokenizer(Tokenizer.from_buffer(asset(FOLDER, TOKENIZER)), POSITIONS)


def llama_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The config of tiny:llama; every width is a multiple of 64, the block size of the 4-bit formats."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )


def tiny_llama(root: Path) -> Path:
    """The folder of tiny:llama in float32, written into the cache at first use.

    Raises:
        MachineError: the cache cannot be written.
    """
    tokenizer = llama_tokenizer()
    config = llama_config(tokenizer)

    def build(folder: Path) -> None:
        with isolated(seed=0):
            model = LlamaForCausalLM(config)
        model.load_state_dict({name: tensor.float() for name, tensor in load(asset(FOLDER, WEIGHTS)).items()})
        write_model(folder, model.eval(), tokenizer, asset(FOLDER, "README.md").decode("utf-8"))

    contents = hashlib.sha256(asset(FOLDER, WEIGHTS) + asset(FOLDER, TOKENIZER)).hexdigest()
    digest = content_hash(VERSION, contents, shape_of(config), tokenizer.chat_template)
    return built_once(root, f"tiny-llama-{digest}", build)
