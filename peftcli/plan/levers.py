"""What makes a step cheaper and leaves its loss as it is: which of it a plan uses, and why."""

from typing import get_args

from peftcli.methods.table import METHODS
from peftcli.plan.choices import Choices
from peftcli.plan.facts import ModelFacts
from peftcli.plan.plan import Decision
from peftcli.recipe.schema import Lever, Recipe
from peftcli.recipe.tasks import CAUSAL

SWITCH = "performance.without"
"""The key that switches one off."""
LEVERS = frozenset(get_args(Lever))
LEFT = "as the libraries make it"


def choose_levers(recipe: Recipe, choices: Choices, facts: ModelFacts) -> tuple[frozenset[str], tuple[Decision, ...]]:
    """The levers that a plan uses, and what is said of those that have a meaning in it."""
    off: set[str] = set(recipe.performance.without)
    if recipe.model.task != CAUSAL:
        off.add("figures")  # of a head none is fetched
    if recipe.trainer.get("torch_compile"):
        return LEVERS - off - {"head", "products"}, ()  # the compiler sees to it
    decisions = []
    if recipe.model.task == CAUSAL and not choices.on_gpu:
        why = SWITCH if "head" in off else _head_stays(recipe, facts)
        does = "a CPU has no kernels for TRL's, which scores prompts too and makes each product twice; same loss"
        decisions.append(_said("output layer", "trained tokens alone, each product once", does, why))
        off |= {"head"} if why else set()
    else:
        off.add("head")  # TRL's kernels score trained tokens alone, and make the second product worth while
    why = SWITCH if "products" in off else _sum_stays(recipe)
    if recipe.adapter.method == "lora":
        does = "PEFT passes through memory three times for it; same sum"
        decisions.append(_said("LoRA", "added in one pass", does, why))
    return LEVERS - off - ({"products"} if why else set()), tuple(decisions)


def _head_stays(recipe: Recipe, facts: ModelFacts) -> str:
    """Why the output layer is left to TRL, empty where it is not; what only the weights tell is seen later."""
    name = (facts.output_layer or "").rpartition(".")[2]
    saved = {module.rpartition(".")[2] for module in recipe.adapter.modules_to_save or ()}
    if METHODS[recipe.adapter.method].targets == "whole" or name in saved:
        return "it is trained"
    if recipe.trainer.get("label_smoothing_factor"):
        return "label smoothing wants all logits"
    return ""


def _sum_stays(recipe: Recipe) -> str:
    if recipe.adapter.method != "lora":
        return "no LoRA"
    if recipe.adapter.use_dora:
        return "DoRA scales the sum"
    if recipe.adapter.arguments.get("lora_bias"):
        return "lora_bias"
    return "8 bit" if recipe.quantization is not None and recipe.quantization.bits == 8 else ""


def _said(key: str, value: str, does: str, why_not: str) -> Decision:
    return Decision(key, LEFT, why_not) if why_not else Decision(key, value, does)
