"""Prompt-learning methods: they train virtual tokens in front of every row and leave the weights alone."""

from peftcli.methods.base import GENERATING_TASKS, Method

NO_MERGE = "its virtual tokens stand before the row, and no weight holds them"
PADDED = "each row needs its own virtual tokens before it"
VIRTUAL_TOKENS = 20
"""Before each row, where a recipe does not say."""
CLOSED = {
    name: "it is read from the model"
    for name in ("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
} | {"tokenizer_name_or_path": "it is the base model's"}

PROMPT = (
    Method(
        name="prompt",
        title="Prompt tuning",
        what="virtual tokens before the row, drawn at random or begun from a text",
        paper="Lester et al. 2021, arXiv:2104.08691",
        config="PromptTuningConfig",
        peft_module="prompt_tuning",
        defaults={"num_virtual_tokens": VIRTUAL_TOKENS},
        unsupported_arguments=CLOSED,
        targets="none",
        tasks=GENERATING_TASKS,
        merge=NO_MERGE,
        padded=PADDED,
        hides_tokens=True,
    ),
    Method(
        name="p_tuning",
        title="P-tuning",
        what="virtual tokens before the row, written by a small network",
        paper="Liu et al. 2021, arXiv:2103.10385",
        config="PromptEncoderConfig",
        peft_module="p_tuning",
        defaults={"num_virtual_tokens": VIRTUAL_TOKENS},
        unsupported_arguments=CLOSED,
        targets="none",
        tasks=GENERATING_TASKS,
        merge=NO_MERGE,
        padded=PADDED,
        hides_tokens=True,
    ),
    Method(
        name="prefix",
        title="Prefix tuning",
        what="learned keys and values before the row, in every layer",
        paper="Li and Liang 2021, arXiv:2101.00190",
        config="PrefixTuningConfig",
        peft_module="prefix_tuning",
        defaults={"num_virtual_tokens": VIRTUAL_TOKENS},
        unsupported_arguments=CLOSED,
        targets="none",
        tasks=GENERATING_TASKS,
        merge="its keys and values stand before the row, and no weight holds them",
        padded="each row needs its own keys and values before it",
        checkpointing="blocks that run again in the backward pass would add the prefix to the cache a second time",
    ),
)
