"""The forecast: memory, time and disk space of a run, before anything is downloaded or loaded."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftcli.methods.registry import METHODS
from peftcli.plan.gpus import GPU, gpu_of
from peftcli.plan.machine import Machine
from peftcli.plan.memory.estimate import INT8_BITS, NF4_BITS, MicroBatchMemory
from peftcli.plan.memory.evaluation_time import evaluation_time
from peftcli.plan.memory.model_shape import Linear, ModelDimensions
from peftcli.plan.memory.step_time import step_seconds, token_flops
from peftcli.plan.memory.suggestions import suggest
from peftcli.plan.memory.training_setup import FULL_LOGITS_HEAD, LogitsHead, TrainingSetup, tile_rows
from peftcli.plan.optimizer import optimizer_bytes
from peftcli.plan.plan import DTYPE_BYTES, Plan
from peftcli.recipe.schema import SelectSection
from peftcli.results import (
    Forecast,
    ForecastChange,
    ForecastDisk,
    ForecastMemory,
    ForecastRows,
    ForecastTime,
    MicroBatchTokens,
)
from peftcli.tasks.registry import TASKS

FLASH_CAPABILITY = (8, 0)
"""First capability with an attention kernel in torch that supports grouped-query attention without probabilities.

Source: the docstring of `scaled_dot_product_attention` on `enable_gqa`, torch 2.13.
"""
FILLING = 1 / 0.85
"""Padded positions per token in attention of a padding-free batch: rows in a micro-batch have 0.7 to 1 of the longest
one's length."""
BLOCK_NUMBER = re.compile(r"(^|.*\.)\d+\.")
MARGIN = 0.05
"""Share of the memory that must stay free for a run to count as fitting without a warning.

The forecast is within 10 % of what autograd saves, which is a part of the total; other processes of a notebook and
allocator fragmentation need the rest.
"""
DEFAULT_EPOCHS = 3.0
"""Default of transformers if the recipe sets neither epochs nor steps."""
OPTIMIZER = "adamw_torch_fused"
"""Default of transformers."""


@dataclass(frozen=True)
class Rows:
    """Statistics of the training rows.

    Attributes:
        longest: tokens of the longest row.
        mean: mean tokens per row.
        count: number of rows; None if the data was not read.
        known: False if both lengths are the recipe's `max_length`.
        lengths: tokens of the longest rows, in descending order; may be fewer than a batch, and empty if unknown.
        test: number of test rows; None if the data was not read.
    """

    longest: int
    mean: float
    count: int | None = None
    known: bool = True
    lengths: tuple[int, ...] = ()
    test: int | None = None

    def step_tokens(self, rows: int) -> int:
        """Maximum number of tokens of a step with a number of rows.

        >>> Rows(9, 9.0).step_tokens(2), Rows(9, 3.0, 4, lengths=(9, 2)).step_tokens(3)
        (18, 13)
        """
        if not self.lengths:
            return rows * self.longest
        taken = self.lengths[:rows]
        return sum(taken) + (rows - len(taken)) * taken[-1]


def rows_of(plan: Plan, data: Mapping[str, Any] | None, lengths: Sequence[int] = ()) -> Rows:
    """The rows as `data.json` describes them, or as long as the recipe allows without it.

    Args:
        data: the statistics of the data; None before it was read.
        lengths: tokens of the longest training rows, in descending order.
    """
    most = plan.labels.max_length
    if data is None:
        return Rows(most, float(most), known=False)
    rows = int(data["train_rows"])
    # These lengths are before truncation.
    longest = min(most, int(data["length"]["max"]))
    return Rows(longest, data["tokens"]["train"] / rows, rows, lengths=tuple(lengths), test=data.get("test_rows"))


def make_forecast(
    plan: Plan, shape: ModelDimensions | None, machine: Machine, rows: Rows, disk: ForecastDisk
) -> Forecast | None:
    """Compute the resources that a run needs.

    Args:
        disk: the disk forecast, which is passed through.

    Returns:
        The "forecast" of `plan.json`; None if the model's dimensions are unknown.
    """
    if shape is None:
        return None
    load = micro_batch_memory(plan, shape, machine, rows)
    # For a CPU run on a machine with a GPU, the machine's memory is that of the GPU.
    memory = machine.memory_bytes if machine.device == plan.base.device else None
    parts = load.parts()
    largest = None if memory is None else load.largest(memory)
    fits = None if memory is None else load.total <= memory
    tight = None if memory is None else memory * (1 - MARGIN) < load.total <= memory
    return Forecast(
        rows=ForecastRows(longest_tokens=rows.longest, mean_tokens=round(rows.mean, 1), known=rows.known),
        micro_batch=MicroBatchTokens(tokens=load.tokens, largest_tokens=largest),
        memory_bytes=ForecastMemory(parts=parts, total=load.total, machine=memory),
        peak_memory_bytes=load.counted,
        fits=fits,
        tight=tight,
        suggestions=()
        if memory is None or (fits and not tight)
        else _suggestions(load, plan, memory, tight=bool(tight)),
        time=_time(plan, load, machine, rows),
        disk_bytes=disk,
    )


