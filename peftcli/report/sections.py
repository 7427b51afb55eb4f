"""Sections of the report: samples, plan, training, merge, stages, AdaLoRA ranks, selected modules, environment."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from peftcli.plan.module_selection import ScoredModule, Selection
from peftcli.report.blocks import (
    Answer,
    Block,
    Cell,
    Code,
    Collapsed,
    Notices,
    Plot,
    Plots,
    Samples,
    Section,
    Table,
    facts,
    table,
)
from peftcli.report.forecast import evaluation_text
from peftcli.report.format import (
    DASH,
    compact,
    count,
    duration,
    percent,
    share,
    significant,
    size,
    text,
    without_home,
)
from peftcli.report.load import EarlierStage, Stages
from peftcli.report.metrics import BY_KEY, primary_metric
from peftcli.report.plots import LINE, NARROW, RAW, WIDE, drawing
from peftcli.results import Calibration, Decision, MergeCandidate, MergeJson, PlanJson, TrainFigures, TrainJson

if TYPE_CHECKING:
    from matplotlib.axes import Axes


DRIFT: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "top1_agreement": ("Same first choice (top-1 agreement)", percent),
    "max_abs_logit_difference": ("Largest difference of a logit", compact),
    "mean_abs_logit_difference": ("Mean difference of a logit", compact),
    "kl_nats": ("KL divergence, nats per position", compact),
}

MOST_BARS = 30
"""Maximum number of modules in the plot, by gradient; the table has all."""
NAME_INCHES = 0.078
"""Width of a letter in labels."""


def samples_section(stages: Stages) -> Section | None:
    """Prompts with the reference and the answer of each model."""
    if not stages.eval.samples:
        return None
    decoding = stages.eval.decoding
    lead = (
        "Held-out rows, answered before and after training; an answer is correct if it equals the reference, "
        "ignoring surrounding whitespace."
    )
    lead += f" Decoding: {text(vars(decoding))}." if decoding else ""
    return Section("samples", "Samples", (samples_table(stages),), lead.replace("_", " "))


def samples_table(stages: Stages) -> Samples:
    """The samples of `eval.json`, with the answers of the merged model from `merge.json`."""
    merged = {row.prompt: row.merged for row in stages.merge.samples} if stages.merge else {}
    rows = [replace(row, merged=merged.get(row.prompt, row.merged)) for row in stages.eval.samples]
    names = [name for name in ("base", "adapter", "merged") if any(getattr(row, name) is not None for row in rows)]
    shown = [
        (Answer(row.prompt), Answer(row.reference), *(_answer(getattr(row, name), row.reference) for name in names))
        for row in rows
    ]
    return Samples(("Prompt", "Reference", *(name.capitalize() for name in names)), tuple(shown))


def _answer(answer: str | None, reference: str | None) -> Answer:
    if answer is None or reference is None:
        return Answer(answer)
    return Answer(answer, answer.strip() == reference.strip())


def plan_section(stages: Stages) -> Section:
    """What was decided before the first step, and why."""
    plan = stages.plan
    blocks: list[Block] = [_plan_facts(plan)]
    if plan.notices:
        blocks.append(Notices(tuple(map(without_home, plan.notices))))
    if predicted := _predicted(stages):
        blocks.append(predicted)
    if plan.decisions:
        blocks.append(decision_table(plan.decisions))
    if plan.trainer:
        settings = [(key, without_home(text(value))) for key, value in plan.trainer.items()]
        blocks.append(Collapsed("Arguments given to the trainer", table(("Argument", "Value"), settings)))
    return Section("plan", "Plan", tuple(blocks))


def _plan_facts(plan: PlanJson) -> Block:
    batch, numbers = plan.batch, plan.parameters
    sizes = " × ".join(map(count, (batch.per_device, batch.accumulation, batch.processes)))
    rows = f"{sizes} = {count(batch.effective)} rows (per device × accumulation × processes)"
    targets = [f"{text(one.name)} ({count(one.modules)})" for one in plan.targets]
    return facts(
        (
            ("Model", without_home(text(plan.model.name))),
            ("Revision", plan.model.revision or None),
            ("Architecture", text(plan.model.architecture)),
            ("Parameters", count(numbers.total)),
            ("Trainable", f"{count(numbers.trainable)} ({share(numbers.trainable, numbers.total)})"),
            ("Targets (modules)", ", ".join(targets) if targets else None),
            ("Rows of one step", rows if batch.effective else None),
            ("Evaluation", evaluation_text(plan.forecast) if plan.forecast else None),
        )
    )


def decision_table(decisions: Sequence[Decision]) -> Table:
    """Each decision of the plan with its reason."""
    rows = [(one.key, without_home(one.value), without_home(one.reason)) for one in decisions]
    return table(("Decision", "Value", "Reason"), rows)


def _predicted(stages: Stages) -> Block | None:
    """The forecast compared with the measurements; None for runs without forecast."""
    forecast = stages.plan.forecast
    if forecast is None:
        return None
    train = stages.training or TrainJson()
    known = train.calibration or Calibration()
    steps, a_step = train.planned_steps, known.step_seconds
    calibrated = None if steps is None or a_step is None else steps * a_step
    lines: tuple[tuple[str, Callable[[float | None], str], float | None, float | None, float | None], ...] = (
        ("Peak memory", size, forecast.peak_memory_bytes, known.peak_memory_bytes, train.peak_memory_bytes),
        ("Training time", duration, forecast.time.seconds, calibrated, train.seconds),
    )
    rows = [
        (label, write(before), write(step), write(found), share(found, before if before is not None else step))
        for label, write, before, step, found in lines
        if before is not None or step is not None
    ]
    columns = ("Forecast", "Before loading", "After one micro-batch", "Measured", "Measured / forecast")
    return table(columns, rows) if rows else None


def training_facts(stages: Stages) -> Block | None:
    """Steps, time and memory of training."""
    train = stages.training
    if train is None:
        return None
    first, last = train.first_loss, train.last_loss
    images = stages.is_images
    losses = f"{significant(first)} → {significant(last)}" if first is not None or last is not None else None
    resumed = "not resumed" if train.resumed_from_step is None else f"step {count(train.resumed_from_step)}"
    of_rows = stages.data is not None and stages.data.format == "classification"
    return facts(
        (
            ("Steps", count(train.steps)),
            ("Rows", count(train.rows)),
            ("Epochs", compact(train.epochs)),
            ("Tokens", None if images else _tokens(train, of_rows)),
            ("Time", duration(train.seconds)),
            ("Speed", None if images else f"{significant(train.tokens_per_second)} tokens/s"),
            ("Peak memory", size(train.peak_memory_bytes)),
            ("Training loss", losses),
            ("Best step", best_text(train)),
            ("Early stopping", _early_text(train)),
            ("Resumed from", resumed),
        )
    )


def best_text(train: TrainFigures) -> str | None:
    """The step with the best metric on the validation rows; None if none was chosen."""
    best = train.best
    if best is None:
        return None
    known = BY_KEY.get(best.metric or "")
    name, value = (known.title.split(",")[0], known.write(best.value)) if known else (best.metric, compact(best.value))
    if known and known.key != known.title.lower().replace(" ", "_").split(",")[0]:
        name = f"{name} ({known.key})"
    kept = "its adapter is kept" if best.kept else "the adapter of the last step is kept"
    return f"step {count(best.step)}: {name} {value} on the {best.rows_from} rows; {kept}"


def _early_text(train: TrainJson) -> str | None:
    if train.stopped_early is None:
        return None
    steps = f"step {count(train.steps)} of {count(train.planned_steps)}"
    return f"stopped at {steps}" if train.stopped_early else "did not stop"


def _tokens(train: TrainJson, of_rows: bool) -> str:
    """Tokens that were processed and, if they are trained, how many of them were trained."""
    return count(train.tokens) if of_rows else f"{count(train.tokens)}, {count(train.trained_tokens)} of them trained"


def merge_section(stages: Stages) -> Section | None:
    """How far the merged model differs from the adapter."""
    merge = stages.merging
    if merge is None:
        return None
    blocks: list[Block] = [_merge_facts(merge, whole=stages.merge is not None), _drift_table(merge)]
    if merge.candidates:
        blocks.append(_candidates(merge.candidates, merge.into))
    return Section("merge", "Merge", tuple(blocks))


def _merge_facts(merge: MergeJson, *, whole: bool) -> Block:
    """What was merged; if only `metrics.json` exists (not `whole`), only the target."""
    return facts(
        (
            ("Merged into", f"{text(merge.into)} base"),
            ("Precision", text(merge.dtype) if whole else None),
            ("Compared on", _compared(merge)),
            ("Within the limits", _within(merge.met) if whole else None),
            ("Size on disk", size(merge.bytes) if whole else None),
            ("Time", duration(merge.seconds) if whole else None),
        )
    )


def _drift_table(merge: MergeJson) -> Table:
    rows = []
    for key in dict.fromkeys((*DRIFT, *merge.limit)):
        title, write = DRIFT.get(key, (key, compact))
        rows.append((title, write(getattr(merge, key, None)), text(merge.limit.get(key))))
    return table(("Drift from the adapter", "Measured", "Limit"), rows, numeric=(1, 2))


def _within(met: bool | None) -> str:
    return DASH if met is None else "✓ yes" if met else "✗ no"


def _compared(merge: MergeJson) -> str | None:
    if merge.rows is None and merge.positions is None:
        return None
    kinds = {
        "training": "training rows, because none were held out",
        "validation": "validation rows",
        "test": "rows",
        None: "rows",
    }
    what = kinds.get(merge.rows_from, f"rows of {merge.rows_from}")
    place = f", on {merge.compared_on}" if merge.compared_on else ""
    partly = place and merge.rows_from == "test" and merge.metrics is None
    unscored = "; not scored, since the GPUs here do not hold the merged model" if partly else ""
    return f"{count(merge.rows)} {what}, {count(merge.positions)} positions{place}{unscored}"


def _candidates(candidates: Sequence[MergeCandidate], into: str | None) -> Block:
    columns = ("Candidate", "Loss", "Max abs logit difference", "Mean abs logit difference", "KL, nats")
    rows = [
        (
            text(row.into) + (" (selected)" if row.into == into else ""),
            significant(row.loss),
            compact(row.max_abs_logit_difference),
            compact(row.mean_abs_logit_difference),
            compact(row.kl_nats),
            percent(row.top1_agreement),
        )
        for row in candidates
    ]
    return table((*columns, "Top1 agreement"), rows, numeric=range(1, 6))


def sizes_section(stages: Stages) -> Section | None:
    """Sizes on disk, compared with the base model."""
    sizes = stages.metrics.bytes
    merged = stages.merge.bytes if stages.merge else None
    rows = [
        (title, size(value), count(value), share(value, sizes.base))
        for title, value in (("Base model", sizes.base), ("Adapter", sizes.adapter), ("Merged model", merged))
        if value is not None or title != "Merged model"
    ]
    if all(row[1] == DASH for row in rows):
        return None
    made = table(("On disk", "Size", "Bytes", "Share of the base"), rows, numeric=(1, 2, 3))
    return Section("sizes", "Sizes", (made,))


def environment_section(stages: Stages) -> Section | None:
    """Hardware, versions, and the command to run it again."""
    environment = stages.environment
    if environment is None:
        return None
    device = environment.device
    named = text(device.name) + (f", compute capability {device.capability}" if device.capability else "")
    blocks: list[Block] = [
        facts(
            (
                ("Device", f"{count(device.count)} × {named}" if device.count and device.count > 1 else named),
                ("Device memory", size(device.memory_bytes)),
                ("Processors", count(environment.cpu_count)),
                ("Memory", size(environment.ram_bytes)),
                ("Platform", text(environment.platform)),
                ("Python", text(environment.python)),
            )
        )
    ]
    if environment.packages:
        rows = [(name, text(environment.packages[name])) for name in sorted(environment.packages)]
        blocks.append(table(("Package", "Version"), rows))
    if environment.command is not None:
        blocks.append(Code("Run it again", without_home(environment.command)))
    return Section("environment", "Hardware and versions", tuple(blocks))


def earlier_section(stages: Stages) -> Section | None:
    """One row per stage, the final one last; None for a run with one stage."""
    if not stages.earlier:
        return None
    metric = primary_metric(stages.metrics)
    own = EarlierStage(name=f"{len(stages.earlier) + 1} (this run)", plan=stages.plan, metrics=stages.metrics)
    rows = []
    for one in (*stages.earlier, own):
        numbers, train = one.plan.parameters, one.metrics.train or TrainFigures()
        rows.append(
            (
                one.name,
                text(one.plan.adapter.method),
                f"{count(numbers.trainable)} ({share(numbers.trainable, numbers.total)})",
                count(train.steps),
                duration(train.seconds),
                "" if metric is None else metric.write(one.metrics.of("adapter").figure(metric.key)),
            )
        )
    title = "" if metric is None else metric.heading
    columns = ("Stage", "Method", "Trainable", "Steps", "Time", title)
    lead = "Each stage starts from the result of the one before; the base in the results is that of the first stage."
    return Section("stages", "Stages", (table(columns, rows, numeric=(2, 3, 4, 5)),), lead)


def ranks_section(stages: Stages) -> Section | None:
    """The ranks of a run; None for methods with fixed ranks."""
    found = stages.ranks
    if found is None or not found.steps or not found.modules or len(found.steps) != len(found.ranks):
        return None
    steps, ranks, modules = found.steps, found.ranks, found.modules
    last = ranks[-1]
    allowed = None if found.target is None else found.target * len(modules)
    blocks = (
        Plots((_rank_plot(steps, ranks),), ()),
        facts(
            (
                ("Initial rank of each module", count(found.first)),
                ("Final mean rank", f"{sum(last) / len(last):.3g}"),
                ("Final sum of the ranks", f"{count(sum(last))} of {count(allowed)} allowed"),
                ("Smallest and largest", f"{count(min(last))} and {count(max(last))}"),
            )
        ),
        Collapsed("All modules", _rank_table(modules, ranks)),
    )
    lead = (
        "All modules started with the same rank; the least important directions, by weight times gradient averaged "
        "over the steps, were pruned until the budget was met."
    )
    return Section("ranks", "Ranks", blocks, lead)


def _rank_plot(steps: Sequence[int], ranks: Sequence[Sequence[int]]) -> Plot:
    title = "Rank of each module"

    def drawn(inches: tuple[float, float]) -> str:
        width, height = inches
        frame = (0.5 / width, 0.45 / height, (width - 0.7) / width, (height - 0.6) / height)
        return drawing(title, inches, lambda axes: _draw_ranks(axes, steps, ranks), frame)

    note = "Steps from left to right. Light: one line per module; dark: their mean."
    return Plot(title, drawn, WIDE, note, narrow_inches=NARROW)


def _draw_ranks(axes: "Axes", steps: Sequence[int], ranks: Sequence[Sequence[int]]) -> None:
    from matplotlib.ticker import MaxNLocator

    for line in zip(*ranks, strict=True):
        axes.plot(steps, line, color=RAW, linewidth=1.0, drawstyle="steps-post")
    axes.plot(steps, [sum(row) / len(row) for row in ranks], color=LINE, linewidth=1.8)
    axes.set_ylim(bottom=0)
    axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def _rank_table(modules: Sequence[str], ranks: Sequence[Sequence[int]]) -> Table:
    ordered = sorted(range(len(modules)), key=lambda index: (-ranks[-1][index], index))
    rows = [(modules[index], count(ranks[0][index]), count(ranks[-1][index])) for index in ordered]
    return table(("Module", "First rank", "Last rank"), rows, numeric=(1, 2))


def selection_section(stages: Stages) -> Section | None:
    """The selected modules of a run; None without a selection by gradient."""
    found = stages.selection
    if found is None or not found.scored:
        return None
    ordered = sorted(found.scored, key=lambda one: -one.score)
    kind = found.kind
    blocks: list[Block] = [
        Plots((_score_plot(ordered, kind),), ()),
        _selection_facts(found),
        Collapsed(f"All {kind}", _score_table(ordered, kind)),
    ]
    lead = (
        f"Before the first step, the gradient of the loss was measured on training rows, and {kind} were selected by "
        "descending gradient as long as their adapters fitted the budget."
    )
    return Section("selection", f"Selected {kind}", tuple(blocks), lead)


def _selection_facts(found: Selection) -> Block:
    chosen = sum(one.chosen for one in found.scored)
    allowed, used = found.budget_parameters, found.used_parameters
    return facts(
        (
            ("Selected", f"{count(chosen)} of {count(len(found.scored))} {found.kind}"),
            ("Trainable parameters", f"{count(used)} of {count(allowed)} allowed ({share(used, allowed)})"),
            ("Measured on", f"{count(found.batches)} training batches"),
        )
    )


def _score_plot(ordered: Sequence[ScoredModule], kind: str) -> Plot:
    shown = ordered[:MOST_BARS] if kind == "modules" else sorted(ordered, key=_number)[:MOST_BARS]
    height = 0.6 + 0.2 * len(shown)

    def drawn(inches: tuple[float, float]) -> str:
        width, height = inches
        names = [_short(row, kind, most=24 if width == NARROW[0] else 60) for row in shown]
        left = min(0.5 * width, 0.25 + NAME_INCHES * max(map(len, names)))
        frame = (left / width, 0.4 / height, (width - left - 0.3) / width, (height - 0.5) / height)
        return drawing(f"Gradient by {kind}", inches, lambda axes: _draw_scores(axes, shown, names), frame)

    note = "Root mean square of the gradient of the weights. Dark: selected; light: not selected."
    if len(ordered) > len(shown):
        note += f" The {count(len(shown))} largest of {count(len(ordered))}."
    return Plot(f"Gradient by {kind}", drawn, (WIDE[0], height), note, narrow_inches=(NARROW[0], height))


def _draw_scores(axes: "Axes", rows: Sequence[ScoredModule], names: list[str]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    positions = range(len(rows))
    colours = [LINE if row.chosen else RAW for row in rows]
    axes.barh(positions, [row.score for row in rows], height=0.7, color=colours)
    axes.set_yticks(list(positions), [name.replace("$", r"\$") for name in names])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")


def _score_table(ordered: Sequence[ScoredModule], kind: str) -> Table:
    cells = [
        (
            row.name,
            significant(row.score),
            count(row.cost),
            Cell("selected", "good") if row.chosen else Cell("not selected", "quiet"),
        )
        for row in ordered
    ]
    name = "Layer" if kind == "layers" else "Module"
    return table((name, "Gradient", "Adapter parameters", "Selected"), cells, numeric=(1, 2))


def _short(row: ScoredModule, kind: str, most: int) -> str:
    name = f"layer {row.name}" if kind == "layers" else row.name.removeprefix("model.").removeprefix("layers.")
    return name if len(name) <= most else "…" + name[-most + 1 :]


def _number(row: ScoredModule) -> int:
    return int(row.name) if row.name.isdigit() else 0
