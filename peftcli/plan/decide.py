"""`make_plan`: every `auto` of the recipe decided from the machine and the model, with its reason."""

from collections.abc import Callable, Mapping
from typing import Any

from peftcli.errors import MachineError, RecipeError
from peftcli.plan.facts import Machine, ModelFacts
from peftcli.plan.plan import DTYPE_BYTES, Base, Batch, Decision, LabelRule, Plan
from peftcli.plan.targets import match_saved, match_targets
from peftcli.recipe.schema import AdapterSection, QuantizationSection, Recipe

LABEL_RULES = ("completion_only_loss", "assistant_only_loss")
NF4_BITS = 4.127
"""Bits a weight of NF4 with double quantization: 4 + 8/64 + 32/(64 * 256) (Dettmers et al. 2023, arXiv:2305.14314)."""


def make_plan(
    recipe: Recipe,
    machine: Machine,
    facts: ModelFacts,
    count_trainable: Callable[[AdapterSection], int],
    *,
    smoke: bool = False,
    notices: tuple[str, ...] = (),
) -> Plan:
    """Decide what will happen.

    Args:
        recipe: what was asked.
        machine: what is there.
        facts: the base model's structure.
        count_trainable: number of trainable parameters of an adapter on that structure.
        smoke: the base is a stand-in and the run a rehearsal.
        notices: what the recipe's loading had to say.

    Raises:
        RecipeError: an adapter target matches nothing.
        MachineError: this machine cannot do it.
    """
    check_wheel(machine)
    device = _device(recipe, machine)
    on_gpu = device.value == "cuda"
    dtype = _dtype(recipe, machine, on_gpu)
    compute = _compute_dtype(recipe.quantization, dtype.value, machine, on_gpu)
    attention = _attention(recipe, machine, facts, on_gpu)
    checkpointing = _checkpointing(recipe.trainer, on_gpu)
    batch = _batch(recipe.trainer, machine)
    targets = match_targets(recipe.adapter.target_modules, facts)
    match_saved(recipe.adapter.modules_to_save or (), facts)
    max_length = _max_length(recipe, facts)
    _check_room(recipe, facts, machine, dtype.value, on_gpu)
    trainable = count_trainable(recipe.adapter)
    quantization = recipe.quantization
    base = Base(
        name=recipe.model.name,
        path=facts.path,
        revision=recipe.model.revision,
        dtype=dtype.value,
        attention=attention.value,
        device=device.value,
        quantization=None
        if quantization is None or compute is None
        else {
            "bits": quantization.bits,
            "type": quantization.type,
            "double_quant": quantization.double_quant,
            "compute_dtype": compute.value,
        },
        chat_template=recipe.model.chat_template,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    decisions = [device, dtype, *([compute] if compute else []), attention]
    decisions.append(Decision("adapter dtype", "float32", _adapter_reason(dtype.value, on_gpu)))
    decisions += [
        checkpointing,
        Decision(
            "batch",
            str(batch.effective),
            f"rows a step: {batch.per_device} a device x {batch.accumulation} accumulated x {batch.processes} process"
            + ("es" if batch.processes > 1 else ""),
        ),
        Decision(
            "adapter",
            f"{recipe.adapter.method} r {recipe.adapter.r} on {sum(targets.values())} modules",
            ", ".join(f"{name} x {count}" for name, count in targets.items()),
        ),
        Decision(
            "trainable",
            f"{trainable:,} parameters",
            f"{trainable / (facts.parameters + trainable):.2%} of {facts.parameters + trainable:,}",
        ),
    ]
    return Plan(
        name=recipe.name,
        task=recipe.model.task,
        smoke=smoke,
        seed=recipe.seed,
        base=base,
        architecture=facts.architecture,
        adapter=recipe.adapter,
        adapter_dtype="float32",
        dataset=recipe.dataset,
        labels=LabelRule(
            completion_only=recipe.trainer.get("completion_only_loss") is not False,
            assistant_only=recipe.trainer.get("assistant_only_loss") is not False,
            asked=tuple(name for name in LABEL_RULES if recipe.trainer.get(name)),
            max_length=max_length,
        ),
        batch=batch,
        trainer=_trainer_arguments(recipe, dtype.value, max_length, checkpointing.value == "on", on_gpu),
        evaluation=recipe.evaluation,
        evaluation_batch=_evaluation_batch(recipe, on_gpu),
        gates=recipe.gates,
        budget=recipe.budget,
        trackers=tuple(recipe.report.trackers),
        targets=targets,
        trainable_parameters=trainable,
        total_parameters=facts.parameters + trainable,
        decisions=tuple(decisions),
        notices=notices + ((facts.note,) if facts.note else ()) + _notices(recipe, machine, on_gpu),
    )


def check_wheel(machine: Machine) -> None:
    """Hold the architectures of the installed torch wheel against the card.

    A kernel built for sm_XY runs on cards of the same major version and the same or a later minor one; PTX
    (`compute_XY`) runs on every later card.

    Raises:
        MachineError: the wheel has no kernel for this card.

    Source: CUDA C++ programming guide, binary and PTX compatibility.
    """
    if machine.capability is None:
        return
    major, minor = machine.capability
    for arch in machine.arch_list:
        kind, _, digits = arch.partition("_")
        digits = digits.rstrip("af")
        if not digits.isdigit():
            continue
        built = (int(digits[:-1]), int(digits[-1]))
        if kind == "sm" and built[0] == major and built[1] <= minor:
            return
        if kind == "compute" and built <= (major, minor):
            return
    raise MachineError(
        f"the installed torch has no kernels for {machine.label}; it was built for {', '.join(machine.arch_list)}; "
        "choose another card (on Kaggle: GPU T4 x2) or install a torch wheel for this one"
    )


def _device(recipe: Recipe, machine: Machine) -> Decision:
    if recipe.trainer.get("use_cpu"):
        return Decision("device", "cpu", "trainer.use_cpu")
    if machine.device == "cuda":
        return Decision("device", "cuda", machine.label)
    return Decision("device", "cpu", f"no CUDA device here; {machine.label}")


def _dtype(recipe: Recipe, machine: Machine, on_gpu: bool) -> Decision:
    asked = recipe.model.dtype
    key = "model.dtype"
    if asked == "auto":
        if not on_gpu:
            return Decision(key, "float32", "a CPU: exact, and as fast as 16 bit on most")
        if machine.native_bf16:
            return Decision(key, "bfloat16", f"{machine.label} computes it natively")
        return Decision(key, "float16", f"{machine.label} has no native bfloat16; with a gradient scaler")
    if asked == "bfloat16" and on_gpu and not machine.native_bf16:
        raise MachineError(
            f"this recipe needs bfloat16, but {machine.label} has none of its own (it would be emulated, several times "
            "slower); set model.dtype: float16 or auto, or use a GPU of sm_80 or later"
        )
    if asked == "float16" and not on_gpu:
        raise MachineError("this recipe needs float16, which trains on a GPU only; set model.dtype: auto")
    return Decision(key, asked, "the recipe")


def _compute_dtype(
    quantization: QuantizationSection | None, dtype: str, machine: Machine, on_gpu: bool
) -> Decision | None:
    if quantization is None:
        return None
    key = "quantization.compute_dtype"
    asked = quantization.compute_dtype
    if asked == "auto":
        return Decision(key, dtype, f"{quantization.type} products in the dtype of the model")
    if asked == "bfloat16" and on_gpu and not machine.native_bf16:
        raise MachineError(
            f"quantization.compute_dtype is bfloat16, but {machine.label} has none of its own; set float16 or auto"
        )
    return Decision(key, asked, "the recipe")


def _attention(recipe: Recipe, machine: Machine, facts: ModelFacts, on_gpu: bool) -> Decision:
    asked = recipe.model.attention
    if asked in ("auto", "sdpa") and not facts.sdpa:
        if asked == "sdpa":
            raise MachineError(f"model.attention: sdpa is not supported by {facts.architecture}; set eager or auto")
        return Decision("model.attention", "eager", f"{facts.architecture} does not support sdpa")
    if asked == "auto":
        return Decision("model.attention", "sdpa", "torch's own, on every device")
    if asked.startswith("flash_attention"):
        if not on_gpu:
            raise MachineError(f"model.attention: {asked} needs a CUDA GPU, and there is none here; set auto")
        if machine.capability is not None and machine.capability < (8, 0):
            raise MachineError(f"model.attention: {asked} needs sm_80 or later, but this is {machine.label}; set auto")
        if asked not in machine.flash_attention:
            raise MachineError(f"model.attention: {asked} is not installed here; install it or set auto")
    return Decision("model.attention", asked, "the recipe")


def _checkpointing(trainer: Mapping[str, Any], on_gpu: bool) -> Decision:
    key = "activation checkpointing"
    asked = trainer.get("activation_checkpointing")
    if asked is not None:
        return Decision(key, "on" if asked else "off", "the recipe")
    if on_gpu:
        return Decision(key, "on", "saves activation memory for about a third more compute")
    return Decision(key, "off", "a CPU has the memory, and it costs a third more compute")


def _batch(trainer: Mapping[str, Any], machine: Machine) -> Batch:
    return Batch(
        per_device=int(trainer.get("per_device_train_batch_size", 8)),
        accumulation=int(trainer.get("gradient_accumulation_steps", 1)),
        processes=machine.processes,
    )


def _adapter_reason(dtype: str, on_gpu: bool) -> str:
    if dtype == "float16" and on_gpu:
        return "the gradient scaler of float16 needs it"
    return "small updates survive; the adapter is small"


def _max_length(recipe: Recipe, facts: ModelFacts) -> int:
    asked = recipe.dataset.max_length
    if facts.positions is None or asked <= facts.positions:
        return asked
    if "max_length" not in recipe.dataset.model_fields_set:
        return facts.positions
    raise RecipeError(
        f"dataset.max_length = {asked}, but {recipe.model.name} was made for at most {facts.positions} tokens; lower it"
    )


def _check_room(recipe: Recipe, facts: ModelFacts, machine: Machine, dtype: str, on_gpu: bool) -> None:
    # Only what is certain: the weights alone. The full forecast has its own room.
    bits = NF4_BITS if recipe.quantization is not None else 8 * DTYPE_BYTES[dtype]
    needed = facts.parameters * bits / 8
    if needed > machine.memory_bytes:
        where = machine.label if on_gpu else "this machine's memory"
        mend = "use a larger GPU" if recipe.quantization is not None else "add `quantization: {bits: 4}`"
        raise MachineError(
            f"the weights of {recipe.model.name} alone take {needed / 2**30:.1f} GiB, more than the "
            f"{machine.memory_bytes / 2**30:.1f} GiB of {where}; {mend}, or rehearse with --smoke"
        )


def _evaluation_batch(recipe: Recipe, on_gpu: bool) -> int:
    asked = recipe.evaluation.batch_size
    return asked if isinstance(asked, int) else (16 if on_gpu else 128)


def _trainer_arguments(
    recipe: Recipe, dtype: str, max_length: int, checkpointing: bool, on_gpu: bool
) -> dict[str, Any]:
    # The labels are made before the trainer sees the rows, so it must not look for columns to make them from.
    given = {name: value for name, value in recipe.trainer.items() if name not in LABEL_RULES}
    steps = given.get("max_steps")
    defaults: dict[str, Any] = {
        "logging_steps": max(1, min(10, steps // 20)) if isinstance(steps, int) and steps > 0 else 10,
        "logging_first_step": True,
        "save_strategy": "no" if "save_steps" not in given else "steps",
        "save_total_limit": 2,
        # The rows are cut already; packing still needs to know the length of a packed row.
        "max_length": max_length if given.get("packing") else None,
        "learning_rate": 2e-4,
    }
    decided = {
        "activation_checkpointing": checkpointing,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16" and on_gpu,
        "use_cpu": not on_gpu,
        "seed": recipe.seed,
        "report_to": list(recipe.report.trackers),
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "run_name": recipe.name,
    }
    return {**defaults, **given, **decided}


def _notices(recipe: Recipe, machine: Machine, on_gpu: bool) -> tuple[str, ...]:
    notices = []
    if on_gpu and machine.count > 1 and machine.processes == 1:
        notices.append(f"{machine.count} GPUs are here and one is used; --num-processes {machine.count} uses them all")
    if recipe.adapter.dropout and recipe.quantization is None and not on_gpu:
        notices.append(f"adapter.dropout {recipe.adapter.dropout} costs time and memory on a CPU")
    return tuple(notices)
