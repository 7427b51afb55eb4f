"""The report of a comparison: a pure function of `compare.json`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peftcli.report.blocks import Block, Cell, Report, Section, Table, Tile, facts, table
from peftcli.report.compare_plots import curve_plots, front_plots
from peftcli.report.format import DASH, MINUS, count, duration, percent, several, significant, size
from peftcli.report.markdown import render_markdown
from peftcli.report.page import render_page
from peftcli.report.scores import BY_KEY, Metric
from peftcli.rundir import write_text

Row = Mapping[str, Any]
Write = Callable[[float | None], str]

BEST, ON_FRONT = "★", "◆"
SIGNS = (
    f"{BEST} best of its column. {ON_FRONT} on the front: no other variant is at least as good for at most this cost."
)
COST_NAMES = {
    "adapter_bytes": "adapter size",
    "peak_memory_bytes": "peak memory",
    "seconds": "training time",
    "retention_change": "forgetting",
}


def write_comparison(comparison: Mapping[str, Any], folder: Any) -> None:
    """Write `compare.md` and `compare.html` into a folder."""
    report = make_comparison(comparison)
    write_text(folder / "compare.md", render_markdown(report))
    write_text(folder / "compare.html", render_page(report))


def make_comparison(comparison: Mapping[str, Any]) -> Report:
    """Make the report of a comparison from the content of `compare.json`."""
    rows = comparison["variants"]
    metric = quality_metric(comparison)
    finished = sum(row["status"] == "finished" for row in rows)
    whole = finished == len(rows)
    sections = (
        _quality_section(rows, metric),
        _cost_section(rows),
        _front_section(comparison, rows, metric),
        _curve_section(comparison, metric),
        _varied_section(rows),
    )
    return Report(
        name=comparison["name"],
        subtitle=" · ".join(part for part in (comparison["model"], comparison["task"]) if part),
        status=f"✓ {several(finished, 'variant', 'variants')}" if whole else f"‖ {finished} of {len(rows)} finished",
        status_tone="good" if whole else "warn",
        smoke=comparison["smoke"],
        verdict=verdict(comparison),
        warnings=(*failures(rows), *comparison["doubts"]),
        tiles=_tiles(rows, metric),
        gates=(),
        sections=tuple(section for section in sections if section is not None),
        kind="comparison",
        footer="Written by peftcli from the JSON files of the runs.",
    )


def quality_metric(comparison: Mapping[str, Any]) -> Metric | None:
    """The metric that the variants are compared by."""
    quality = comparison["quality"]
    return None if quality is None else BY_KEY[quality["key"]]


def verdict(comparison: Mapping[str, Any]) -> str:
    """Which variant is best, how sure that is, and which is the cheapest that is nearly as good."""
    rows, metric = comparison["variants"], quality_metric(comparison)
    best = next((row for row in rows if "quality" in row["best"]), None)
    if metric is None and any(row["status"] == "finished" for row in rows):
        return "No variant was scored on held-out rows, so nothing here says which is best."
    if metric is None or best is None:
        return "No two finished variants with different scores, so there is nothing to choose between yet."
    number = comparison["quality"]["rows"]
    on = f" on {number:,} held-out rows" if number else ""
    title = metric.title.split(",")[0]
    said = f"{best['name']} has the best {title[0].lower() + title[1:]}, {metric.write(best['quality'])}{on}."
    near = [row for row in rows if row is not best and row["status"] == "finished" and _overlap(row, best)]
    if not near:
        return said
    said += f" That does not settle it: the 95 % {_intervals(near)}."
    cheapest = min((row for row in [best, *near] if row["adapter_bytes"]), key=_bytes, default=best)
    if cheapest is not best:
        said += f" The smallest adapter of these is that of {cheapest['name']}, {size(cheapest['adapter_bytes'])}."
    return said


def _bytes(row: Row) -> float:
    return float(row["adapter_bytes"])


def _intervals(near: Sequence[Row]) -> str:
    names = [row["name"] for row in near[:3]] + ([f"{len(near) - 3} more"] if len(near) > 3 else [])
    joined = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return (
        f"{'interval' if len(near) == 1 else 'intervals'} of {joined} {'overlaps' if len(near) == 1 else 'overlap'} its"
    )


def _overlap(one: Row, other: Row) -> bool:
    first, second = one["interval"], other["interval"]
    return bool(first and second and first[0] <= second[1] and second[0] <= first[1])


def failures(rows: Sequence[Row]) -> list[str]:
    """One sentence for each variant that ended with an error."""
    said = []
    for row in rows:
        if row["error"] is None:
            continue
        first = row["error"].splitlines()[0]
        said.append(f"{row['name']}: {row['status']}, exit code {row['exit_code']}: {first}")
    return said


def signed(write: Write) -> Write:
    """Write a difference with its sign."""

    def written(value: float | None) -> str:
        if value is None:
            return DASH
        return f"{MINUS if value < 0 else '+'}{write(abs(value))}" if write(abs(value)) != "0" else "0"

    return written


def label(number: int, row: Row) -> str:
    """How a variant is called in tables; the drawings show its number."""
    return f"{number} {row['name']}"


def cell(row: Row, key: str, write: Write) -> Cell | str:
    """A figure of a variant, with the signs of the best one and of the front."""
    signs = (BEST if key in row["best"] else "") + (ON_FRONT if key in row["front"] else "")
    written = write(row[key]) + (f"\N{NO-BREAK SPACE}{signs}" if signs else "")
    return Cell(written, "good") if key in row["best"] else written


def _quality_section(rows: Sequence[Row], metric: Metric | None) -> Section | None:
    if metric is None:
        return None
    optional: list[tuple[str, str, Write]] = [
        ("loss", "Loss ↓", significant),
        ("retention_change", "Forgetting ↓", signed(significant)),
        ("merge_top1_agreement", "Merge top-1 ↑", percent),
    ]
    columns = [one for one in optional if one[0] != metric.key and any(row[one[0]] is not None for row in rows)]
    with_interval = any(row["interval"] for row in rows)
    made = []
    for number, row in enumerate(rows, start=1):
        bounds = row["interval"]
        known = DASH if bounds is None else " to ".join(f"{bound:.3f}" for bound in bounds)
        cells = [cell(row, key, write) for key, _, write in columns]
        quality = cell(row, "quality", metric.write)
        made.append([label(number, row), quality, *([known] if with_interval else []), *cells])
    titles = ["Variant", metric.heading, *(["95 % interval"] if with_interval else []), *(one[1] for one in columns)]
    numeric = range(1, len(titles))
    note = _quality_note(rows, metric)
    return Section("quality", "Quality", (table(titles, made, numeric=numeric, note=note),))


def _quality_note(rows: Sequence[Row], metric: Metric) -> str:
    bases = {row["base_quality"] for row in rows if row["base_quality"] is not None}
    parts = [SIGNS]
    parts += [f"The base without adapter has {metric.write(bases.pop())}."] if len(bases) == 1 else []
    if any(row["retention_change"] is not None for row in rows):
        parts.append("Forgetting: how much the loss on another text grew, nats per token.")
    return " ".join(parts)


def _cost_section(rows: Sequence[Row]) -> Section | None:
    columns: tuple[tuple[str, str, Write], ...] = (
        ("trainable_parameters", "Trainable ↓", count),
        ("trainable_share", "Share", percent),
        ("adapter_bytes", "Adapter ↓", size),
        ("adapter_share", "Share of the base", percent),
        ("peak_memory_bytes", "Peak memory ↓", size),
        ("seconds", "Time ↓", duration),
        ("tokens_per_second", "Tokens/s ↑", significant),
    )
    shown = [one for one in columns if any(row[one[0]] is not None for row in rows)]
    if not shown:
        return None
    made = [
        [label(number, row), *(cell(row, key, write) for key, _, write in shown)]
        for number, row in enumerate(rows, start=1)
    ]
    titles = ("Variant", *(title for _, title, _ in shown))
    return Section("cost", "What it costs", (table(titles, made, numeric=range(1, len(titles)), note=SIGNS),))


def _front_section(comparison: Mapping[str, Any], rows: Sequence[Row], metric: Metric | None) -> Section | None:
    fronts = comparison["fronts"]
    if metric is None or not fronts:
        return None
    blocks: list[Block] = [*front_plots(rows, fronts, metric, COST_NAMES)]
    numbers = {row["name"]: label(number, row) for number, row in enumerate(rows, start=1)}
    blocks.append(
        facts((COST_NAMES[cost], ", ".join(numbers[name] for name in names)) for cost, names in fronts.items())
    )
    lead = (
        "Up is better, left is cheaper. Dark and joined: variants that no other one beats at both; light: the others. "
        "The numbers are those of the tables; the line through a point is its 95 % interval."
    )
    return Section("fronts", "Quality against cost", tuple(blocks), lead)


def _curve_section(comparison: Mapping[str, Any], metric: Metric | None) -> Section | None:
    curves = comparison["curves"]
    if metric is None or not curves:
        return None
    rows = [
        (count(point["rows"]), curve["name"] or DASH, metric.write(point["quality"]), point["variant"])
        for curve in curves
        for point in curve["points"]
    ]
    titles = ("Training rows", "Varied besides", metric.heading, "Variant")
    kept = (0, 1, 2, 3) if len(curves) > 1 else (0, 2, 3)
    made = table([titles[i] for i in kept], [[row[i] for i in kept] for row in rows], numeric=(0, kept.index(2)))
    lead = (
        "What more training rows bring: the same recipe, the same held-out rows, another number of rows to learn from."
    )
    return Section("rows", "Learning curve", (curve_plots(curves, metric), made), lead)


def _varied_section(rows: Sequence[Row]) -> Section | None:
    keys = list(dict.fromkeys(key for row in rows for key in row["varied"]))
    titles = ["Variant", *keys, "Rows", "Steps", "Run", "Status"]
    made = [
        [
            label(number, row),
            *(_varied(key, row["varied"].get(key, DASH)) for key in keys),
            count(row["train_rows"]),
            count(row["steps"]),
            row["run"],
            Cell(row["status"], "" if row["status"] == "finished" else "bad"),
        ]
        for number, row in enumerate(rows, start=1)
    ]
    first = 1 + len(keys)
    made_table: Table = table(titles, made, numeric=(first, first + 1))
    return Section("variants", "Variants", (made_table,))


def _varied(key: str, value: str) -> str:
    return "all" if key == "dataset.max_train_samples" and value == "null" else value


def _tiles(rows: Sequence[Row], metric: Metric | None) -> tuple[Tile, ...]:
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
        best = next((row for row in rows if key in row["best"]), None)
        if best is not None:
            found.append(Tile(title, write(best[key]), best["name"]))
    return tuple(found)
