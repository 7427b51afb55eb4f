"""Sections of the report: samples, data, plan, training, merge, stages, AdaLoRA ranks, selected modules, machine."""

from typing import TYPE_CHECKING, Any

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
    facts,
    table,
)
from peftcli.report.format import DASH, compact, count, duration, percent, share, significant, size, without_home
from peftcli.report.load import Stages, figure, find, objects, text
from peftcli.report.metrics import primary_metric
from peftcli.report.plots import LINE, NARROW, RAW, WIDE, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes


DRIFT = (
    ("top1_agreement", "Same first choice (top-1 agreement)", percent),
    ("max_abs_logit_difference", "Largest difference of a logit", compact),
    ("mean_abs_logit_difference", "Mean difference of a logit", compact),
    ("kl_nats", "KL divergence, nats per position", compact),
)

NOT_SHOWN = ("into", "rows", "positions")  # the same for every candidate, or the row's own name

MOST_BARS = 30
"""Modules that are drawn, those with the largest gradient; the table has all."""
NAME_INCHES = 0.078
"""Width of a letter beside a bar."""


def samples_section(stages: Stages) -> Section | None:
    """Prompts with the reference and what each model said."""
    merged = {text(row, "prompt"): find(row, "merged") for row in objects(stages.merge, "samples")}
    rows = objects(stages.eval, "samples")
    if not rows:
        return None
    wide = [(row, merged.get(text(row, "prompt"))) for row in rows]
    names = [name for name in ("base", "adapter") if any(find(row, name) is not None for row in rows)]
    columns = ["Prompt", "Reference", *(name.capitalize() for name in names)]
    if any(said is not None for _, said in wide):
        columns.append("Merged")
    shown = []
    for row, said in wide:
        answers = [_said(row.get(name), row.get("reference")) for name in names]
        answers += [_said(said, row.get("reference"))] if "Merged" in columns else []
        shown.append((_said(row.get("prompt"), None), _said(row.get("reference"), None), *answers))
    decoding = find(stages.eval, "decoding")
    lead = (
        "Held-out rows, answered before and after training; an answer is correct if it equals the reference, "
        "outer space aside."
    )
    lead += f" Decoding: {text(decoding)}." if decoding else ""
    return Section("samples", "Samples", (Samples(tuple(columns), tuple(shown)),), lead.replace("_", " "))


def _said(answer: Any, reference: Any) -> Answer:
    said = None if answer is None else str(answer)
    if said is None or reference is None:
        return Answer(said)
    return Answer(said, said.strip() == str(reference).strip())


def plan_section(stages: Stages) -> Section:
    """What was decided before the first step, and why."""
    plan = stages.plan
    trainable, total = figure(plan, "parameters", "trainable"), figure(plan, "parameters", "total")
    sizes = [figure(plan, "batch", key) for key in ("per_device", "accumulation", "processes")]
    effective = figure(plan, "batch", "effective")
    product = f"{' × '.join(count(part) for part in sizes)} = {count(effective)} rows"
    targets = [f"{text(row, 'name')} ({count(figure(row, 'modules'))})" for row in objects(plan, "targets")]
    blocks: list[Block] = [
        facts(
            (
                ("Model", without_home(text(plan, "model", "name"))),
                ("Revision", text(plan, "model", "revision") if find(plan, "model", "revision") else None),
                ("Architecture", text(plan, "model", "architecture")),
                ("Parameters", count(total)),
                ("Trainable", f"{count(trainable)} ({share(trainable, total)})"),
                ("Targets (modules)", ", ".join(targets) if targets else None),
                (
                    "Rows of one step",
                    f"{product} (per device × accumulation × processes)" if effective else None,
                ),
            )
        )
    ]
    if notices := find(plan, "notices"):
        blocks.append(Notices(tuple(without_home(text(notice)) for notice in notices)))
    if predicted := _predicted(stages):
        blocks.append(predicted)
    if decisions := objects(plan, "decisions"):
        rows = [
            (text(row, "key"), without_home(text(row, "value")), without_home(text(row, "reason"))) for row in decisions
        ]
        blocks.append(table(("Decided", "Value", "Reason"), rows))
    if trainer := find(plan, "trainer"):
        settings = [(str(key), without_home(text(trainer, key))) for key in trainer]
        blocks.append(Collapsed("Arguments given to the trainer", table(("Argument", "Value"), settings)))
    return Section("plan", "Plan", tuple(blocks))


