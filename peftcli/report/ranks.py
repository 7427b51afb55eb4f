"""How AdaLoRA's ranks moved: the rank of each module over the steps, and where it ended."""

from typing import TYPE_CHECKING, Any

from peftcli.report.blocks import Folded, Plot, Plots, Section, facts, table
from peftcli.report.format import count
from peftcli.report.plots import LINE, NARROW, RAW, WIDE, drawing
from peftcli.report.stages import Stages, figure, find

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
        Folded("All modules", _rank_table(modules, ranks)),
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
