"""The top of the report: how the run ended, in one sentence, a few numbers and the gates."""

import shlex
from typing import Any

from peftcli.report.blocks import Gate, Tile, Tone
from peftcli.report.format import (
    DASH,
    compact,
    count,
    duration,
    percent,
    several,
    share,
    significant,
    size,
    without_home,
)
from peftcli.report.load import Stages, figure, find, objects, text
from peftcli.report.metrics import BY_KEY, interval, primary_metric, rows_scored, task_of

STATUS: dict[str, tuple[str, Tone]] = {
    "finished": ("✓ finished", "good"),
    "stopped": ("‖ stopped early", "warn"),
    "diverged": ("✗ diverged", "bad"),
}
UNFINISHED_LIMIT = 0.05


def status(stages: Stages) -> tuple[str, Tone]:
    """How the run ended, as a word with a sign and a tone."""
    return STATUS.get(text(stages.metrics, "status"), (text(stages.metrics, "status"), ""))


def subtitle(stages: Stages) -> str:
    """What was trained, in a few words."""
    chosen = {text(row, "key"): text(row, "value") for row in objects(stages.plan, "decisions")}
    parts = [text(stages.plan, "model", "name"), text(stages.metrics, "task"), text(stages.plan, "adapter", "method")]
    parts.append(chosen.get("model.dtype", DASH))
    return " · ".join(part for part in parts if part != DASH)


def verdict(stages: Stages) -> str:
    """What came of the run, in plain sentences."""
    parts = [_ending(stages), _learned(stages), _merged(stages)]
    return " ".join(part for part in parts if part)


def _ending(stages: Stages) -> str:
    steps = _first(figure(stages.train, "steps"), figure(stages.metrics, "train", "steps"))
    if stages.metrics.get("status") == "diverged":
        return f"Training diverged after {count(steps)} steps: a loss or a gradient was no longer finite."
    if stages.metrics.get("status") == "stopped":
        return f"Training stopped early after {count(steps)} steps; `{_resume_command(stages)}` continues it."
    return ""


def _resume_command(stages: Stages) -> str:
    """The recorded command, so that it can be pasted: to resume, without what would remove the run."""
    try:
        words = shlex.split(text(stages.environment, "command"))
    except ValueError:  # the command of another shell, with a quote that is never closed
        words = []
    if words[:2] != ["peftcli", "train"]:
        return "peftcli train RECIPE --resume"
    kept = [word for word in words if word not in ("--overwrite", "--resume")]
    return without_home(shlex.join([*kept, "--resume"]))


def _learned(stages: Stages) -> str:
    metric = primary_metric(stages.metrics)
    if metric is None and figure(stages.data or find(stages.metrics, "data") or {}, "test_rows") == 0:
        return (
            "All rows were trained on (dataset.split.test_size: 0) and none held out, so nothing here says whether the "
            "model got better."
        )
    if metric is None:
        return "No held-out row was scored, so nothing here says whether the model got better."
    rows = rows_scored(stages, metric.key)
    on = f" on {rows:,} held-out rows" if rows else " on the held-out rows"
    name = metric.title.split(",")[0]
    unit = " nats per trained token" if metric.key == "loss" and task_of(stages).generates else ""
    base, adapter = figure(stages.metrics, "base", metric.key), figure(stages.metrics, "adapter", metric.key)
    if adapter is None or base is None:
        side, measured = ("adapter", adapter) if base is None else ("base", base)
        other = "base" if base is None else "adapter"
        return f"{name} of the {side} is {metric.write(measured)}{unit}{on}; the {other} was not scored."
    before, after = metric.write(base), metric.write(adapter)
    if before == after:
        return f"{name} stayed at {after}{unit}{on}."
    moved = "rose" if adapter > base else "fell"
    word, tone = metric.verdict(base, adapter)
    worse = f" That is {word} than the base." if tone == "bad" else ""
    return f"{name} {moved} from {before} to {after}{unit}{on}{_doubt(stages, metric.key, rows)}.{worse}"


def _doubt(stages: Stages, key: str, rows: int | None) -> str:
    base, adapter = interval(stages, "base"), interval(stages, "adapter")
    if key != "exact_match" or base is None or adapter is None:
        return ""
    if base[1] < adapter[0] or adapter[1] < base[0]:
        return ""
    return f", but the two 95 % intervals overlap: {rows:,} rows do not settle it"


def _merged(stages: Stages) -> str:
    agreement = _merge_figure(stages, "top1_agreement")
    if agreement is None:
        return ""
    positions = figure(stages.merge, "positions")
    where = f" at {percent(agreement)} of {count(positions)} positions" if positions else f" at {percent(agreement)}"
    does = task_of(stages).agreement
    sentence = f"The merged model {does} as the adapter{where}"
    met = find(stages.merge, "met")
    if met is None:
        return sentence + "."
    return sentence + ("." if met else ", and its drift is outside the limits.")


