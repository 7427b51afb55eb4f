"""`make_plan`: every `auto` of the recipe decided from the machine and the model, with its reason.

Also which optimizations a plan uses (none of them changes the loss), and whether batches are padding-free.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias, get_args

from peftcli.errors import MachineError, RecipeError
from peftcli.methods.prompt import VIRTUAL_TOKENS
from peftcli.methods.registry import METHODS
from peftcli.plan.adalora import check_ranks
from peftcli.plan.adapter import resolve_adapter
from peftcli.plan.choices import Choices, choose, choose_trained_dtype, count_batch
from peftcli.plan.heads import base_with_head, head_decisions, head_notices, with_head
from peftcli.plan.machine import Machine, ModelFacts
from peftcli.plan.memory.estimate import INT8_BITS, NF4_BITS
from peftcli.plan.memory.forecast import rows_of
from peftcli.plan.memory.micro_batch import choose_micro_batch
from peftcli.plan.memory.model_shape import Norm
from peftcli.plan.memory.training_setup import ActivationFit
from peftcli.plan.optimizer import Trained
from peftcli.plan.parallelism import Sharding, choose_sharding
from peftcli.plan.plan import BATCHING, DTYPE_BYTES, RANDOM_STATE, Base, Batch, Batching, Decision, LossMask, Plan
from peftcli.plan.smoke import ROW_TOKENS
from peftcli.plan.targets import choice_decisions, choice_of, match_saved, match_targets, named_targets, within_choice
from peftcli.recipe.schedulers import LEARNING_RATE
from peftcli.recipe.schema import AdapterSection, Optimization, QuantizationSection, Recipe
from peftcli.recipe.trainer_together import default_logging_steps, save_strategy
from peftcli.tasks.registry import TASKS

ROUNDED = (
    "adapter.dtype bfloat16: an update of less than about 1/256 of its weight is rounded away, so small learning rates "
    "learn less than the loss of the first steps suggests; float32 weights (adapter.dtype: float32) keep them, and so "
    "does stochastic rounding (trainer.optim: adamw_torch_8bit with optim_args: bf16_stochastic_round=True, of torchao)"
)
"""bfloat16 has 8 bits of precision: halfway to the next number is 1/512 to 1/256 of a weight.

Source: Gupta et al. 2015, arXiv:1502.02551, on what stochastic rounding keeps.
"""
LOSS_MASK_KEYS = ("completion_only_loss", "assistant_only_loss")

SWITCH = "performance.disable"
"""The key that switches one off."""
OPTIMIZATIONS = frozenset(get_args(Optimization))
COMPILED = "compiled code fuses what it can"

TRITON_CAPABILITY = (8, 0)
"""Compute capability from which Triton supports NVIDIA's GPUs, by its README."""
CPU_TOKENS = 768
"""Of a line on a CPU, for the memory: 4096 take a fourteenth less time and twice the memory of the loop."""
APART = {
    "packing": "packing makes lines of its own",
    "padding_free": "padding_free makes lines of its own",
    "neftune_noise_alpha": "the noise of neftune depends on the length of a padded row",
    "label_smoothing_factor": "label smoothing is computed on padded rows",
    "use_liger_kernel": "liger's kernels bring an attention and a loss of their own",
}
"""Trainer arguments with which rows stay padded, and why."""