def micro_batch_memory(plan: Plan, shape: ModelDimensions, machine: Machine, rows: Rows) -> MicroBatchMemory:
    """The largest micro-batch of a plan, with its training setup."""
    whole = plan.trainer.get("packing") or plan.trainer.get("padding_free")
    at_once = plan.batch.per_device * (plan.labels.max_length if plan.trainer.get("packing") else rows.longest)
    in_step = rows.step_tokens(plan.batch.per_device * plan.batch.accumulation)
    tokens = min(plan.batching.tokens, in_step) if plan.batching.kind == "padding_free" else at_once
    tokens = min(tokens, plan.batching.most or tokens)
    tokens = max(tokens, rows.longest)
    setting = training_setup(plan, shape, machine, one_row=tokens == rows.longest)
    return MicroBatchMemory(shape, setting, tokens, tokens if whole else rows.longest)


def training_setup(plan: Plan, shape: ModelDimensions, machine: Machine, *, one_row: bool) -> TrainingSetup:
    """The properties of a plan that determine memory and time.

    Args:
        one_row: each micro-batch is one row, so that there is no padding.
    """
    targets = match_linears(plan.targets, shape)
    saved = plan.adapter.modules_to_save or ()
    return TrainingSetup(
        on_gpu=plan.base.device == "cuda",
        base_bytes=DTYPE_BYTES[plan.base.dtype],
        weight_bits=weight_bits(plan.base.quantization),
        autocast=bool(plan.trainer.get("bf16") or plan.trainer.get("fp16")),
        adapter_bytes=DTYPE_BYTES[plan.adapter_dtype],
        state_bytes=state_bytes(plan, str(plan.trainer.get("optim", OPTIMIZER))),
        targets=targets,
        r=plan.adapter.r or 0,
        trainable=plan.trainable_parameters,
        dropout=plan.adapter.dropout or 0.0,
        dora=plan.adapter.use_dora,
        expert_adapters=shape.experts is not None and any(".experts." in name for name in plan.targets),
        checkpointing=_checkpointed(plan, shape),
        casts=_casts(plan),
        offloading=bool(plan.trainer.get("activation_offloading")),
        attention=_attention(plan, shape, machine, one_row),
        filling=_filling(plan, one_row),
        head=_head(plan, shape),
        head_trained=any(name in ("lm_head", "embed_out") for name in saved)
        or bool(plan.adapter.arguments.get("trainable_token_indices")),
        processes=plan.batch.processes,
        shards=plan.shards,
        activation_fit=plan.activation_fit,
        first_block=_first_block(plan, shape),
        freed=min(plan.trainable_parameters, shape.parameters) if plan.frees_base else 0,
        norms_trained=METHODS[plan.adapter.method].trains_norms,
        norms_fused="fused_norms" in plan.optimizations,
    )


def state_bytes(plan: Plan, optimizer: str) -> float:
    """Mean bytes of optimizer state per trainable weight of a plan."""
    trained = plan.trained
    return optimizer_bytes(optimizer, trained, DTYPE_BYTES[plan.adapter_dtype]) / max(1, trained.parameters)


def _first_block(plan: Plan, shape: ModelDimensions) -> int:
    """The first block with trainable weights; 0 if the gradient continues to the embeddings."""
    arguments, saved = plan.adapter.arguments, plan.adapter.modules_to_save
    if plan.trainer.get("activation_checkpointing") or METHODS[plan.adapter.method].prompts or saved:
        return 0
    if plan.adapter.layers is not None and not isinstance(plan.adapter.layers, SelectSection):
        return min(plan.adapter.layers, default=0)
    last = arguments.get("last_layers", METHODS[plan.adapter.method].defaults.get("last_layers"))
    if last is not None and not arguments.get("embeddings"):
        return max(0, shape.layers - int(last))
    return 0


def weight_bits(quantization: Mapping[str, Any] | None) -> float | None:
    """Bits per quantized weight; None without quantization.

    Args:
        quantization: of the plan's base.
    """
    if quantization is None:
        return None
    return INT8_BITS if quantization["bits"] == 8 else NF4_BITS[bool(quantization["double_quant"])]


def _head(plan: Plan, shape: ModelDimensions) -> LogitsHead:
    if not TASKS[plan.task].generates:
        return LogitsHead(None, len(plan.base.labels), FULL_LOGITS_HEAD.bytes)
    if plan.trainer.get("label_smoothing_factor"):
        return FULL_LOGITS_HEAD
    if "fused_loss" in plan.optimizations:  # logits and probabilities, each with a float32 copy if they are 16-bit
        return LogitsHead(tile_rows(shape.vocabulary), None, 8 if plan.base.dtype == "float32" else 12)
    return LogitsHead()


def _casts(plan: Plan) -> bool:
    """Whether adapters cast their inputs in training: if that changes more than memory, see `train.step`."""
    return plan.adapter.use_dora or (plan.base.device == "cpu" and bool(plan.adapter.dropout))


