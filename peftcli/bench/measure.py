"""One run of one tool, and what it took."""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from peftcli.bench.job import Job, write_spec
from peftcli.bench.process import Ended, run_process
from peftcli.bench.tools import Tool
from peftcli.run_dir import RunDir, read_json, read_log


@dataclass(frozen=True)
class Ran:
    """One run that came to its end.

    Attributes:
        seconds: of the training loop.
        first_step_seconds: from the start of the process to the end of the first step.
        process_seconds: from the start of the process to its exit.
        step_seconds: of each step but the first.
        losses: of each step.
        peak_bytes: of torch's allocator on a card, else of the resident memory, when the loop has ended; None where
            the tool does not say.
        above_bytes: how far the resident memory rose above what it was when the loop began; None on a card.
        card_bytes: how far the used memory of the card rose while the process ran, by its driver; None without one.
        recomputed: share of the blocks that run forward twice.
        adapter: what was trained.
        figures: what the tool itself says besides.
    """

    seconds: float
    first_step_seconds: float
    process_seconds: float
    step_seconds: tuple[float, ...]
    losses: tuple[float, ...]
    peak_bytes: int | None
    above_bytes: int | None
    card_bytes: int | None
    recomputed: float
    adapter: Path
    figures: dict[str, Any]


def measure(tool: Tool, job: Job) -> Ran | str:
    """Run a tool once.

    Returns:
        What it took, or the end of its error.
    """
    run = job.place / f"run-{tool.name}"
    shutil.rmtree(run, ignore_errors=True)
    return _ours(tool, job, run) if tool.ours else _sft(tool, job, run)


def run_child(verb: str, spec: Path, result: Path) -> Ended:
    """One verb of `peftcli.bench.child`."""
    words = [sys.executable, "-m", "peftcli.bench.child", verb, str(spec), str(result)]
    return run_process(words, result.with_suffix(".log"))


def _ours(tool: Tool, job: Job, run: Path) -> Ran | str:
    recipe = write_spec(job.place / f"{tool.name}.yaml", job.recipe(tool.settings))
    folder = RunDir(run)
    first: list[float] = []

    def look() -> None:
        if not first and folder.log.is_file() and folder.log.stat().st_size:
            first.append(time.monotonic())

    words = [sys.executable, "-m", "peftcli", "train", str(recipe), "--output-dir", str(run)]
    words += ["--num-processes", "1"]  # as the tools beside it
    begun = time.monotonic()
    # A cache of its own, since the others prepare their rows each time too.
    cache = job.place / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    ended = run_process(words, job.place / f"{tool.name}.log", look, {"PEFTCLI_CACHE": str(cache)})
    if ended.error is not None:
        return ended.error
    facts, log = read_json(folder.train), [row for row in read_log(folder.log) if "loss" in row]
    recomputed = _recomputed(read_json(folder.plan), int(job.shape.widths["num_hidden_layers"]))
    peak, before = int(facts["peak_memory_bytes"]), int(facts["resident_before_bytes"])
    return Ran(
        seconds=facts["seconds"],
        first_step_seconds=first[0] - begun,
        process_seconds=ended.seconds,
        step_seconds=_between([row["elapsed_seconds"] for row in log]),
        losses=tuple(row["loss"] for row in log),
        peak_bytes=peak,
        above_bytes=max(0, peak - before) if job.device == "cpu" else None,
        card_bytes=ended.card_bytes,
        recomputed=recomputed,
        adapter=folder.adapter,
        figures={"tokens": facts["tokens"], "trained_tokens": facts["trained_tokens"], "batching": facts["batching"]},
    )


def _recomputed(plan: dict[str, Any], layers: int) -> float:
    if not plan["trainer"].get("activation_checkpointing"):
        return 0.0
    blocks = plan.get("checkpointed_blocks")
    return 1.0 if blocks is None else blocks / layers


def _sft(tool: Tool, job: Job, run: Path) -> Ran | str:
    spec = write_spec(job.place / f"{tool.name}.json", job.sft(tool, run))
    result = job.place / f"{tool.name}-result.json"
    begun = time.time()
    ended = run_child("sft", spec, result)
    if ended.error is not None:
        return ended.error
    found = json.loads(result.read_text(encoding="utf-8"))
    return ran_of(found, begun, ended, run / "adapter", job.device)


def ran_of(found: dict[str, Any], begun: float, ended: Ended, adapter: Path, device: str) -> Ran:
    """What a child has written, as a run.

    Args:
        begun: when the process was started, seconds since the epoch.
    """
    peak, before = found["peak_memory_bytes"], found["resident_before_bytes"]
    return Ran(
        seconds=found["seconds"],
        first_step_seconds=found["first_step_at"] - begun,
        process_seconds=ended.seconds,
        step_seconds=tuple(found["step_seconds"]),
        losses=tuple(found["losses"]),
        peak_bytes=peak,
        above_bytes=max(0, peak - before) if device == "cpu" else None,
        card_bytes=ended.card_bytes,
        recomputed=found["recomputed"],
        adapter=adapter,
        figures={"reserved_bytes": found["reserved_bytes"]},
    )


def _between(ends: Sequence[float]) -> tuple[float, ...]:
    return tuple(after - before for before, after in pairwise(ends))
