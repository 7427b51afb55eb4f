"""One run of one tool in a separate process, with its time and memory."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from peftcli.bench.workload import Job, Tool, write_spec
from peftcli.run_dir import RunDir, read_json, read_log

POLL_SECONDS = 0.05
GPU_POLL_SECONDS = 0.5
ENVIRONMENT = {"GOMP_SPINCOUNT": "2000", "CUDA_VISIBLE_DEVICES": "0"}
"""For all tools, unless set already: one GPU, and idle OpenMP threads that do not spin, which would slow a plain script
most on shared cores; peftcli sets both itself."""
SHOWN_LINES = 3
ERROR = re.compile(r"error: |[\w.]*(Error|Exception|Exhausted|Interrupt)\b")
"""Start of the line with the reason of a failure, in the output of peftcli and Python."""


@dataclass(frozen=True)
class Exited:
    """How a process ended.

    Attributes:
        code: exit code, negative for a signal.
        seconds: from its start to its exit.
        peak_bytes: peak resident memory of it and its children. Linux never reports less than the process that started
            it had, so start it from a small one.
        output: the end of what it wrote.
        gpu_bytes: how far the used memory of the first GPU rose while it ran; None without a GPU.
    """

    code: int
    seconds: float
    peak_bytes: int
    output: str
    gpu_bytes: int | None = None

    @property
    def error(self) -> str | None:
        """The error message at the end of the output of a process that failed, None for one that did not."""
        if self.code == 0:
            return None
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        first = next((at for at, line in reversed(list(enumerate(lines))) if ERROR.match(line)), -SHOWN_LINES)
        return " / ".join(lines[first:][:SHOWN_LINES]).removeprefix("error: ") or f"ended with exit code {self.code}"


class GPUMemory:
    """The used memory of the first GPU, as its driver reports it."""

    def __init__(self) -> None:
        self._tool = shutil.which("nvidia-smi")
        self._polled = 0.0
        self._before = self.used()
        self._most = self._before

    def used(self) -> int | None:
        """Bytes in use by all processes, None without a GPU."""
        if self._tool is None:
            return None
        command = [self._tool, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
        answer = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        return int(answer) * 2**20 if answer.isdigit() else None

    def poll(self) -> None:
        """Read it again, unless that was done a moment ago."""
        if self._most is None or time.monotonic() - self._polled < GPU_POLL_SECONDS:
            return
        self._polled = time.monotonic()
        self._most = max(self._most, self.used() or 0)

    @property
    def rise(self) -> int | None:
        """The most that was seen, less what was in use at the start."""
        return None if self._most is None or self._before is None else self._most - self._before


def run_process(
    command: Sequence[str], log: Path, poll: Callable[[], None] | None = None, more: Mapping[str, str] | None = None
) -> Exited:
    """Run a command to its end; it is killed when this process is interrupted.

    Args:
        log: file for its output.
        poll: called every `POLL_SECONDS`.
        more: additional environment variables.
    """
    gpu = GPUMemory()
    environment = {**ENVIRONMENT, **os.environ, **(more or {})}
    with log.open("wb") as sink:
        begun = time.monotonic()
        child = subprocess.Popen(command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, env=environment)
        try:
            done = 0
            while not done:
                time.sleep(POLL_SECONDS)
                gpu.poll()
                if poll is not None:
                    poll()
                done, status, used = os.wait4(child.pid, os.WNOHANG)
            child.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if child.returncode is None:
                child.kill()
                child.wait()
        seconds = time.monotonic() - begun
    kib = 1 if sys.platform == "darwin" else 1024
    text = log.read_text(encoding="utf-8", errors="replace")
    return Exited(child.returncode, seconds, used.ru_maxrss * kib, text[-4000:], gpu.rise)


@dataclass(frozen=True)
class Measurement:
    """One run that finished.

    Attributes:
        seconds: of the training loop.
        first_step_seconds: from the start of the process to the end of the first step.
        process_seconds: from the start of the process to its exit.
        step_seconds: of each step but the first.
        losses: of each step.
        peak_bytes: at the end of the loop, of torch's allocator on a GPU, otherwise of resident memory; None where
            the tool does not report it.
        above_bytes: how far the resident memory rose in the loop; None on a GPU.
        gpu_bytes: how far the used memory of the GPU rose while the process ran, by its driver; None without one.
        recomputed: share of the layers whose forward pass runs twice (activation checkpointing).
        adapter: folder of the trained adapter.
        details: what else the tool reports: what computed attention and loss, tokens, allocator.
    """

    seconds: float
    first_step_seconds: float
    process_seconds: float
    step_seconds: tuple[float, ...]
    losses: tuple[float, ...]
    peak_bytes: int | None
    above_bytes: int | None
    gpu_bytes: int | None
    recomputed: float
    adapter: Path
    details: dict[str, Any]


def measure(tool: Tool, job: Job) -> Measurement | str:
    """Run a tool once; returns what it took, or its error message."""
    run = job.folder / f"run-{tool.name}"
    shutil.rmtree(run, ignore_errors=True)
    return _measure_peftcli(tool, job, run) if tool.ours else _measure_sft(tool, job, run)


def run_child(verb: str, spec: Path, result: Path) -> Exited:
    """Run one verb of `peftcli.bench.child`."""
    command = [sys.executable, "-m", "peftcli.bench.child", verb, str(spec), str(result)]
    return run_process(command, result.with_suffix(".log"))


def _measure_peftcli(tool: Tool, job: Job, run: Path) -> Measurement | str:
    recipe = write_spec(job.folder / f"{tool.name}.yaml", job.recipe(tool.settings))
    folder = RunDir(run)
    first: list[float] = []

    def poll() -> None:
        if not first and folder.log.is_file() and folder.log.stat().st_size:
            first.append(time.monotonic())

    command = [sys.executable, "-m", "peftcli", "train", str(recipe), "--output-dir", str(run)]
    command += ["--num-processes", "1"]  # like the other tools
    begun = time.monotonic()
    # A separate cache, because the other tools also prepare their rows every time.
    cache = job.folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    ended = run_process(command, job.folder / f"{tool.name}.log", poll, {"PEFTCLI_CACHE": str(cache)})
    if ended.error is not None:
        return ended.error
    train, plan = read_json(folder.train), read_json(folder.plan)
    log = [row for row in read_log(folder.log) if "loss" in row]
    peak, before = int(train["peak_memory_bytes"]), int(train["resident_before_bytes"])
    return Measurement(
        seconds=train["seconds"],
        first_step_seconds=first[0] - begun,
        process_seconds=ended.seconds,
        step_seconds=_between([row["elapsed_seconds"] for row in log]),
        losses=tuple(row["loss"] for row in log),
        peak_bytes=peak,
        above_bytes=max(0, peak - before) if job.device == "cpu" else None,
        gpu_bytes=ended.gpu_bytes,
        recomputed=_recomputed(plan, int(job.shape.sizes["num_hidden_layers"])),
        adapter=folder.adapter,
        details=_peftcli_details(train, plan, tool),
    )


def _peftcli_details(train: dict[str, Any], plan: dict[str, Any], tool: Tool) -> dict[str, Any]:
    batching, decisions = train["batching"], {one["key"]: one["value"] for one in plan["decisions"]}
    limited = batching["kind"] == "padding_free" or "tokens_per_micro_batch" in tool.settings
    return {
        "attention": ", ".join(batching["attention"] or [decisions["model.attention"]]),
        "loss_head": "fused_loss"
        if "fused_loss" in train["optimizations"]
        else f"TRL {plan['trainer'].get('loss_type', 'nll')}",
        "micro_batch_tokens": plan["batching"]["tokens"] if limited else None,
        "tokens": train["tokens"],
        "trained_tokens": train["trained_tokens"],
        "batching": batching,
    }


def _recomputed(plan: dict[str, Any], layers: int) -> float:
    if not plan["trainer"].get("activation_checkpointing"):
        return 0.0
    blocks = plan.get("checkpointed_blocks")
    return 1.0 if blocks is None else blocks / layers


def _measure_sft(tool: Tool, job: Job, run: Path) -> Measurement | str:
    spec = write_spec(job.folder / f"{tool.name}.json", job.sft(tool, run))
    result = job.folder / f"{tool.name}-result.json"
    begun = time.time()
    ended = run_child("sft", spec, result)
    if ended.error is not None:
        return ended.error
    found = json.loads(result.read_text(encoding="utf-8"))
    peak, before = found["peak_memory_bytes"], found["resident_before_bytes"]
    return Measurement(
        seconds=found["seconds"],
        first_step_seconds=found["first_step_at"] - begun,
        process_seconds=ended.seconds,
        step_seconds=tuple(found["step_seconds"]),
        losses=tuple(found["losses"]),
        peak_bytes=peak,
        above_bytes=max(0, peak - before) if job.device == "cpu" else None,
        gpu_bytes=ended.gpu_bytes,
        recomputed=found["recomputed"],
        adapter=run / "adapter",
        details={name: found[name] for name in ("attention", "loss_head", "reserved_bytes")},
    )


def _between(ends: Sequence[float]) -> tuple[float, ...]:
    return tuple(after - before for before, after in pairwise(ends))
