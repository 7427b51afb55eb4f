"""The report of a comparison as a pure function of `compare.json`, with its plots."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from peftcli.report.blocks import Block, Cell, Plot, Plots, Report, Section, Table, Tile, facts, table
from peftcli.report.format import DASH, MINUS, compact, count, duration, percent, several, significant, size
from peftcli.report.html import render_page
from peftcli.report.markdown import render_markdown
from peftcli.report.metrics import BY_KEY, Metric
from peftcli.report.plots import FAINT, INK, LINE, NARROW, RAW, WIDE, drawing
from peftcli.results import CompareJson, LearningCurve, VariantRow
from peftcli.run_dir import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Write = Callable[[float | None], str]

BEST, ON_FRONT = "★", "◆"
SIGNS = (
    f"{BEST} best of its column. {ON_FRONT} Pareto-optimal: no other variant is at least as good at the same or lower "
    "cost."
)
COST_NAMES = {
    "adapter_bytes": "adapter size",
    "peak_memory_bytes": "peak memory",
    "seconds": "training time",
    "retention_change": "forgetting",
}

FRONT = (4.8, 2.7)
"""Inches of one plot of quality against a cost."""
MARKS = ("o", "s", "^", "D", "v", "P")
"""Curves differ by markers and dashes, not by color."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1, 2)))
LOGARITHMIC_FROM = 20.0
"""Ratio of largest to smallest cost from which an axis is logarithmic."""


def write_comparison(comparison: CompareJson, folder: Any) -> None:
    """Write `compare.md` and `compare.html` into a folder."""
    report = make_comparison(comparison)
    write_text(folder / "compare.md", render_markdown(report))
    write_text(folder / "compare.html", render_page(report))


def make_comparison(comparison: CompareJson) -> Report:
    """Make the report of a comparison from the content of `compare.json`."""
    rows = comparison.variants
    metric = quality_metric(comparison)
    finished = sum(row.is_finished for row in rows)
    whole = finished == len(rows)
    sections = (
        _quality_section(rows, metric),
        _cost_section(rows),
        _front_section(comparison, rows, metric),
        _curve_section(comparison, metric),
        _varied_section(rows),
    )
    return Report(
        name=comparison.name,
        subtitle=" · ".join(part for part in (comparison.model, comparison.task) if part),
        status=f"✓ {several(finished, 'variant', 'variants')}" if whole else f"‖ {finished} of {len(rows)} finished",
        status_tone="good" if whole else "warn",
        smoke=comparison.smoke,
        verdict=verdict(comparison),
        warnings=(*failures(rows), *comparison.doubts),
        tiles=_tiles(rows, metric),
        gates=(),
        sections=tuple(section for section in sections if section is not None),
        kind="comparison",
        footer="Written by peftcli from the JSON files of the runs.",
    )


def quality_metric(comparison: CompareJson) -> Metric | None:
    """The metric by which the variants are compared."""
    quality = comparison.quality
    return None if quality is None else BY_KEY[quality.key]


def verdict(comparison: CompareJson) -> str:
    """Which variant is best, how certain that is, and the cheapest one that is nearly as good."""
    rows, metric = comparison.variants, quality_metric(comparison)
    finished = [row for row in rows if row.is_finished]
    if metric is None and finished:
        return "No variant was scored on held-out rows, so there is no ranking."
    if comparison.quality and not comparison.quality.comparable:
        return "The variants were scored on different held-out rows, so there is no ranking."
    best = next((row for row in rows if "quality" in row.best), None)
    scored = [row for row in finished if row.quality is not None]
    if metric is None or len(scored) < 2:
        return "Fewer than two finished variants have a score, so there is no ranking."
    if best is None:
        return _all_alike(scored, metric)
    kind = "validation" if comparison.quality and comparison.quality.rows_from == "validation" else "held-out"
    on = f" on {best.rows:,} {kind} rows" if best.rows else ""
    sentence = f"{best.name} has the best {_titled(metric)}, {metric.write(best.quality)}{on}."
    near = [row for row in rows if row is not best and row.is_finished and _overlap(row, best)]
    if not near:
        return sentence
    sentence += f" The difference is not significant: the 95 % {_intervals(near)}."
    cheapest = min(
        (row for row in [best, *near] if row.adapter_bytes), key=lambda row: row.adapter_bytes or 0, default=best
    )
    if cheapest is not best:
        sentence += f" The smallest adapter of these is that of {cheapest.name}, {size(cheapest.adapter_bytes)}."
    return sentence


