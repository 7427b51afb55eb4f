"""The data section of the report: rows in and out, labels, token lengths, checks and a preview."""

from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from peftcli.report.blocks import (
    Block,
    Cell,
    Collapsed,
    Notices,
    Plot,
    Plots,
    Preview,
    PreviewRow,
    Section,
    SideBySide,
    Span,
    Table,
    Tone,
    facts,
    table,
)
from peftcli.report.format import DASH, compact, count, several, share, without_home
from peftcli.report.load import Stages, figure, find, objects, text
from peftcli.report.plots import INK, LINE, NARROW, RAW, WIDE, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes


ROWS = (
    ("Read", "rows", "rows"),
    ("Dropped", "dropped_rows", "rows"),
    ("Training", "train_rows", "rows"),
    ("Held out", "test_rows", "rows"),
    ("Cut at the maximum length", "truncated_rows", "rows"),
    ("Held out, also in training", "leaked_rows", "test_rows"),
    ("Training, end token trained", "eos_trained_rows", "train_rows"),
)
RARE_ROWS = (
    ("Held out, prompt or text also in training", "leaked_prompts", "test_rows"),
    ("Held out, nearly in training", "near_leaked_rows", "test_rows"),
    ("Equal to an earlier row", "duplicate_rows", "rows"),
    ("Nearly equal to an earlier row", "near_duplicate_rows", "rows"),
    ("Text of an earlier row, another label", "conflicting_rows", "train_rows"),
    ("A token over the end of the prompt", "merged_boundary_rows", "train_rows"),
    ("Start token twice", "doubled_bos_rows", "rows"),
    ("With an unknown token", "unknown_token_rows", "rows"),
)
"""Shown where there are any."""
LABELLED = ("classification", "tagging", "images")
"""Formats whose rows have labels and no end token to learn."""
TOKEN_SIDES = (("Training", "train", "trained"), ("Held out", "test", "test_trained"))
ALIKE = (
    ("Held out, also in training", "leaked_examples", "test", "train"),
    ("Held out, nearly in training", "near_leaked_examples", "test", "train"),
    ("Equal to an earlier row", "duplicate_examples", "row", "first"),
    ("Nearly equal to an earlier row", "near_duplicate_examples", "row", "first"),
    ("Text of an earlier row, another label", "conflicting_examples", "row", "first"),
)
SCANNED = (
    ("control_characters", "control characters"),
    ("replacement_characters", "replacement characters"),
    ("email", "e-mail addresses"),
    ("phone", "telephone numbers"),
    ("key", "keys or passwords"),
)
RESULTS: dict[str, tuple[str, Tone]] = {
    "ok": ("✓ good", "good"),
    "warn": ("! look", "warn"),
    "fail": ("✗ wrong", "bad"),
    "skip": (f"{DASH} does not apply", "quiet"),
}
LEGEND = (Span("prompt", "read"), Span("trained", "trained"), Span("dropped", "cut off"))

MOST_LABELS = 12
SPREAD = (("min", "Least"), ("median", "Median"), ("max", "Most"), ("mean", "Mean"), ("deviation", "Deviation"))
WORDS = (
    ("Words", "words"),
    ("Within an entity", "tagged"),
    ("Without a token of their own", "silent"),
    ("Cut off at the maximum length", "cut"),
    ("Cut off, within an entity", "cut_tagged"),
    ("Going on with no entity", "odd_tags"),
)

MOST_BARS = 400


def data_section(stages: Stages) -> Section | None:
    """Rows and tokens: what came in, what was left out, what was trained."""
    data = stages.data
    if not data:
        return None
    left = [_row_table(data), _sources(data)]
    images = find(data, "format") == "images"
    right = [None if images else _token_table(data), _dropped(data), _joins(data), _truncated(data)]
    blocks: list[Block | None] = [
        _warnings(data),
        SideBySide((_present(left), _present(right))),
        None if images else length_plots(data),
        label_table(data),
        number_table(data),
        word_table(data),
        _checks(data),
        _preview(data),
        _folded("Rows that are alike, the first of them", _alike(data)),
        _folded("What was found in the columns", _columns(data)),
        _identity(data),
    ]
    return Section("data", "Data", tuple(block for block in blocks if block is not None))


def _present(tables: Iterable[Table | None]) -> tuple[Table, ...]:
    return tuple(made for made in tables if made is not None)


def _folded(title: str, made: Table | None) -> Collapsed | None:
    return None if made is None else Collapsed(title, made)


def _strings(data: dict[str, Any], *keys: str) -> list[str]:
    found = find(data, *keys)
    return [without_home(text(part)) for part in found] if isinstance(found, list) else []