def warnings(stages: Stages) -> tuple[str, ...]:
    """What makes the figures of this run worth less than they look."""
    data = stages.data or find(stages.metrics, "data") or {}
    train_rows, found = figure(data, "train_rows"), []
    if leaked := figure(data, "leaked_rows"):
        found.append(
            f"{several(leaked, 'held-out row also stands', 'held-out rows also stand')} among the training "
            "rows: their answers were seen, and the held-out scores flatter the adapter."
        )
    if truncated := figure(data, "truncated_rows"):
        limit = figure(data, "max_length")
        cut = f" at {count(limit)} tokens" if limit else ""
        found.append(
            f"{several(truncated, 'row was', 'rows were')} cut{cut}: what stood behind the cut was neither "
            "learned nor scored."
        )
    # A row that is cut has no end to learn; runs of an earlier version did not count those that have one.
    expected = _first(figure(data, "eos_expected_rows"), train_rows)
    ended = figure(data, "eos_trained_rows")
    if ended is not None and expected and ended < expected:
        found.append(
            f"{count(expected - ended)} of {count(expected)} training rows do not teach the model to "
            "stop: their end token is not trained."
        )
    unfinished = figure(stages.metrics, "adapter", "unfinished_answers")
    if unfinished is not None and unfinished > UNFINISHED_LIMIT:
        limit = figure(stages.eval, "decoding", "max_new_tokens")
        within = f" within {count(limit)} tokens" if limit else ""
        found.append(f"{percent(unfinished)} of the adapter's answers did not stop{within}.")
    if find(stages.merge, "met") is False:
        found.append("The merged model drifts from the adapter by more than the limits allow; see Merge.")
    return tuple(found)


def tiles(stages: Stages) -> tuple[Tile, ...]:
    """The few figures that are looked for first."""
    found = []
    metric = primary_metric(stages.metrics)
    keys = [key for key in dict.fromkeys((metric.key if metric else "loss", "loss"))]
    for key in keys:
        base, adapter = figure(stages.metrics, "base", key), figure(stages.metrics, "adapter", key)
        if base is not None or adapter is not None:
            write = BY_KEY[key].write
            per_token = key == "loss" and task_of(stages).generates
            note = "base → adapter, nats per token" if per_token else "base → adapter"
            found.append(Tile(BY_KEY[key].title.split(",")[0], f"{write(base)} → {write(adapter)}", note))
    if find(stages.metrics, "retention"):
        losses = [significant(figure(stages.metrics, "retention", key)) for key in ("base_loss", "adapter_loss")]
        found.append(Tile("Forgetting", " → ".join(losses), "loss on another text, base → adapter"))
    agreement = _merge_figure(stages, "top1_agreement")
    if agreement is not None:
        what = "next token" if task_of(stages).generates else "label"
        found.append(Tile("Merge agreement", percent(agreement), f"same {what} as the adapter"))
    seconds = _first(figure(stages.train, "seconds"), figure(stages.metrics, "train", "seconds"))
    if seconds is not None:
        speed = _first(figure(stages.train, "tokens_per_second"), figure(stages.metrics, "train", "tokens_per_second"))
        note = f"{significant(speed)} tokens/s" if speed is not None else ""
        found.append(Tile("Training time", duration(seconds), note))
    adapter_bytes, base_bytes = (
        figure(stages.metrics, "bytes", "adapter"),
        figure(stages.metrics, "bytes", "base"),
    )
    if adapter_bytes is not None:
        note = f"{share(adapter_bytes, base_bytes)} of the base" if base_bytes else ""
        found.append(Tile("Adapter size", size(adapter_bytes), note))
    return tuple(found)


def gates(stages: Stages) -> tuple[Gate, ...]:
    """The recipe's gates, each met, not met, or not measured."""
    return tuple(_gate(gate) for gate in objects(stages.metrics, "gates"))


def _gate(gate: dict[str, Any]) -> Gate:
    met = gate.get("met") if figure(gate, "value") is not None else None
    outcome: tuple[str, Tone] = ("– not measured", "warn")
    if met is not None:
        outcome = ("✓ met", "good") if met else ("✗ not met", "bad")
    return Gate(text(gate, "name"), text(gate, "limit"), compact(figure(gate, "value")), *outcome)


def _merge_figure(stages: Stages, key: str) -> float | None:
    return _first(figure(stages.merge, key), figure(stages.metrics, "merge", key))


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)
