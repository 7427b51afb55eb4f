"""The drawings of a comparison: quality against each cost, and quality over the number of training rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftcli.report.blocks import Plot, Plots
from peftcli.report.format import compact, count
from peftcli.report.plots import FAINT, INK, LINE, NARROW, RAW, WIDE, drawing
from peftcli.report.scores import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

FRONT = (4.8, 2.7)
"""Inches of one drawing of quality against a cost."""
MARKS = ("o", "s", "^", "D", "v", "P")
"""Curves differ by their mark and their dashes, not by colour."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1, 2)))
LOGARITHMIC_FROM = 20.0
"""Largest over smallest cost from which an axis is logarithmic."""


@dataclass(frozen=True)
class Point:
    """A variant in a drawing; `bounds` is the interval of its quality."""

    number: int
    cost: float
    quality: float
    bounds: tuple[float, float] | None
    on_front: bool


def front_plots(
    rows: Sequence[Row], fronts: Mapping[str, Sequence[str]], metric: Metric, names: Mapping[str, str]
) -> list[Plots]:
    """One drawing for each cost, two or three beside each other.

    Args:
        rows: of `compare.json`.
        fronts: names of the variants on each front.
        names: of the costs, in words.
    """
    found = []
    for cost, front in fronts.items():
        points = [
            Point(number, row[cost], row["quality"], _bounds(row), row["name"] in front)
            for number, row in enumerate(rows, start=1)
            if row["status"] == "finished" and row[cost] is not None and row["quality"] is not None
        ]
        factor, unit = _unit(cost, [point.cost for point in points])
        scaled = [Point(p.number, p.cost / factor, p.quality, p.bounds, p.on_front) for p in points]
        axis = f"{names[cost]}, {unit}"
        found.append(Plot(f"Against {names[cost]}", _front_svg(scaled, metric, axis)))
    beside = 2 if len(found) % 3 else 3
    return [Plots((), tuple(found[first : first + beside])) for first in range(0, len(found), beside)]


def _bounds(row: Row) -> tuple[float, float] | None:
    return None if row["interval"] is None else (row["interval"][0], row["interval"][1])


def _unit(cost: str, values: Sequence[float]) -> tuple[float, str]:
    """What a cost is divided by for its axis, and the unit that this gives; of bytes, one for the middle of them."""
    largest = max(values)
    if cost.endswith("_bytes"):
        middle = math.sqrt(max(min(values), 1) * max(largest, 1))
        power = min(4, int(math.log(middle, 1024)))
        return 1024.0**power, ("B", "KiB", "MiB", "GiB", "TiB")[power]
    if cost == "seconds":
        return (1.0, "s") if largest < 300 else (60.0, "min") if largest < 3 * 3600 else (3600.0, "h")
    return 1.0, "nats per token"


def _front_svg(points: Sequence[Point], metric: Metric, axis: str) -> str:
    width, height = FRONT
    frame = (0.62 / width, 0.5 / height, (width - 0.77) / width, (height - 0.62) / height)
    title = f"{metric.title.split(',')[0]} against {axis}"
    return drawing(title, FRONT, lambda axes: _draw_front(axes, points, metric, axis), frame)


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
    """Set the height of the drawing by its points and their intervals, so that up is better."""
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
    """Write its number beside each point, at the first of some places that is free."""
    spots = [axes.transData.transform((point.cost, point.quality)) for point in points]
    taken = [(float(x), float(y)) for x, y in spots]
    unit = axes.figure.dpi / 72
    for point, (x, y) in zip(points, spots, strict=True):
        places = [(9, 5), (-9, 5), (9, -9), (-9, -9), (0, 12), (0, -15), (18, 5), (-18, 5)]
        free = [place for place in places if _is_free(x + place[0] * unit, y + place[1] * unit, taken, 9 * unit)]
        dx, dy = free[0] if free else places[0]
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


def curve_plots(curves: Sequence[Row], metric: Metric) -> Plots:
    """Quality over the number of training rows, one curve for each group of runs."""
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
            "v": "pointing down",
            "P": "crosses",
        }
        named = [f"{signs[MARKS[i % len(MARKS)]]} {curve['name'] or 'the others'}" for i, curve in enumerate(curves)]
        note = f"{note} {'; '.join(named)}."
    return Plots((Plot(title, drawn(WIDE), note, drawn(NARROW)),), ())


def _draw_curves(axes: "Axes", curves: Sequence[Row], metric: Metric) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for number, curve in enumerate(curves):
        points = curve["points"]
        for point in points:
            if point["interval"] is not None:
                axes.plot([point["rows"]] * 2, point["interval"], color=RAW, linewidth=1.0)
        mark, dash = MARKS[number % len(MARKS)], DASHES[number % len(DASHES)]
        line = [(point["rows"], point["quality"]) for point in points]
        axes.plot(*zip(*line, strict=True), marker=mark, linestyle=dash, color=LINE, linewidth=1.6, markersize=5.5)
    axes.set_xscale("log")
    points = [point for curve in curves for point in curve["points"]]
    _scale(axes, [value for point in points for value in (point["quality"], *(point["interval"] or ()))], metric)
    axes.margins(x=0.04)
    _ticks(axes)
    axes.set_xticks(sorted({point["rows"] for curve in curves for point in curve["points"]}))
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training rows", labelpad=3)
