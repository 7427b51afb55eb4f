"""The body of `compare`: variants or existing runs, the table and the report."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftcli.cli.console import Shown, console, printable
from peftcli.cli.recipes import find_recipe
from peftcli.compare.results import RESULT, Entry, collect, is_run, open_runs
from peftcli.compare.run import VariantRunner
from peftcli.compare.variants import Variant, check_variants, make_variants, read_axes
from peftcli.errors import Aborted, RecipeError, Stopped
from peftcli.report.compare import COST_NAMES, failures, quality_metric, signed, verdict, write_comparison
from peftcli.report.format import count, duration, percent, several, significant, size
from peftcli.results import CompareJson, VariantRow, as_text, save

GATE_NOT_MET = 7

WIDTH = 100
LONGEST_NAME = 30
STAR = "*"


@dataclass(frozen=True)
class CompareFlags:
    """The flags of `compare`."""

    vary: tuple[str, ...]
    overrides: tuple[str, ...]
    output_dir: Path | None
    smoke: bool
    as_json: bool


def compare_command(targets: Sequence[str], flags: CompareFlags, out: Any, err: Any) -> int:
    """Compare runs that are there, or train the variants of recipes first.

    Args:
        targets: run folders, or recipes.
        out: stream for the result.
        err: stream for people.

    Returns:
        The exit code: 0 where every variant is finished, else that of the first that is not.
    """
    if all(is_run(Path(target)) for target in targets):
        return _compare_runs([Path(target) for target in targets], flags, out)
    for target in targets:
        if is_run(Path(target)):
            raise RecipeError(f"{target} is a run, others are recipes; compare runs with runs, or recipes with recipes")
    recipes = [find_recipe(target) for target in targets]
    variants = make_variants(recipes, read_axes(flags.vary), flags.overrides)
    check_variants(variants)
    name = recipes[0].stem if len(recipes) == 1 else "recipes"
    home = Path(os.path.abspath(flags.output_dir or Path("runs") / f"{name}-compare{'-smoke' if flags.smoke else ''}"))
    shown = Shown(console(err))
    shown.note(f"{len(variants)} variants, one after the other, in {home}; a finished one is not trained again")
    entries: list[Entry] = []
    with VariantRunner() as children:
        for number, variant in enumerate(variants, start=1):
            if children.stopped_by is None:
                shown.note(f"variant {number} of {len(variants)}: {variant.name}")
                entries.append(_train(children, variant, home, entries, flags.smoke, shown))
            else:
                entries.append(Entry(variant.name, home / variant.name, dict(variant.varied)))
    comparison = _write(name, entries, home)
    _say_cache(comparison, shown)
    if flags.as_json or any(row.is_finished for row in comparison.variants):
        _show(comparison, home, flags, out)
    _raise_if_stopped(children, entries)
    return _ended(entries, shown)


def _compare_runs(folders: Sequence[Path], flags: CompareFlags, out: Any) -> int:
    if flags.vary or flags.overrides or flags.smoke:
        raise RecipeError("--vary, --set and --smoke belong to recipes; runs that are there are compared as they are")
    entries = open_runs(folders)
    alone = folders[0] if len(folders) == 1 else Path("runs") / "compare"
    home = Path(os.path.abspath(flags.output_dir or alone))
    _show(_write(home.name, entries, home), home, flags, out)
    return 0


def _train(
    children: VariantRunner, variant: Variant, home: Path, before: Sequence[Entry], smoke: bool, shown: Shown
) -> Entry:
    folder = home / variant.name
    source_run = next((entry.folder for entry in before if entry.exit_code in (0, GATE_NOT_MET)), None)
    flags = [*(["--smoke"] if smoke else []), *([] if source_run is None else ["--baseline-from", str(source_run)])]
    code, error = children.train(variant, folder, flags, shown)
    if children.stopped_by is not None and code not in (0, GATE_NOT_MET):
        # The exit code is another one where the signal came before the child could listen to it.
        code, error = Stopped.exit_code, None
    return Entry(variant.name, folder, dict(variant.varied), code, error)


def _write(name: str, entries: Sequence[Entry], home: Path) -> CompareJson:
    comparison = collect(name, entries, home)
    save(home / RESULT, comparison)
    write_comparison(comparison, home)
    return comparison


def _show(comparison: CompareJson, home: Path, flags: CompareFlags, out: Any) -> None:
    if flags.as_json:
        out.write(as_text(comparison) + "\n")
        out.flush()
        return
    show_comparison(comparison, console(out))
    console(out).print(f"\nreport  {home / 'compare.html'}")


def _say_cache(comparison: CompareJson, shown: Shown) -> None:
    caches = [row.data_cache for row in comparison.variants if row.data_cache]
    if caches:
        made, reused = caches.count("made"), caches.count("reused")
        shown.note(f"data prepared by {several(made, 'variant', 'variants')}, taken from the cache by {reused}")


def _raise_if_stopped(children: VariantRunner, entries: Sequence[Entry]) -> None:
    if children.stopped_by is None:
        return
    done = sum(entry.exit_code in (0, GATE_NOT_MET) for entry in entries)
    if done == len(entries):
        return
    said = f"with {done} of {len(entries)} variants finished; the same command goes on"
    if children.at_once:
        raise Aborted(f"stopped at once {said} from the last checkpoint")
    raise Stopped(f"stopped by {children.stopped_by} {said}")


def _ended(entries: Sequence[Entry], shown: Shown) -> int:
    bad = [entry for entry in entries if entry.exit_code]
    if not bad:
        return 0
    first = bad[0]
    shown.note(
        f"{len(bad)} of {len(entries)} variants did not end well; exit code {first.exit_code} is that of {first.name}"
    )
    return first.exit_code or 0


def show_comparison(comparison: CompareJson, out: Console) -> None:
    """Print the verdict, the table, the fronts and what is to be kept in mind."""
    rows = comparison.variants
    out.print(comparison_table(comparison), width=WIDTH)
    if any(row.best for row in rows):
        out.print(f"{STAR} best of its column")
    out.print()
    metric = quality_metric(comparison)
    for cost, names in comparison.fronts.items():
        title = "quality" if metric is None else metric.title.split(",")[0].lower()
        out.print(f"front of {title} against {COST_NAMES[cost]}: {printable(', '.join(names))}")
    for curve in comparison.curves:
        points = ", ".join(f"{point.rows:,} rows {_quality(point.quality, metric)}" for point in curve.points)
        out.print(f"learning curve{' of ' + curve.name if curve.name else ''}: {points}")
    for doubt in (*failures(rows), *comparison.doubts):
        out.print(f"note: {printable(doubt)}")
    out.print(verdict(comparison))


def _quality(value: float, metric: Any) -> str:
    return str(metric.write(value))


def comparison_table(comparison: CompareJson) -> Table:
    """The variants with their figures; a column that no variant has is left out."""
    rows, metric = comparison.variants, quality_metric(comparison)
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
    shown = [one for one in columns if any(getattr(row, one[0]) is not None for row in rows)]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("variant", overflow="fold", max_width=LONGEST_NAME)
    for _, title, _ in shown:
        table.add_column(title, justify="right", overflow="fold")
    for row in rows:
        table.add_row(Text(printable(row.name)), *_cells(row, shown))
    return table


def _cells(row: VariantRow, shown: Sequence[tuple[str, str, Callable[[Any], str]]]) -> list[Text]:
    if not row.is_finished and row.quality is None:
        return [Text(row.status), *([Text("-")] * (len(shown) - 1))] if shown else []
    return [
        Text("-" if getattr(row, key) is None else write(getattr(row, key)) + (STAR if key in row.best else ""))
        for key, _, write in shown
    ]


def _interval(bounds: Sequence[float]) -> str:
    return "-".join(f"{bound:.3f}".removeprefix("0") for bound in bounds)


def _short(title: str) -> str:
    return title.split(",")[0].lower().replace("exact match", "exact")
