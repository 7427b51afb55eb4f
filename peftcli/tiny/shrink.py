"""From a real model's config to a tiny one of the same architecture: same module names, small numbers."""

from copy import deepcopy
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerFast

HIDDEN = 64
HEADS = 4
HEAD_DIM = HIDDEN // HEADS
LAYERS = 2
MAX_POSITIONS = 2048

# What each size becomes, in every spelling that the configs of transformers use. A key that a config
# does not have, or that is None there, stays away.
SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "head_dim": HEAD_DIM,
    "query_pre_attn_scalar": HEAD_DIM,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "ffn_hidden_size": 128,
    "hidden_dim": 128,
    "n_inner": 128,
    "pooler_hidden_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN,
    "embedding_size": HIDDEN,
    "rotary_dim": HEAD_DIM // 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": HEAD_DIM,
    "qk_rope_head_dim": HEAD_DIM,
    "qk_head_dim": 2 * HEAD_DIM,
    "v_head_dim": HEAD_DIM,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_window_layers": LAYERS,
}


def shrink(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast | None) -> PreTrainedConfig:
    """A small copy of a config; the config given is left as it was.

    Of a config with a nested text model (an image-and-text model) the text model's part is taken.

    Args:
        tokenizer: whose vocabulary the copy gets; None keeps the model's own vocabulary, special tokens and longest
            row, for use with its own tokenizer.
    """
    text = config.get_text_config()
    small = deepcopy(text)
    if text is not config and hasattr(config, "tie_word_embeddings"):
        small.tie_word_embeddings = config.tie_word_embeddings
    for quantized in ("quantization_config", "compression_config"):
        if hasattr(small, quantized):
            delattr(small, quantized)
    _shorten_lists(small, text.num_hidden_layers)
    _set_kv_heads(small)
    for key, size in SIZES.items():
        if getattr(small, key, None) is not None and not _is_derived(small, key):
            setattr(small, key, size)
    _plain_positions(small)
    if tokenizer is not None:
        _lower_positions(small)
        _set_vocabulary(small, tokenizer)
    small.dtype = "float32"
    return small


def _is_derived(small: PreTrainedConfig, key: str) -> bool:
    """Whether the config works the value out itself, as falcon does with `head_dim`."""
    attribute = getattr(type(small), key, None)
    return isinstance(attribute, property) and attribute.fset is None


def _shorten_lists(small: PreTrainedConfig, layers: int) -> None:
    """Keep two entries of every list that holds one per layer: the first, and the first that differs."""
    for key, value in list(vars(small).items()):
        if isinstance(value, list) and len(value) == layers:
            other = next((entry for entry in value if entry != value[0]), value[0])
            setattr(small, key, [value[0], other])
    if getattr(small, "mlp_only_layers", None):
        small.mlp_only_layers = []


def _set_kv_heads(small: PreTrainedConfig) -> None:
    """Keep the kind of attention: one key/value head, fewer than query heads, or as many."""
    for key in ("num_key_value_heads", "num_kv_heads"):
        heads = getattr(small, key, None)
        if heads is None:
            continue
        grouped = 1 if heads == 1 else HEADS // 2
        setattr(small, key, grouped if heads < small.num_attention_heads else HEADS)


def _lower_positions(small: PreTrainedConfig) -> None:
    for key in ("max_position_embeddings", "original_max_position_embeddings", "sliding_window"):
        positions = getattr(small, key, None)
        if positions is not None:
            setattr(small, key, min(positions, MAX_POSITIONS))


def _plain_positions(small: PreTrainedConfig) -> None:
    rope = getattr(small, "rope_parameters", None)
    if rope:
        small.rope_parameters = _plain_rope(rope)


def _plain_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rope without the scaling to long contexts, whose factors fit the real head size only."""
    if all(value is None or isinstance(value, dict) for value in rope.values()):
        return {kind: _plain_rope(value) if value else value for kind, value in rope.items()}
    kept = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if rope.get(key) is not None}
    return {"rope_type": "default", **kept}


def _set_vocabulary(small: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    # Room beside the tokenizer, as real models have: the tokenizer classes of some families add a token.
    small.vocab_size = len(tokenizer) + 64
    small.pad_token_id = tokenizer.pad_token_id
    small.bos_token_id = tokenizer.bos_token_id
    small.eos_token_id = tokenizer.eos_token_id
    for key in ("sep_token_id", "cls_token_id", "mask_token_id"):
        if hasattr(small, key):
            setattr(small, key, getattr(tokenizer, key))
