"""Curves of the training log and other plots as SVG, with the colors and font of the surrounding page."""

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING, Any, cast

from peftcli.report.blocks import Plot, Plots, Table, table
from peftcli.report.format import compact, count, several, significant
from peftcli.report.load import Stages, logged
from peftcli.report.metrics import BY_KEY, task_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[float, float]]

# Placeholder colors, which are used nowhere else and later replaced by variables of the page's style sheet.
INK, FAINT, GRID, LINE, RAW = "#010203", "#010204", "#010205", "#010206", "#010207"
VARIABLES = {INK: "--ink", FAINT: "--quiet", GRID: "--rule", LINE: "--accent", RAW: "--raw"}
STYLE = {
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.labelcolor": FAINT,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.unicode_minus": True,
}
WIDE, NARROW, SMALL = (9.6, 2.9), (4.0, 2.5), (3.1, 1.85)  # inches; 72 units of the drawing each
MOST_POINTS = 700


@dataclass(frozen=True)
class Curve:
    """One curve over the steps; the levels are horizontal lines labeled at the right edge."""

    name: str
    points: Points
    smooth: Points
    levels: tuple[tuple[str, float], ...] = ()
    from_zero: bool = True


def log_points(log: Sequence[Mapping[str, Any]], key: str) -> Points:
    """The finite values of one key by step; if a resumed run logged a step again, the later value counts."""
    found = {
        step: value
        for row in log
        if (step := logged(row, "step")) is not None and (value := logged(row, key)) is not None
    }
    return sorted(found.items())


