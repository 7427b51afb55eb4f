"""`make_plan`: resolves every `auto` of the recipe for the machine and the model, with its reason.

It also decides whether batches are padding-free.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from peftcli.errors import MachineError, RecipeError
from peftcli.methods.prompt import VIRTUAL_TOKENS
from peftcli.methods.registry import METHODS
from peftcli.plan.adalora import check_ranks
from peftcli.plan.adapter import resolve_adapter
from peftcli.plan.adapter_targets import AdapterTargets, find_targets, target_decisions
from peftcli.plan.choices import Choices, choose, choose_trained_dtype, count_batch
from peftcli.plan.evaluations import early_stop, evaluation_decisions
from peftcli.plan.heads import base_with_head, head_decisions, head_notices, with_head
from peftcli.plan.label_loss import class_weight_decisions
from peftcli.plan.machine import Machine, ModelFacts
from peftcli.plan.memory.estimate import INT8_BITS, NF4_BITS
from peftcli.plan.memory.forecast import rows_of
from peftcli.plan.memory.micro_batch import choose_micro_batch
from peftcli.plan.memory.training_setup import ActivationFit
from peftcli.plan.optimizations import choose_optimizations
from peftcli.plan.optimizer import Trained
from peftcli.plan.parallelism import Sharding, choose_sharding
from peftcli.plan.plan import BATCHING, DTYPE_BYTES, Base, Batch, Batching, Decision, LossMask, Plan, template_settings
from peftcli.plan.smoke import ROW_TOKENS
from peftcli.plan.targets import choice_decisions, choice_of, match_saved, within_choice
from peftcli.recipe.best_model import EARLY_STOPPING, best_model_arguments
from peftcli.recipe.schedulers import LEARNING_RATE
from peftcli.recipe.schema import AdapterSection, QuantizationSection, Recipe
from peftcli.recipe.trainer_together import default_logging_steps, save_strategy
from peftcli.tasks.registry import TASKS

ROUNDED = (
    "adapter.dtype bfloat16: updates smaller than about 1/256 of a weight are rounded away, so small learning rates "
    "learn less than the loss of the first steps suggests; float32 weights (adapter.dtype: float32) avoid this, and so "
    "does stochastic rounding (trainer.optim: adamw_torch_8bit with optim_args: bf16_stochastic_round=True, of torchao)"
)
"""bfloat16 has 8 bits of precision: half the distance to the next number is 1/512 to 1/256 of a weight.

