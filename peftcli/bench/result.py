"""What a comparison found: losses that must be equal, medians, ratios and a verdict; no names and no folders."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftcli.bench.measure import Measurement
from peftcli.bench.workload import FLAT, REFERENCE, Job, Row, Tool, mean_attended
from peftcli.report.format import several

LARGEST_SHARE = 0.005
"""The most by which a loss may differ from the reference, relative to it."""
WARM_STEPS = 2
"""Steps that the median step leaves out."""
PLAIN = ("trl", "trl_fp32")
"""SFTTrainer with its defaults."""

# The gate: no speed for a tool whose losses differ.


@dataclass(frozen=True)
class Gate:
    """How the losses of a tool compare with those of the reference.

    Attributes:
        held_out_share: relative difference of the held-out losses; None without one.
        mean_share: mean relative difference of the losses of the steps; None where the steps differ.
        largest: largest difference of the loss of a step, nats; None where the steps differ.
        limit: of both shares.
    """

    held_out_share: float | None
    mean_share: float | None
    largest: float | None
    limit: float

    @property
    def met(self) -> bool:
        """The losses are equal within the limit; those of the steps count where the steps are the same."""
        if self.held_out_share is None or not abs(self.held_out_share) <= self.limit:
            return False
        return self.mean_share is None or self.mean_share <= self.limit


def judge_losses(
    losses: Sequence[float],
    held_out: float | None,
    reference: Sequence[float],
    reference_held_out: float | None,
    limit: float,
) -> Gate:
    """Compare the losses of a tool with those of the reference."""
    share = None
    if held_out is not None and reference_held_out is not None:
        share = (held_out - reference_held_out) / reference_held_out
    if len(losses) != len(reference) or not reference:
        return Gate(share, None, None, limit)
    differences = [abs(one - other) for one, other in zip(losses, reference, strict=True)]
    return Gate(share, sum(differences) / sum(reference), max(differences), limit)


# The results of one regime


@dataclass(frozen=True)
class Measurements:
    """All runs of a regime.

    Attributes:
        runs: of each tool, one per round that finished.
        errors: of tools that failed.
        held_out: nats per token of each tool's adapter of the first round.
        limit: of the gate.
    """

    runs: Mapping[str, Sequence[Measurement]]
    errors: Mapping[str, str]
    held_out: Mapping[str, float]
    limit: float


def result_object(
    made: Mapping[str, Any], bits: int, results: list[dict[str, Any]], against: Sequence[Sequence[str]] = (PLAIN,)
) -> dict[str, Any]:
    """The object of `--json`: the machine, the model and the results.

    Args:
        made: what `make_model` returned.
        against: as for `verdict`.
    """
    return {
        "schema": 1,
        "environment": made["environment"],
        "shape": made["shape"],
        "parameters": made["parameters"],
        "bits": bits,
        "peak_flops": made["peak_flops"],
        "regimes": results,
        "verdict": verdict(results[0], against),
    }


def regime_result(
    job: Job, rows: Sequence[Row], tools: Sequence[Tool], measured: Measurements, made: Mapping[str, Any]
) -> dict[str, Any]:
    """The results of all tools on one regime.

    Args:
        made: what `make_model` returned.
    """
    tokens, trained = sum(len(row.ids) for row in rows), sum(len(row.answer) for row in rows)
    longest = max(len(row.ids) for row in rows)
    work = _flops_per_token(made["flops"], mean_attended(rows))
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
            | _details(runs[0], job.regime.rows * longest)
            | (_speed(runs, tokens, trained, work, made["peak_flops"]) if gate.met else {})
        )
    return {
        "regime": job.regime.name,
        "steps": job.steps,
        "rounds": max((len(runs) for runs in measured.runs.values()), default=0),
        "rows_per_step": job.regime.rows,
        "tokens": tokens,
        "label_tokens": trained,
        "longest_tokens": longest,
        "learning_rate": job.shape.learning_rate,
        "gate_share": measured.limit,
        "tools": found,
        "ratios": ratios(found),
    }


def _flops_per_token(flops: Mapping[str, float] | None, attended: float) -> tuple[float, float] | None:
    """FLOPs of a token in the model, and those that checkpointing all layers adds."""
    if flops is None:
        return None
    return flops["token"] + flops["attended"] * attended, flops["again"] + flops["again_attended"] * attended


def _spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def _times(runs: Sequence[Measurement]) -> dict[str, Any]:
    steps = [statistics.median(run.step_seconds[WARM_STEPS:] or run.step_seconds or (run.seconds,)) for run in runs]
    return {
        "seconds": _spread([run.seconds for run in runs]),
        "first_step_seconds": _spread([run.first_step_seconds for run in runs]),
        "process_seconds": _spread([run.process_seconds for run in runs]),
        "step_seconds": _spread(steps, 5),
    }


def _memory(runs: Sequence[Measurement]) -> dict[str, Any]:
    above = [run.above_bytes for run in runs if run.above_bytes is not None]
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return {
        "peak_memory_bytes": round(statistics.median(peaks)) if peaks else None,
        "above_start_bytes": round(statistics.median(above)) if above else None,
        "card_bytes": max((run.gpu_bytes for run in runs if run.gpu_bytes is not None), default=None),
    }


def _details(run: Measurement, padded_tokens: int) -> dict[str, Any]:
    """Other values that the tool reports.

    Args:
        padded_tokens: maximum tokens of a micro-batch without a limit: its rows times the longest row.
    """
    known = {name: value for name, value in run.details.items() if value is not None}
    return {"attention": None, "loss_head": None, "micro_batch_tokens": padded_tokens} | known


def _losses(run: Measurement, held_out: float | None, gate: Gate) -> dict[str, Any]:
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
    runs: Sequence[Measurement], tokens: int, trained: int, work: tuple[float, float] | None, peak: float | None
) -> dict[str, Any]:
    """Tokens and FLOPs per second; padding does not count, and MFU leaves out what is recomputed."""
    seconds = statistics.median(run.seconds for run in runs)
    speed: dict[str, Any] = {
        "tokens_per_second": round(tokens / seconds, 1),
        "label_tokens_per_second": round(trained / seconds, 1),
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
    """How many times as fast peftcli is as each other tool, and its memory as a share of the other's.

    A tool that does not pass the gate of equal loss has none.
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


