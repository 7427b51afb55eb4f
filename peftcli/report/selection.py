"""What the gradient chose before the first step: the score of each module or layer, drawn and as a table."""

from typing import TYPE_CHECKING, Any

from peftcli.report.blocks import Block, Cell, Folded, Plot, Plots, Section, facts, table
from peftcli.report.format import count, share, significant
from peftcli.report.plots import LINE, NARROW, RAW, WIDE, drawing
from peftcli.report.stages import Stages, figure, find, objects, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_BARS = 30
"""Modules that are drawn, those with the largest gradient; the table has all."""
NAME_INCHES = 0.078
"""Width of a letter beside a bar."""


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
        Folded(f"All {kind}", _score_table(ordered, kind)),
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