Source: Gupta et al. 2015, arXiv:1502.02551, on what stochastic rounding keeps.
"""
LOSS_MASK_KEYS = ("completion_only_loss", "assistant_only_loss")

CPU_TOKENS = 768
"""Tokens of a padding-free batch on a CPU: 4096 take a fourteenth less time, but twice the memory in the loop."""
APART = {
    "packing": "packing builds its own batches",
    "padding_free": "TRL's padding_free builds its own batches",
    "neftune_noise_alpha": "the noise of NEFTune depends on the length of a padded row",
    "label_smoothing_factor": "label smoothing is computed on padded rows",
    "use_liger_kernel": "Liger replaces attention and loss",
}
"""Trainer arguments that require padded batches, and why."""


GPU_EVALUATION_ROWS = 64
"""A step of generation takes as long for one answer as for 64: it reads and unpacks all weights. Where memory does not
hold as many, fewer are taken."""
SHARDED_EVALUATION_ROWS = 16
"""Processes that each hold a part of the weights go in step, so none of them can take fewer rows on its own."""
CPU_EVALUATION_ROWS = 128

FitActivations: TypeAlias = Callable[[Plan], Mapping[str, ActivationFit] | None]
"""By the last part of the layer name, what an adapter saves there; None if that cannot be measured."""


def make_plan(
    recipe: Recipe,
    machine: Machine,
    facts: ModelFacts,
    count_trainable: Callable[[AdapterSection], Trained],
    *,
    smoke: bool = False,
    notices: tuple[str, ...] = (),
    merged_adapters: tuple[str, ...] = (),
    fit_activations: FitActivations | None = None,
) -> Plan:
    """Decide what will happen.

    Three things are known only later and then change the plan: the label names (`resolve_labels`), the lengths of the
    rows (`choose_micro_batch`) and the modules selected by gradient (`resolve_targets`).

    Args:
        recipe: the recipe.
        machine: the machine to run on.
        facts: the base model's structure.
        count_trainable: counts the trainable parameters of an adapter on that structure.
        smoke: the base is a tiny stand-in and the run a rehearsal.
        notices: from loading the recipe.
        merged_adapters: folders of the adapters of earlier stages, which are merged into the base.
        fit_activations: measures what an adapter saves for the backward pass; without it the forecast counts LoRA's.

    Raises:
        RecipeError: an adapter target matches no module.
        MachineError: this machine does not support the recipe.
    """
    _refuse_quantized_twice(recipe, facts)
    choices = choose(recipe, machine, facts)
    widest, choice = choice_of(recipe.adapter, facts)
    resolved, sizes = resolve_adapter(widest, facts)
    found = _find_targets(recipe, resolved, facts, selects=choice is not None)
    labels = loss_mask(recipe, facts.positions, smoke=smoke)
    sharding = choose_sharding(recipe, machine, facts, choices)
    _check_room(recipe, facts, machine, choices, sharding)
    batch = count_batch(recipe.trainer, machine.processes, shared=machine.shares_batch)
    batching, how = choose_batching(recipe, choices, batch, labels, facts.not_flat)
    optimizations, switched = choose_optimizations(recipe, choices, facts, machine, sharding)
    adapter = with_head(resolved, facts, recipe.model.task)
    trained = within_choice(count_trainable(adapter), choice)
    trainable = trained.parameters
    total = facts.parameters + trainable
    plan = Plan(
        name=recipe.name,
        task=recipe.model.task,
        smoke=smoke,
        seed=recipe.seed,
        base=base_with_head(_base(recipe, facts, choices, merged_adapters), recipe, facts),
        architecture=facts.architecture,
        adapter=adapter,
        adapter_dtype=choose_trained_dtype(recipe, choices).value,
        dataset=recipe.dataset,
        labels=labels,
        batch=batch,
        batching=batching,
        trainer=_trainer_arguments(recipe, labels, choices, machine.processes)
        | _ddp_arguments(recipe, machine.processes, facts)
        | (batch.arguments() if machine.shares_batch else {}),
        evaluation=recipe.evaluation,
        evaluation_batch=_evaluation_batch(recipe, choices.on_gpu, sharding.shards),
        gates=recipe.gates,
        budget=recipe.budget,
        targets=found.counts,
        trained=trained,
        choice=choice,
        optimizations=optimizations,
        total_parameters=total,
        decisions=(
            *_decisions(recipe, choices, batch, found, trainable, total),
            *sizes,
            *target_decisions(recipe, resolved, found, facts, choices.dtype.value),
            *choice_decisions(choice),
            *_recipe_decisions(recipe, facts),
            how,
            *switched,
            *((sharding.decision,) if sharding.decision else ()),
        ),
        notices=(*notices, *facts.notes, *_notices(recipe, machine, choices.on_gpu), *sharding.notices),
        shards=sharding.shards,
        possible_shards=sharding.possible,
        own_tokenizer=facts.own_tokenizer,
        early_stop=early_stop(recipe),
        class_weights=recipe.model.class_weights,
    )
    if fit_activations is not None:
        plan = _with_activations(plan, fit_activations(plan))
    return choose_micro_batch(plan, facts.shape, machine, recipe, rows_of(plan, None))


def _find_targets(recipe: Recipe, adapter: AdapterSection, facts: ModelFacts, *, selects: bool) -> AdapterTargets:
    """The modules that an adapter trains.

    Args:
        selects: modules are selected by gradient, which only looks at linear layers.
    """
    check_ranks(adapter, recipe.trainer.get("max_steps"))
    found = find_targets(adapter, facts)
    match_saved(recipe.adapter.modules_to_save or (), facts)
    return replace(found, experts=()) if selects else found


def _recipe_decisions(recipe: Recipe, facts: ModelFacts) -> tuple[Decision, ...]:
    """The decisions about the head, the loss and evaluation, which only depend on the recipe and the model."""
    return (
        *head_decisions(recipe, facts),
        *class_weight_decisions(recipe.model.class_weights),
        *evaluation_decisions(recipe),
    )


def _with_activations(plan: Plan, fitted: Mapping[str, ActivationFit] | None) -> Plan:
    if fitted is not None:
        return replace(plan, activation_fit=fitted)
    unknown = f"activation memory of {plan.adapter.method} cannot be estimated; the forecast assumes LoRA"
    return replace(plan, notices=(*plan.notices, unknown))


def _base(recipe: Recipe, facts: ModelFacts, choices: Choices, merged_adapters: tuple[str, ...]) -> Base:
    return Base(
        name=recipe.model.name,
        path=facts.path,
        revision=recipe.model.revision,
        dtype=choices.dtype.value,
        attention=choices.attention.value,
        device=choices.device.value,
        quantization=_quantization(recipe.quantization, choices),
        chat_template=recipe.model.chat_template,
        trust_remote_code=recipe.model.trust_remote_code,
        eos_token=recipe.model.eos_token,
        absorbed=merged_adapters,
        add_tokens=recipe.model.add_tokens,
        # The template of a stand-in has other variables.
        template=template_settings(recipe) if facts.own_tokenizer else None,
    )


def _quantization(asked: QuantizationSection | None, choices: Choices) -> dict[str, Any] | None:
    if asked is None or choices.products is None:
        return None
    if asked.bits == 8:
        return {"bits": 8}  # the other keys are for 4 bits
    return {
        "bits": asked.bits,
        "type": asked.type,
        "double_quant": asked.double_quant,
        "compute_dtype": choices.products.value,
    }


def _decisions(
    recipe: Recipe,
    choices: Choices,
    batch: Batch,
    found: AdapterTargets,
    trainable: int,
    total: int,
) -> tuple[Decision, ...]:
    machine = (choices.device, choices.dtype, choices.products, choices.attention)
    processes = f"{batch.processes} process" + ("es" if batch.processes > 1 else "")
    return (
        *(decision for decision in machine if decision is not None),
        choose_trained_dtype(recipe, choices),
        choices.checkpointing,
        Decision(
            "batch",
            str(batch.effective),
            f"rows per step: {batch.per_device} per device x {batch.accumulation} accumulated x {processes}",
        ),
        Decision(
            "adapter",
            _adapter_summary(recipe.adapter, found),
            ", ".join(f"{name} x {count}" for name, count in found.counts.items())
            or METHODS[recipe.adapter.method].what,
        ),
        Decision("trainable", f"{trainable:,} parameters", _share(recipe.adapter, trainable, total)),
    )


def _share(adapter: AdapterSection, trainable: int, total: int) -> str:
    base = total - trainable
    if METHODS[adapter.method].targets == "whole":
        return f"{trainable / base:.2%} of the {base:,} base parameters, as a trained copy"
    return f"{trainable / total:.2%} of {total:,}"


def _adapter_summary(adapter: AdapterSection, found: AdapterTargets) -> str:
    rank = "" if adapter.r is None else f" r {adapter.r}"
    if METHODS[adapter.method].prompts:
        return f"{adapter.method}, {adapter.arguments.get('num_virtual_tokens', VIRTUAL_TOKENS)} virtual tokens"
    modules = sum(found.counts.values()) - found.parameters
    beside = f" and {found.parameters} parameters" if found.parameters else ""
    return f"{adapter.method}{rank} on {modules} modules{beside}"


def check_recipe(recipe: Recipe, facts: ModelFacts, count_trainable: Callable[[AdapterSection], Trained]) -> None:
    """Check a recipe against a model that will not be loaded, such as the real model of a smoke run.

    Args:
        facts: the structure of the real model.
        count_trainable: counts the trainable parameters of an adapter on that structure.

    Raises:
        RecipeError: the model lacks a module or layer of the recipe, does not support rows of that length, or does not
            support the adapter.
    """
    _refuse_quantized_twice(recipe, facts)
    widest, choice = choice_of(recipe.adapter, facts)
    resolved, _ = resolve_adapter(widest, facts)
    find_targets(resolved, facts)
    match_saved(recipe.adapter.modules_to_save or (), facts)
    within_choice(count_trainable(with_head(resolved, facts, recipe.model.task)), choice)
    loss_mask(recipe, facts.positions)


def _refuse_quantized_twice(recipe: Recipe, facts: ModelFacts) -> None:
    if facts.stored and recipe.quantization is not None:
        raise RecipeError(
            f"quantization: the files of {recipe.model.name} are {facts.stored}, and transformers cannot dequantize "
            f"them and quantize them to {recipe.quantization.bits} bits in one load; remove `quantization` (the "
            f"weights then take {facts.parameters * 2 / 2**30:.1f} GiB in 16 bits), or use a repository with the full "
            "weights"
        )


def loss_mask(recipe: Recipe, positions: int | None, *, smoke: bool = False) -> LossMask:
    """Which tokens of a recipe's rows are trained.

    Args:
        positions: maximum sequence length of the model; None if unknown.
        smoke: truncate rows at `ROW_TOKENS`, after checking the recipe's own limit.

    Raises:
        RecipeError: the recipe sets a longer maximum.
    """
    return LossMask(
        completion_only=recipe.trainer.get("completion_only_loss") is not False,
        assistant_only=recipe.trainer.get("assistant_only_loss") is not False,
        asked=tuple(name for name in LOSS_MASK_KEYS if recipe.trainer.get(name)),
        max_length=min(_max_length(recipe, positions), ROW_TOKENS) if smoke else _max_length(recipe, positions),
        task=recipe.model.task,
        problem_type=recipe.model.problem_type,
    )


def _max_length(recipe: Recipe, positions: int | None) -> int:
    requested = recipe.dataset.max_length
    if positions is None or requested <= positions:
        return requested
    if "max_length" not in recipe.dataset.model_fields_set:
        return positions
    raise RecipeError(
        f"dataset.max_length = {requested}, but {recipe.model.name} supports at most {positions} tokens; lower it"
    )


def _check_room(recipe: Recipe, facts: ModelFacts, machine: Machine, choices: Choices, sharding: Sharding) -> None:
    if machine.device != choices.device.value:
        return  # a CPU run on a machine whose memory_bytes is that of its GPU
    # Only the certain part: the weights, as if all of them were quantized.
    bits = _least_bits(recipe.quantization, choices.dtype.value)
    whole = facts.parameters * bits / 8
    needed = whole / sharding.shards if choices.on_gpu else whole
    if needed > machine.memory_bytes:
        where = machine.label if choices.on_gpu else "this machine's memory"
        shardable = choices.on_gpu and whole / sharding.possible <= machine.memory_bytes
        fix = f"add {sharding.fix(machine.processes)}" if shardable else _smaller_weights(recipe)
        raise MachineError(
            f"the weights of {recipe.model.name} need {needed / 2**30:.1f} GiB, more than the "
            f"{machine.memory_bytes / 2**30:.1f} GiB of {where}; {fix}, or rehearse with --smoke"
        )


def _least_bits(quantization: QuantizationSection | None, dtype: str) -> float:
    if quantization is None:
        return 8 * DTYPE_BYTES[dtype]
    return INT8_BITS if quantization.bits == 8 else NF4_BITS[True]


def _smaller_weights(recipe: Recipe) -> str:
    """How to shrink weights that do not fit: fewer bits, if the method supports them."""
    bits, now = METHODS[recipe.adapter.method].fewest_bits, recipe.quantization
    if bits >= (16 if now is None else now.bits):
        return "use a larger GPU"
    return f"add `quantization: {{bits: {bits}}}`" if now is None else f"set quantization.bits: {bits}"


def _evaluation_batch(recipe: Recipe, on_gpu: bool, shards: int) -> int:
    asked = recipe.evaluation.batch_size
    if isinstance(asked, int):
        return asked
    if shards > 1:
        return SHARDED_EVALUATION_ROWS
    return GPU_EVALUATION_ROWS if on_gpu else CPU_EVALUATION_ROWS


def _trainer_arguments(recipe: Recipe, labels: LossMask, choices: Choices, processes: int) -> dict[str, Any]:
    # The labels are made before the trainer sees the rows, so it must not look for columns to make them from.
    apart = (*LOSS_MASK_KEYS, *EARLY_STOPPING)  # early stopping is a callback
    given = {name: value for name, value in recipe.trainer.items() if name not in apart}
    asked = recipe.evaluation.batch_size
    # With one process, transformers would take it for an existing process group.
    given = {name: value for name, value in given.items() if name != "ddp_backend" or processes > 1}
    # torch requires two floats or two tensors.
    given |= {name: float(given[name]) for name in ("adam_beta1", "adam_beta2") if name in given}
    packs = given.get("packing") or given.get("eval_packing")
    defaults: dict[str, Any] = {
        "logging_steps": default_logging_steps(given),
        "logging_first_step": True,
        "save_strategy": save_strategy(given),
        "save_total_limit": 2,
        # The rows are already truncated; packing still needs the length of a packed row.
        **({"max_length": labels.max_length if packs else None} if TASKS[labels.task].generates else {}),
        "learning_rate": LEARNING_RATE,
        # By default, evaluation during training uses the training batch size, which is known to fit.
        "per_device_eval_batch_size": asked if isinstance(asked, int) else count_batch(given, 1).per_device,
    }
    decided = {
        "activation_checkpointing": choices.checkpointing.value == "on",
        "bf16": choices.dtype.value == "bfloat16",
        "fp16": choices.dtype.value == "float16" and choices.on_gpu,
        "use_cpu": not choices.on_gpu,
        "seed": recipe.seed,
        "report_to": list(recipe.report.trackers),
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "run_name": recipe.name,
        **best_model_arguments(recipe.trainer),
    }
    return {**defaults, **given, **decided}


def _ddp_arguments(recipe: Recipe, processes: int, facts: ModelFacts) -> dict[str, Any]:
    """Disable DDP's search for unused parameters, unless some parameters may get no gradient.

    transformers enables the search for every PEFT model. Each LoRA matrix of a language model has a gradient in every
    pass, except those of experts that no token was routed to.
    """
    dense = facts.shape is not None and facts.shape.experts is None
    experts = any(".experts." in name for name in facts.modules)
    if processes == 1 or not METHODS[recipe.adapter.method].is_lora or facts.head or not dense or experts:
        return {}
    return {"ddp_find_unused_parameters": recipe.trainer.get("ddp_find_unused_parameters", False)}


def _notices(recipe: Recipe, machine: Machine, on_gpu: bool) -> tuple[str, ...]:
    notices = []
    if not recipe.dataset.holds_out:
        notices.append("dataset.split.test_size is 0: all rows are trained on, so no held-out rows are evaluated")
    if recipe.trainer.get("eval_strategy", "no") != "no" and not recipe.dataset.validates:
        notices.append(
            "the test rows are evaluated during training, because this run began without validation rows, so its "
            "metrics on them may be too good; a new run needs dataset.split.validation_size"
        )
    if on_gpu and machine.count > 1 and machine.processes == 1:
        notices.append(
            f"{machine.count} GPUs are available, but one is used; without --num-processes the batch is split across "
            "all of them, if it is divisible"
        )
    if recipe.adapter.dtype == "bfloat16":
        notices.append(ROUNDED)
    if recipe.adapter.dropout and recipe.quantization is None and not on_gpu:
        notices.append(f"adapter.dropout {recipe.adapter.dropout} takes extra time and memory on a CPU")
    return (*notices, *head_notices(recipe))


def choose_batching(
    recipe: Recipe, choices: Choices, batch: Batch, labels: LossMask, not_flat: str = ""
) -> tuple[Batching, Decision]:
    """Choose how the rows of a step are batched.

    Args:
        not_flat: why the model does not support padding-free batches; empty if it does.

    Raises:
        RecipeError: padding-free batching is requested together with something that excludes it.
    """
    requested = recipe.performance.batching
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
    if not TASKS[recipe.model.task].generates:
        why = "classification uses padded batches"
    if why is None and choices.attention.value == "eager":
        why = "eager attention does not support row boundaries; sdpa and FlashAttention do"
    why = why or not_flat or None
    if requested == "padding_free" and why is not None:
        fix = "set padded or auto" if why == not_flat else "remove one of the two"
        raise RecipeError(f"performance.batching: padding_free is not supported here: {why}; {fix}")
    if requested == "padded" or why is not None:
        value = f"padded, up to {tokens:,} tokens at once" if firm else "padded"
        return Batching("padded", tokens, firm), Decision(BATCHING, value, why or "performance.batching")
    reason = "rows are concatenated without padding and attend only to themselves; same loss as padded"
    return Batching("padding_free", tokens, firm), Decision(
        BATCHING, f"padding_free, up to {tokens:,} tokens at once", reason
    )
