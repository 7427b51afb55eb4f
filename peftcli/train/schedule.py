"""The learning rate of a session that resumes with another schedule than that of its checkpoint."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

HORIZONLESS = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Schedulers whose learning rate does not depend on the number of steps, if the warmup is given in steps."""


@dataclass(frozen=True)
class ScheduleChange:
    """The learning rates of the first parameter group.

    Attributes:
        step: of the checkpoint.
        before: what the schedule of the checkpoint has for the next step.
        after: what the schedule of this session has for it.
    """

    step: int
    before: float
    after: float


def base_rates(scheduler: Any) -> list[float] | None:
    """The learning rate of each parameter group before the schedule; None for a schedule that depends on the loss."""
    return [float(rate) for rate in scheduler.base_lrs] if isinstance(scheduler, LambdaLR) else None


def follow_schedule(scheduler: Any, optimizer: Any, rates: Sequence[float] | None) -> ScheduleChange | None:
    """Set the learning rate of the next step to that of the session's own schedule.

    transformers restores the learning rate of the checkpoint, which is that of the old schedule, for the next step, and
    the base rate of the checkpoint for all steps. Nothing changes if the session has the schedule of its checkpoint.

    Args:
        scheduler: with the state of the checkpoint.
        optimizer: with the state of the checkpoint.
        rates: `base_rates` of the scheduler before it was loaded.
    """
    if rates is None:
        return None
    step = int(scheduler.last_epoch)
    wanted = [rate * scale(step) for rate, scale in zip(rates, scheduler.lr_lambdas, strict=True)]
    before = [float(group["lr"]) for group in optimizer.param_groups]
    if _alike(before, wanted) and _alike(scheduler.base_lrs, rates):
        return None
    for group, rate, peak in zip(optimizer.param_groups, wanted, rates, strict=True):
        group["initial_lr"] = peak
        if isinstance(group["lr"], torch.Tensor):  # an optimizer that is captured in a CUDA graph
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler.base_lrs = list(rates)
    scheduler._last_lr = wanted
    return ScheduleChange(step, before[0], wanted[0])


def _alike(some: Sequence[Any], others: Sequence[float]) -> bool:
    """Whether rates are equal; an optimizer may store them in float32."""
    pairs = zip(some, others, strict=True)
    return all(math.isclose(float(one), other, rel_tol=1e-6) for one, other in pairs)


class ScheduleCallback(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Says before the first step what happens to the learning rate of a session that trains further."""

    def __init__(self, trainer: Any, note: Callable[[str], None], *, extends: bool, only_steps: bool) -> None:
        """
        Args:
            trainer: a `StepTrainer`.
            extends: a finished run is trained further.
            only_steps: nothing but the number of steps has changed.
        """
        self._trainer = trainer
        self._note = note
        self._extends = extends
        self._only_steps = only_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        change: ScheduleChange | None = self._trainer.schedule_change
        name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        if change is not None:
            self._note(change_note(change, kwargs["lr_scheduler"], name, state.max_steps))
        elif self._extends:
            # A warmup below 1 is a share of the steps.
            exact = self._only_steps and name in HORIZONLESS and (not args.warmup_steps or args.warmup_steps >= 1)
            same = f"; the result is that of a run of {state.max_steps} steps from the start" if exact else ""
            self._note(f"  learning rate: {name} goes on as it was{same}")


def change_note(change: ScheduleChange, scheduler: Any, name: str, total: int) -> str:
    """The learning rates to come, and what they mean for the result.

    Args:
        scheduler: of the session.
        name: `trainer.lr_scheduler_type`.
        total: steps of the run.
    """
    base, scale = float(scheduler.base_lrs[0]), scheduler.lr_lambdas[0]
    course = [base * scale(step) for step in range(change.step, max(total, change.step + 1))]
    peak = max(range(len(course)), key=course.__getitem__)
    parts = [f"{course[0]:.2e} at step {change.step + 1}"]
    parts += [f"{course[peak]:.2e} at step {change.step + 1 + peak}"] if 0 < peak < len(course) - 1 else []
    parts += [f"{course[-1]:.2e} at step {total}"] if len(course) > 1 else []
    return (
        f"  learning rate: now {name} over {total} steps: {', '.join(parts)} (the checkpoint has {change.before:.2e} "
        f"for step {change.step + 1}). The result is not that of a run of {total} steps from the start; it is only "
        "with a constant learning rate (trainer.lr_scheduler_type: constant or constant_with_warmup)"
    )
