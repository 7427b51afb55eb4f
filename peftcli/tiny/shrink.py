"""Shrinks a model's config to a tiny one with the same architecture and module names.

If the config is not available, the architecture is guessed from the model's name.
"""

import re
from copy import deepcopy
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

HIDDEN = 64
HEADS = 4
HEAD_DIM = HIDDEN // HEADS
LAYERS = 2
MAX_POSITIONS = 2048

# The small value of each size, under every name that the configs of transformers use. A key that is missing or None in
# a config is not set.
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

# The first pattern that matches wins.
FAMILIES = [
    (r"qwen-?3.*a\d+b|qwen-?3-?moe", "qwen3_moe"),
    (r"qwen-?3", "qwen3"),
    (r"qwen.*moe|qwen.*a\d+(\.\d+)?b", "qwen2_moe"),
    (r"qwen|qwq", "qwen2"),
    (r"mixtral", "mixtral"),
    (r"smollm-?3", "smollm3"),
    (r"llama|vicuna|alpaca|smollm|yi-\d|deepseek-(llm|coder)", "llama"),
    (r"mistral|ministral|zephyr", "mistral"),
    (r"gemma-?3", "gemma3_text"),
    (r"gemma-?2-", "gemma2"),
    (r"gemma", "gemma"),
    (r"phi-?(3|4)", "phi3"),
    (r"phi-?(1|2)", "phi"),
    (r"pythia|gpt-?neox", "gpt_neox"),
    (r"gpt-?neo", "gpt_neo"),
    (r"gpt-?j", "gptj"),
    (r"gpt-?2", "gpt2"),
    (r"falcon", "falcon"),
    (r"bloom", "bloom"),
    (r"\bopt\b", "opt"),
    (r"olmo-?2", "olmo2"),
    (r"olmo", "olmo"),
    (r"starcoder-?2", "starcoder2"),
    (r"stablelm", "stablelm"),
    (r"modernbert", "modernbert"),
    (r"distilbert", "distilbert"),
    (r"deberta", "deberta-v2"),
    (r"xlm-?roberta", "xlm-roberta"),
    (r"roberta", "roberta"),
    (r"electra", "electra"),
    (r"bert", "bert"),
]
IMAGE_FAMILIES = [
    (r"resnet", "resnet"),
    (r"convnext-?v2", "convnextv2"),
    (r"convnext", "convnext"),
    (r"dinov2", "dinov2"),
    (r"vit", "vit"),
]
"""Families of image classification models."""


def shrink(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast | None) -> PreTrainedConfig:
    """A small copy of a config; the original is not changed.

    For a config with a nested text model (a vision-language model), only the text model's part is used.

    Args:
        tokenizer: its vocabulary is used; None keeps the model's own vocabulary, special tokens and maximum length, for
            use with its own tokenizer.
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
    """Whether the config computes the value itself, as falcon does with `head_dim`."""
    attribute = getattr(type(small), key, None)
    return isinstance(attribute, property) and attribute.fset is None


def _shorten_lists(small: PreTrainedConfig, layers: int) -> None:
    """Keep two entries of every list with one entry per layer: the first, and the first that differs."""
    for key, value in list(vars(small).items()):
        if isinstance(value, list) and len(value) == layers:
            other = next((entry for entry in value if entry != value[0]), value[0])
            setattr(small, key, [value[0], other])
    if getattr(small, "mlp_only_layers", None):
        small.mlp_only_layers = []


def _set_kv_heads(small: PreTrainedConfig) -> None:
    """Keep the kind of attention: multi-query, grouped-query or multi-head."""
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
    """RoPE without long-context scaling, whose factors only fit the real head size."""
    if all(value is None or isinstance(value, dict) for value in rope.values()):
        return {kind: _plain_rope(value) if value else value for kind, value in rope.items()}
    kept = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if rope.get(key) is not None}
    return {"rope_type": "default", **kept}


def _set_vocabulary(small: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    # Larger than the tokenizer, as in real models: the tokenizer classes of some families add a token.
    small.vocab_size = len(tokenizer) + 64
    small.pad_token_id = tokenizer.pad_token_id
    small.bos_token_id = tokenizer.bos_token_id
    small.eos_token_id = tokenizer.eos_token_id
    for key in ("sep_token_id", "cls_token_id", "mask_token_id"):
        if hasattr(small, key):
            setattr(small, key, getattr(tokenizer, key))


def family_config(model_name: str, *, images: bool = False) -> tuple[PreTrainedConfig, str]:
    """The default config of the family that a model name suggests, and a description of the guess.

    The sizes in the config are the family's defaults, not this model's; only the architecture is meaningful.

    Args:
        model_name: Hub id or folder name.
        images: whether it is an image classification model.
    """
    name = model_name.lower().replace("_", "-")
    for pattern, family in IMAGE_FAMILIES if images else FAMILIES:
        found = re.search(pattern, name)
        if found:
            guessed_from = f"{family}, from {found.group()!r} in the name {model_name!r}"
            return AutoConfig.for_model(family), guessed_from
    family = "vit" if images else "llama"
    return AutoConfig.for_model(family), f"{family}, since no known family is in the name {model_name!r}"
