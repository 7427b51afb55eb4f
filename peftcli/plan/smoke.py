"""The rehearsal of a recipe: the same path from end to end, on a few rows for a few steps."""

import re
from collections.abc import Mapping
from typing import Any

from peftcli.plan.adalora import check_ranks
from peftcli.recipe.problems import dotted
from peftcli.recipe.schema import AdapterSection, QuantizationSection, Recipe, SelectSection
from peftcli.recipe.stages import stage_recipes
from peftcli.recipe.trainer_together import save_strategy
from peftcli.tasks.registry import TASKS

STEPS = 6
ROW_TOKENS = 1024
"""Rows are cut here: the default of `dataset.max_length`, so most recipes are rehearsed with whole rows."""
LAYERS = 2
"""Of every stand-in, at least."""
BUDGET = 0.5
"""Of a choice by gradient, as a share of the stand-in, which is small beside its adapters."""
EVALUATED_EVERY = STEPS // 2
"""Steps between two evaluations or checkpoints, where the recipe asks for them."""
DROPPED = ("num_train_epochs", "save_steps", "save_strategy", "eval_steps", "eval_delay", "eval_strategy")
"""Trainer arguments that say how long training takes and when it is evaluated or saved."""
COMPILE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
REAL_MACHINE = {
    **dict.fromkeys(("tf32", "activation_offloading"), "it needs a GPU"),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "its kernels need a GPU"),
    "deepspeed": "it needs GPUs",
    "ddp_backend": "a rehearsal is one process",
    **dict.fromkeys(COMPILE, "compiling for this CPU would take minutes and say nothing about a GPU"),
}
"""Trainer arguments that only the real machine can serve, and why."""
SCHEDULE = ("tinit", "tfinal")
"""Arguments of AdaLoRA that are numbers of steps."""


def smoke_recipe(recipe: Recipe) -> Recipe:
    """The recipe of a smoke run: small in all that costs time, unchanged in all that decides the path.

    Method, quantization, templates, optimizer and scheduler stay. Gates go: the numbers of a random stand-in say
    nothing about the real model. `smoke_notices` names what goes.
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
    return recipe.model_copy(
        update={
            "name": f"{recipe.name}-smoke",
            "output_dir": None if recipe.output_dir is None else f"{recipe.output_dir}-smoke",
            "model": recipe.model.model_copy(update={"dtype": _dtype(recipe), "attention": "auto"}),
            "quantization": _quantization(recipe.quantization),
            "adapter": _without_schedule(recipe.adapter),
            "trainer": trainer,
            "evaluation": recipe.evaluation.model_copy(update=_evaluation(recipe)),
            "gates": (),
            "budget": type(recipe.budget)(),
            "report": type(recipe.report)(),
        }
    )


def check_schedules(recipe: Recipe) -> None:
    """Check the schedules that `smoke_recipe` leaves out, against the steps of the real run.

    Raises:
        RecipeError: that of AdaLoRA does not fit the steps of its stage.
    """
    for stage in stage_recipes(recipe):
        check_ranks(stage.adapter, stage.trainer.get("max_steps"))


def smoke_notices(recipe: Recipe) -> tuple[str, ...]:
    """What a smoke run of a recipe leaves out, as sentences for people."""
    asked: list[tuple[tuple[str, ...], Any]] = [
        (("model", "dtype"), recipe.model.dtype not in ("auto", _dtype(recipe))),
        (("model", "attention"), _unless_auto(recipe.model.attention)),
        (("gates",), recipe.gates),
        (("budget", "wall_clock"), recipe.budget.wall_clock),
        (("report", "trackers"), recipe.report.trackers),
        *((("adapter", name), recipe.adapter.arguments.get(name)) for name in SCHEDULE),
    ]
    if recipe.quantization is not None:
        asked.append((("quantization", "compute_dtype"), _unless_auto(recipe.quantization.compute_dtype)))
    left_out = [dotted(path) for path, value in asked if value]
    said = [*_only_on_the_real_machine(recipe)]
    if left_out:
        said.append(f"smoke: left out: {', '.join(left_out)}")
    if recipe.dataset.max_length > ROW_TOKENS:
        said.append(
            f"smoke: rows are cut at {ROW_TOKENS:,} tokens, dataset.max_length is {recipe.dataset.max_length:,}"
        )
    return tuple(said)


def _unless_auto(value: str) -> str | None:
    return None if value == "auto" else value


def _only_on_the_real_machine(recipe: Recipe) -> dict[str, None]:
    """A sentence for each trainer argument that a rehearsal cannot try, in order, each once."""
    found: dict[str, None] = {}
    for stage in stage_recipes(recipe):
        for name, why in REAL_MACHINE.items():
            if stage.trainer.get(name):
                found[f"smoke: trainer.{name} is left out: {why}"] = None
        if (stage.trainer.get("activation_checkpointing_kwargs") or {}).get("offload"):
            found["smoke: trainer.activation_checkpointing_kwargs.offload is left out: it needs a GPU"] = None
    return found


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


def _without_schedule(adapter: AdapterSection) -> AdapterSection:
    kept = {name: value for name, value in adapter.arguments.items() if name not in SCHEDULE}
    return adapter.model_copy(update={"arguments": kept}) if len(kept) < len(adapter.arguments) else adapter


def _dtype(recipe: Recipe) -> str:
    """The format of a CPU, or that of weights that are trained as they are."""
    return "bfloat16" if recipe.adapter.dtype == "bfloat16" else "auto"


def _quantization(asked: QuantizationSection | None) -> QuantizationSection | None:
    if asked is None or asked.bits == 8:
        return asked  # 8 bits have no format of their own to compute in
    return asked.model_copy(update={"compute_dtype": "auto"})


def stand_in_adapter(adapter: AdapterSection) -> AdapterSection:
    """The adapter with layers that a stand-in has, a budget that one of its modules fits, and weights of its own."""
    update: dict[str, Any] = {"init_from": None}
    for key in ("target_modules", "layers"):
        asked = getattr(adapter, key)
        if isinstance(asked, SelectSection):
            update[key] = asked.model_copy(update={"budget": max(asked.budget, BUDGET)})
        elif key == "layers" and asked is not None:
            update[key] = tuple(sorted({number % LAYERS for number in asked}))
        elif isinstance(asked, tuple):
            update[key] = tuple(dict.fromkeys(map(_renumbered, asked)))
    last = adapter.arguments.get("last_layers")
    if last is not None:
        update["arguments"] = {**adapter.arguments, "last_layers": min(last, LAYERS)}
    return adapter.model_copy(update=update)


def _renumbered(name: str) -> str:
    """A module's name with the number of a layer that a stand-in has.

    >>> _renumbered("model.layers.31.mlp.up_proj"), _renumbered("up_proj")
    ('model.layers.1.mlp.up_proj', 'up_proj')
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", lambda number: str(int(number[0]) % LAYERS), name)


def _evaluation(recipe: Recipe) -> dict[str, int]:
    if not TASKS[recipe.model.task].generates:
        return {}  # nothing is written
    short = {"max_new_tokens": 8, "rows": 8}
    return short if recipe.evaluation.forgetting_text is None else short | {"forgetting_tokens": 1000}