def _titled(metric: Metric) -> str:
    title = metric.title.split(",")[0]
    return title[0].lower() + title[1:]


def _all_alike(scored: Sequence[VariantRow], metric: Metric) -> str:
    sentence = f"All variants have the same {_titled(metric)} ({metric.write(scored[0].quality)})."
    by_loss = winner(scored)
    if by_loss is None or metric.key == "loss":
        return f"{sentence} There is no ranking."
    return f"{sentence} By loss, {by_loss.name} is lowest ({significant(by_loss.loss)})."


def winner(rows: Sequence[VariantRow]) -> VariantRow | None:
    """The best variant by quality, or by loss where the quality of all is equal; None without a ranking."""
    best = (row for key in ("quality", "loss") for row in rows if key in row.best)
    return next(best, None)


def _intervals(near: Sequence[VariantRow]) -> str:
    names = [row.name for row in near[:3]] + ([f"{len(near) - 3} more"] if len(near) > 3 else [])
    joined = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return (
        f"{'interval' if len(near) == 1 else 'intervals'} of {joined} {'overlaps' if len(near) == 1 else 'overlap'} its"
    )


def _overlap(one: VariantRow, other: VariantRow) -> bool:
    first, second = one.interval, other.interval
    return bool(first and second and first[0] <= second[1] and second[0] <= first[1])


def failures(rows: Sequence[VariantRow]) -> list[str]:
    """One message per variant that ended with an error."""
    messages = []
    for row in rows:
        if row.error is None:
            continue
        first = row.error.splitlines()[0]
        messages.append(f"{row.name}: {row.status}, exit code {row.exit_code}: {first}")
    return messages


def signed(write: Write) -> Write:
    """Format a difference with its sign."""

    def written(value: float | None) -> str:
        if value is None:
            return DASH
        return f"{MINUS if value < 0 else '+'}{write(abs(value))}" if write(abs(value)) != "0" else "0"

    return written


def label(number: int, row: VariantRow) -> str:
    """The label of a variant in tables; plots show only its number."""
    return f"{number} {row.name}"


def cell(row: VariantRow, key: str, write: Write) -> Cell | str:
    """A value of a variant, marked if it is the best or Pareto-optimal."""
    signs = (BEST if key in row.best else "") + (ON_FRONT if key in row.front else "")
    written = write(row.figure(key)) + (f"\N{NO-BREAK SPACE}{signs}" if signs else "")
    return Cell(written, "good") if key in row.best else written


def _quality_section(rows: Sequence[VariantRow], metric: Metric | None) -> Section | None:
    if metric is None:
        return None
    optional: list[tuple[str, str, Write]] = [
        ("loss", "Loss ↓", significant),
        ("retention_change", "Forgetting ↓", signed(significant)),
        ("merge_top1_agreement", "Merge top-1 ↑", percent),
    ]
    columns = [one for one in optional if one[0] != metric.key and any(row.figure(one[0]) is not None for row in rows)]
    with_interval = any(row.interval for row in rows)
    made = []
    for number, row in enumerate(rows, start=1):
        bounds = row.interval
        known = DASH if bounds is None else " to ".join(f"{bound:.3f}" for bound in bounds)
        cells = [cell(row, key, write) for key, _, write in columns]
        quality = cell(row, "quality", metric.write)
        made.append([label(number, row), quality, *([known] if with_interval else []), *cells])
    titles = ["Variant", metric.heading, *(["95 % interval"] if with_interval else []), *(one[1] for one in columns)]
    numeric = range(1, len(titles))
    note = _quality_note(rows, metric)
    return Section("quality", "Quality", (table(titles, made, numeric=numeric, note=note),))


