"""The table of a comparison on the terminal, within 100 columns."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftcli.cli.printable import printable
from peftcli.report.compare import COST_NAMES, failures, quality_metric, signed, verdict
from peftcli.report.format import count, duration, percent, significant, size

WIDTH = 100
LONGEST_NAME = 30
STAR = "*"
Row = Mapping[str, Any]


def show_comparison(comparison: Mapping[str, Any], out: Console) -> None:
    """Print the verdict, the table, the fronts and what is to be kept in mind."""
    rows = comparison["variants"]
    out.print(comparison_table(comparison), width=WIDTH)
    if any(row["best"] for row in rows):
        out.print(f"{STAR} best of its column")
    out.print()
    metric = quality_metric(comparison)
    for cost, names in comparison["fronts"].items():
        title = "quality" if metric is None else metric.title.split(",")[0].lower()
        out.print(f"front of {title} against {COST_NAMES[cost]}: {printable(', '.join(names))}")
    for curve in comparison["curves"]:
        points = ", ".join(f"{point['rows']:,} rows {_quality(point['quality'], metric)}" for point in curve["points"])
        out.print(f"learning curve{' of ' + curve['name'] if curve['name'] else ''}: {points}")
    for doubt in (*failures(rows), *comparison["doubts"]):
        out.print(f"note: {printable(doubt)}")
    out.print(verdict(comparison))


def _quality(value: float, metric: Any) -> str:
    return str(metric.write(value))


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """The variants with their figures; a column that no variant has is left out."""
    rows, metric = comparison["variants"], quality_metric(comparison)
    columns: list[tuple[str, str, Callable[[Any], str]]] = [
        ("interval", "95 %", _interval),
        ("loss", "loss", significant),
        ("retention_change", "forgot", signed(lambda value: significant(value, 3))),
        ("trainable_parameters", "trained", count),
        ("trainable_share", "share", percent),
        ("adapter_bytes", "adapter", size),
        ("peak_memory_bytes", "memory", size),
        ("seconds", "time", duration),
        ("tokens_per_second", "tok/s", lambda value: significant(value, 3)),
        ("merge_top1_agreement", "merge", percent),
    ]
    if metric is not None:
        columns.insert(0, ("quality", _short(metric.title), metric.write))
        columns = [one for one in columns if one[0] != metric.key]
    shown = [one for one in columns if any(row[one[0]] is not None for row in rows)]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("variant", overflow="fold", max_width=LONGEST_NAME)
    for _, title, _ in shown:
        table.add_column(title, justify="right", overflow="fold")
    for row in rows:
        table.add_row(Text(printable(row["name"])), *_cells(row, shown))
    return table


def _cells(row: Row, shown: Sequence[tuple[str, str, Callable[[Any], str]]]) -> list[Text]:
    if row["status"] != "finished" and row["quality"] is None:
        return [Text(row["status"]), *([Text("-")] * (len(shown) - 1))] if shown else []
    return [
        Text("-" if row[key] is None else write(row[key]) + (STAR if key in row["best"] else ""))
        for key, _, write in shown
    ]


def _interval(bounds: Sequence[float]) -> str:
    return "-".join(f"{bound:.3f}".removeprefix("0") for bound in bounds)


def _short(title: str) -> str:
    return title.split(",")[0].lower().replace("exact match", "exact")
