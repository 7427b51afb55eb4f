"""What makes a step cheaper and leaves its loss as it is: which of it a plan uses, and why."""

from typing import get_args

from peftcli.plan.choices import Choices
from peftcli.plan.plan import Decision
from peftcli.recipe.schema import Lever, Recipe
from peftcli.recipe.tasks import CAUSAL

SWITCH = "performance.without"
"""The key that switches one off."""
LEVERS = frozenset(get_args(Lever))


def choose_levers(recipe: Recipe, choices: Choices) -> tuple[frozenset[str], tuple[Decision, ...]]:
    """The levers that a plan uses, and what is said of those that have a meaning in it."""
    off: set[str] = set(recipe.performance.without)
    if recipe.trainer.get("torch_compile"):
        return LEVERS - off - {"head", "products"}, ()  # the compiler sees to it
    decisions = []
    if recipe.model.task == CAUSAL:
        if choices.on_gpu:
            off.add("head")  # TRL's kernels score trained tokens alone, and make the second product worth while
        else:
            why = "a CPU has no kernels for TRL's, which scores prompts too and makes each product twice; same loss"
            decisions.append(_said("output layer", "trained tokens alone, each product once", why, off, "head"))
    if recipe.adapter.method == "lora" and not recipe.adapter.use_dora:
        why = "PEFT passes through memory three times for it; same sum"
        decisions.append(_said("LoRA", "added in one pass", why, off, "products"))
    return LEVERS - off, tuple(decisions)


def _said(key: str, value: str, why: str, off: set[str], lever: str) -> Decision:
    return Decision(key, "as the libraries make it", SWITCH) if lever in off else Decision(key, value, why)