def _quality_note(rows: Sequence[VariantRow], metric: Metric) -> str:
    bases = {row.base_quality for row in rows if row.base_quality is not None}
    parts = [SIGNS]
    parts += [f"The base model has {metric.write(bases.pop())}."] if len(bases) == 1 else []
    if any(row.retention_change is not None for row in rows):
        parts.append("Forgetting: how much the loss on another text grew, nats per token.")
    return " ".join(parts)


def _cost_section(rows: Sequence[VariantRow]) -> Section | None:
    columns: tuple[tuple[str, str, Write], ...] = (
        ("trainable_parameters", "Trainable ↓", count),
        ("trainable_share", "Share", percent),
        ("adapter_bytes", "Adapter ↓", size),
        ("adapter_share", "Share of the base", percent),
        ("peak_memory_bytes", "Peak memory ↓", size),
        ("seconds", "Time ↓", duration),
        ("tokens_per_second", "Tokens/s ↑", significant),
    )
    shown = [one for one in columns if any(row.figure(one[0]) is not None for row in rows)]
    if not shown:
        return None
    made = [
        [label(number, row), *(cell(row, key, write) for key, _, write in shown)]
        for number, row in enumerate(rows, start=1)
    ]
    titles = ("Variant", *(title for _, title, _ in shown))
    return Section("cost", "What it costs", (table(titles, made, numeric=range(1, len(titles)), note=SIGNS),))


def _front_section(comparison: CompareJson, rows: Sequence[VariantRow], metric: Metric | None) -> Section | None:
    fronts = comparison.fronts
    if metric is None or not fronts:
        return None
    blocks: list[Block] = [*front_plots(rows, fronts, metric, COST_NAMES)]
    numbers = {row.name: label(number, row) for number, row in enumerate(rows, start=1)}
    blocks.append(
        facts((COST_NAMES[cost], ", ".join(numbers[name] for name in names)) for cost, names in fronts.items())
    )
    lead = (
        "Up is better, left is cheaper. Dark and connected: variants that no other one beats at both; light: the "
        "others. The numbers are those of the tables; the line through a point is its 95 % interval."
    )
    return Section("fronts", "Quality against cost", tuple(blocks), lead)


def _curve_section(comparison: CompareJson, metric: Metric | None) -> Section | None:
    curves = comparison.curves
    if metric is None or not curves:
        return None
    rows = [
        (count(point.rows), curve.name or DASH, metric.write(point.quality), point.variant)
        for curve in curves
        for point in curve.points
    ]
    titles = ("Training rows", "Varied besides", metric.heading, "Variant")
    kept = (0, 1, 2, 3) if len(curves) > 1 else (0, 2, 3)
    made = table([titles[i] for i in kept], [[row[i] for i in kept] for row in rows], numeric=(0, kept.index(2)))
    lead = (
        "The effect of more training rows: the same recipe and held-out rows, with different numbers of training rows."
    )
    return Section("rows", "Learning curve", (curve_plots(curves, metric), made), lead)


def _varied_section(rows: Sequence[VariantRow]) -> Section | None:
    keys = list(dict.fromkeys(key for row in rows for key in row.varied))
    titles = ["Variant", *keys, "Rows", "Steps", "Run", "Status"]
    made: list[list[Cell | str]] = [
        [
            label(number, row),
            *(_varied(key, row.varied.get(key, DASH)) for key in keys),
            count(row.train_rows),
            count(row.steps),
            row.run,
            Cell(row.status, "" if row.is_finished else "bad"),
        ]
        for number, row in enumerate(rows, start=1)
    ]
    first = 1 + len(keys)
    made_table: Table = table(titles, made, numeric=(first, first + 1))
    return Section("variants", "Variants", (made_table,))


def _varied(key: str, value: str) -> str:
    return "all" if key == "dataset.max_train_samples" and value == "null" else value


