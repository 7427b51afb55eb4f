"""The callback that watches TRL's loop: the log, the progress, the clock, checkpoints and stops."""

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftcli.model.distributed import gather
from peftcli.model.hardware import peak_memory_bytes, resident_bytes
from peftcli.progress import Progress
from peftcli.train.steps import StepTrainer
from peftcli.train.stops import StopRequests

FIRST_SAVE_SECONDS = 1.0
"""Of a checkpoint, before one was written and measured."""


class Watch(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Writes `log.jsonl`, shows progress, saves by time and stops at the end of a step.

    Attributes:
        losses: (step, loss) as logged.
        stop_reason: why the run stopped early, None where it did not.
        stopped_by_clock: that was a limit of time, so there is time for the last evaluation.
        resident_before: memory of the process in bytes when the loop began.
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
            trainer: whose loop this is.
            log: the JSON-lines file, appended to.
            save_every: seconds between checkpoints.
            reserve: seconds that the final evaluation will take.
            device: `cuda` or `cpu`.
            writes: this process writes and shows for all.
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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.resident_before = resident_bytes()
        self._begun = self._saved = self._stepped = time.monotonic()
        self._last_logged = (self._begun, self._trainer.tokens_before)
        # transformers forgets the best checkpoint where it is not on this machine's disk.
        state.best_model_checkpoint = gather(state.best_model_checkpoint)[0]
        left = self._stops.seconds_left
        if left is not None:
            self._progress.note(
                f"  time: {left:.0f} s are left; training stops {self.margin():.0f} s and a step before that, for a "
                "checkpoint, the last evaluation and the report"
            )
        self._progress.start("training", state.max_steps)
        self._progress.advance(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.check_step(state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        self._trainer.seconds = now - self._begun
        self._longest_step = max(self._longest_step, now - self._stepped)
        self._stepped = now
        self._progress.advance(state.global_step)
        self._tell_shrunk()
        if state.global_step >= state.max_steps:
            return
        # Clocks and signals differ between processes, but all must save and stop at the same step.
        # Whether it is the clock goes with the reason: a deadline may be set on one machine alone.
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
        """Seconds before the limit at which training stops: for one more step, a save and the last evaluation."""
        return self._reserve + 1.2 * self._longest_step + 1.5 * max(self._save_seconds, FIRST_SAVE_SECONDS)

    def _tell_shrunk(self) -> None:
        events = self._trainer.pieces.events
        for step, pieces in events[self._shrunk :]:
            self._progress.note(
                f"step {step}: out of memory, so its rows are run in {pieces} pieces; the rows of a step and their "
                "order stay the same"
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
        of_tokens = self._trainer.fed == "tokens"
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
                f"{self._trainer.fed}/s": f"{rate:,.0f}",
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
    # The gradient scaler of float16 skips a step whose norm is infinite; JSON has no word for that.
    return value if value is not None and math.isfinite(value) else None