FitActivations: TypeAlias = Callable[[Plan], Mapping[str, ActivationFit] | None]
"""By the last name of a layer, what an adapter saves there; None where that cannot be measured."""


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

    Three facts are known later and change the plan then: the names of the classes (`resolve_labels`), the lengths of
    the rows (`choose_micro_batch`) and the modules that the gradient selects (`resolve_targets`).

    Args:
        recipe: what was asked.
        machine: what is there.
        facts: the base model's structure.
        count_trainable: the trainable parameters of an adapter on that structure.
        smoke: the base is a stand-in and the run a rehearsal.
        notices: of the loading of the recipe.
        merged_adapters: folders of the adapters of earlier stages, which are merged into the base.
        fit_activations: measures what an adapter saves for the backward pass; without it the forecast counts LoRA's.

    Raises:
        RecipeError: an adapter target matches nothing.
        MachineError: this machine cannot do it.
    """
    choices = choose(recipe, machine, facts)
    widest, choice = choice_of(recipe.adapter, facts)
    settled, sizes = resolve_adapter(widest, facts)
    check_ranks(settled, recipe.trainer.get("max_steps"))
    targets = match_targets(named_targets(settled), facts)
    match_saved(recipe.adapter.modules_to_save or (), facts)
    labels = loss_mask(recipe, facts.positions, smoke=smoke)
    sharding = choose_sharding(recipe, machine, facts, choices)
    _check_room(recipe, facts, machine, choices, sharding)
    batch = count_batch(recipe.trainer, machine.processes, shared=machine.shares_batch)
    batching, how = choose_batching(recipe, choices, batch, labels, facts.not_flat)
    optimizations, switched = choose_optimizations(recipe, choices, facts, machine, sharding)
    adapter = with_head(settled, facts, recipe.model.task)
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
        evaluation_batch=_evaluation_batch(recipe, choices.on_gpu),
        gates=recipe.gates,
        budget=recipe.budget,
        targets=targets,
        trained=trained,
        choice=choice,
        optimizations=optimizations,
        total_parameters=total,
        decisions=(
            *_decisions(recipe, choices, batch, targets, trainable, total),
            *sizes,
            *choice_decisions(choice),
            *head_decisions(recipe, facts),
            how,
            *switched,
            *((sharding.decision,) if sharding.decision else ()),
        ),
        notices=(
            *notices,
            *facts.notes,
            *_notices(recipe, machine, choices.on_gpu),
            *head_notices(recipe),
            *sharding.notices,
        ),
        shards=sharding.shards,
        possible_shards=sharding.possible,
        own_tokenizer=facts.own_tokenizer,
    )
    if fit_activations is not None:
        plan = _with_activations(plan, fit_activations(plan))
    return choose_micro_batch(plan, facts.shape, machine, recipe, rows_of(plan, None))


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
    )


def _quantization(asked: QuantizationSection | None, choices: Choices) -> dict[str, Any] | None:
    if asked is None or choices.products is None:
        return None
    if asked.bits == 8:
        return {"bits": 8}  # the other keys belong to 4
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
    targets: dict[str, int],
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
            f"rows a step: {batch.per_device} a device x {batch.accumulation} accumulated x {processes}",
        ),
        Decision(
            "adapter",
            _adapter_said(recipe.adapter, sum(targets.values())),
            ", ".join(f"{name} x {count}" for name, count in targets.items()) or METHODS[recipe.adapter.method].what,
        ),
        Decision("trainable", f"{trainable:,} parameters", _share(recipe.adapter, trainable, total)),
    )


def _share(adapter: AdapterSection, trainable: int, total: int) -> str:
    base = total - trainable
    if METHODS[adapter.method].targets == "whole":
        return f"{trainable / base:.2%} of the {base:,} of the base, in a copy beside it"
    return f"{trainable / total:.2%} of {total:,}"


def _adapter_said(adapter: AdapterSection, modules: int) -> str:
    rank = "" if adapter.r is None else f" r {adapter.r}"
    if METHODS[adapter.method].prompts:
        return f"{adapter.method}, {adapter.arguments.get('num_virtual_tokens', VIRTUAL_TOKENS)} virtual tokens"
    return f"{adapter.method}{rank} on {modules} modules"


def check_recipe(recipe: Recipe, facts: ModelFacts, count_trainable: Callable[[AdapterSection], Trained]) -> None:
    """Check what a recipe asks of a model that will not be loaded, as that of a smoke run.

    Args:
        facts: the structure of the real model.
        count_trainable: the trainable parameters of an adapter on that structure.

    Raises:
        RecipeError: the model lacks a module or a layer that the recipe names, cannot read rows of that length, or
            cannot have that adapter.
    """
    widest, choice = choice_of(recipe.adapter, facts)
    settled, _ = resolve_adapter(widest, facts)
    match_targets(named_targets(settled), facts)
    match_saved(recipe.adapter.modules_to_save or (), facts)
    within_choice(count_trainable(with_head(settled, facts, recipe.model.task)), choice)
    loss_mask(recipe, facts.positions)


def loss_mask(recipe: Recipe, positions: int | None, *, smoke: bool = False) -> LossMask:
    """Which tokens of a recipe's rows are trained.

    Args:
        positions: longest row that the model was made for, None where it does not say.
        smoke: cut rows at `ROW_TOKENS`, after the recipe's own limit was checked.

    Raises:
        RecipeError: the recipe asks for longer rows than that.
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
    asked = recipe.dataset.max_length
    if positions is None or asked <= positions:
        return asked
    if "max_length" not in recipe.dataset.model_fields_set:
        return positions
    raise RecipeError(
        f"dataset.max_length = {asked}, but {recipe.model.name} was made for at most {positions} tokens; lower it"
    )