def _tiles(rows: Sequence[VariantRow], metric: Metric | None) -> tuple[Tile, ...]:
    wanted: list[tuple[str, str, Write]] = [
        ("adapter_bytes", "Smallest adapter", size),
        ("peak_memory_bytes", "Least memory", size),
        ("seconds", "Shortest training", duration),
        ("retention_change", "Least forgetting", signed(significant)),
    ]
    if metric is not None:
        wanted.insert(0, ("quality", f"Best {metric.title.split(',')[0].lower()}", metric.write))
    found = []
    for key, title, write in wanted:
        best = next((row for row in rows if key in row.best), None)
        if best is not None:
            found.append(Tile(title, write(best.figure(key)), best.name))
    return tuple(found)


@dataclass(frozen=True)
class Point:
    """A variant in a plot; `bounds` is the interval of its quality."""

    number: int
    cost: float
    quality: float
    bounds: tuple[float, float] | None
    on_front: bool


def front_plots(
    rows: Sequence[VariantRow], fronts: Mapping[str, Sequence[str]], metric: Metric, names: Mapping[str, str]
) -> list[Plots]:
    """One plot per cost, two or three side by side.

    Args:
        rows: of `compare.json`.
        fronts: names of the variants on each front.
        names: of the costs, in words.
    """
    found = []
    for cost, front in fronts.items():
        points = [
            Point(number, paid, row.quality, _bounds(row), row.name in front)
            for number, row in enumerate(rows, start=1)
            if row.is_finished and (paid := row.figure(cost)) is not None and row.quality is not None
        ]
        factor, unit = _unit(cost, [point.cost for point in points])
        scaled = [Point(p.number, p.cost / factor, p.quality, p.bounds, p.on_front) for p in points]
        axis = f"{names[cost]}, {unit}"
        found.append(Plot(f"Against {names[cost]}", partial(_front_svg, scaled, metric, axis), FRONT))
    beside = 2 if len(found) % 3 else 3
    return [Plots((), tuple(found[first : first + beside])) for first in range(0, len(found), beside)]


def _bounds(row: VariantRow) -> tuple[float, float] | None:
    return None if row.interval is None else (row.interval[0], row.interval[1])


def _unit(cost: str, values: Sequence[float]) -> tuple[float, str]:
    """The divisor of a cost for its axis, and the resulting unit; for bytes, one that fits the middle of the values."""
    largest = max(values)
    if cost.endswith("_bytes"):
        middle = math.sqrt(max(min(values), 1) * max(largest, 1))
        power = min(4, int(math.log(middle, 1024)))
        return 1024.0**power, ("B", "KiB", "MiB", "GiB", "TiB")[power]
    if cost == "seconds":
        return (1.0, "s") if largest < 300 else (60.0, "min") if largest < 3 * 3600 else (3600.0, "h")
    return 1.0, "nats per token"


def _front_svg(points: Sequence[Point], metric: Metric, axis: str, inches: tuple[float, float]) -> str:
    width, height = inches
    frame = (0.62 / width, 0.5 / height, (width - 0.77) / width, (height - 0.62) / height)
    title = f"{metric.title.split(',')[0]} against {axis}"
    return drawing(title, inches, lambda axes: _draw_front(axes, points, metric, axis), frame)


def _draw_front(axes: "Axes", points: Sequence[Point], metric: Metric, axis: str) -> None:
    for point in points:
        if point.bounds is not None:
            axes.plot([point.cost] * 2, point.bounds, color=RAW, linewidth=1.0, zorder=1)
    on = sorted((point for point in points if point.on_front), key=lambda point: point.cost)
    axes.plot(
        [p.cost for p in on], [p.quality for p in on], color=LINE, linewidth=1.0, drawstyle="steps-post", zorder=2
    )
    for point in points:
        colour = LINE if point.on_front else RAW
        axes.plot([point.cost], [point.quality], "o", color=colour, markersize=6.5, zorder=3)
    costs = [point.cost for point in points]
    if min(costs) > 0 and max(costs) / min(costs) >= LOGARITHMIC_FROM:
        axes.set_xscale("log")
    _scale(axes, [value for p in points for value in (p.quality, *(p.bounds or ()))], metric)
    axes.margins(x=0.12)
    _ticks(axes)
    axes.set_xlabel(axis, labelpad=3)
    _number(axes, points)


