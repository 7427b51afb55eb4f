"""Smoke runs: the same path from end to end, on a few rows for a few steps."""

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
"""Rows are truncated here: the default of `dataset.max_length`, so most recipes are rehearsed with whole rows."""
LAYERS = 2
"""Minimum number of layers of every stand-in."""
BUDGET = 0.5
"""Budget of a selection by gradient, as a share of the stand-in, whose adapters are relatively large."""
EVALUATED_EVERY = STEPS // 2
"""Steps between two evaluations or checkpoints, if the recipe enables them."""
DROPPED = ("num_train_epochs", "save_steps", "save_strategy", "eval_steps", "eval_delay", "eval_strategy")
"""Trainer arguments that set the duration of training and the evaluation and save schedule."""
COMPILE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
REAL_MACHINE = {
    **dict.fromkeys(("tf32", "activation_offloading"), "it needs a GPU"),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "its kernels need a GPU"),
    "deepspeed": "it needs GPUs",
    "ddp_backend": "a smoke run is one process",
    **dict.fromkeys(COMPILE, "compiling for this CPU takes minutes and tests nothing about a GPU"),
}
"""Trainer arguments that only work on the real machine, and why."""
SCHEDULE = ("tinit", "tfinal")
"""Arguments of AdaLoRA that are step counts."""


def smoke_recipe(recipe: Recipe) -> Recipe:
    """The recipe of a smoke run: everything that takes time is small, everything that affects the code path unchanged.

    Method, quantization, templates, optimizer and scheduler stay. Gates are dropped, because the metrics of a random
    stand-in do not predict those of the real model. `smoke_notices` lists what is dropped.
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
    """Check schedules that `smoke_recipe` drops against the steps of the real run.

    Raises:
        RecipeError: AdaLoRA's schedule does not fit the steps of its stage.
    """
    for stage in stage_recipes(recipe):
        check_ranks(stage.adapter, stage.trainer.get("max_steps"))


def smoke_notices(recipe: Recipe) -> tuple[str, ...]:
    """Messages on what a smoke run of a recipe drops."""
    dropped: list[tuple[tuple[str, ...], Any]] = [
        (("model", "dtype"), recipe.model.dtype not in ("auto", _dtype(recipe))),
        (("model", "attention"), _unless_auto(recipe.model.attention)),
        (("gates",), recipe.gates),
        (("budget", "wall_clock"), recipe.budget.wall_clock),
        (("report", "trackers"), recipe.report.trackers),
        *((("adapter", name), recipe.adapter.arguments.get(name)) for name in SCHEDULE),
    ]
    if recipe.quantization is not None:
        dropped.append((("quantization", "compute_dtype"), _unless_auto(recipe.quantization.compute_dtype)))
    left_out = [dotted(path) for path, value in dropped if value]
    notices = [*_only_on_the_real_machine(recipe)]
    if left_out:
        notices.append(f"smoke: ignored: {', '.join(left_out)}")
    if recipe.dataset.max_length > ROW_TOKENS:
        notices.append(
            f"smoke: rows are truncated at {ROW_TOKENS:,} tokens; dataset.max_length is {recipe.dataset.max_length:,}"
        )
    return tuple(notices)


def _unless_auto(value: str) -> str | None:
    return None if value == "auto" else value


def _only_on_the_real_machine(recipe: Recipe) -> dict[str, None]:
    """A message for each trainer argument that a smoke run cannot test, in order, without repeats."""
    found: dict[str, None] = {}
    for stage in stage_recipes(recipe):
        for name, why in REAL_MACHINE.items():
            if stage.trainer.get(name):
                found[f"smoke: trainer.{name} is ignored: {why}"] = None
        if (stage.trainer.get("activation_checkpointing_kwargs") or {}).get("offload"):
            found["smoke: trainer.activation_checkpointing_kwargs.offload is ignored: it needs a GPU"] = None
    return found


def _looks(given: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation and save schedule of a smoke run, kept if enabled because other arguments can need it."""
    looks: dict[str, Any] = {}
    if given.get("eval_strategy", "no") != "no":
        looks |= {"eval_strategy": "steps", "eval_steps": EVALUATED_EVERY}
    if save_strategy(given) == "best":
        looks["save_strategy"] = "best"
    elif given.get("load_best_model_at_end"):
        looks |= {"save_strategy": "steps", "save_steps": EVALUATED_EVERY}
    return looks


def _checkpointing(given: Mapping[str, Any]) -> dict[str, Any]:
    """Activation checkpointing arguments of the recipe, without those that need a GPU."""
    given_kwargs = given.get("activation_checkpointing_kwargs")
    kwargs = {name: value for name, value in (given_kwargs or {}).items() if name != "offload"}
    return {} if given_kwargs is None else {"activation_checkpointing_kwargs": kwargs or None}


def _without_schedule(adapter: AdapterSection) -> AdapterSection:
    arguments = {name: value for name, value in adapter.arguments.items() if name not in SCHEDULE}
    return adapter.model_copy(update={"arguments": arguments}) if len(arguments) < len(adapter.arguments) else adapter


def _dtype(recipe: Recipe) -> str:
    """The default dtype of a CPU, or that of weights trained in their own dtype."""
    return "bfloat16" if recipe.adapter.dtype == "bfloat16" else "auto"


def _quantization(asked: QuantizationSection | None) -> QuantizationSection | None:
    if asked is None or asked.bits == 8:
        return asked  # 8-bit quantization has no compute dtype
    return asked.model_copy(update={"compute_dtype": "auto"})


def stand_in_adapter(adapter: AdapterSection) -> AdapterSection:
    """The adapter with layers that exist in a stand-in, a budget that fits one of its modules, and new weights."""
    update: dict[str, Any] = {"init_from": None}
    for key in ("target_modules", "layers"):
        value = getattr(adapter, key)
        if isinstance(value, SelectSection):
            update[key] = value.model_copy(update={"budget": max(value.budget, BUDGET)})
        elif key == "layers" and value is not None:
            update[key] = tuple(sorted({number % LAYERS for number in value}))
        elif isinstance(value, tuple):
            update[key] = tuple(dict.fromkeys(map(_renumbered, value)))
    last = adapter.arguments.get("last_layers")
    if last is not None:
        update["arguments"] = {**adapter.arguments, "last_layers": min(last, LAYERS)}
    return adapter.model_copy(update=update)


def _renumbered(name: str) -> str:
    """A module name with a layer number that exists in a stand-in.

    >>> _renumbered("model.layers.31.mlp.up_proj"), _renumbered("up_proj")
    ('model.layers.1.mlp.up_proj', 'up_proj')
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", lambda number: str(int(number[0]) % LAYERS), name)


def _evaluation(recipe: Recipe) -> dict[str, int]:
    if not TASKS[recipe.model.task].generates:
        return {}  # no text is generated
    short = {"max_new_tokens": 8, "rows": 8}
    return short if recipe.evaluation.forgetting_text is None else short | {"forgetting_tokens": 1000}