def _check_room(recipe: Recipe, facts: ModelFacts, machine: Machine, choices: Choices, sharding: Sharding) -> None:
    if machine.device != choices.device.value:
        return  # a CPU was asked for on a machine whose memory is stated for its card
    # Only what is certain: the weights alone, as if all of them were quantized.
    bits = _least_bits(recipe.quantization, choices.dtype.value)
    whole = facts.parameters * bits / 8
    needed = whole / sharding.shards if choices.on_gpu else whole
    if needed > machine.memory_bytes:
        where = machine.label if choices.on_gpu else "this machine's memory"
        divided = choices.on_gpu and whole / sharding.possible <= machine.memory_bytes
        mend = f"add {sharding.fix(machine.processes)}" if divided else _smaller_weights(recipe)
        raise MachineError(
            f"the weights of {recipe.model.name} alone take {needed / 2**30:.1f} GiB, more than the "
            f"{machine.memory_bytes / 2**30:.1f} GiB of {where}; {mend}, or rehearse with --smoke"
        )


def _least_bits(quantization: QuantizationSection | None, dtype: str) -> float:
    if quantization is None:
        return 8 * DTYPE_BYTES[dtype]
    return INT8_BITS if quantization.bits == 8 else NF4_BITS[True]


def _smaller_weights(recipe: Recipe) -> str:
    """What to do about weights that do not fit: fewer bits, where the method works on them."""
    bits, now = METHODS[recipe.adapter.method].fewest_bits, recipe.quantization
    if bits >= (16 if now is None else now.bits):
        return "use a larger GPU"
    return f"add `quantization: {{bits: {bits}}}`" if now is None else f"set quantization.bits: {bits}"


def _evaluation_batch(recipe: Recipe, on_gpu: bool) -> int:
    asked = recipe.evaluation.batch_size
    return asked if isinstance(asked, int) else (16 if on_gpu else 128)


def _trainer_arguments(recipe: Recipe, labels: LossMask, choices: Choices, processes: int) -> dict[str, Any]:
    # The labels are made before the trainer sees the rows, so it must not look for columns to make them from.
    given = {name: value for name, value in recipe.trainer.items() if name not in LOSS_MASK_KEYS}
    asked = recipe.evaluation.batch_size
    # transformers would take it for a process group that is there already.
    given = {name: value for name, value in given.items() if name != "ddp_backend" or processes > 1}
    # torch takes two floats or two tensors.
    given |= {name: float(given[name]) for name in ("adam_beta1", "adam_beta2") if name in given}
    packs = given.get("packing") or given.get("eval_packing")
    defaults: dict[str, Any] = {
        "logging_steps": default_logging_steps(given),
        "logging_first_step": True,
        "save_strategy": save_strategy(given),
        "save_total_limit": 2,
        # The rows are cut already; packing still needs to know the length of a packed row.
        **({"max_length": labels.max_length if packs else None} if TASKS[labels.task].generates else {}),
        "learning_rate": LEARNING_RATE,
        # Nothing else is measured on the way, and without a name transformers refuses save_strategy: best.
        **({"metric_for_best_model": "loss"} if save_strategy(given) == "best" else {}),
        # The evaluation on the way has as many rows at once as training, which is known to fit, unless told otherwise.
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
    }
    return {**defaults, **given, **decided}


def _ddp_arguments(recipe: Recipe, processes: int, facts: ModelFacts) -> dict[str, Any]:
    """Let DDP wait for no gradient that does not come, without looking for those in every backward pass.

    transformers has it look wherever a model is wrapped by PEFT. Each matrix of LoRA in a language model has a gradient
    in every pass, other than those of experts that no token was sent to.
    """
    dense = facts.shape is not None and facts.shape.experts is None
    experts = any(".experts." in name for name in facts.modules)
    if processes == 1 or recipe.adapter.method != "lora" or facts.head or not dense or experts:
        return {}
    return {"ddp_find_unused_parameters": recipe.trainer.get("ddp_find_unused_parameters", False)}