def _scale(axes: "Axes", values: Sequence[float], metric: Metric) -> None:
    """Set the vertical limits from the points and their intervals, so that up is better."""
    low, high = min(values), max(values)
    pad = (high - low) * 0.1 or abs(high) * 0.1 or 0.1
    bottom, top = low - pad, high + pad
    axes.set_ylim((top, bottom) if metric.better == "lower" else (bottom, top))


def _ticks(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if axes.get_xscale() == "log":
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 3.0) if high / low < 300 else (1.0,), numticks=6))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_tick_params(which="minor", length=0)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    written = FuncFormatter(lambda value, _: compact(float(f"{value:.10g}")))
    axes.xaxis.set_major_formatter(written)
    axes.yaxis.set_major_formatter(written)


def _number(axes: "Axes", points: Sequence[Point]) -> None:
    """Write its number beside each point, at the first free position."""
    spots = [axes.transData.transform((point.cost, point.quality)) for point in points]
    taken = [(float(x), float(y)) for x, y in spots]
    unit = axes.figure.dpi / 72
    for point, (x, y) in zip(points, spots, strict=True):
        positions = [(9, 5), (-9, 5), (9, -9), (-9, -9), (0, 12), (0, -15), (18, 5), (-18, 5)]
        free = [spot for spot in positions if _is_free(x + spot[0] * unit, y + spot[1] * unit, taken, 9 * unit)]
        dx, dy = free[0] if free else positions[0]
        taken.append((x + dx * unit, y + dy * unit))
        axes.annotate(
            str(point.number),
            (point.cost, point.quality),
            xytext=(dx, dy),
            textcoords="offset points",
            ha="center",
            va="center",
            color=INK if point.on_front else FAINT,
            annotation_clip=False,
        )


def _is_free(x: float, y: float, taken: Sequence[tuple[float, float]], apart: float) -> bool:
    return all(math.hypot(x - other[0], y - other[1]) >= apart for other in taken)


def curve_plots(curves: Sequence[LearningCurve], metric: Metric) -> Plots:
    """Quality over the number of training rows, one curve per group of runs."""
    title = f"{metric.title.split(',')[0]} over training rows"

    def drawn(inches: tuple[float, float]) -> str:
        width, height = inches
        frame = (0.62 / width, 0.48 / height, (width - 0.85) / width, (height - 0.6) / height)
        return drawing(title, inches, lambda axes: _draw_curves(axes, curves, metric), frame)

    note = "Logarithmic in the number of rows."
    if len(curves) > 1:
        signs = {
            "o": "circles",
            "s": "squares",
            "^": "triangles",
            "D": "diamonds",
            "v": "inverted triangles",
            "P": "crosses",
        }
        named = [f"{signs[MARKS[i % len(MARKS)]]} {curve.name or 'the others'}" for i, curve in enumerate(curves)]
        note = f"{note} {'; '.join(named)}."
    return Plots((Plot(title, drawn, WIDE, note, narrow_inches=NARROW),), ())


def _draw_curves(axes: "Axes", curves: Sequence[LearningCurve], metric: Metric) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for number, curve in enumerate(curves):
        points = curve.points
        for point in points:
            if point.interval is not None:
                axes.plot([point.rows] * 2, point.interval, color=RAW, linewidth=1.0)
        mark, dash = MARKS[number % len(MARKS)], DASHES[number % len(DASHES)]
        line = [(point.rows, point.quality) for point in points]
        axes.plot(*zip(*line, strict=True), marker=mark, linestyle=dash, color=LINE, linewidth=1.6, markersize=5.5)
    axes.set_xscale("log")
    everywhere = [point for curve in curves for point in curve.points]
    _scale(axes, [value for point in everywhere for value in (point.quality, *(point.interval or ()))], metric)
    axes.margins(x=0.04)
    _ticks(axes)
    axes.set_xticks(sorted({point.rows for point in everywhere}))
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training rows", labelpad=3)