def _warnings(data: dict[str, Any]) -> Notices | None:
    said = _strings(data, "warnings")
    return Notices(tuple(said)) if said else None


def _row_table(data: dict[str, Any]) -> Table:
    expected = figure(data, "eos_expected_rows")
    labelled = find(data, "format") in LABELLED
    shown = [row for row in ROWS if not (labelled and row[1] == "eos_trained_rows")]
    shown += [row for row in RARE_ROWS if figure(data, row[1])]
    rows = []
    for title, key, of in shown:
        whole = expected if key == "eos_trained_rows" and expected is not None else figure(data, of)
        rows.append((title, count(figure(data, key)), share(figure(data, key), whole)))
    return table(("Rows", "Number", "Share"), rows, numeric=(1, 2))


def _sources(data: dict[str, Any]) -> Table | None:
    sources = objects(data, "sources")
    if not sources:
        return None
    optional = (("Read as", "read_as"), ("Weight", "weight"))
    more = [(title, key) for title, key in optional if any(find(source, key) is not None for source in sources)]
    rows = [
        [
            without_home(text(source, "path")),
            count(figure(source, "rows")),
            *(without_home(text(source, key)).replace("_", " ") for _, key in more),
        ]
        for source in sources
    ]
    return table(("Source", "Rows", *(title for title, _ in more)), rows, numeric=(1,))


def _joins(data: dict[str, Any]) -> Table | None:
    joins = objects(data, "joins")
    if not joins:
        return None
    rows = [
        (without_home(text(join, "path")), text(join, "on"), count(figure(join, "rows")), _unmatched(join))
        for join in joins
    ]
    return table(("Joined with", "On", "Rows", "Unmatched"), rows, numeric=(2, 3))


def _unmatched(join: dict[str, Any]) -> Cell:
    unmatched = figure(join, "unmatched")
    return Cell(count(unmatched), "warn" if unmatched else "" if unmatched == 0 else "quiet")


def _dropped(data: dict[str, Any]) -> Table | None:
    dropped = find(data, "dropped")
    if not dropped or not isinstance(dropped, dict):
        return None
    places = {reason: ", ".join(_strings(data, "dropped_examples", reason)) for reason in dropped}
    if not any(places.values()):
        rows = [(str(reason), count(figure(dropped, reason))) for reason in dropped]
        return table(("Reason to drop", "Rows"), rows, numeric=(1,))
    wide = [(str(reason), count(figure(dropped, reason)), places[reason] or DASH) for reason in dropped]
    return table(("Reason to drop", "Rows", "First at"), wide, numeric=(1,))


def _truncated(data: dict[str, Any]) -> Table | None:
    places = _strings(data, "truncated_examples")
    return table(("Cut at the maximum length, the first of them",), [[place] for place in places]) if places else None


def _token_table(data: dict[str, Any]) -> Table:
    tokens = [(side, figure(data, "tokens", a), figure(data, "tokens", b)) for side, a, b in TOKEN_SIDES]
    lengths = ", ".join(f"{key} {compact(figure(data, 'length', key))}" for key in ("min", "median", "p95", "max"))
    note = f"Tokens of a training row: {lengths}; the maximum length is {compact(figure(data, 'max_length'))}."
    if find(data, "format") == "classification":  # a class belongs to a row, not to its tokens
        return table(("Tokens", "All"), [(side, count(whole)) for side, whole, _ in tokens], numeric=(1,), note=note)
    rows = [(side, count(whole), count(part), share(part, whole)) for side, whole, part in tokens]
    return table(("Tokens", "All", "Trained or scored", "Share"), rows, numeric=(1, 2, 3), note=note)


def _checks(data: dict[str, Any]) -> Table | None:
    checks = objects(data, "checks")
    if not checks:
        return None
    rows = []
    for check in checks:
        word, tone = RESULTS.get(text(check, "result"), (text(check, "result"), ""))
        rows.append((text(check, "name"), Cell(word, tone), without_home(text(check, "said"))))
    return table(("Check", "Result", "Said"), rows)


def _preview(data: dict[str, Any]) -> Preview | None:
    rows = []
    for row in objects(data, "preview"):
        spans = tuple(Span(text(part, "kind"), text(part, "text")) for part in objects(row, "parts"))
        about = f"{count(figure(row, 'tokens'))} tokens" if figure(row, "tokens") is not None else "an image"
        if "trained" not in row or row["trained"] is not None:
            about += f", {count(figure(row, 'trained'))} trained"
        rows.append(PreviewRow(without_home(text(row, "place")), about, spans))
    return Preview("What the trainer does with a row", LEGEND, tuple(rows)) if rows else None