def _notices(recipe: Recipe, machine: Machine, on_gpu: bool) -> tuple[str, ...]:
    notices = []
    if not recipe.dataset.holds_out:
        notices.append("dataset.split.test_size is 0: all rows are trained on, so nothing is measured on held-out rows")
    if on_gpu and machine.count > 1 and machine.processes == 1:
        notices.append(
            f"{machine.count} GPUs are here and one is used; without --num-processes all of them share the rows of a "
            "step, where their number divides it"
        )
    if recipe.adapter.dtype == "bfloat16":
        notices.append(ROUNDED)
    if recipe.adapter.dropout and recipe.quantization is None and not on_gpu:
        notices.append(f"adapter.dropout {recipe.adapter.dropout} costs time and memory on a CPU")
    return tuple(notices)


def choose_optimizations(
    recipe: Recipe, choices: Choices, facts: ModelFacts, machine: Machine, sharding: Sharding
) -> tuple[frozenset[str], tuple[Decision, ...]]:
    """The optimizations that a plan uses, and what is said of those that have a meaning in it."""
    reasons = {
        "fused_loss": _head_stays(recipe, choices, facts),
        "fused_lora": _sum_stays(recipe),
        "fused_norms": _why_python_norms(recipe, choices, facts, machine),
        "liger_layers": _why_python_layers(recipe, choices, machine, sharding),
        "skip_rng_state": _why_random_states(recipe, choices),
        "deferred_metrics": "" if TASKS[recipe.model.task].generates else "of a head none is fetched",
    }
    left = {name: why for name, why in reasons.items() if why} | dict.fromkeys(recipe.performance.disable, SWITCH)
    decisions = []
    if TASKS[recipe.model.task].generates and not choices.on_gpu:
        does = "a CPU has no kernels for TRL's, which scores prompts too and makes each product twice; same loss"
        decisions.append(_said("output layer", "trained tokens alone, each product once", does, left.get("fused_loss")))
    if METHODS[recipe.adapter.method].is_lora:
        does = "PEFT passes through memory three times for it; same sum"
        decisions.append(_said("LoRA", "added in one pass", does, left.get("fused_lora")))
    if choices.on_gpu and _rms_norms(facts):
        does = "one kernel in place of about ten, and half the saved bytes in 16 bit; one rounding less"
        decisions.append(_said("norms", "torch's fused kernel", does, left.get("fused_norms")))
    if choices.on_gpu and TASKS[recipe.model.task].generates:
        does = "rotary embeddings, gated activations, and norms where torch has no kernel; checked before training"
        decisions.append(_said("layer kernels", "Liger's", does, left.get("liger_layers")))
    if choices.checkpointing.value == "on":
        does = "checkpointed layers draw no random numbers, so the second pass gives the same bits without it"
        decisions.append(_said(RANDOM_STATE, "not saved for each layer", does, left.get("skip_rng_state")))
    return OPTIMIZATIONS - left.keys(), tuple(decisions)


def compiles(recipe: Recipe) -> bool:
    """Whether the trainer compiles the model: a backend or a mode alone switches torch.compile on too.

    Source: `TrainingArguments.__post_init__` of transformers.
    """
    return any(recipe.trainer.get(name) for name in ("torch_compile", "torch_compile_backend", "torch_compile_mode"))


def _head_stays(recipe: Recipe, choices: Choices, facts: ModelFacts) -> str:
    """Why the output layer is left to TRL, empty where it is not; what only the weights tell is seen later."""
    name = (facts.output_layer or "").rpartition(".")[2]
    saved = {module.rpartition(".")[2] for module in recipe.adapter.modules_to_save or ()}
    if not TASKS[recipe.model.task].generates or choices.on_gpu:
        return "TRL's kernels on a card score trained tokens alone, and make the second product worth while"
    if METHODS[recipe.adapter.method].targets == "whole" or name in saved:
        return "it is trained"
    if recipe.trainer.get("label_smoothing_factor"):
        return "label smoothing wants all logits"
    return COMPILED if compiles(recipe) else ""


