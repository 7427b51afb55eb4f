"""Prompt-learning methods: they train virtual tokens that are prepended to every row; the weights do not change."""

from peftcli.methods.base import GENERATING_TASKS, Method

NO_MERGE = "its virtual tokens are part of the input, so they cannot be folded into a weight"
PADDED = "virtual tokens must be prepended to each row"
VIRTUAL_TOKENS = 20
"""Default number per row."""
CLOSED = {
    name: "it is read from the model"
    for name in ("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
} | {"tokenizer_name_or_path": "it is the base model's tokenizer"}

PROMPT = (
    Method(
        name="prompt",
        title="Prompt tuning",
        what="virtual tokens before each row, initialized at random or from a text",
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
        what="virtual tokens before each row, computed by a small network",
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
        what="learned keys and values before each row, in every layer",
        paper="Li and Liang 2021, arXiv:2101.00190",
        config="PrefixTuningConfig",
        peft_module="prefix_tuning",
        defaults={"num_virtual_tokens": VIRTUAL_TOKENS},
        unsupported_arguments=CLOSED,
        targets="none",
        tasks=GENERATING_TASKS,
        merge="its keys and values are part of the cache, so they cannot be folded into a weight",
        padded="learned keys and values must be prepended to each row",
        checkpointing="recomputing a block in the backward pass would add the prefix to the cache a second time",
    ),
)
