"""The comparison of a few minutes that a user makes on a card of their own."""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftcli.bench.job import Job
from peftcli.bench.measure import Ran, measure
from peftcli.bench.regimes import REGIMES
from peftcli.bench.result import regime_result, verdict
from peftcli.bench.rounds import make_model, take_turns
from peftcli.bench.shapes import LEAST_GIB, SHAPES
from peftcli.bench.tools import FLAT, REFERENCE, TOOLS, Tool
from peftcli.errors import MachineError, RecipeError
from peftcli.progress import Progress
from peftcli.report.format import several

COSTS = (1.0, 2.0, 2.5)
"""About how long each tool of the short comparison takes for a step, beside the first."""
TRIAL_STEPS = 4
FEWEST_STEPS, MOST_STEPS = 10, 200


@dataclass(frozen=True)
class Asked:
    """What a user asks for.

    Attributes:
        shape: a key of `SHAPES`, or `auto`.
        bits: of the base's weights, 4 or 16.
        rounds: runs of each tool.
        minutes: that all of it may take, about.
    """

    shape: str = "auto"
    bits: int = 16
    rounds: int = 3
    minutes: float = 2.0


def compare_quickly(asked: Asked, place: Path, progress: Progress) -> dict[str, Any]:
    """Train the same rows of chat length with peftcli, flat and padded, and with SFTTrainer as it comes.

    Args:
        place: folder for rows and runs.

    Returns:
        The object that a user sends in; error texts of the tools may still name folders.

    Raises:
        MachineError: the model cannot be made, or peftcli itself does not run here.
        RecipeError: there is no such shape, or no such number of bits.
    """
    check_asked(asked)
    progress.note("making the model, or finding it in the cache")
    made = make_model(asked.shape, asked.bits, place)
    shape = SHAPES[made["shape"]]
    regime = REGIMES["skewed"].stretched(shape.stretch)
    job = Job(shape, asked.bits, regime, TRIAL_STEPS, place, Path(made["folder"]), made["device"])
    job.write()
    trial = measure(TOOLS[FLAT], job)
    if isinstance(trial, str):
        raise MachineError(f"peftcli does not train --shape {shape.key} here: {trial}; take a smaller --shape")
    job = replace(job, steps=steps_for(asked, trial))
    progress.note(
        f"{made['environment']['device']['name']}, {made['parameters'] / 1e6:,.0f} million weights: "
        f"{job.steps} steps of {regime.rows} rows, {several(asked.rounds, 'round', 'rounds')} of {len(COSTS)} tools"
    )
    rows, tools = job.write(), quick_tools(made["device"])
    result = regime_result(job, rows, tools, take_turns(tools, job, asked.rounds, progress, run=measure), made)
    return result_object(made, asked.bits, [result])


def check_asked(asked: Asked) -> None:
    """Check the words of the command line.

    Raises:
        RecipeError: there is no such shape, or no such number of bits.
    """
    if asked.shape not in ("auto", *SHAPES):
        raise RecipeError(f"--shape {asked.shape}: the shapes are auto, {', '.join(SHAPES)}; name one of them")
    if asked.bits not in LEAST_GIB:
        raise RecipeError(f"--bits {asked.bits}: weights have 16 bits or, quantized, 4; name one of the two")


def quick_tools(device: str) -> list[Tool]:
    """Both of ours, and SFTTrainer as it comes: on a CPU in float32, since few have products of bfloat16."""
    return [TOOLS[name] for name in (FLAT, REFERENCE, "trl" if device == "cuda" else "trl_fp32")]


def steps_for(asked: Asked, trial: Ran) -> int:
    """Steps that the minutes asked for are enough for, by a short run of peftcli; never fewer than ten."""
    step = statistics.median(trial.step_seconds)
    once = trial.process_seconds - trial.seconds
    left = asked.minutes * 60 - trial.process_seconds - asked.rounds * len(COSTS) * once
    return max(FEWEST_STEPS, min(int(left / (asked.rounds * sum(COSTS) * step)), MOST_STEPS))


def result_object(made: dict[str, Any], bits: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of a comparison: the machine, the model and the figures."""
    return {
        "schema": 1,
        "environment": made["environment"],
        "shape": made["shape"],
        "parameters": made["parameters"],
        "bits": bits,
        "peak_flops": made["peak_flops"],
        "regimes": results,
        "verdict": verdict(results[0]),
    }