def _predicted(stages: Stages) -> Block | None:
    """What was forecast before the first step beside what was measured; None for runs that had no forecast."""
    forecast = find(stages.plan, "forecast")
    if not forecast:
        return None
    train = {**(find(stages.metrics, "train") or {}), **stages.train}
    known = find(train, "calibration") or {}
    steps, a_step = figure(train, "planned_steps"), figure(known, "step_seconds")
    calibrated = None if steps is None or a_step is None else steps * a_step
    peaks = figure(forecast, "peak_memory_bytes"), figure(known, "peak_memory_bytes")
    lines = (
        ("Peak memory", size, *peaks, figure(train, "peak_memory_bytes")),
        ("Training time", duration, figure(forecast, "time", "seconds"), calibrated, figure(train, "seconds")),
    )
    rows = [
        (label, write(before), write(step), write(found), share(found, before if before is not None else step))
        for label, write, before, step, found in lines
        if before is not None or step is not None
    ]
    columns = ("Forecast", "Before loading", "After one micro-batch", "Measured", "Measured / forecast")
    return table(columns, rows) if rows else None


def training_facts(stages: Stages) -> Block | None:
    """What training took."""
    train = {**(find(stages.metrics, "train") or {}), **stages.train}
    if not train:
        return None
    resumed = figure(train, "resumed_from_step")
    first, last = figure(train, "first_loss"), figure(train, "last_loss")
    images = find(stages.data, "format") == "images"
    losses = f"{significant(first)} → {significant(last)}" if first is not None or last is not None else None
    return facts(
        (
            ("Steps", count(figure(train, "steps"))),
            ("Rows", count(figure(train, "rows"))),
            ("Epochs", compact(figure(train, "epochs"))),
            ("Tokens", None if images else _tokens(train, find(stages.data, "format") == "classification")),
            ("Time", duration(figure(train, "seconds"))),
            ("Speed", None if images else f"{significant(figure(train, 'tokens_per_second'))} tokens/s"),
            ("Peak memory", size(figure(train, "peak_memory_bytes"))),
            ("Training loss", losses),
            ("Resumed from", "not resumed" if resumed is None else f"step {count(resumed)}"),
        )
    )


def _tokens(train: dict[str, Any], of_rows: bool) -> str:
    """Tokens that were read and, where they are what is trained, how many of them were."""
    tokens, trained = count(figure(train, "tokens")), count(figure(train, "trained_tokens"))
    return tokens if of_rows else f"{tokens}, {trained} of them trained"


def merge_section(stages: Stages) -> Section | None:
    """How far the merged model is from the adapter that it came from."""
    merge = {**(find(stages.metrics, "merge") or {}), **stages.merge}
    if not merge:
        return None
    limits = find(merge, "limit") or {}
    rows = [(title, write(figure(merge, key)), text(limits, key)) for key, title, write in DRIFT]
    known = {key for key, _, _ in DRIFT}
    rows += [(str(key), compact(figure(merge, key)), text(limits, key)) for key in limits if key not in known]
    blocks: list[Block] = [
        facts(
            (
                ("Merged into", f"{text(merge, 'into')} base"),
                ("Precision", text(merge, "dtype") if "dtype" in merge else None),
                ("Compared on", _compared(merge)),
                (
                    "Within the limits",
                    _within(merge["met"]) if "met" in merge else None,
                ),
                ("Size on disk", size(figure(merge, "bytes")) if "bytes" in merge else None),
                ("Time", duration(figure(merge, "seconds")) if "seconds" in merge else None),
            )
        ),
        table(("Drift from the adapter", "Measured", "Limit"), rows, numeric=(1, 2)),
    ]
    if candidates := objects(merge, "candidates"):
        blocks.append(_candidates(candidates, merge.get("into")))
    return Section("merge", "Merge", tuple(blocks))


def _within(met: Any) -> str:
    return DASH if met is None else "✓ yes" if met else "✗ no"


def _compared(merge: dict[str, Any]) -> str | None:
    rows, positions = figure(merge, "rows"), figure(merge, "positions")
    what = "training rows, since none were held out" if merge.get("rows_from") == "training" else "rows"
    place = f", on {text(merge, 'compared_on')}" if "compared_on" in merge else ""
    return None if rows is None and positions is None else f"{count(rows)} {what}, {count(positions)} positions{place}"


def _candidates(candidates: list[dict[str, Any]], into: Any) -> Block:
    keys = list(dict.fromkeys(key for row in candidates for key in row if key not in NOT_SHOWN))
    titles = [{"kl_nats": "KL, nats"}.get(key, key.replace("_", " ").capitalize()) for key in keys]
    rows = [
        (
            text(row, "into") + (" (taken)" if row.get("into") == into else ""),
            *(_candidate_cell(row, key) for key in keys),
        )
        for row in candidates
    ]
    return table(("Candidate", *titles), rows, numeric=range(1, len(keys) + 1))


