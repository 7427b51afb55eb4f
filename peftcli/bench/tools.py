"""What is held against each other: ways to train the same rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Tool:
    """One way to train.

    Attributes:
        name: short, for options and files.
        title: for people.
        ours: `peftcli train`; otherwise SFTTrainer.
        settings: of ours the section `performance`; else arguments of SFTConfig, and `dtype` and
            `attn_implementation` of the model.
    """

    name: str
    title: str
    ours: bool
    settings: Mapping[str, Any] = field(default_factory=dict)


REFERENCE = "padded"
"""Whose losses the others' are held against."""
FLAT = "flat"
AS_IT_COMES = ("trl", "trl_fp32")
TUNED = ("trl_tuned", "trl_tuned_fp32")
TOOLS = {
    tool.name: tool
    for tool in (
        Tool("flat", "peftcli, flat lines", True, {"batching": "padding_free"}),
        Tool(
            "flat_512", "peftcli, flat, 512 tokens", True, {"batching": "padding_free", "tokens_per_micro_batch": 512}
        ),
        Tool("padded", "peftcli, padded", True, {"batching": "padded"}),
        Tool("trl", "SFTTrainer as it comes", False),
        # On a processor without bfloat16 products its default is emulated, and slower than float32.
        Tool("trl_fp32", "SFTTrainer as it comes, float32", False, {"bf16": False}),
        # Its documentation, "Speeding Up Training" and "Reducing Memory Usage": no padding, and no checkpointing where
        # memory allows; packing would change the steps.
        Tool("trl_tuned", "SFTTrainer tuned", False, {"padding_free": True, "activation_checkpointing": False}),
        Tool(
            "trl_tuned_fp32",
            "SFTTrainer tuned, float32",
            False,
            {"padding_free": True, "activation_checkpointing": False, "bf16": False},
        ),
    )
}


def tuned_for(tool: Tool, *, on_gpu: bool, flash: bool) -> Tool:
    """SFTTrainer tuned for a card: weights in 16 bit, and flash attention where its package is installed."""
    if tool.name != "trl_tuned" or not on_gpu:
        return tool
    more = {"dtype": "bfloat16"} | ({"attn_implementation": "flash_attention_2"} if flash else {})
    return Tool(tool.name, tool.title, tool.ours, {**tool.settings, **more})