def _sum_stays(recipe: Recipe) -> str:
    """Why LoRA's sum is left to PEFT, empty where it is not."""
    if not METHODS[recipe.adapter.method].is_lora:
        return "there is no LoRA"
    if recipe.adapter.use_dora:
        return "DoRA scales the sum"
    if recipe.adapter.arguments.get("lora_bias"):
        return "lora_bias adds to it"
    if recipe.quantization is not None and recipe.quantization.bits == 8:
        return "PEFT has a layer of its own for 8 bits"
    return COMPILED if compiles(recipe) else ""


def _rms_norms(facts: ModelFacts) -> tuple[Norm, ...]:
    """The norms of a model that compute in float32, as RMS norms do."""
    return () if facts.shape is None else tuple(norm for norm in facts.shape.norms if norm.in_float32)


def _why_python_norms(recipe: Recipe, choices: Choices, facts: ModelFacts, machine: Machine) -> str:
    """Why RMSNorm is left to the model's own Python, empty where it is not."""
    if not any(norm.fusible for norm in _rms_norms(facts)):
        return f"the norm of {facts.architecture} computes another formula than torch's"
    if not choices.on_gpu:
        return "a CPU has no fused kernel for it, and torch's operators take as long as the model's own"
    if not machine.fused_norms:
        return "the installed torch has no kernel for it; torch 2.9 and later have one"
    if METHODS[recipe.adapter.method].trains_norms:
        return f"{recipe.adapter.method} trains the norms, whose weights may be wider than their inputs"
    if recipe.trainer.get("use_liger_kernel"):
        return "trainer.use_liger_kernel brings its own"
    return COMPILED if compiles(recipe) else ""


def _why_python_layers(recipe: Recipe, choices: Choices, machine: Machine, sharding: Sharding) -> str:
    """Why rotary embeddings and activations are left to the model's own Python, empty where they are not."""
    if not choices.on_gpu or not TASKS[recipe.model.task].generates:
        return "Liger's kernels are for language models on a GPU"
    if recipe.trainer.get("use_liger_kernel"):
        return "trainer.use_liger_kernel brings them already"
    if compiles(recipe):
        return COMPILED
    if machine.capability is not None and machine.capability < TRITON_CAPABILITY:
        return "Triton, which compiles Liger's kernels, supports GPUs of sm_80 and later"
    if not METHODS[recipe.adapter.method].is_lora or sharding.shards > 1:
        return "they were tried with LoRA on whole weights alone"
    return "" if machine.liger else "liger-kernel is not installed"


def _why_random_states(recipe: Recipe, choices: Choices) -> str:
    """Why random states are saved for checkpointed layers, empty where they are not."""
    if choices.checkpointing.value != "on":
        return "no layer is checkpointed"
    if recipe.adapter.dropout:
        return f"adapter.dropout {recipe.adapter.dropout} draws random numbers in each layer"
    return COMPILED if compiles(recipe) else ""


def _said(key: str, value: str, does: str, why_not: str | None) -> Decision:
    return Decision(key, "as the libraries make it", why_not) if why_not else Decision(key, value, does)


def choose_batching(
    recipe: Recipe, choices: Choices, batch: Batch, labels: LossMask, not_flat: str = ""
) -> tuple[Batching, Decision]:
    """Choose how the rows of a step are run.

    Args:
        not_flat: why the model would not keep the rows of a line apart, empty where it does.

    Raises:
        RecipeError: padding-free batching is asked for together with something that excludes it.
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
    if not TASKS[recipe.model.task].generates:
        why = "a head reads whole rows, which a line would not keep apart"
    if why is None and choices.attention.value == "eager":
        why = "eager attention takes no boundaries of rows, as sdpa and FlashAttention do"
    why = why or not_flat or None
    if asked == "padding_free" and why is not None:
        fix = "set padded or auto" if why == not_flat else "remove one of the two"
        raise RecipeError(f"performance.batching: padding_free cannot be had: {why}; {fix}")
    if asked == "padded" or why is not None:
        value = f"padded, up to {tokens:,} tokens at once" if firm else "padded"
        return Batching("padded", tokens, firm), Decision(BATCHING, value, why or "performance.batching")
    reason = "the rows of a step stand in lines without padding, each seeing itself alone; same rows, same loss"
    return Batching("padding_free", tokens, firm), Decision(
        BATCHING, f"padding_free, up to {tokens:,} tokens at once", reason
    )
