"""Where the time of a step goes: one step of the small and of the large model under torch's profiler.

    python scripts/gpu/profiling.py

Kept of each: how much of the step the GPU was busy, how many kernels were launched, how often Python waited for the
GPU, the longest gaps, and the kernels that took the most time. On a CPU operators stand for kernels.
"""

import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from settings import device_name, record, scale
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from workbench import Workbench, widest_dtype

LARGEST = 15
NAME = 90
"""Characters of a kernel's name that are kept."""
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class ProfiledStep(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Profiles the step after the warm ones."""

    def __init__(self, warm: int) -> None:
        self._warm = warm
        self._cuda = device_name() == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self.profile = profile(activities=activities, acc_events=True)
        self.seconds = 0.0
        self._begun = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self._warm:
            self._wait()
            self.profile.start()
            self._begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self._warm + 1:
            self._wait()
            self.seconds = time.perf_counter() - self._begun
            self.profile.stop()

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def figures_of(step: ProfiledStep) -> dict[str, Any]:
    """What a profiled step came to; shares are of its seconds, which the profiler itself makes longer."""
    events = list(step.profile.events())
    # A range that torch or transformers names is shown on the GPU too, gaps included.
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    counted: dict[str, int] = defaultdict(int)
    for event in events:
        counted[event.name] += 1
    found: dict[str, Any] = {
        "seconds": round(step.seconds, 5),
        "launches": sum(counted[name] for name in LAUNCHES),
        "waits": sum(counted[name] for name in WAITS),
        "items_fetched": counted["aten::_local_scalar_dense"],
    }
    if on_gpu:
        spans = sorted((event.time_range.start, event.time_range.end) for event in on_gpu)
        busy, gaps = busy_and_gaps(spans)
        found |= {"busy_ratio": round(busy / 1e6 / step.seconds, 4), "kernels": len(on_gpu)}
        found["longest_gaps_milliseconds"] = [round(gap / 1000, 3) for gap in sorted(gaps, reverse=True)[:5]]
        taken = summed((event.name, event.time_range.elapsed_us()) for event in on_gpu)
    else:
        averages = step.profile.key_averages()
        taken = summed((event.key, event.self_cpu_time_total) for event in averages if not event.is_user_annotation)
    largest = sorted(taken.items(), key=lambda pair: -pair[1])[:LARGEST]
    found["largest"] = [{"name": name, "share": round(taken / 1e6 / step.seconds, 4)} for name, taken in largest]
    return found


def busy_and_gaps(spans: Iterable[tuple[float, float]]) -> tuple[float, list[float]]:
    """Time covered by spans, which are sorted and may overlap, and the gaps between them.

    >>> busy_and_gaps([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)])
    (4.0, [2.0])
    """
    busy, gaps, end = 0.0, [], -math.inf
    for begin, last in spans:
        if -math.inf < end < begin:
            gaps.append(begin - end)
        busy += max(0.0, last - max(begin, end))
        end = max(end, last)
    return busy, gaps


def summed(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Microseconds by name; long names are cut."""
    found: dict[str, float] = defaultdict(float)
    for name, taken in pairs:
        found[name[:NAME]] += taken
    return dict(found)


def main() -> None:
    """Profile a step of both models."""
    warm = scale().warm
    for name in dict.fromkeys((scale().small, scale().large)):
        with tempfile.TemporaryDirectory() as folder:
            bench = Workbench(name, Path(folder), dtype=widest_dtype(), steps=warm + 1)
            step = ProfiledStep(warm)
            bench.train("profiled", trainer={"activation_checkpointing": False}, callbacks=[step])
        figures = figures_of(step)
        record({name: figures})
        print(name, figures, flush=True)
        del bench


if __name__ == "__main__":
    main()
