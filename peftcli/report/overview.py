"""The top of the report: how the run ended, in one sentence, a few numbers and the gates."""

import shlex
from collections.abc import Iterator

from peftcli.report.blocks import Gate, Tile, Tone
from peftcli.report.format import (
    compact,
    count,
    duration,
    percent,
    several,
    share,
    significant,
    size,
    text,
    without_home,
)
from peftcli.report.load import Stages
from peftcli.report.metrics import BY_KEY, interval, primary_metric, rows_scored, task_of
from peftcli.results import DataJson, GateResult

STATUS: dict[str, tuple[str, Tone]] = {
    "finished": ("✓ finished", "good"),
    "stopped": ("‖ stopped early", "warn"),
    "diverged": ("✗ diverged", "bad"),
}
UNFINISHED_LIMIT = 0.05


def status(stages: Stages) -> tuple[str, Tone]:
    """How the run ended, as a word with a symbol and a tone."""
    word = text(stages.metrics.status)
    return STATUS.get(word, (word, ""))


def subtitle(stages: Stages) -> str:
    """What was trained, in a few words."""
    plan, dtype = stages.plan, stages.plan.chosen.get("model.dtype")
    parts = (plan.model.name, stages.metrics.task, plan.adapter.method, None if dtype is None else dtype.value)
    return " · ".join(part for part in parts if part is not None)


def verdict(stages: Stages) -> str:
    """The result of the run, in plain sentences."""
    parts = [_ending(stages), _learned(stages), _merged(stages)]
    return " ".join(part for part in parts if part)


def _ending(stages: Stages) -> str:
    steps = stages.training.steps if stages.training else None
    if stages.metrics.status == "diverged":
        return f"Training diverged after {count(steps)} steps: a loss or a gradient was not finite."
    if stages.metrics.status == "stopped":
        return f"Training stopped early after {count(steps)} steps; `{_resume_command(stages)}` continues it."
    return ""


def _resume_command(stages: Stages) -> str:
    """The recorded command for copying: with --resume, and without options that would remove the run."""
    try:
        words = shlex.split((stages.environment and stages.environment.command) or "")
    except ValueError:  # a command of another shell, with an unclosed quote
        words = []
    if words[:2] != ["peftcli", "train"]:
        return "peftcli train RECIPE --resume"
    options = [word for word in words if word not in ("--overwrite", "--resume")]
    return without_home(shlex.join([*options, "--resume"]))


def _learned(stages: Stages) -> str:
    metric = primary_metric(stages.metrics)
    if metric is None and stages.data_figures.test_rows == 0:
        return (
            "All rows were trained on (dataset.split.test_size: 0) and none held out, so it is unknown whether the "
            "model improved."
        )
    if metric is None:
        return "No held-out row was scored, so it is unknown whether the model improved."
    rows = rows_scored(stages, metric.key)
    on = f" on {rows:,} held-out rows" if rows else " on the held-out rows"
    name = metric.title.split(",")[0]
    unit = " nats per trained token" if metric.key == "loss" and task_of(stages).generates else ""
    base, adapter = (stages.metrics.of(side).figure(metric.key) for side in ("base", "adapter"))
    if adapter is None or base is None:
        side, measured = ("adapter", adapter) if base is None else ("base", base)
        other = "base" if base is None else "adapter"
        return f"{name} of the {side} is {metric.write(measured)}{unit}{on}; the {other} was not scored."
    before, after = metric.write(base), metric.write(adapter)
    if before == after:
        return f"{name} did not change from {after}{unit}{on}."
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
    return f", but the two 95 % intervals overlap: {rows:,} rows are too few to be sure"


def _merged(stages: Stages) -> str:
    merge = stages.merging
    if merge is None or merge.top1_agreement is None:
        return ""
    agreement, positions = merge.top1_agreement, merge.positions
    where = f" at {percent(agreement)} of {count(positions)} positions" if positions else f" at {percent(agreement)}"
    does = task_of(stages).agreement
    sentence = f"The merged model {does} as the adapter{where}"
    return sentence + ("." if merge.met is not False else ", and its drift is outside the limits.")


