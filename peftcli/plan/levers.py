"""What makes a step cheaper and leaves its loss as it is: which of it a plan uses, and why."""

from typing import get_args

from peftcli.methods.registry import METHODS
from peftcli.plan.choices import Choices
from peftcli.plan.facts import ModelFacts
from peftcli.plan.plan import Decision
from peftcli.recipe.rules import CAUSAL
from peftcli.recipe.schema import Lever, Recipe

SWITCH = "performance.without"
"""The key that switches one off."""
LEVERS = frozenset(get_args(Lever))
COMPILED = "compiled code fuses what it can"


def choose_levers(recipe: Recipe, choices: Choices, facts: ModelFacts) -> tuple[frozenset[str], tuple[Decision, ...]]:
    """The levers that a plan uses, and what is said of those that have a meaning in it."""
    reasons = {
        "head": _head_stays(recipe, choices, facts),
        "products": _sum_stays(recipe),
        "figures": "" if recipe.model.task == CAUSAL else "of a head none is fetched",
    }
    left = {lever: why for lever, why in reasons.items() if why} | dict.fromkeys(recipe.performance.without, SWITCH)
    decisions = []
    if recipe.model.task == CAUSAL and not choices.on_gpu:
        does = "a CPU has no kernels for TRL's, which scores prompts too and makes each product twice; same loss"
        decisions.append(_said("output layer", "trained tokens alone, each product once", does, left.get("head")))
    if recipe.adapter.method == "lora":
        does = "PEFT passes through memory three times for it; same sum"
        decisions.append(_said("LoRA", "added in one pass", does, left.get("products")))
    return LEVERS - left.keys(), tuple(decisions)


def _head_stays(recipe: Recipe, choices: Choices, facts: ModelFacts) -> str:
    """Why the output layer is left to TRL, empty where it is not; what only the weights tell is seen later."""
    name = (facts.output_layer or "").rpartition(".")[2]
    saved = {module.rpartition(".")[2] for module in recipe.adapter.modules_to_save or ()}
    if recipe.model.task != CAUSAL or choices.on_gpu:
        return "TRL's kernels on a card score trained tokens alone, and make the second product worth while"
    if METHODS[recipe.adapter.method].targets == "whole" or name in saved:
        return "it is trained"
    if recipe.trainer.get("label_smoothing_factor"):
        return "label smoothing wants all logits"
    return COMPILED if recipe.trainer.get("torch_compile") else ""


def _sum_stays(recipe: Recipe) -> str:
    """Why LoRA's sum is left to PEFT, empty where it is not."""
    if recipe.adapter.method != "lora":
        return "there is no LoRA"
    if recipe.adapter.use_dora:
        return "DoRA scales the sum"
    if recipe.adapter.arguments.get("lora_bias"):
        return "lora_bias adds to it"
    if recipe.quantization is not None and recipe.quantization.bits == 8:
        return "PEFT has a layer of its own for 8 bits"
    return COMPILED if recipe.trainer.get("torch_compile") else ""


def _said(key: str, value: str, does: str, why_not: str | None) -> Decision:
    return Decision(key, "as the libraries make it", why_not) if why_not else Decision(key, value, does)