def _candidate_cell(row: dict[str, Any], key: str) -> str:
    value = figure(row, key)
    if value is None:
        return text(row, key)
    return significant(value) if key == "loss" else percent(value) if key == "top1_agreement" else compact(value)


def sizes_section(stages: Stages) -> Section | None:
    """What has to be stored or sent, against the base model."""
    sizes = find(stages.metrics, "bytes") or {}
    base = figure(sizes, "base")
    rows = [
        (title, size(value), count(value), share(value, base))
        for title, value in (
            ("Base model", base),
            ("Adapter", figure(sizes, "adapter")),
            ("Merged model", figure(stages.merge, "bytes")),
        )
        if value is not None or title != "Merged model"
    ]
    if all(row[1] == DASH for row in rows):
        return None
    made = table(("On disk", "Size", "Bytes", "Share of the base"), rows, numeric=(1, 2, 3))
    return Section("sizes", "Sizes", (made,))


def environment_section(stages: Stages) -> Section | None:
    """On what it ran, with which versions, and the command that runs it again."""
    environment = stages.environment
    if not environment:
        return None
    device = find(environment, "device") or {}
    capability = find(device, "capability")
    named = text(device, "name") + (f", compute capability {capability}" if capability else "")
    number = figure(device, "count")
    blocks: list[Block] = [
        facts(
            (
                ("Device", f"{count(number)} × {named}" if number and number > 1 else named),
                ("Device memory", size(figure(device, "memory_bytes"))),
                ("Processors", count(figure(environment, "cpu_count"))),
                ("Memory", size(figure(environment, "ram_bytes"))),
                ("Platform", text(environment, "platform")),
                ("Python", text(environment, "python")),
            )
        )
    ]
    if packages := find(environment, "packages"):
        rows = [(str(name), text(packages, name)) for name in sorted(packages)]
        blocks.append(table(("Package", "Version"), rows))
    if find(environment, "command") is not None:
        blocks.append(Code("Run it again", without_home(text(environment, "command"))))
    return Section("environment", "Hardware and versions", tuple(blocks))


def earlier_section(stages: Stages) -> Section | None:
    """A row for each stage, the run's own last; None for a run of one stage."""
    if not stages.earlier:
        return None
    metric = primary_metric(stages.metrics)
    known = [*stages.earlier, (f"{len(stages.earlier) + 1} (this run)", stages.plan, stages.metrics)]
    rows = []
    for name, plan, metrics in known:
        after = None if metric is None else figure(metrics, "adapter", metric.key)
        trainable, total = (figure(plan, "parameters", key) for key in ("trainable", "total"))
        rows.append(
            (
                name,
                text(plan, "adapter", "method"),
                f"{count(trainable)} ({share(trainable, total)})",
                count(figure(metrics, "train", "steps")),
                duration(figure(metrics, "train", "seconds")),
                "" if metric is None else metric.write(after),
            )
        )
    title = "" if metric is None else metric.heading
    columns = ("Stage", "Method", "Trainable", "Steps", "Time", title)
    lead = "Each stage starts from the result of the one before; the base of the results is that of the first."
    return Section("stages", "Stages", (table(columns, rows, numeric=(2, 3, 4, 5)),), lead)


def ranks_section(stages: Stages) -> Section | None:
    """The ranks of a run; None for a method whose ranks stay."""
    steps, ranks, modules = (find(stages.ranks, key) or [] for key in ("steps", "ranks", "modules"))
    if not steps or not modules or len(steps) != len(ranks):
        return None
    first, target = figure(stages.ranks, "first"), figure(stages.ranks, "target")
    last = ranks[-1]
    allowed = None if target is None else target * len(modules)
    blocks = (
        Plots((_rank_plot(steps, ranks),), ()),
        facts(
            (
                ("Rank of each module at first", count(first)),
                ("Mean rank at the end", f"{sum(last) / len(last):.3g}"),
                ("Sum of the ranks at the end", f"{count(sum(last))} of {count(allowed)} allowed"),
                ("Smallest and largest", f"{count(min(last))} and {count(max(last))}"),
            )
        ),
        Collapsed("All modules", _rank_table(modules, ranks)),
    )
    lead = (
        "All modules began with the same rank; the directions that mattered least, by weight times gradient averaged "
        "over the steps, were taken away until the sum was met."
    )
    return Section("ranks", "Ranks", blocks, lead)


def _rank_plot(steps: list[int], ranks: list[list[int]]) -> Plot:
    title = "Rank of each module"

    def drawn(inches: tuple[float, float]) -> str:
        width, height = inches
        frame = (0.5 / width, 0.45 / height, (width - 0.7) / width, (height - 0.6) / height)
        return drawing(title, inches, lambda axes: _draw_ranks(axes, steps, ranks), frame)

    note = "Steps from left to right. Light: one line a module; dark: their mean."
    return Plot(title, drawn(WIDE), note, drawn(NARROW))


