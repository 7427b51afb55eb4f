"""The architecture that a model's name tells, for when its config is not at hand."""

import re

from transformers import AutoConfig, PreTrainedConfig

# Tried from the top: a name that holds several of these words is what the first of them says.
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
"""Of models that classify images."""


def family_config(model_name: str, *, images: bool = False) -> tuple[PreTrainedConfig, str]:
    """The default config of the family that a model name tells, and in words what it was guessed from.

    The numbers of the config are the family's defaults, not this model's: only its architecture is of use.

    Args:
        model_name: Hub id or folder name.
        images: the model classifies images.
    """
    name = model_name.lower().replace("_", "-")
    for pattern, family in IMAGE_FAMILIES if images else FAMILIES:
        found = re.search(pattern, name)
        if found:
            guessed_from = f"{family}, from {found.group()!r} in the name {model_name!r}"
            return AutoConfig.for_model(family), guessed_from
    family = "vit" if images else "llama"
    return AutoConfig.for_model(family), f"{family}, since the name {model_name!r} tells no family"
