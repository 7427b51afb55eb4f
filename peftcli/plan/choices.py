"""The choices of a plan that depend on the machine: each with its reason, or an error with the fix."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftcli.errors import MachineError, RecipeError
from peftcli.methods.registry import METHODS
from peftcli.plan.machine import Machine, ModelFacts
from peftcli.plan.plan import Batch, Decision
from peftcli.recipe.schema import QuantizationSection, Recipe

CHECKPOINTING = "activation checkpointing"
"""Key of the decision."""
EIGHT_BIT = "quantization"
"""Key of the decision for an 8-bit base."""
OVERFLOWS_FLOAT16 = ("Gemma2", "Gemma3", "T5", "MT5", "UMT5")
"""Prefixes of architectures trained in bfloat16 whose activations overflow float16 (65504) in the forward pass, so
that a gradient scaler does not help. For any other architecture, training detects it at the first row.

Source: transformers issues 36822 and 39972 (Gemma 3), google-research/text-to-text-transfer-transformer issue 539.
"""


@dataclass(frozen=True)
class Choices:
    """What depends on the machine; `products` is how quantized weights are multiplied, None without quantization."""

    device: Decision
    dtype: Decision
    products: Decision | None
    attention: Decision
    checkpointing: Decision

    @property
    def on_gpu(self) -> bool:
        return self.device.value == "cuda"


def choose(recipe: Recipe, machine: Machine, facts: ModelFacts) -> Choices:
    """Make all choices that depend on the machine.

    Raises:
        MachineError: this machine does not support what the recipe requires.
        RecipeError: the model does not support it.
    """
    device = choose_device(recipe, machine)
    on_gpu = device.value == "cuda"
    if on_gpu:
        check_wheel(machine)
    dtype = choose_dtype(recipe, machine, on_gpu, facts.architecture)
    return Choices(
        device=device,
        dtype=dtype,
        products=choose_products(recipe.quantization, dtype.value, machine, on_gpu),
        attention=choose_attention(recipe, machine, facts, on_gpu),
        checkpointing=choose_checkpointing(recipe.trainer, on_gpu, _not_twice(recipe, facts)),
    )


def _not_twice(recipe: Recipe, facts: ModelFacts) -> str:
    """Why activations cannot be recomputed; empty if they can."""
    if facts.checkpointing:
        return METHODS[recipe.adapter.method].checkpointing
    if recipe.trainer.get("activation_checkpointing"):
        raise RecipeError(f"trainer.activation_checkpointing: {facts.architecture} does not support it; remove it")
    return f"{facts.architecture} does not support it"


def check_wheel(machine: Machine) -> None:
    """Check the architectures of the installed torch wheel against the GPU.

    A kernel built for sm_XY runs on GPUs of the same major version and the same or a later minor one; PTX
    (`compute_XY`) runs on every later GPU.

    Raises:
        MachineError: the wheel has no kernel for this GPU.

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
        "choose another GPU (on Kaggle: GPU T4 x2) or install a torch wheel that supports this one"
    )


def choose_device(recipe: Recipe, machine: Machine) -> Decision:
    if recipe.trainer.get("use_cpu"):
        return Decision("device", "cpu", "trainer.use_cpu")
    if machine.device == "cuda":
        return Decision("device", "cuda", machine.label)
    return Decision("device", "cpu", f"no CUDA device; {machine.label}")


def choose_dtype(recipe: Recipe, machine: Machine, on_gpu: bool, architecture: str = "") -> Decision:
    """The dtype of the base weights and matmuls.

    Args:
        architecture: class name of the model; empty if not specific to one.

    Raises:
        MachineError: the machine does not support the requested dtype.
    """
    asked = recipe.model.dtype
    key = "model.dtype"
    if asked == "auto":
        if not on_gpu:
            return Decision(key, "float32", "on a CPU: exact, and on most as fast as 16 bit")
        if machine.native_bf16:
            return Decision(key, "bfloat16", f"{machine.label} computes it natively")
        if architecture.startswith(OVERFLOWS_FLOAT16):
            why = f"{machine.label} has no native bfloat16, and {architecture} overflows float16; slower, but finite"
            return Decision(key, "float32", why)
        return Decision(key, "float16", f"{machine.label} has no native bfloat16; uses a gradient scaler")
    if asked == "bfloat16" and on_gpu and not machine.native_bf16:
        raise MachineError(
            f"this recipe needs bfloat16, but {machine.label} does not support it natively (emulation is several times "
            "slower); set model.dtype: float16 or auto, or use a GPU of sm_80 or later"
        )
    if asked == "float16" and not on_gpu:
        raise MachineError("this recipe needs float16, which only trains on a GPU; set model.dtype: auto")
    return Decision(key, asked, "set in the recipe")