def _draw_ranks(axes: "Axes", steps: list[int], ranks: list[list[int]]) -> None:
    from matplotlib.ticker import MaxNLocator

    for line in zip(*ranks, strict=True):
        axes.plot(steps, line, color=RAW, linewidth=1.0, drawstyle="steps-post")
    axes.plot(steps, [sum(row) / len(row) for row in ranks], color=LINE, linewidth=1.8)
    axes.set_ylim(bottom=0)
    axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def _rank_table(modules: list[str], ranks: list[list[int]]) -> Any:
    ordered = sorted(range(len(modules)), key=lambda place: (-ranks[-1][place], place))
    rows = [(modules[place], count(ranks[0][place]), count(ranks[-1][place])) for place in ordered]
    return table(("Module", "First rank", "Last rank"), rows, numeric=(1, 2))


def selection_section(stages: Stages) -> Section | None:
    """The choice of a run; None where nothing was left to the gradient."""
    found = stages.selection
    rows = [row for row in objects(found, "scored") if figure(row, "score") is not None]
    if not rows:
        return None
    ordered = sorted(rows, key=lambda row: -(figure(row, "score") or 0.0))
    kind = "layers" if find(found, "kind") == "layers" else "modules"
    chosen = sum(bool(row.get("chosen")) for row in rows)
    allowed, used = figure(found, "budget_parameters"), figure(found, "used_parameters")
    blocks: list[Block] = [
        Plots((_score_plot(ordered, kind),), ()),
        facts(
            (
                ("Chosen", f"{count(chosen)} of {count(len(rows))} {kind}"),
                ("Trainable parameters", f"{count(used)} of {count(allowed)} allowed ({share(used, allowed)})"),
                ("Measured on", f"{count(figure(found, 'batches'))} training batches"),
            )
        ),
        Collapsed(f"All {kind}", _score_table(ordered, kind)),
    ]
    lead = (
        f"Before the first step the loss's gradient was measured on training rows, and whole {kind} were taken, the "
        "largest gradient first, as long as their adapters fitted the budget."
    )
    return Section("selection", f"Chosen {kind}", tuple(blocks), lead)


def _score_plot(ordered: list[dict[str, Any]], kind: str) -> Plot:
    shown = ordered[:MOST_BARS] if kind == "modules" else sorted(ordered, key=lambda row: _number(row))[:MOST_BARS]
    height = 0.6 + 0.2 * len(shown)

    def drawn(width: float) -> str:
        inches = (width, height)
        names = [_short(row, kind, most=24 if width == NARROW[0] else 60) for row in shown]
        left = min(0.5 * width, 0.25 + NAME_INCHES * max(map(len, names)))
        frame = (left / width, 0.4 / height, (width - left - 0.3) / width, (height - 0.5) / height)
        return drawing(f"Gradient by {kind}", inches, lambda axes: _draw_scores(axes, shown, names), frame)

    note = "Root mean square of the loss's gradient by the weights. Dark: chosen; light: left out."
    if len(ordered) > len(shown):
        note += f" The {count(len(shown))} largest of {count(len(ordered))}."
    return Plot(f"Gradient by {kind}", drawn(WIDE[0]), note, drawn(NARROW[0]))


def _draw_scores(axes: "Axes", rows: list[dict[str, Any]], names: list[str]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    places = range(len(rows))
    colours = [LINE if row.get("chosen") else RAW for row in rows]
    axes.barh(places, [figure(row, "score") or 0.0 for row in rows], height=0.7, color=colours)
    axes.set_yticks(list(places), [name.replace("$", r"\$") for name in names])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")


def _score_table(ordered: list[dict[str, Any]], kind: str) -> Any:
    cells = [
        (
            text(row, "name"),
            significant(figure(row, "score")),
            count(figure(row, "cost")),
            Cell("chosen", "good") if row.get("chosen") else Cell("left out", "quiet"),
        )
        for row in ordered
    ]
    name = "Layer" if kind == "layers" else "Module"
    return table((name, "Gradient", "Adapter parameters", "Taken"), cells, numeric=(1, 2))


def _short(row: dict[str, Any], kind: str, most: int) -> str:
    name = text(row, "name")
    name = f"layer {name}" if kind == "layers" else name.removeprefix("model.").removeprefix("layers.")
    return name if len(name) <= most else "…" + name[-most + 1 :]


def _number(row: dict[str, Any]) -> int:
    name = text(row, "name")
    return int(name) if name.isdigit() else 0
