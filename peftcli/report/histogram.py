"""How long the rows are, as one drawing with the maximum length marked."""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from peftcli.report.blocks import Plot, Plots
from peftcli.report.format import compact, count
from peftcli.report.plots import INK, LINE, NARROW, RAW, WIDE, drawing
from peftcli.report.stages import figure, find

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_BARS = 400


def length_plots(data: dict[str, Any]) -> Plots | None:
    """The lengths of the rows in tokens; None where they were not counted."""
    edges, counts = bins(data)
    if not counts:
        return None
    limit, longest = figure(data, "max_length"), edges[-1]
    edges = _even(edges)
    inside = limit if limit is not None and limit < longest else None

    def drawn(inches: tuple[float, float]) -> str:
        return drawing("Rows by their length", inches, lambda axes: _draw(axes, edges, counts, inside), _frame(inches))

    note = _note(limit, inside, longest if longest > edges[-1] else None)
    return Plots((Plot("Length of the rows", drawn(WIDE), note, drawn(NARROW)),), ())


def bins(data: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Edges and counts of the histogram; both empty where it is missing or not one."""
    edges, counts = (_numbers(find(data, "length_histogram", key)) for key in ("edges", "counts"))
    whole = len(edges) == len(counts) + 1 and all(low < high for low, high in pairwise(edges))
    return (edges, counts) if whole and 0 < len(counts) <= MOST_BARS else ([], [])


def _numbers(value: Any) -> list[float]:
    """A list of figures; empty where it is none, or where one of them is missing."""
    found = [figure({"value": part}, "value") for part in value] if isinstance(value, list) else []
    known = [part for part in found if part is not None]
    return known if len(known) == len(found) else []


def _even(edges: list[float]) -> list[float]:
    """The edges with the last bar as wide as the one before: it may hold all rows that are much longer."""
    if len(edges) < 3:
        return edges
    return [*edges[:-1], min(edges[-1], 2 * edges[-2] - edges[-3])]


def _note(limit: float | None, inside: float | None, longest: float | None) -> str:
    what = "Rows by their tokens, before any cut."
    if longest is not None:
        what = f"{what} The last bar holds all longer rows, the longest of {count(longest - 1)} tokens."
    if limit is None:
        return what
    if inside is None:
        return f"{what} The maximum length, {count(limit)}, lies beyond the longest row."
    return f"{what} Dashed: the maximum length; light: bars that reach beyond it."


def _frame(inches: tuple[float, float]) -> tuple[float, float, float, float]:
    width, height = inches
    return 0.6 / width, 0.42 / height, (width - 0.8) / width, (height - 0.72) / height


def _draw(axes: "Axes", edges: list[float], counts: list[float], limit: float | None) -> None:
    # Imported here: the report of a run without data needs no matplotlib.
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    widths = [high - low for low, high in pairwise(edges)]
    colours = [RAW if limit is not None and high > limit else LINE for high in edges[1:]]
    axes.bar(edges[:-1], counts, width=[width * 0.94 for width in widths], align="edge", color=colours)
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.set_xlabel("tokens", labelpad=2)
    if limit is not None:
        axes.axvline(limit, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        side = "right" if limit > (edges[0] + edges[-1]) / 2 else "left"
        above = axes.get_xaxis_transform()
        axes.text(limit, 1.04, f"max_length {count(limit)}", transform=above, ha=side, va="bottom", color=INK)