def choose_trained_dtype(recipe: Recipe, choices: Choices) -> Decision:
    """The dtype of the trained weights.

    Raises:
        MachineError: bfloat16 is requested, but the base has another dtype.
    """
    key = "adapter dtype"
    base = choices.dtype
    if recipe.adapter.dtype == "bfloat16":
        if base.value != "bfloat16":
            fix = "set adapter.dtype: float32" if choices.on_gpu else "set model.dtype: bfloat16"
            raise MachineError(
                f"adapter.dtype: bfloat16 trains the base weights in their own dtype, but here they are {base.value} "
                f"({base.reason}); {fix}"
            )
        return Decision(key, "bfloat16", "set in the recipe; no float32 copy of the weights")
    if base.value == "float16" and choices.on_gpu:
        return Decision(key, "float32", "required by the gradient scaler of float16")
    if METHODS[recipe.adapter.method].targets == "whole":
        return Decision(key, "float32", "keeps small updates; adapter.dtype: bfloat16 halves the memory")
    return Decision(key, "float32", "keeps small updates; the adapter is small")


def choose_products(
    quantization: QuantizationSection | None, dtype: str, machine: Machine, on_gpu: bool
) -> Decision | None:
    if quantization is None:
        return None
    if quantization.bits == 8:
        why = f"dequantized weights, matmuls in {dtype}, so that no row depends on the others in its batch"
        return Decision(EIGHT_BIT, "8 bit", why)
    key = "quantization.compute_dtype"
    asked = quantization.compute_dtype
    if asked == "auto":
        return Decision(key, dtype, f"{quantization.type} weights, matmuls in the dtype of the model")
    if asked == "bfloat16" and on_gpu and not machine.native_bf16:
        raise MachineError(
            f"quantization.compute_dtype is bfloat16, but {machine.label} does not support it natively; "
            "set float16 or auto"
        )
    return Decision(key, asked, "set in the recipe")


def choose_attention(recipe: Recipe, machine: Machine, facts: ModelFacts, on_gpu: bool) -> Decision:
    asked = recipe.model.attention
    if asked in ("auto", "sdpa") and not facts.sdpa:
        if asked == "sdpa":
            raise MachineError(f"model.attention: sdpa is not supported by {facts.architecture}; set eager or auto")
        return Decision("model.attention", "eager", f"{facts.architecture} does not support sdpa")
    if asked == "auto":
        return Decision("model.attention", "sdpa", "torch's attention, on every device")
    if asked.startswith("flash_attention"):
        if not on_gpu:
            raise MachineError(f"model.attention: {asked} needs a CUDA GPU, and this machine has none; set auto")
        if machine.capability is not None and machine.capability < (8, 0):
            raise MachineError(f"model.attention: {asked} needs sm_80 or later, but this is {machine.label}; set auto")
        if asked not in machine.flash_attention:
            raise MachineError(f"model.attention: {asked} is not installed; install it or set auto")
    return Decision("model.attention", asked, "set in the recipe")


def choose_checkpointing(trainer: Mapping[str, Any], on_gpu: bool, excluded: str = "") -> Decision:
    key = CHECKPOINTING
    asked = trainer.get("activation_checkpointing")
    if asked is not None:
        return Decision(key, "on" if asked else "off", "set in the recipe")
    if excluded:
        return Decision(key, "off", excluded)
    if on_gpu:
        return Decision(key, "on", "saves activation memory at about a third more compute")
    return Decision(key, "off", "a CPU has enough memory, and it would cost a third more compute")


def count_batch(trainer: Mapping[str, Any], processes: int, *, shared: bool = False) -> Batch:
    """The batch size of a step, as the trainer section sets it.

    Args:
        shared: the section is for one process, and its batch is split; the number of steps stays the same.
    """
    batch = Batch(
        per_device=int(trainer.get("per_device_train_batch_size", 8)),
        accumulation=int(trainer.get("gradient_accumulation_steps", 1)),
        processes=1 if shared else processes,
    )
    return batch if not shared else share_batch(batch, processes) or count_batch(trainer, processes)


def share_batch(batch: Batch, processes: int) -> Batch | None:
    """The batch split across processes, each with the largest micro-batch that divides its rows; None if not divisible.

    >>> share_batch(Batch(4, 4, 1), 2), share_batch(Batch(8, 1, 1), 2), share_batch(Batch(3, 1, 1), 2)
    (Batch(per_device=4, accumulation=2, processes=2), Batch(per_device=4, accumulation=1, processes=2), None)
    """
    own, rest = divmod(batch.effective, processes)
    if rest:
        return None
    at_once = max(rows for rows in range(1, min(own, batch.per_device) + 1) if own % rows == 0)
    return Batch(at_once, own // at_once, processes)


def processes_that_share(trainers: Sequence[Mapping[str, Any]], gpus: int) -> int:
    """The largest number of processes, one per GPU, across which the batches of all stages can be split.

    >>> processes_that_share([{"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}], 4)
    3
    """
    batches = [count_batch(trainer, 1) for trainer in trainers]
    numbers = range(max(1, gpus), 0, -1)
    return next(number for number in numbers if all(share_batch(batch, number) is not None for batch in batches))
