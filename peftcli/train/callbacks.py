"""Trainer callbacks: log, progress, clock and stops; calibration before the first step; checkpointed blocks."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import SaveStrategy

from peftcli.model.checkpoint_random import save_random_states, skip_random_states
from peftcli.model.distributed import gather, is_fsdp
from peftcli.model.fused_lora import disable_fused_lora, enable_fused_lora
from peftcli.model.fused_norms import disable_fused_norms, enable_fused_norms
from peftcli.model.gradients import missing_gradients
from peftcli.model.hardware import peak_memory_bytes, resident_bytes
from peftcli.model.liger_layers import LigerLayers, enable_liger_layers
from peftcli.plan.plan import Plan
from peftcli.progress import Progress
from peftcli.report.format import count, duration, size
from peftcli.train.step import StepTrainer
from peftcli.train.stop import StopRequests

FIRST_SAVE_SECONDS = 1.0
"""Assumed duration of a checkpoint until one was measured."""

FEWEST_STEPS = 30
"""Minimum steps of a run that is calibrated; for a shorter one it is not worth the time."""
PASSES = 2
"""The first pass includes one-time work such as choosing kernels; the second is measured."""


class RunCallback(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Writes `log.jsonl`, shows progress, saves at intervals and stops at the end of a step.

    Attributes:
        losses: (step, loss) as logged.
        stop_reason: why the run stopped early; None if it did not.
        stopped_by_clock: the reason was a time limit, so there is time for the final evaluation.
        resident_before: memory of the process in bytes when the loop started.
    """

    def __init__(
        self,
        trainer: StepTrainer,
        log: Path,
        progress: Progress,
        stops: StopRequests,
        *,
        save_every: float,
        reserve: float,
        device: str,
        writes: bool,
    ) -> None:
        """
        Args:
            trainer: the trainer of this loop.
            log: the JSON-lines file, appended to.
            save_every: seconds between checkpoints.
            reserve: seconds that the final evaluation will take.
            device: `cuda` or `cpu`.
            writes: this process writes and prints for all.
        """
        self.losses: list[tuple[int, float]] = []
        self.stop_reason: str | None = None
        self.stopped_by_clock = False
        self.resident_before = 0
        self._trainer = trainer
        self._log = log
        self._progress = progress
        self._stops = stops
        self._save_every = save_every
        self._reserve = reserve
        self._save_seconds = 0.0
        self._device = device
        self._writes = writes
        self._begun = 0.0
        self._saved = 0.0
        self._stepped = 0.0
        self._longest_step = 0.0
        self._shrunk = 0
        self._last_logged = (0.0, 0.0)
        self._gradients_checked = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.resident_before = resident_bytes()
        self._begun = self._saved = self._stepped = time.monotonic()
        self._last_logged = (self._begun, self._trainer.tokens_before)
        # transformers drops the best checkpoint if it is not on this machine's disk.
        state.best_model_checkpoint = gather(state.best_model_checkpoint)[0]
        left = self._stops.seconds_left
        if left is not None:
            margin = self.margin()
            self._progress.note(
                f"  time: {left:.0f} s left; training stops after about {max(0.0, left - margin):.0f} s, to leave "
                f"{margin:.0f} s for a checkpoint, the final evaluation and the report"
            )
        self._progress.start("training", state.max_steps)
        self._progress.advance(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.check_step(state.global_step + 1)
        if not self._gradients_checked and not is_fsdp(kwargs["model"]):
            missing = missing_gradients(kwargs["model"])
            if missing is not None:
                self._progress.note(f"  note: {missing}")
        self._gradients_checked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        self._trainer.seconds = now - self._begun
        self._longest_step = max(self._longest_step, now - self._stepped)
        self._stepped = now
        self._progress.advance(state.global_step)
        self._report_oom_retries()
        if state.global_step >= state.max_steps:
            # A finished run can be trained further from it. A full disk must not end a training that is complete.
            if args.save_strategy == SaveStrategy.NO:
                control.should_save = self._trainer.has_space()
            return
        # Clocks and signals differ between processes, but all must save and stop at the same step.
        # Whether it is the clock is sent with the reason: a deadline may be set on only one machine.
        own = self._stops.reason(self.margin())
        found = gather((own, own is not None and self._stops.is_clock(own)))
        self.stop_reason, self.stopped_by_clock = next((one for one in found if one[0] is not None), (None, False))
        if self.stop_reason is not None:
            control.should_save = control.should_training_stop = True
        elif any(gather(now - self._saved >= self._save_every)):
            control.should_save = True
        if control.should_save:
            self._saved = now

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._save_seconds = max(self._save_seconds, time.monotonic() - self._saved)
        self._saved = self._stepped = time.monotonic()

    def margin(self) -> float:
        """Seconds before the limit at which training stops: for one more step, a save and the final evaluation."""
        return self._reserve + 1.2 * self._longest_step + 1.5 * max(self._save_seconds, FIRST_SAVE_SECONDS)

    def _report_oom_retries(self) -> None:
        events = self._trainer.micro_batches.events
        for step, pieces in events[self._shrunk :]:
            self._progress.note(
                f"step {step}: out of memory; its rows are now split into {pieces} micro-batches; the rows of a step "
                "and their order do not change"
            )
        self._shrunk = len(events)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" not in logs:
            if "eval_loss" in logs and self._writes:
                self._append({"step": state.global_step, "eval_loss": logs["eval_loss"]})
            return
        now = time.monotonic()
        since, tokens_before = self._last_logged
        tokens = float(logs.get("num_tokens", 0.0)) + self._trainer.tokens_before
        rate = (tokens - tokens_before) / max(now - since, 1e-9)
        self._last_logged = (now, tokens)
        of_tokens = self._trainer.counts == "tokens"
        self.losses.append((state.global_step, float(logs["loss"])))
        row = {
            "step": state.global_step,
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": _finite(logs.get("grad_norm")),
            "epoch": state.epoch,
            "token_accuracy": logs.get("mean_token_accuracy"),
            "tokens": tokens if of_tokens else None,
            "tokens_per_second": round(rate, 1) if of_tokens else None,
            "memory_bytes": peak_memory_bytes(self._device),
            "elapsed_seconds": round(self._trainer.seconds_before + now - self._begun, 3),
        }
        if self._writes:
            self._append(row)
        self._progress.advance(
            state.global_step,
            {
                "loss": f"{row['loss']:.4f}",
                "lr": f"{logs.get('learning_rate', 0.0):.2e}",
                f"{self._trainer.counts}/s": f"{rate:,.0f}",
                "memory": f"{row['memory_bytes'] / 2**30:.1f} GiB",
            },
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.seconds = time.monotonic() - self._begun
        self._progress.end()

    def _append(self, row: dict[str, Any]) -> None:
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _finite(value: float | None) -> float | None:
    # The gradient scaler of float16 skips a step whose norm is infinite, which JSON cannot represent.
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Calibration:
    """Measurements of one micro-batch.

    Attributes:
        tokens: of its rows, without padding.
        seconds: of a forward and a backward pass.
        step_seconds: of an optimizer step with rows of mean length.
        peak_memory_bytes: of torch's allocator; None on a CPU, where process memory never shrinks.
    """

    tokens: int
    seconds: float
    step_seconds: float
    peak_memory_bytes: int | None


class CalibrationCallback(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Runs the longest micro-batch before the first step; weights, counters and random states do not change."""

    def __init__(self, trainer: StepTrainer, plan: Plan, lengths: NDArray[Any], progress: Progress) -> None:
        """
        Args:
            trainer: the trainer about to start.
            lengths: (rows,), tokens of each training row.
        """
        self._trainer = trainer
        self._plan = plan
        self._lengths = lengths
        self._progress = progress

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        steps = state.max_steps - state.global_step
        if steps < FEWEST_STEPS or self._trainer.is_deepspeed_enabled or is_fsdp(model) or counts_batches(model):
            return
        rows = longest_rows(self._lengths, self._plan)
        found = calibrate(self._trainer, model, rows, self._plan, float(self._lengths.mean()))
        self._trainer.calibration = asdict(found)
        self._progress.note(calibration_text(found, steps, self._trainer.counts))


def counts_batches(model: torch.nn.Module) -> bool:
    """Whether a forward pass changes the model, such as the running statistics of batch norms."""
    return any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())


def longest_rows(lengths: NDArray[Any], plan: Plan) -> list[int]:
    """The longest rows of one micro-batch: a padded one, or a padding-free one filled to the limit."""
    order = np.argsort(-lengths, kind="stable")
    if plan.batching.kind == "padded":
        return [int(row) for row in order[: plan.batch.per_device]]
    taken = order[: plan.batch.per_device * plan.batch.accumulation]
    fitting = max(1, int(np.searchsorted(np.cumsum(lengths[taken]), plan.batching.tokens, side="right")))
    return [int(row) for row in taken[:fitting]]


def calibrate(trainer: StepTrainer, model: Any, rows: list[int], plan: Plan, mean: float) -> Calibration:
    """Run some rows forward and backward twice and measure the second time.

    Micro-batches that do not fit are split now instead of during training.

    Args:
        rows: indices of training rows.
        mean: mean tokens per row.

    Raises:
        MemoryExhausted: even small micro-batches do not fit.
    """
    batch = trainer.data_collator([trainer.train_dataset[row] for row in rows])
    tokens = int(sum(len(trainer.train_dataset[row]["input_ids"]) for row in rows))
    batch = trainer._prepare_inputs(batch)
    cuda = trainer.args.device.type == "cuda"
    seconds = 0.0
    with _state_restored(trainer, model):
        for _ in range(PASSES):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            begun = time.monotonic()
            _forward_and_backward(trainer, model, batch)
            if cuda:
                torch.cuda.synchronize()
            seconds = time.monotonic() - begun
    in_step = plan.batch.per_device * plan.batch.accumulation * mean
    passes = in_step / tokens if trainer.micro_batches.padding_free else float(plan.batch.accumulation)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return Calibration(tokens, round(seconds, 4), round(seconds * passes, 4), peak)


def calibration_text(found: Calibration, steps: int, unit: str = "tokens") -> str:
    """The note at the start of a training."""
    line = (
        f"  calibration: {count(found.tokens)} {unit} forward and backward in {duration(found.seconds)}, so about "
        f"{duration(found.step_seconds)} per step and {duration(found.step_seconds * steps)} for {count(steps)} steps"
    )
    return line + (f"; {size(found.peak_memory_bytes)} peak memory" if found.peak_memory_bytes is not None else "")


def _forward_and_backward(trainer: StepTrainer, model: Any, batch: dict[str, Any]) -> None:
    def one(micro_batch: dict[str, Any]) -> torch.Tensor:
        with trainer.compute_loss_context_manager():
            loss: torch.Tensor = trainer.compute_loss(model, dict(micro_batch))
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return loss.detach()

    trainer.micro_batches.run([batch], one, lambda: model.zero_grad(), nullcontext, trainer.state.global_step)


@contextmanager
def _state_restored(trainer: StepTrainer, model: Any) -> Iterator[None]:
    """Undo the side effects of a forward and a backward pass: gradients, counters and random states."""
    counted = trainer.micro_batches.real, trainer.micro_batches.padded
    training = model.training
    model.train()
    device = trainer.args.device
    # Without a list, torch saves the states of all GPUs, which other processes use, and warns.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    model.train(training)
    model.zero_grad(set_to_none=True)
    trainer.micro_batches.real, trainer.micro_batches.padded = counted
    for logged in getattr(trainer, "_metrics", {}).values():
        logged.clear()


class ForwardCallback(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Sets up the blocks before the first step, and restores adapters and norms after the last.

    None of this changes the loss: recomputed blocks give the same values, autocast would undo PEFT's cast to the
    adapter's dtype before the matmul, and fused LoRA and norms give the same result.

    Attributes:
        optimizations: names of those in use; after training starts, without those that do not apply.
    """

    def __init__(
        self, checkpointed_blocks: int | None, optimizations: frozenset[str], note: Callable[[str], None]
    ) -> None:
        """
        Args:
            checkpointed_blocks: number of checkpointed blocks; None leaves it to the trainer's argument.
            optimizations: names of those that the trainer uses.
            note: shows people what of it this model or this machine cannot do.
        """
        self._blocks = checkpointed_blocks
        self.optimizations = optimizations
        self._note = note
        self._liger: LigerLayers | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._blocks is not None:
            keep_checkpointed(model, self._blocks)
        if not (args.bf16 or args.fp16):
            self.optimizations -= {"skip_adapter_casts"}
        if "skip_adapter_casts" in self.optimizations:
            cast_inputs(model, False)
        if "fused_lora" in self.optimizations and not enable_fused_lora(model):
            self.optimizations -= {"fused_lora"}
        if "fused_norms" in self.optimizations:
            self._fuse_norms(model, args.device)
        if "liger_layers" in self.optimizations:
            self._use_liger(model, args)
        if "skip_rng_state" in self.optimizations and not skip_random_states(model, args.device):
            self.optimizations -= {"skip_rng_state"}

    def _fuse_norms(self, model: torch.nn.Module, device: torch.device) -> None:
        found = enable_fused_norms(model, device)
        for name, why in found.left.items():
            self._note(f"  note: {name} is left as it is, without torch's fused kernel: {why}")
        if not found.modules:
            self.optimizations -= {"fused_norms"}

    def _use_liger(self, model: Any, args: TrainingArguments) -> None:
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        base = model.get_base_model()
        self._liger = enable_liger_layers(base, dtype, norms="fused_norms" not in self.optimizations)
        if self._liger.problem is not None:
            self._note(f"  note: Liger's layer kernels are not used: {self._liger.problem}")
            self.optimizations -= {"liger_layers"}

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._liger is not None:
            self._liger.restore()
        # Evaluation runs without autocast, so adapters need their inputs cast again.
        cast_inputs(model, True)
        disable_fused_lora(model)
        disable_fused_norms(model)
        save_random_states(model)


def keep_checkpointed(model: torch.nn.Module, blocks: int) -> int:
    """Checkpoint only the first blocks; all others save their activations.

    Returns:
        Number of checkpointed blocks.
    """
    switched = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    for module in switched[blocks:]:
        module.gradient_checkpointing = False
    return min(blocks, len(switched))


def cast_inputs(model: torch.nn.Module, wanted: bool) -> None:
    """Let adapters cast their inputs to the dtype of their weights, or leave it to autocast if results are equal."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = wanted or _rounds_differently(module)


def _rounds_differently(layer: Any) -> bool:
    """Whether the cast changes more than memory: DoRA computes on its input, and a CPU rounds dropout's scale."""
    if len(getattr(layer, "lora_magnitude_vector", ())):
        return True
    drops = getattr(layer, "lora_dropout", {}).values()
    on_cpu = next(layer.parameters()).device.type == "cpu"
    return on_cpu and any(getattr(drop, "p", 0.0) > 0 for drop in drops)
