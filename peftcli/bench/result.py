"""What a regime came to: medians, ratios and the verdict; nothing in it names a person or a folder."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from peftcli.bench.gate import Gate, judge_losses
from peftcli.bench.job import Job
from peftcli.bench.measure import Ran
from peftcli.bench.regimes import Row, attended
from peftcli.bench.rounds import Measured
from peftcli.bench.tools import AS_IT_COMES, FLAT, REFERENCE, TUNED, Tool
from peftcli.report.format import several

WARM_STEPS = 2
"""Steps before the median of a step is taken."""


def regime_result(
    job: Job, rows: Sequence[Row], tools: Sequence[Tool], measured: Measured, made: Mapping[str, Any]
) -> dict[str, Any]:
    """The figures of all tools on one regime.

    Args:
        made: what `make_model` returned.
    """
    tokens, learned = sum(len(row.ids) for row in rows), sum(len(row.answer) for row in rows)
    longest = max(len(row.ids) for row in rows)
    work = _work(made["flops"], attended(rows))
    reference = measured.runs.get(REFERENCE) or ()
    losses = reference[0].losses if reference else ()
    found: dict[str, Any] = {}
    for tool in tools:
        runs = measured.runs.get(tool.name) or ()
        if not runs:
            found[tool.name] = {"title": tool.title, "error": measured.errors.get(tool.name, "was not run")}
            continue
        held_out = measured.held_out.get(tool.name)
        gate = judge_losses(runs[0].losses, held_out, losses, measured.held_out.get(REFERENCE), measured.limit)
        found[tool.name] = (
            {"title": tool.title, "settings": dict(tool.settings)}
            | _losses(runs[0], held_out, gate)
            | _times(runs)
            | _memory(runs)
            | (_speed(runs, tokens, learned, work, made["peak_flops"]) if gate.met else {})
        )
    return {
        "regime": job.regime.name,
        "steps": job.steps,
        "rounds": max((len(runs) for runs in measured.runs.values()), default=0),
        "rows_per_step": job.regime.rows,
        "tokens": tokens,
        "label_tokens": learned,
        "longest_tokens": longest,
        "learning_rate": job.shape.learning_rate,
        "gate_share": measured.limit,
        "tools": found,
        "ratios": ratios(found),
    }


def _work(flops: Mapping[str, float] | None, seen: float) -> tuple[float, float] | None:
    """Products and sums of a token in the model, and those that checkpointing all blocks adds."""
    if flops is None:
        return None
    return flops["token"] + flops["attended"] * seen, flops["again"] + flops["again_attended"] * seen


def _spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def _times(runs: Sequence[Ran]) -> dict[str, Any]:
    steps = [statistics.median(run.step_seconds[WARM_STEPS:] or run.step_seconds or (run.seconds,)) for run in runs]
    return {
        "seconds": _spread([run.seconds for run in runs]),
        "first_step_seconds": _spread([run.first_step_seconds for run in runs]),
        "process_seconds": _spread([run.process_seconds for run in runs]),
        "step_seconds": _spread(steps, 5),
    }


def _memory(runs: Sequence[Ran]) -> dict[str, Any]:
    above = [run.above_bytes for run in runs if run.above_bytes is not None]
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return {
        "peak_memory_bytes": round(statistics.median(peaks)) if peaks else None,
        "above_start_bytes": round(statistics.median(above)) if above else None,
        "card_bytes": max((run.card_bytes for run in runs if run.card_bytes is not None), default=None),
        **{name: value for name, value in runs[0].figures.items() if value is not None},
    }


def _losses(run: Ran, held_out: float | None, gate: Gate) -> dict[str, Any]:
    return {
        "first_loss": run.losses[0] if run.losses else None,
        "last_loss": run.losses[-1] if run.losses else None,
        "held_out_loss": held_out,
        "held_out_difference_share": gate.held_out_share,
        "mean_loss_difference_share": gate.mean_share,
        "largest_loss_difference": gate.largest,
        "equal_loss": gate.met,
    }


def _speed(
    runs: Sequence[Ran], tokens: int, learned: int, work: tuple[float, float] | None, peak: float | None
) -> dict[str, Any]:
    """Tokens and products a second; no padding counts, and MFU leaves out what is run twice."""
    seconds = statistics.median(run.seconds for run in runs)
    speed: dict[str, Any] = {
        "tokens_per_second": round(tokens / seconds, 1),
        "label_tokens_per_second": round(learned / seconds, 1),
        "model_tflops": None,
        "hardware_tflops": None,
        "mfu": None,
    }
    if work is not None:
        rate = tokens / seconds
        once, again = rate * work[0], rate * work[1] * runs[0].recomputed
        speed["model_tflops"] = round(once / 1e12, 5)
        speed["hardware_tflops"] = round((once + again) / 1e12, 5)
        speed["mfu"] = None if peak is None else round(once / peak, 4)
    return speed


def ratios(tools: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How many times the flat lines are as fast as each other tool, and their share of its memory.

    A tool outside the gate of equal loss has none.
    """
    flat = tools.get(FLAT, {})
    found: dict[str, Any] = {}
    for name, other in tools.items():
        if name == FLAT or not (flat.get("equal_loss") and other.get("equal_loss")):
            continue
        found[name] = {
            "times_as_fast": round(other["seconds"]["median"] / flat["seconds"]["median"], 3),
            "least": round(other["seconds"]["min"] / flat["seconds"]["max"], 3),
            "most": round(other["seconds"]["max"] / flat["seconds"]["min"], 3),
            "process_share": round(flat["process_seconds"]["median"] / other["process_seconds"]["median"], 3),
            "memory_share": _share(flat, other, "peak_memory_bytes"),
            "memory_above_start_share": _share(flat, other, "above_start_bytes"),
            "card_memory_share": _share(flat, other, "card_bytes"),
        }
    return found


def _share(flat: Mapping[str, Any], other: Mapping[str, Any], name: str) -> float | None:
    return None if flat[name] is None or not other[name] else round(flat[name] / other[name], 3)


def verdict(result: Mapping[str, Any]) -> str:
    """One sentence on what was found, against the fastest way to run SFTTrainer as it comes."""
    tools, found = result["tools"], result["ratios"]
    named = [name for names in (AS_IT_COMES, TUNED) for name in _fastest_first(names, found)]
    if named:
        ratio, other, own = found[named[0]], tools[named[0]], tools[FLAT]["held_out_loss"]
        memory = "" if ratio["memory_share"] is None else f"with {ratio['memory_share']:.2f} of its memory, "
        return (
            f"peftcli trains {ratio['times_as_fast']:.2f} times as fast as {other['title']} here "
            f"({ratio['least']:.2f} to {ratio['most']:.2f} over {several(result['rounds'], 'round', 'rounds')}), "
            f"{memory}at the same held-out loss ({own:.4f} against {other['held_out_loss']:.4f})"
        )
    if not set(tools) & {*AS_IT_COMES, *TUNED}:
        return "SFTTrainer was not among the tools, so there is no ratio to it"
    failed = [tool for tool in tools.values() if "error" in tool]
    if failed:
        return f"no ratio: {failed[0]['title']} did not run ({failed[0]['error']})"
    return "no ratio is stated: the losses are not equal, so the speeds are of different things"


def _fastest_first(names: Sequence[str], found: Mapping[str, Any]) -> list[str]:
    return sorted((name for name in names if name in found), key=lambda name: found[name]["times_as_fast"])