def _alike(data: dict[str, Any]) -> Table | None:
    rows = [
        (title, without_home(text(pair, one)), without_home(text(pair, other)))
        for title, key, one, other in ALIKE
        for pair in objects(data, key)
    ]
    return table(("Alike", "Row", "Stands already at"), rows) if rows else None


def _columns(data: dict[str, Any]) -> Table | None:
    columns = objects(data, "columns")
    if not columns:
        return None
    several_sources = len({text(column, "source") for column in columns}) > 1
    rows = [
        (
            text(column, "column"),
            *([without_home(text(column, "source"))] if several_sources else []),
            count(figure(column, "rows")),
            count(figure(column, "null")),
            count(figure(column, "empty")),
            text(column, "types"),
            _found(column),
        )
        for column in columns
    ]
    named = ("Column", "Source") if several_sources else ("Column",)
    numeric = range(len(named), len(named) + 3)
    return table((*named, "Rows", "Null", "Empty", "Types", "Found"), rows, numeric=numeric)


def _found(column: dict[str, Any]) -> str:
    parts = []
    for key, title in SCANNED:
        if number := figure(column, key):
            first = _strings(column, "first", key)
            at = f" (first {first[0]})" if first else ""
            parts.append(f"{title} in {several(number, 'row', 'rows')}{at}")
    return ", ".join(parts) or "nothing of note"


def _identity(data: dict[str, Any]) -> Block:
    split = find(data, "split")
    return facts(
        (
            ("Format", text(data, "format").replace("_", " + ")),
            ("Split", text(split).replace("_", " ") if split else None),
            ("Fingerprint, training", text(data, "fingerprint", "train")[:16]),
            ("Fingerprint, held out", text(data, "fingerprint", "test")[:16]),
        )
    )


def label_table(data: dict[str, Any]) -> Table | None:
    """How often each answer or class stands on either side, the most frequent first."""
    sides = {side: _counts(find(data, "labels", side)) for side in ("train", "test")}
    values = sorted({**sides["train"], **sides["test"]}, key=lambda value: -sides["train"].get(value, 0))
    if not values:
        return None
    # Of many values only the most frequent are stored, so the shares are those of all rows, or of all tagged words.
    totals = {side: _total(data, side) if found else None for side, found in sides.items()}
    highest = max(sides["train"].values(), default=0)
    rows = []
    for value in values[:MOST_LABELS]:
        number = sides["train"].get(value, 0)
        bar = Cell(share(number, totals["train"]), bar=number / highest if highest else 0)
        rows.append((value, count(number), bar, share(sides["test"].get(value, 0), totals["test"])))
    distinct = figure(data, "labels", "distinct") or len(values)
    more = several(distinct - len(rows), "more value", "more values")
    note = f"{more} not shown." if distinct > len(rows) else ""
    of = text(data, "labels", "of").capitalize() if find(data, "labels", "of") else "Value"
    return table((of, "Training", "Share", "Held out"), rows, numeric=(1, 3), note=note)


def number_table(data: dict[str, Any]) -> Table | None:
    """The spread of the numbers of a regression on both sides."""
    if not isinstance(find(data, "numbers"), dict):
        return None
    rows = [
        (title, *(compact(figure(data, "numbers", side, key)) for key, _ in SPREAD))
        for title, side in (("Training", "train"), ("Held out", "test"))
        if find(data, "numbers", side)
    ]
    return table((text(data, "numbers", "of"), *(title for _, title in SPREAD)), rows, numeric=range(1, 6))


def word_table(data: dict[str, Any]) -> Table | None:
    """Words of tagged rows and entities by type, both sides together."""
    words = find(data, "words")
    if not isinstance(words, dict):
        return None
    whole = figure(words, "words")
    rows = [
        (title, count(figure(words, key)), share(figure(words, key), whole))
        for title, key in WORDS
        if figure(words, key) or key == "words"
    ]
    entities = _counts(find(words, "entities"))
    rows += [(f"Entities: {kind}", count(entities[kind]), "") for kind in list(entities)[:MOST_LABELS]]
    more = len(entities) - MOST_LABELS
    note = f"{several(more, 'more type', 'more types')} of entities not shown." if more > 0 else ""
    return table(("Words of all rows", "Number", "Share"), rows, numeric=(1, 2), note=note)


def _total(data: dict[str, Any], side: str) -> float | None:
    total = figure(data, "labels", "total", side)
    return total if total is not None else figure(data, f"{side}_rows")


def _counts(value: Any) -> dict[str, float]:
    found = value if isinstance(value, dict) else {}
    return {str(key): number for key in found if (number := figure(found, key)) is not None}


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
