"""The rehearsal of a recipe: the same path from end to end, on a few rows for a few steps."""

from collections.abc import Mapping
from typing import Any

from peftcli.recipe.adapter_section import AdapterSection
from peftcli.recipe.schema import QuantizationSection, Recipe
from peftcli.recipe.select_section import SelectSection
from peftcli.recipe.stages import stage_recipes
from peftcli.recipe.tasks import CAUSAL
from peftcli.recipe.trainer_together import save_strategy

STEPS = 6
LAYERS = 2
"""Of every stand-in, at least."""
BUDGET = 0.5
"""Of a choice by gradient, as a share of the stand-in, which is small beside its adapters."""
EVALUATED_EVERY = 3
"""Steps between two evaluations, where the recipe evaluates on the way."""
DROPPED = ("num_train_epochs", "save_steps", "save_strategy", "eval_steps", "eval_delay", "eval_strategy")
"""Trainer arguments that say how long training takes and when it is looked at."""
COMPILE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
REAL_MACHINE = {
    **dict.fromkeys(("tf32", "activation_offloading"), "it needs a GPU"),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "its kernels need a GPU"),
    "deepspeed": "it needs GPUs",
    "ddp_backend": "a rehearsal is one process",
    **dict.fromkeys(COMPILE, "compiling for this CPU would take minutes and say nothing about a GPU"),
}
"""Trainer arguments that only the real machine can serve, and why."""


def smoke_recipe(recipe: Recipe) -> Recipe:
    """The recipe of a smoke run: small in all that costs time, unchanged in all that decides the path.

    Method, quantization, templates, optimizer and scheduler stay. Gates go: the numbers of a random stand-in say
    nothing about the real model.
    """
    given = recipe.trainer
    trainer = {name: value for name, value in given.items() if name not in (*DROPPED, *REAL_MACHINE)}
    trainer |= _looks(given) | _checkpointing(given)
    trainer |= {
        "max_steps": STEPS,
        "logging_steps": 1,
        "per_device_train_batch_size": min(int(given.get("per_device_train_batch_size", 8)), 4),
        "gradient_accumulation_steps": min(int(given.get("gradient_accumulation_steps", 1)), 2),
        "use_cpu": True,
    }
    longest = min(recipe.dataset.max_length, 512)
    return recipe.model_copy(
        update={
            "name": f"{recipe.name}-smoke",
            "output_dir": None if recipe.output_dir is None else f"{recipe.output_dir}-smoke",
            "model": recipe.model.model_copy(update={"dtype": "auto", "attention": "auto"}),
            "quantization": _quantization(recipe.quantization),
            "adapter": _adapter(recipe.adapter),
            "dataset": recipe.dataset.model_copy(update={"max_length": longest}),
            "trainer": trainer,
            "evaluation": recipe.evaluation.model_copy(update=_evaluation(recipe)),
            "gates": (),
            "budget": type(recipe.budget)(),
            "report": type(recipe.report)(),
        }
    )


def smoke_notes(recipe: Recipe) -> tuple[str, ...]:
    """What a rehearsal leaves out because only the real machine can do it."""
    found: dict[str, None] = {}
    for stage in stage_recipes(recipe):
        for name, why in REAL_MACHINE.items():
            if stage.trainer.get(name):
                found[f"smoke: trainer.{name} is left out: {why}"] = None
        if (stage.trainer.get("activation_checkpointing_kwargs") or {}).get("offload"):
            found["smoke: trainer.activation_checkpointing_kwargs.offload is left out: it needs a GPU"] = None
    return tuple(found)


def _looks(given: Mapping[str, Any]) -> dict[str, Any]:
    """When a rehearsal evaluates and saves: as often as it has time for, since other arguments can need it."""
    looks: dict[str, Any] = {}
    if given.get("eval_strategy", "no") != "no":
        looks |= {"eval_strategy": "steps", "eval_steps": EVALUATED_EVERY}
    if save_strategy(given) == "best":
        looks["save_strategy"] = "best"
    elif given.get("load_best_model_at_end"):
        looks |= {"save_strategy": "steps", "save_steps": EVALUATED_EVERY}
    return looks


def _checkpointing(given: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's arguments of activation checkpointing without what needs a GPU."""
    asked = given.get("activation_checkpointing_kwargs")
    kept = {name: value for name, value in (asked or {}).items() if name != "offload"}
    return {} if asked is None else {"activation_checkpointing_kwargs": kept or None}


def _quantization(asked: QuantizationSection | None) -> QuantizationSection | None:
    if asked is None or asked.bits == 8:
        return asked  # 8 bits have no format of their own to compute in
    return asked.model_copy(update={"compute_dtype": "auto"})


def _adapter(adapter: AdapterSection) -> AdapterSection:
    """The adapter with layers that the stand-in has, and a budget that one of its modules fits."""
    update: dict[str, Any] = {}
    for key in ("target_modules", "layers"):
        asked = getattr(adapter, key)
        if isinstance(asked, SelectSection):
            update[key] = asked.model_copy(update={"budget": max(asked.budget, BUDGET)})
        elif key == "layers" and asked is not None:
            update[key] = tuple(sorted({number % LAYERS for number in asked}))
    last = adapter.arguments.get("last_layers")
    if last is not None:
        update["arguments"] = {**adapter.arguments, "last_layers": min(last, LAYERS)}
    return adapter.model_copy(update=update)


def _evaluation(recipe: Recipe) -> dict[str, int]:
    if recipe.model.task != CAUSAL:
        return {}  # nothing is written
    short = {"max_new_tokens": 8, "rows": 8}
    return short if recipe.evaluation.retention is None else short | {"retention_tokens": 1000}
