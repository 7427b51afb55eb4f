"""How the blocks run while a trainer trains: which are checkpointed, and what adapters do with their inputs."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from peftcli.model.fused_lora import join_products, part_products


class Forward(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Sets the blocks up when training begins, and puts adapters back when it ends.

    None of it changes a loss: a block that runs again gives the same values, what PEFT casts to the adapter's dtype
    autocast would cast back before the product, and LoRA's sum is the same in one pass.
    """

    def __init__(self, checkpointed_blocks: int | None, levers: set[str]) -> None:
        """
        Args:
            checkpointed_blocks: that run again in the backward pass; None leaves it to the trainer's argument.
            levers: names of what is done otherwise than the libraries do it; what turns out to be without use is
                taken out.
        """
        self._blocks = checkpointed_blocks
        self._levers = levers

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._blocks is not None:
            keep_checkpointed(model, self._blocks)
        if not (args.bf16 or args.fp16):
            self._levers.discard("casts")
        if "casts" in self._levers:
            cast_inputs(model, False)
        if "products" in self._levers and not join_products(model):
            self._levers.discard("products")

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        # Evaluation runs without autocast, so adapters need their inputs cast again.
        cast_inputs(model, True)
        part_products(model)


def keep_checkpointed(model: torch.nn.Module, blocks: int) -> int:
    """Leave the first so many blocks checkpointed and let all others keep their activations.

    Returns:
        Number of blocks that are checkpointed now.
    """
    switched = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    for module in switched[blocks:]:
        module.gradient_checkpointing = False
    return min(blocks, len(switched))


def cast_inputs(model: torch.nn.Module, wanted: bool) -> None:
    """Let adapters cast their inputs to the dtype of their weights, or leave that to autocast where it is the same."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = wanted or _rounds_otherwise(module)


def _rounds_otherwise(layer: Any) -> bool:
    """Whether the cast changes more than memory: DoRA computes on its input, and a CPU rounds dropout's factor."""
    if len(getattr(layer, "lora_magnitude_vector", ())):
        return True
    drops = getattr(layer, "lora_dropout", {}).values()
    on_cpu = next(layer.parameters()).device.type == "cpu"
    return on_cpu and any(getattr(drop, "p", 0.0) > 0 for drop in drops)
