"""The comparison of a few minutes: interleaved runs of peftcli and SFTTrainer on the user's machine."""

import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftcli.bench.measure import Measurement, measure, run_child
from peftcli.bench.result import LARGEST_SHARE, Measurements, regime_result, result_object
from peftcli.bench.workload import FLAT, LEAST_GIB, REFERENCE, SHAPES, SKEWED, TOOLS, Job, Tool, write_spec
from peftcli.errors import MachineError, RecipeError
from peftcli.progress import Progress
from peftcli.report.format import several

COSTS = (1.0, 2.0, 2.5)
"""Roughly how long a step of each tool of the short comparison takes, relative to the first."""
TRIAL_STEPS = 4
FEWEST_STEPS, MOST_STEPS = 10, 200
Run = Callable[[Tool, Job], Measurement | str]


@dataclass(frozen=True)
class BenchRequest:
    """The options of a comparison.

    Attributes:
        shape: a key of `SHAPES`, or `auto`.
        bits: of the base model's weights, 4 or 16.
        rounds: runs of each tool.
        minutes: that all of it may take, roughly.
    """

    shape: str = "auto"
    bits: int = 16
    rounds: int = 3
    minutes: float = 2.0


def compare_quickly(request: BenchRequest, folder: Path, progress: Progress) -> dict[str, Any]:
    """Train the same rows of chat length with peftcli, padding-free and padded, and with SFTTrainer's defaults.

    Args:
        folder: for rows and runs.

    Returns:
        The object that a user sends in; error messages of the tools may still name folders.

    Raises:
        MachineError: the model cannot be made, or peftcli itself does not run here.
        RecipeError: unknown shape or number of bits.
    """
    check_request(request)
    progress.note("preparing the model")
    made = make_model(request.shape, request.bits, folder)
    shape = SHAPES[made["shape"]]
    regime = SKEWED.stretched(shape.stretch)
    job = Job(shape, request.bits, regime, TRIAL_STEPS, folder, Path(made["folder"]), made["device"])
    job.write()
    trial = measure(TOOLS[FLAT], job)
    if isinstance(trial, str):
        raise MachineError(f"peftcli cannot train --shape {shape.key} here: {trial}; use a smaller --shape")
    job = replace(job, steps=steps_for(request, trial))
    progress.note(
        f"{made['environment']['device']['name']}, {made['parameters'] / 1e6:,.0f} million parameters: "
        f"{job.steps} steps of {regime.rows} rows, {several(request.rounds, 'round', 'rounds')} of {len(COSTS)} tools"
    )
    rows, tools = job.write(), quick_tools(made["device"])
    result = regime_result(job, rows, tools, take_turns(tools, job, request.rounds, progress, run=measure), made)
    return result_object(made, request.bits, [result])


def check_request(request: BenchRequest) -> None:
    """Check the options of the command line.

    Raises:
        RecipeError: unknown shape or number of bits.
    """
    if request.shape not in ("auto", *SHAPES):
        raise RecipeError(f"--shape {request.shape}: must be one of auto, {', '.join(SHAPES)}")
    if request.bits not in LEAST_GIB:
        raise RecipeError(f"--bits {request.bits}: must be 16, or 4 for quantized weights")


def quick_tools(device: str) -> list[Tool]:
    """Both of peftcli's, and SFTTrainer's defaults: on a CPU in float32, since few have bfloat16 instructions."""
    return [TOOLS[name] for name in (FLAT, REFERENCE, "trl" if device == "cuda" else "trl_fp32")]


def steps_for(request: BenchRequest, trial: Measurement) -> int:
    """Steps that fit into the minutes, judged by a short run of peftcli; at least ten."""
    step = statistics.median(trial.step_seconds)
    startup = trial.process_seconds - trial.seconds
    left = request.minutes * 60 - trial.process_seconds - request.rounds * len(COSTS) * startup
    return max(FEWEST_STEPS, min(int(left / (request.rounds * sum(COSTS) * step)), MOST_STEPS))


def make_model(shape: str, bits: int, folder: Path) -> dict[str, Any]:
    """Make the model in a separate process, which also describes this machine.

    Raises:
        MachineError: it could not be made.
    """
    spec = write_spec(folder / "make.json", {"shape": shape, "bits": bits})
    result = folder / "made.json"
    ended = run_child("make", spec, result)
    if ended.code == MachineError.exit_code:
        raise MachineError(ended.error)
    if ended.error is not None:
        raise MachineError(f"the model of --shape {shape} could not be made: {ended.error}; use a smaller --shape")
    made: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return made


def take_turns(tools: Sequence[Tool], job: Job, rounds: int, progress: Progress, *, run: Run = measure) -> Measurements:
    """Run every tool once a round (A B C A B C), and judge the adapters of the first round.

    Runs are interleaved, so that a machine that slows down affects all tools. A tool that fails is not tried again.

    Args:
        run: runs one tool once.
    """
    runs: dict[str, list[Measurement]] = {tool.name: [] for tool in tools}
    errors: dict[str, str] = {}
    progress.start("runs", rounds * len(tools))
    for number in range(rounds):
        for index, tool in enumerate(tools):
            if tool.name not in errors:
                found = run(tool, job)
                if isinstance(found, str):
                    errors[tool.name] = found
                    progress.note(f"  {tool.title}: {found}")
                else:
                    runs[tool.name].append(keep_adapter(found, job.folder / f"adapter-{tool.name}"))
            progress.advance(number * len(tools) + index + 1, {"tool": tool.title})
    progress.end()
    folders = {name: made[0].adapter for name, made in runs.items() if made}
    return Measurements(runs, errors, judge(job, folders) if folders else {}, LARGEST_SHARE)


def keep_adapter(found: Measurement, folder: Path) -> Measurement:
    """Copy the adapter of a run, whose folder the next run replaces; the copy of an earlier run stays as it is."""
    if not folder.is_dir():
        shutil.copytree(found.adapter, folder)
    return replace(found, adapter=folder)


def judge(job: Job, adapters: Mapping[str, Path]) -> dict[str, float]:
    """The held-out loss of each adapter, all by the same code.

    Raises:
        MachineError: the base model could not be run.
    """
    spec = {
        "model": str(job.model),
        "bits": job.bits,
        "device": job.device,
        "dtype": "float32" if job.device == "cpu" else "bfloat16",
        "rows": str(job.folder / "held-out-ids.jsonl"),
        "adapters": {name: str(folder) for name, folder in adapters.items()},
    }
    result = job.folder / "judged.json"
    ended = run_child("judge", write_spec(job.folder / "judge.json", spec), result)
    if ended.error is not None:
        raise MachineError(f"the held-out rows could not be evaluated: {ended.error}")
    judged: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))
    return judged
