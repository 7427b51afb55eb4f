"""Memory on this GPU: smaller micro-batches when it runs out, what is given back, and the forecast beside the peak."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from workbench import Trained, Workbench, widest_dtype

from gpu.conftest import Gpu
from peftcli.cli.pipeline import plan_recipe
from peftcli.plan.memory.forecast import Rows, micro_batch_memory
from peftcli.recipe.load import load_recipe
from peftcli.train.trainers import Trainer

pytestmark = pytest.mark.gpu
Record = Callable[[Mapping[str, Any]], None]

STEPS = 4
FORECAST_ERROR = 0.1
"""Of the measured peak, by which the forecast may be off."""
LOSS_TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Largest difference of a loss, as a share: other sums, rounded in the dtype of the products."""
SETTINGS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "padding-free": (16, {}, {"activation_checkpointing": False}),
    "padding-free, checkpointed": (16, {}, {"activation_checkpointing": True}),
    "padded": (16, {"batching": "padded"}, {"activation_checkpointing": False}),
    "1024 tokens": (16, {"tokens_per_micro_batch": 1024}, {"activation_checkpointing": False}),
    "nf4": (4, {}, {"activation_checkpointing": False}),
    "nf4, checkpointed": (4, {}, {"activation_checkpointing": True}),
}


@pytest.fixture(scope="module")
def bench(gpu: Gpu, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    yield Workbench(gpu.scale.memory, tmp_path_factory.mktemp("bench"), dtype=widest_dtype(), steps=STEPS)


class TightFrom(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """From a step on, lets this process have the base and 0.6 of what the steps before needed beyond it."""

    def __init__(self, step: int) -> None:
        self._step = step
        self.base = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step + 1 != self._step:
            return
        total = torch.cuda.get_device_properties(0).total_memory
        wanted = self.base + (torch.cuda.max_memory_allocated() - self.base) * 0.6
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, wanted / total))


class NoRoom:
    """The substitute of a rehearsal: a forward pass of more tokens runs out of memory."""

    def __init__(self, patch: pytest.MonkeyPatch, tokens: int, step: int) -> None:
        whole = Trainer.compute_loss

        def limited(self: Trainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training and inputs["input_ids"].numel() > tokens and self.state.global_step + 1 >= step:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return whole(self, model, inputs, *args, **kwargs)

        patch.setattr(Trainer, "compute_loss", limited)


def allocated(gpu: Gpu) -> int:
    return 0 if gpu.rehearsal else torch.cuda.memory_allocated()


def test_when_memory_runs_out_micro_batches_shrink_and_the_losses_stay(
    gpu: Gpu, bench: Workbench, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"trainer": {"activation_checkpointing": False}}
    before = allocated(gpu)
    roomy = bench.train("roomy", **settings)
    kept = allocated(gpu) - before
    tight: Trained
    if gpu.rehearsal:
        NoRoom(monkeypatch, tokens=80, step=3)
        tight = bench.train("tight", **settings)
    else:
        try:
            tight = bench.train("tight", callbacks=[TightFrom(3)], **settings)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    events = tight.facts["out_of_memory"]
    left = allocated(gpu) - before
    off = max(abs(one - other) / one for one, other in zip(roomy.losses, tight.losses, strict=True))
    record({"events": events, "largest_difference": off, "bytes_kept": [kept, left]})
    assert events and all(event["step"] >= 3 for event in events)
    assert off <= LOSS_TOLERANCES[bench.dtype]
    # A training leaves nothing on the GPU but the workspaces of the libraries, which the first one has made.
    assert left <= kept + 2**20


class Largest:
    """The largest micro-batch that is trained after the first step, padding included."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.tokens = self.longest = 0
        whole = Trainer.compute_loss

        def watched(trainer: Trainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            places = inputs.get("position_ids")
            longest = inputs["input_ids"].shape[-1] if places is None else int(places.max()) + 1
            if trainer.state.global_step and inputs["input_ids"].numel() > self.tokens:
                self.tokens, self.longest = inputs["input_ids"].numel(), longest
            return whole(trainer, model, inputs, *args, **kwargs)

        patch.setattr(Trainer, "compute_loss", watched)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_forecast_is_within_a_tenth_of_the_measured_peak(
    gpu: Gpu, bench: Workbench, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """The forecast is asked for the micro-batch that was run; how the rows of a step are cut is not its subject."""
    bits, performance, trainer = SETTINGS[setting]
    if gpu.rehearsal and setting not in ("padding-free", "nf4, checkpointed"):
        pytest.skip("one setting of each kind is enough for a rehearsal")
    beside = 0 if bits == 16 else allocated(gpu)  # the other base
    used = bench if bits == 16 else Workbench(gpu.scale.memory, tmp_path, bits=4, dtype=bench.dtype, steps=STEPS)
    largest = Largest(monkeypatch)
    found = used.train(f"forecast-{setting.replace(' ', '-')}", performance=performance, trainer=trainer, warm=1)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(used.recipe(performance=performance, trainer=trainer)))
    planned = plan_recipe(load_recipe(file))
    assert planned.shape is not None
    load = micro_batch_memory(planned.plan, planned.shape, planned.machine, Rows(largest.longest, largest.longest, 1))
    forecast = replace(load, tokens=largest.tokens, longest=largest.longest).counted
    measured = found.peak_bytes - beside
    figures = {"forecast": forecast, "measured": measured, "ratio": forecast / measured, "tokens": largest.tokens}
    record(figures)
    assert forecast > 0 and largest.tokens > 0
    if not gpu.rehearsal:  # a CPU counts the whole process
        assert abs(forecast / measured - 1) <= FORECAST_ERROR