def _checkpointed(plan: Plan, shape: ModelDimensions) -> float:
    if not plan.trainer.get("activation_checkpointing"):
        return 0.0
    return 1.0 if plan.checkpointed_blocks is None else plan.checkpointed_blocks / shape.layers


def match_linears(targets: Mapping[str, int], shape: ModelDimensions) -> tuple[Linear, ...]:
    """The linear layers that match the targets of a plan.

    Args:
        targets: number of modules by name; a name with a block number matches only that block.
    """
    found = {}
    for name, count in targets.items():
        bare = BLOCK_NUMBER.sub("", name)
        for linear in shape.linears:
            if linear.name == bare or linear.name.endswith("." + bare):
                number = min(count, linear.count)
                found[linear.name, linear.outputs] = Linear(linear.name, linear.inputs, linear.outputs, number)
    return tuple(found.values())


def _filling(plan: Plan, one_row: bool) -> float:
    """Places of attention for each token: FlashAttention reads rows by their boundaries, and fills nothing."""
    beside = plan.batching.kind == "padding_free" and not plan.base.attention.startswith("flash")
    return FILLING if beside and not one_row else 1.0


def _attention(plan: Plan, shape: ModelDimensions, machine: Machine, one_row: bool) -> str:
    implementation = plan.base.attention
    if implementation == "eager":
        return "eager"
    if implementation.startswith("flash"):
        return "flash"
    packed = plan.trainer.get("packing") or plan.trainer.get("padding_free")
    if packed or (plan.batching.kind == "padded" and not one_row):
        return "masked"
    old = machine.capability is not None and machine.capability < FLASH_CAPABILITY
    if not (plan.base.device == "cuda" and old and shape.grouped):
        return "flash"
    # Padding-free batches repeat keys and values on such a GPU; a single padded row is left to transformers.
    return "repeated" if plan.batching.kind == "padding_free" else "math"


def _suggestions(load: MicroBatchMemory, plan: Plan, memory: int, *, tight: bool) -> tuple[ForecastChange, ...]:
    """Changes that make a micro-batch fit, or leave the margin if it already fits."""
    room = int(memory * (1 - MARGIN)) if tight else memory
    return tuple(
        ForecastChange(keys=tuple(fix.keys.split("\n")), total_bytes=fix.load.total, fits=fix.load.total <= memory)
        for fix in suggest(load, plan, room)
    )


@dataclass(frozen=True)
class _Step:
    """The tokens of one optimizer step in one process.

    Attributes:
        tokens: padding included.
        micro_batches: number of micro-batches with these tokens.
        attended: mean number of tokens that a token attends to.
    """

    tokens: float
    micro_batches: int
    attended: float


def _step(plan: Plan, load: MicroBatchMemory, rows: Rows) -> _Step:
    in_step = plan.batch.per_device * plan.batch.accumulation
    padding_free = plan.batching.kind == "padding_free"
    length = rows.mean if padding_free else rows.longest
    tokens = in_step * length
    micro_batches = max(1, -(-round(tokens) // load.tokens)) if padding_free else plan.batch.accumulation
    return _Step(tokens, micro_batches, length / (2 if load.setting.attention == "flash" else 1))


def step_time(plan: Plan, load: MicroBatchMemory, machine: Machine, rows: Rows) -> float | None:
    """Seconds per optimizer step; None on a CPU, on a GPU that is not in the table, and with sharded weights."""
    gpu = _timed_gpu(load, machine)
    if gpu is None:
        return None
    step = _step(plan, load, rows)
    return step_seconds(
        load.shape, load.setting, gpu, tokens=step.tokens, micro_batches=step.micro_batches, attended=step.attended
    )


def _timed_gpu(load: MicroBatchMemory, machine: Machine) -> GPU | None:
    unsharded = load.setting.shards == 1  # the speed of the interconnect is unknown
    return gpu_of(machine) if load.setting.on_gpu and load.setting.width == 2 and unsharded else None


def _time(plan: Plan, load: MicroBatchMemory, machine: Machine, rows: Rows) -> ForecastTime:
    """Steps and seconds; null if unknown, such as the speed of a CPU."""
    gpu, step = _timed_gpu(load, machine), _step(plan, load, rows)
    seconds, steps = step_time(plan, load, machine, rows), _steps(plan, rows)
    return ForecastTime(
        steps=steps,
        flops_per_token=round(token_flops(load.shape, load.setting, step.attended)),
        tokens_per_step=round(step.tokens * plan.batch.processes),
        step_seconds=seconds,
        seconds=None if seconds is None or steps is None else seconds * steps,
        gpu=None if gpu is None else gpu.key,
        evaluation=evaluation_time(plan, load, gpu, machine.memory_bytes, test_rows=rows.test, mean=rows.mean),
    )


def _steps(plan: Plan, rows: Rows) -> int | None:
    max_steps = plan.trainer.get("max_steps")
    if isinstance(max_steps, int) and max_steps > 0:
        return max_steps
    if rows.count is None:
        return None
    epochs = float(plan.trainer.get("num_train_epochs", DEFAULT_EPOCHS))
    return max(1, round(epochs * -(-rows.count // plan.batch.effective)))