def verdict(result: Mapping[str, Any], against: Sequence[Sequence[str]] = (PLAIN,)) -> str:
    """The result in one sentence.

    Args:
        against: groups of tools; the fastest of the first group that has a ratio is the one compared with.
    """
    tools, found = result["tools"], result["ratios"]
    named = [name for names in against for name in _fastest_first(names, found)]
    if named:
        ratio, other, own = found[named[0]], tools[named[0]], tools[FLAT]["held_out_loss"]
        memory = "" if ratio["memory_share"] is None else f"with {ratio['memory_share']:.2f} of its memory, "
        return (
            f"peftcli trains {ratio['times_as_fast']:.2f} times as fast as {other['title']} here "
            f"({ratio['least']:.2f} to {ratio['most']:.2f} over {several(result['rounds'], 'round', 'rounds')}), "
            f"{memory}at the same held-out loss ({own:.4f} and {other['held_out_loss']:.4f})"
        )
    if not set(tools) & {name for names in against for name in names}:
        return "SFTTrainer was not among the tools, so there is no ratio to it"
    failed = [tool for tool in tools.values() if "error" in tool]
    if failed:
        return f"no ratio: {failed[0]['title']} did not run ({failed[0]['error']})"
    return "no ratio: the losses are not equal, so the tools did not train the same thing"


def _fastest_first(names: Sequence[str], found: Mapping[str, Any]) -> list[str]:
    return sorted((name for name in names if name in found), key=lambda name: found[name]["times_as_fast"])