def warnings(stages: Stages) -> tuple[str, ...]:
    """Problems that make the metrics of this run less meaningful."""
    found = [*_file_warnings(stages), *_data_warnings(stages)]
    unfinished = stages.metrics.of("adapter").figure("unfinished_answers")
    if unfinished is not None and unfinished > UNFINISHED_LIMIT:
        limit = stages.eval.decoding.max_new_tokens if stages.eval.decoding else None
        within = f" within {count(limit)} tokens" if limit else ""
        found.append(f"{percent(unfinished)} of the adapter's answers did not stop{within}.")
    if stages.merge is not None and stages.merge.met is False:
        found.append("The merged model drifts from the adapter by more than the limits allow; see Merge.")
    return tuple(found)


def _file_warnings(stages: Stages) -> Iterator[str]:
    if stages.lost:
        are = "is" if len(stages.lost) == 1 else "are"
        yield f"{' and '.join(stages.lost)} {are} missing from the run folder, so this report is not complete."
    if stages.log_changed:
        yield "log.jsonl was changed after training, so the training curve may be wrong."


def _data_warnings(stages: Stages) -> Iterator[str]:
    figures, data = stages.data_figures, stages.data or DataJson()
    if leaked := figures.leaked_rows:
        yield (
            f"{several(leaked, 'held-out row is', 'held-out rows are')} also in the training data, so the held-out "
            "scores are too optimistic."
        )
    if truncated := figures.truncated_rows:
        cut = f" at {count(data.max_length)} tokens" if data.max_length else ""
        yield (
            f"{several(truncated, 'row was', 'rows were')} truncated{cut}; tokens past the limit were neither trained "
            "on nor scored."
        )
    # A truncated row has no end to learn; runs of an earlier version did not count the rows that have one.
    expected = figures.train_rows if data.eos_expected_rows is None else data.eos_expected_rows
    ended = data.eos_trained_rows
    if ended is not None and expected and ended < expected:
        yield (
            f"{count(expected - ended)} of {count(expected)} training rows do not teach the model to "
            "stop: their end token is not trained."
        )


def tiles(stages: Stages) -> tuple[Tile, ...]:
    """The key numbers at the top."""
    found = [*_score_tiles(stages)]
    if retention := stages.metrics.retention:
        losses = f"{significant(retention.base_loss)} → {significant(retention.adapter_loss)}"
        found.append(Tile("Forgetting", losses, "loss on another text, base → adapter"))
    if stages.merging is not None and stages.merging.top1_agreement is not None:
        what = "next token" if task_of(stages).generates else "label"
        found.append(Tile("Merge agreement", percent(stages.merging.top1_agreement), f"same {what} as the adapter"))
    train, sizes = stages.training, stages.metrics.bytes
    if train is not None and train.seconds is not None:
        note = f"{significant(train.tokens_per_second)} tokens/s" if train.tokens_per_second is not None else ""
        found.append(Tile("Training time", duration(train.seconds), note))
    if sizes.adapter is not None:
        note = f"{share(sizes.adapter, sizes.base)} of the base" if sizes.base else ""
        found.append(Tile("Adapter size", size(sizes.adapter), note))
    return tuple(found)


def _score_tiles(stages: Stages) -> Iterator[Tile]:
    metric = primary_metric(stages.metrics)
    for key in dict.fromkeys((metric.key if metric else "loss", "loss")):
        base, adapter = (stages.metrics.of(side).figure(key) for side in ("base", "adapter"))
        if base is not None or adapter is not None:
            write = BY_KEY[key].write
            per_token = key == "loss" and task_of(stages).generates
            note = "base → adapter, nats per token" if per_token else "base → adapter"
            yield Tile(BY_KEY[key].title.split(",")[0], f"{write(base)} → {write(adapter)}", note)


def gates(stages: Stages) -> tuple[Gate, ...]:
    """The recipe's gates, each met, not met, or not measured."""
    return tuple(_gate(gate) for gate in stages.metrics.gates)


def _gate(gate: GateResult) -> Gate:
    outcome: tuple[str, Tone] = ("– not measured", "warn")
    if gate.met is not None and gate.value is not None:
        outcome = ("✓ met", "good") if gate.met else ("✗ not met", "bad")
    return Gate(gate.name, text(gate.limit), compact(gate.value), *outcome)
