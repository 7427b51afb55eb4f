"""Whether the rows of a step run as flat lines without padding: the same rows, the same loss, less work."""

from peftcli.errors import RecipeError
from peftcli.methods.registry import METHODS
from peftcli.plan.choices import Choices
from peftcli.plan.plan import Batch, Batching, Decision, LabelRule
from peftcli.recipe.rules import CAUSAL
from peftcli.recipe.schema import Recipe

CPU_TOKENS = 768
"""Of a line on a CPU, for the memory: 4096 take a fourteenth less time and twice the memory of the loop."""
APART = {
    "packing": "packing makes lines of its own",
    "padding_free": "padding_free makes lines of its own",
    "neftune_noise_alpha": "the noise of neftune depends on the length of a padded row",
    "label_smoothing_factor": "label smoothing is computed on padded rows",
    "use_liger_kernel": "liger's kernels bring an attention and a loss of their own",
    "torch_compile": "compiled code would be compiled anew for every length",
}
"""Trainer arguments with which rows stay padded, and why."""


def choose_batching(
    recipe: Recipe, choices: Choices, batch: Batch, labels: LabelRule, not_flat: str = ""
) -> tuple[Batching, Decision]:
    """Choose how the rows of a step are run.

    Args:
        not_flat: why the model would not keep the rows of a line apart, empty where it does.

    Raises:
        RecipeError: flat lines are asked for together with something that they cannot go with.
    """
    asked = recipe.performance.batching
    given = recipe.performance.tokens_per_micro_batch
    tokens = batch.per_device * labels.max_length
    firm = isinstance(given, int)
    if isinstance(given, int):
        tokens = given
    elif not choices.on_gpu:
        tokens = min(tokens, max(CPU_TOKENS, labels.max_length))
    why = METHODS[recipe.adapter.method].padded or None
    if why is None:
        why = next((why for name, why in APART.items() if recipe.trainer.get(name)), None)
    if recipe.model.task != CAUSAL:
        why = "a head reads whole rows, which a line would not keep apart"
    if why is None and choices.attention.value != "sdpa":
        why = f"lines need model.attention sdpa, not {choices.attention.value}"
    why = why or not_flat or None
    if asked == "flat" and why is not None:
        fix = "set padded or auto" if why == not_flat else "remove one of the two"
        raise RecipeError(f"performance.batching: flat cannot be had: {why}; {fix}")
    if asked == "padded" or why is not None:
        value = f"padded, up to {tokens:,} tokens at once" if firm else "padded"
        return Batching("padded", tokens, firm), Decision("batching", value, why or "performance.batching")
    reason = "the rows of a step stand in lines without padding, each seeing itself alone; same rows, same loss"
    return Batching("flat", tokens, firm), Decision("batching", f"flat, up to {tokens:,} tokens at once", reason)
