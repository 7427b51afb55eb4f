"""Which optimizations of the training step a plan uses, and why others are left out; none of them changes the loss."""

from typing import get_args

from peftcli.methods.registry import METHODS
from peftcli.plan.choices import Choices
from peftcli.plan.machine import Machine, ModelFacts
from peftcli.plan.memory.model_shape import Norm
from peftcli.plan.parallelism import Sharding
from peftcli.plan.plan import RANDOM_STATE, Decision
from peftcli.recipe.schema import Optimization, Recipe
from peftcli.tasks.registry import TASKS

SWITCH = "performance.disable"
"""The recipe key that disables optimizations."""
OPTIMIZATIONS = frozenset(get_args(Optimization))
COMPILED = "torch.compile fuses what it can"

TRITON_CAPABILITY = (8, 0)
"""Compute capability from which Triton supports NVIDIA's GPUs, by its README."""


def choose_optimizations(
    recipe: Recipe, choices: Choices, facts: ModelFacts, machine: Machine, sharding: Sharding
) -> tuple[frozenset[str], tuple[Decision, ...]]:
    """The optimizations that a plan uses, and the decisions to show for those that apply to it."""
    reasons = {
        "fused_loss": _head_stays(recipe, choices, facts),
        "fused_lora": _sum_stays(recipe),
        "fused_norms": _why_python_norms(recipe, choices, facts, machine),
        "liger_layers": _why_python_layers(recipe, choices, machine, sharding),
        "skip_rng_state": _why_random_states(recipe, choices),
        "deferred_metrics": "" if TASKS[recipe.model.task].generates else "no per-batch metrics for classification",
    }
    left = {name: why for name, why in reasons.items() if why} | dict.fromkeys(recipe.performance.disable, SWITCH)
    decisions = []
    if TASKS[recipe.model.task].generates and not choices.on_gpu:
        does = "TRL's fused loss needs GPU kernels, includes prompt tokens and computes logits twice; same loss"
        decisions.append(
            _optimization_decision(
                "output layer", "only trained tokens, logits computed once", does, left.get("fused_loss")
            )
        )
    if METHODS[recipe.adapter.method].is_lora:
        does = "PEFT reads and writes the output three times; same result"
        decisions.append(_optimization_decision("LoRA", "added in one pass", does, left.get("fused_lora")))
    if choices.on_gpu and _rms_norms(facts):
        does = "one kernel instead of about ten, and half the saved bytes in 16 bit; one rounding fewer"
        decisions.append(_optimization_decision("norms", "torch's fused kernel", does, left.get("fused_norms")))
    if choices.on_gpu and TASKS[recipe.model.task].generates:
        does = "rotary embeddings, gated activations, and norms where torch has no kernel; checked before training"
        decisions.append(_optimization_decision("layer kernels", "Liger's", does, left.get("liger_layers")))
    if choices.checkpointing.value == "on":
        does = "checkpointed layers use no random numbers, so recomputation gives the same bits without it"
        decisions.append(
            _optimization_decision(RANDOM_STATE, "not saved for each layer", does, left.get("skip_rng_state"))
        )
    return OPTIMIZATIONS - left.keys(), tuple(decisions)


def compiles(recipe: Recipe) -> bool:
    """Whether the trainer compiles the model: a backend or a mode alone switches torch.compile on too.

    Source: `TrainingArguments.__post_init__` of transformers.
    """
    return any(recipe.trainer.get(name) for name in ("torch_compile", "torch_compile_backend", "torch_compile_mode"))


def _head_stays(recipe: Recipe, choices: Choices, facts: ModelFacts) -> str:
    """Why the loss is left to TRL; empty if it is not. Reasons that depend on the weights are found later."""
    name = (facts.output_layer or "").rpartition(".")[2]
    saved = {module.rpartition(".")[2] for module in recipe.adapter.modules_to_save or ()}
    if not TASKS[recipe.model.task].generates or choices.on_gpu:
        return "on GPU, TRL's fused kernel already skips masked tokens"
    if METHODS[recipe.adapter.method].targets == "whole" or name in saved:
        return "the output layer is trained"
    if recipe.trainer.get("label_smoothing_factor"):
        return "label smoothing needs all logits"
    return COMPILED if compiles(recipe) else ""


def _sum_stays(recipe: Recipe) -> str:
    """Why adding LoRA's output is left to PEFT; empty if it is not."""
    if not METHODS[recipe.adapter.method].is_lora:
        return "the method is not LoRA"
    if recipe.adapter.use_dora:
        return "DoRA rescales the output"
    if recipe.adapter.arguments.get("lora_bias"):
        return "lora_bias adds a bias"
    if recipe.quantization is not None and recipe.quantization.bits == 8:
        return "PEFT has a separate layer for 8 bits"
    return COMPILED if compiles(recipe) else ""


def _rms_norms(facts: ModelFacts) -> tuple[Norm, ...]:
    """The norms of a model that compute in float32, as RMS norms do."""
    return () if facts.shape is None else tuple(norm for norm in facts.shape.norms if norm.in_float32)


def _why_python_norms(recipe: Recipe, choices: Choices, facts: ModelFacts, machine: Machine) -> str:
    """Why the norms keep the model's own implementation; empty if they do not."""
    if not any(norm.fusible for norm in _rms_norms(facts)):
        return f"the norm of {facts.architecture} uses a different formula from torch's"
    if not choices.on_gpu:
        return "a CPU has no fused kernel for it, so it would not be faster"
    if not machine.fused_norms:
        return "the installed torch has no kernel for it; torch 2.9 and later have one"
    if METHODS[recipe.adapter.method].trains_norms:
        return f"{recipe.adapter.method} trains the norms, whose weights may be wider than their inputs"
    if recipe.trainer.get("use_liger_kernel"):
        return "trainer.use_liger_kernel brings its own"
    return COMPILED if compiles(recipe) else ""


def _why_python_layers(recipe: Recipe, choices: Choices, machine: Machine, sharding: Sharding) -> str:
    """Why rotary embeddings and activations keep the model's own implementation; empty if they do not."""
    if not choices.on_gpu or not TASKS[recipe.model.task].generates:
        return "Liger's kernels are for language models on a GPU"
    if recipe.trainer.get("use_liger_kernel"):
        return "trainer.use_liger_kernel already brings them"
    if compiles(recipe):
        return COMPILED
    if machine.capability is not None and machine.capability < TRITON_CAPABILITY:
        return "Triton, which compiles Liger's kernels, supports GPUs of sm_80 and later"
    if not METHODS[recipe.adapter.method].is_lora or sharding.shards > 1:
        return "only LoRA on unsharded weights was tested"
    return "" if machine.liger else "liger-kernel is not installed"


def _why_random_states(recipe: Recipe, choices: Choices) -> str:
    """Why random states are saved for checkpointed layers; empty if they are not."""
    if choices.checkpointing.value != "on":
        return "no layer is checkpointed"
    if recipe.adapter.dropout:
        return f"adapter.dropout {recipe.adapter.dropout} uses random numbers in each layer"
    return COMPILED if compiles(recipe) else ""


def _optimization_decision(key: str, value: str, does: str, why_not: str | None) -> Decision:
    return Decision(key, "library default", why_not) if why_not else Decision(key, value, does)
