"""The rehearsal of a recipe: the same path from end to end, on a few rows for a few steps."""

from typing import Any

from peftcli.recipe.adapter_section import AdapterSection
from peftcli.recipe.schema import QuantizationSection, Recipe
from peftcli.recipe.select_section import SelectSection
from peftcli.recipe.tasks import CAUSAL

STEPS = 6
LAYERS = 2
"""Of every stand-in, at least."""
BUDGET = 0.5
"""Of a choice by gradient, as a share of the stand-in, which is small beside its adapters."""
DROPPED = ("num_train_epochs", "save_steps", "save_strategy", "eval_steps", "eval_strategy", "torch_compile")


def smoke_recipe(recipe: Recipe) -> Recipe:
    """The recipe of a smoke run: small in all that costs time, unchanged in all that decides the path.

    Method, quantization, templates, optimizer and scheduler stay. Gates go: the numbers of a random stand-in say
    nothing about the real model.
    """
    given = recipe.trainer
    trainer = {name: value for name, value in given.items() if name not in DROPPED}
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
            "model": recipe.model.model_copy(update={"dtype": _dtype(recipe), "attention": "auto"}),
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


def _dtype(recipe: Recipe) -> str:
    """The format of a CPU, or that of weights that are trained as they are."""
    return "bfloat16" if recipe.adapter.dtype == "bfloat16" else "auto"


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
