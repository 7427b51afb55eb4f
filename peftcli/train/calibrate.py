"""The longest micro-batch run once before the first step: what a step really takes, and whether it fits."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftcli.model.distributed import is_divided
from peftcli.plan.plan import Plan
from peftcli.progress import Progress
from peftcli.report.format import count, duration, size
from peftcli.train.steps import StepTrainer

FEWEST_STEPS = 30
"""Of a run that is calibrated; a shorter one would spend more on it than it says."""
PASSES = 2
"""The first one pays for what is done once, such as the choice of kernels; the second is measured."""


@dataclass(frozen=True)
class Calibration:
    """What one micro-batch took.

    Attributes:
        tokens: of its rows, padding aside.
        seconds: forward and backward.
        step_seconds: of an optimizer step of rows of mean length.
        peak_memory_bytes: of torch's allocator, None on a CPU, where the memory of a process never falls.
    """

    tokens: int
    seconds: float
    step_seconds: float
    peak_memory_bytes: int | None


class Calibrate(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Runs the longest micro-batch when training begins; weights, counters and random numbers stay as they were."""

    def __init__(self, trainer: StepTrainer, plan: Plan, lengths: NDArray[Any], progress: Progress) -> None:
        """
        Args:
            trainer: whose training begins.
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
        if steps < FEWEST_STEPS or self._trainer.is_deepspeed_enabled or is_divided(model) or counts_batches(model):
            return
        rows = longest_rows(self._lengths, self._plan)
        found = calibrate(self._trainer, model, rows, self._plan, float(self._lengths.mean()))
        self._trainer.calibration = asdict(found)
        self._progress.note(said(found, steps, self._trainer.fed))


def counts_batches(model: torch.nn.Module) -> bool:
    """Whether a forward pass alone changes the model, as the running means of a convolutional network do."""
    return any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())


def longest_rows(lengths: NDArray[Any], plan: Plan) -> list[int]:
    """The longest rows that are run at once: a padded micro-batch of them, or a line as full as lines become."""
    order = np.argsort(-lengths, kind="stable")
    if plan.batching.kind == "padded":
        return [int(row) for row in order[: plan.batch.per_device]]
    taken = order[: plan.batch.per_device * plan.batch.accumulation]
    fitting = max(1, int(np.searchsorted(np.cumsum(lengths[taken]), plan.batching.tokens, side="right")))
    return [int(row) for row in taken[:fitting]]


def calibrate(trainer: StepTrainer, model: Any, rows: list[int], plan: Plan, mean: float) -> Calibration:
    """Run some rows forward and backward and measure the second time.

    Pieces that do not fit are made smaller now, as they would be in the middle of the training.

    Args:
        rows: numbers of training rows.
        mean: tokens of a row.

    Raises:
        MemoryExhausted: not even small pieces fit.
    """
    batch = trainer.data_collator([trainer.train_dataset[row] for row in rows])
    tokens = int(sum(len(trainer.train_dataset[row]["input_ids"]) for row in rows))
    batch = trainer._prepare_inputs(batch)
    cuda = trainer.args.device.type == "cuda"
    seconds = 0.0
    with _undone(trainer, model):
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
    passes = in_step / tokens if trainer.pieces.lines else float(plan.batch.accumulation)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return Calibration(tokens, round(seconds, 4), round(seconds * passes, 4), peak)


def said(found: Calibration, steps: int, fed: str = "tokens") -> str:
    """The line for the start of a training."""
    line = (
        f"  calibration: {count(found.tokens)} {fed} forward and backward in {duration(found.seconds)}, so about "
        f"{duration(found.step_seconds)} a step and {duration(found.step_seconds * steps)} for {count(steps)} steps"
    )
    return line + (f"; {size(found.peak_memory_bytes)} at the peak" if found.peak_memory_bytes is not None else "")


def _forward_and_backward(trainer: StepTrainer, model: Any, batch: dict[str, Any]) -> None:
    def one(piece: dict[str, Any]) -> torch.Tensor:
        with trainer.compute_loss_context_manager():
            loss: torch.Tensor = trainer.compute_loss(model, dict(piece))
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return loss.detach()

    trainer.pieces.run([batch], one, lambda: model.zero_grad(), nullcontext, trainer.state.global_step)


@contextmanager
def _undone(trainer: StepTrainer, model: Any) -> Iterator[None]:
    """Take back what a forward and a backward pass leave behind: gradients, counters and drawn numbers."""
    counted = trainer.pieces.real, trainer.pieces.padded
    training = model.training
    model.train()
    with torch.random.fork_rng():
        yield
    model.train(training)
    model.zero_grad(set_to_none=True)
    trainer.pieces.real, trainer.pieces.padded = counted
    for logged in getattr(trainer, "_metrics", {}).values():
        logged.clear()