def smoothed(points: Points, window: int) -> Points:
    """Moving averages over a window centered on each point and shorter at both ends.

    >>> smoothed([(1, 4.0), (2, 1.0), (3, 1.0)], 3)
    [(1, 2.5), (2, 2.0), (3, 1.0)]
    """
    half = window // 2
    total = [0.0]
    for _, value in points:
        total.append(total[-1] + value)
    result: Points = []
    for index, (step, _) in enumerate(points):
        first, last = max(0, index - half), min(len(points), index + half + 1)
        result.append((step, (total[last] - total[first]) / (last - first)))
    return result


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most about `most` points; the minimum and maximum of every section stay, so that no spike is lost."""
    if len(points) <= most:
        return points
    width = math.ceil(2 * len(points) / most)
    indices: set[int] = {0, len(points) - 1}
    for start in range(0, len(points), width):
        stretch = range(start, min(start + width, len(points)))
        indices.add(min(stretch, key=lambda index: points[index][1]))
        indices.add(max(stretch, key=lambda index: points[index][1]))
    return [points[index] for index in sorted(indices)]


def log_plots(stages: Stages) -> Plots | None:
    """The curves of a run; None if fewer than two steps were logged."""
    losses = log_points(stages.log, "loss")
    window = max(3, len(losses) // 20)
    wide: list[Plot] = []
    if len(losses) > 1:
        levels = [(side, stages.metrics.of(side).figure("loss")) for side in ("base", "adapter")]
        known = tuple((f"{side} {significant(loss)}", loss) for side, loss in levels if loss is not None)
        curve = Curve("Loss", losses, smoothed(losses, window) if len(losses) > 12 else [], known)
        note = _loss_note(stages, curve, window)
        wide.append(Plot("Training loss", partial(_svg, curve), WIDE, note, narrow_inches=NARROW))
    small = []
    for key, title, from_zero in (
        ("learning_rate", "Learning rate", True),
        ("grad_norm", "Gradient norm", True),
        ("tokens_per_second", "Tokens per second", True),
    ):
        points = log_points(stages.log, key)
        if len(points) > 1:
            small.append(Plot(title, partial(_svg, Curve(title, points, [], from_zero=from_zero)), SMALL))
    small += _evaluation_plots(stages)
    return Plots(tuple(wide), tuple(small)) if wide or small else None


def _evaluation_plots(stages: Stages) -> list[Plot]:
    """The loss of the evaluations during training, and the metric that chose the best step."""
    best = None if stages.training is None else stages.training.best
    keys = dict.fromkeys(("loss", *([best.metric] if best is not None and best.metric else [])))
    rows = "test" if best is not None and best.rows_from == "test" else "validation"
    found = []
    for key in keys:
        points = log_points(stages.log, f"eval_{key}")
        if len(points) > 1:
            name = BY_KEY[key].title.split(",")[0] if key in BY_KEY else key.replace("_", " ")
            title = f"{name} on the {rows} rows"
            found.append(Plot(title, partial(_svg, Curve(title, points, [], from_zero=False)), SMALL))
    return found


def _loss_note(stages: Stages, curve: Curve, window: int) -> str:
    parts = [f"{task_of(stages).loss_title}, by step."]
    if curve.smooth:
        parts.append(f"Light: each logged step; dark: the mean of {window} steps.")
    if curve.levels:
        parts.append("Dashed: the loss on the held-out rows.")
    broken = [row for row in stages.log if "loss" in row and logged(row, "loss") is None]
    if broken:
        steps = several(len(broken), "logged step has", "logged steps have")
        parts.append(f"{steps} no finite loss and cannot be drawn.")
    return " ".join(parts)


def log_table(stages: Stages) -> Table | None:
    """At most ten rows of the log, evenly spaced, as a table."""
    by_step = {step: row for row in stages.log if "loss" in row and (step := logged(row, "step")) is not None}
    if not by_step:
        return None
    steps = sorted(by_step)
    rows = sorted({round(index * (len(steps) - 1) / 9) for index in range(10)})
    writers: tuple[tuple[str, Callable[[float | None], str]], ...] = (
        ("loss", significant),
        ("learning_rate", compact),
        ("grad_norm", compact),
        ("tokens_per_second", significant),
    )
    cells = [
        [count(step), *(write(logged(by_step[step], key)) for key, write in writers)]
        for step in (steps[row] for row in rows)
    ]
    return table(("Step", "Loss", "Learning rate", "Gradient norm", "Tokens/s"), cells, numeric=range(5))


def _svg(curve: Curve, inches: tuple[float, float]) -> str:
    return drawing(f"{curve.name} over steps", inches, lambda axes: _draw(axes, curve, inches), _frame(curve, inches))


def drawing(
    title: str,
    inches: tuple[float, float],
    draw: Callable[["Axes"], None],
    frame: tuple[float, float, float, float],
) -> str:
    """An SVG for the page; the same calls give identical output.

    Args:
        title: alternative text; contains no text of a run.
        inches: width and height.
        draw: draws on the axes.
        frame: left, bottom, width and height of the axes, as shares of the drawing.
    """
    # Imported here: the first import on a machine searches for fonts and logs it.
    with _silenced("matplotlib"):
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            # The salt names the clip paths: the same in every run, but different for every drawing.
            salt = {"svg.hashsalt": f"{title} {inches}"}
            matplotlib.rcParams.update(cast("Any", STYLE | salt))
            made = Figure(figsize=inches)
            draw(made.add_axes(frame))
            written = StringIO()
            no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            made.savefig(written, format="svg", metadata=no_metadata)
    return _for_page(written.getvalue(), title)


def _frame(curve: Curve, inches: tuple[float, float]) -> tuple[float, float, float, float]:
    width, height = inches
    room = 0.8 if inches == NARROW else 1.35
    left, right, bottom, top = 0.55, room if curve.levels else 0.2, 0.42 if curve.levels else 0.28, 0.1
    return left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height


def _draw(axes: "Axes", curve: Curve, inches: tuple[float, float]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    main = curve.smooth or curve.points
    if curve.smooth:
        axes.plot(*zip(*thinned(curve.points), strict=True), color=RAW, linewidth=1.0)
    axes.plot(*zip(*thinned(main), strict=True), color=LINE, linewidth=1.8, solid_capstyle="round")
    values = [value for _, value in curve.points] + [value for _, value in curve.levels]
    low, high = min(values), max(values)
    if curve.from_zero:
        low = min(low, 0.0)
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    axes.set_ylim(low if low == 0 else low - pad, high + pad)
    axes.set_xlim(curve.points[0][0], curve.points[-1][0])
    axes.xaxis.set_major_locator(MaxNLocator(8 if inches == WIDE else 4, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5 if curve.levels else 3, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    if curve.levels:
        axes.set_xlabel("step", labelpad=2)
        _draw_levels(axes, curve.levels, lines=2 if inches == NARROW else 1)


def _draw_levels(axes: "Axes", levels: tuple[tuple[str, float], ...], *, lines: int) -> None:
    bottom, top = axes.get_ylim()
    apart = (top - bottom) * 0.1 * lines
    places: list[float] = []
    for _, value in sorted(levels, key=lambda level: level[1]):
        places.append(max(value, places[-1] + apart) if places else value)
    for (name, value), place in zip(sorted(levels, key=lambda level: level[1]), places, strict=True):
        axes.axhline(value, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        edge = axes.get_yaxis_transform()
        label = name.replace(" ", "\n") if lines == 2 else name
        axes.text(1.015, place, label, transform=edge, va="center", ha="left", color=INK)


def _tick(value: float) -> str:
    return f"{compact(value / 1000)}k" if abs(value) >= 10000 else compact(round(value, 12))


def _for_page(svg: str, title: str) -> str:
    """Reduce a drawing to what a page needs: no header, no URL, no fixed size, no clashing names."""
    svg = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    svg = re.sub(r"^<svg[^>]*>", f'<svg viewBox="{box[1]}" role="img" aria-label="{title}">', svg, count=1)
    svg = re.sub(r"<style type=\"text/css\">.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    # Versions of matplotlib name the font differently; the page sets it.
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"\n\s*", "\n", svg).strip()


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
