"""The data section of the report: row counts, labels, token lengths, checks and a preview."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING

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
from peftcli.report.format import DASH, compact, count, several, share, text, without_home
from peftcli.report.load import Stages
from peftcli.report.plots import INK, LINE, NARROW, RAW, WIDE, drawing
from peftcli.results import (
    Counts,
    DataColumn,
    DataJson,
    HeldOutPair,
    Histogram,
    Lengths,
    RowPair,
    SideCounts,
    SideTokens,
    Spread,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


ROWS = (
    ("Read", "rows", "rows"),
    ("Dropped", "dropped_rows", "rows"),
    ("Training", "train_rows", "rows"),
    ("Held out", "test_rows", "rows"),
    ("Truncated at the maximum length", "truncated_rows", "rows"),
    ("Held out, also in training", "leaked_rows", "test_rows"),
    ("Training, end token trained", "eos_trained_rows", "train_rows"),
)
RARE_ROWS = (
    ("Validation", "validation_rows", "rows"),
    ("Held out, prompt or text also in training", "leaked_prompts", "test_rows"),
    ("Held out, near-duplicate in training", "near_leaked_rows", "test_rows"),
    ("Duplicate of an earlier row", "duplicate_rows", "rows"),
    ("Near-duplicate of an earlier row", "near_duplicate_rows", "rows"),
    ("Text of an earlier row, another label", "conflicting_rows", "train_rows"),
    ("A token across the end of the prompt", "merged_boundary_rows", "train_rows"),
    ("Doubled start token", "doubled_bos_rows", "rows"),
    ("With an unknown token", "unknown_token_rows", "rows"),
    ("Trained with another text than is asked", "template_mismatch_rows", "rows"),
    ("With earlier answers as context only", "context_only_rows", "rows"),
)
"""Shown if not zero."""
LABELLED = ("classification", "tagging", "images")
"""Formats with labels, whose rows have no end token to train."""
SCANNED = (
    ("control_characters", "control characters"),
    ("replacement_characters", "replacement characters"),
    ("email", "e-mail addresses"),
    ("phone", "telephone numbers"),
    ("key", "keys or passwords"),
)
RESULTS: dict[str, tuple[str, Tone]] = {
    "ok": ("✓ good", "good"),
    "warn": ("! check", "warn"),
    "fail": ("✗ failed", "bad"),
    "skip": (f"{DASH} not applicable", "quiet"),
}
LEGEND = (Span("prompt", "input"), Span("trained", "trained"), Span("dropped", "truncated"))

MOST_LABELS = 12
WORDS = (
    ("Words", "words"),
    ("Within an entity", "tagged"),
    ("Without a token", "silent"),
    ("Truncated at the maximum length", "cut"),
    ("Truncated, within an entity", "cut_tagged"),
    ("Inside tag without an entity before", "odd_tags"),
)

MOST_BARS, MOST_TEXT_BARS = 400, 10
"""Maximum bars of the length plot, and of its text version."""


def data_section(stages: Stages) -> Section | None:
    """Rows and tokens: what was read, dropped and trained."""
    data = stages.data
    if data is None:
        return None
    left = [_row_table(data), _sources(data)]
    right = [None if stages.is_images else _token_table(data), _dropped(data), _joins(data), _truncated(data)]
    blocks: list[Block | None] = [
        _warnings(data),
        SideBySide((_present(left), _present(right))),
        _unread(data),
        None if stages.is_images else length_plots(data),
        label_table(data),
        number_table(data),
        word_table(data),
        _checks(data),
        _preview(data),
        _folded("Duplicate rows (the first ones)", _alike(data)),
        _folded("Statistics of the columns", _columns(data)),
        _identity(data),
    ]
    return Section("data", "Data", tuple(block for block in blocks if block is not None))


def _present(tables: Iterable[Table | None]) -> tuple[Table, ...]:
    return tuple(made for made in tables if made is not None)


def _folded(title: str, made: Table | None) -> Collapsed | None:
    return None if made is None else Collapsed(title, made)


def _warnings(data: DataJson) -> Notices | None:
    """Failed checks and warnings; checks with a warning are among the latter."""
    failed = [text(check.said) for check in data.checks if check.result == "fail"]
    messages = dict.fromkeys((*failed, *data.warnings))
    return Notices(tuple(map(without_home, messages))) if messages else None


def _row_table(data: DataJson) -> Table:
    labelled = data.format in LABELLED
    shown = [row for row in ROWS if not (labelled and row[1] == "eos_trained_rows")]
    shown += [row for row in RARE_ROWS if getattr(data, row[1])]
    rows = []
    for title, key, of in shown:
        ends = key == "eos_trained_rows" and data.eos_expected_rows is not None
        whole = data.eos_expected_rows if ends else getattr(data, of)
        rows.append((title, count(getattr(data, key)), share(getattr(data, key), whole)))
    return table(("Rows", "Number", "Share"), rows, numeric=(1, 2))


def _sources(data: DataJson) -> Table | None:
    if not data.sources:
        return None
    mixed = sum(source.mixed_rows or 0 for source in data.sources)
    columns: dict[str, list[str]] = {
        "Source": [without_home(text(source.path)) for source in data.sources],
        "Rows": [count(source.rows) for source in data.sources],
        "Read as": [without_home(text(source.read_as)).replace("_", " ") for source in data.sources],
        "Weight": [text(source.weight) for source in data.sources],
        "Share": [text(source.share) for source in data.sources],
        "Training": [count(source.train_rows) for source in data.sources],
        "Used per epoch": [count(source.mixed_rows) for source in data.sources],
        "of all": [share(source.mixed_rows, mixed) for source in data.sources],
    }
    of_shares = any(source.share is not None for source in data.sources)
    given = {
        "Read as": any(source.read_as is not None for source in data.sources),
        "Weight": not of_shares and any(source.weight is not None for source in data.sources),
        "Share": of_shares,
        **dict.fromkeys(("Training", "Used per epoch", "of all"), mixed > 0),
    }
    titles = [title for title in columns if given.get(title, True)]
    rows = [list(row) for row in zip(*(columns[title] for title in titles), strict=True)]
    numeric = tuple(at for at, title in enumerate(titles) if title not in ("Source", "Read as", "Weight", "Share"))
    return table(tuple(titles), rows, numeric=numeric)


def _unread(data: DataJson) -> Block | None:
    """The columns and keys that nothing reads, for each source that has some."""
    several_sources = len(data.sources) > 1
    pairs = [
        (f"Not read of {without_home(text(source.path))}" if several_sources else "Not read", unread)
        for source in data.sources
        if (unread := source.not_read()) is not None
    ]
    return facts(tuple(pairs)) if pairs else None


def _joins(data: DataJson) -> Table | None:
    if not data.joins:
        return None
    rows = [
        (without_home(text(join.path)), text(join.on), count(join.rows), _unmatched(join.unmatched))
        for join in data.joins
    ]
    return table(("Joined with", "On", "Rows", "Unmatched"), rows, numeric=(2, 3))


def _unmatched(number: int | None) -> Cell:
    return Cell(count(number), "warn" if number else "" if number == 0 else "quiet")


def _dropped(data: DataJson) -> Table | None:
    if not data.dropped:
        return None
    locations = {reason: ", ".join(map(without_home, data.dropped_examples.get(reason, ()))) for reason in data.dropped}
    if not any(locations.values()):
        rows = [(reason, count(number)) for reason, number in data.dropped.items()]
        return table(("Reason to drop", "Rows"), rows, numeric=(1,))
    wide = [(reason, count(number), locations[reason] or DASH) for reason, number in data.dropped.items()]
    return table(("Reason to drop", "Rows", "First at"), wide, numeric=(1,))


def _truncated(data: DataJson) -> Table | None:
    if not data.truncated_examples:
        return None
    rows = [[without_home(place)] for place in data.truncated_examples]
    return table(("Truncated at the maximum length (the first ones)",), rows)


def _token_table(data: DataJson) -> Table:
    tokens, length = data.tokens or SideTokens(), data.length or Lengths()
    sides = (("Training", tokens.train, tokens.trained), ("Held out", tokens.test, tokens.test_trained))
    named = (("min", length.min), ("median", length.median), ("p95", length.p95), ("max", length.max))
    lengths = ", ".join(f"{name} {compact(value)}" for name, value in named)
    note = f"Tokens of a training row: {lengths}; the maximum length is {compact(data.max_length)}."
    if data.format == "classification":  # a row has one class, and its tokens have none
        return table(("Tokens", "All"), [(side, count(whole)) for side, whole, _ in sides], numeric=(1,), note=note)
    rows = [(side, count(whole), count(part), share(part, whole)) for side, whole, part in sides]
    return table(("Tokens", "All", "Trained or scored", "Share"), rows, numeric=(1, 2, 3), note=note)


def _checks(data: DataJson) -> Table | None:
    if not data.checks:
        return None
    rows = []
    for check in data.checks:
        word, tone = RESULTS.get(text(check.result), (text(check.result), ""))
        rows.append((text(check.name), Cell(word, tone), without_home(text(check.said))))
    return table(("Check", "Result", "Message"), rows)


def _preview(data: DataJson) -> Preview | None:
    rows = []
    for row in data.preview:
        spans = tuple(Span(part.kind, part.text) for part in row.parts)
        about = "an image" if row.tokens is None else f"{count(row.tokens)} tokens"
        about += "" if row.trained is None else f", {count(row.trained)} trained"
        rows.append(PreviewRow(without_home(text(row.place)), about, spans))
    return Preview("What the trainer does with a row", LEGEND, tuple(rows)) if rows else None


def _alike(data: DataJson) -> Table | None:
    pairs: tuple[tuple[str, Sequence[HeldOutPair | RowPair]], ...] = (
        ("Held out, also in training", data.leaked_examples),
        ("Held out, nearly in training", data.near_leaked_examples),
        ("Equal to an earlier row", data.duplicate_examples),
        ("Nearly equal to an earlier row", data.near_duplicate_examples),
        ("Text of an earlier row, another label", data.conflicting_examples or ()),
    )
    rows = [(title, *(without_home(text(place)) for place in one.places)) for title, found in pairs for one in found]
    return table(("Duplicate", "Row", "Same as"), rows) if rows else None


def _columns(data: DataJson) -> Table | None:
    if not data.columns:
        return None
    several_sources = len({column.source for column in data.columns}) > 1
    rows = [
        (
            text(column.column),
            *([without_home(text(column.source))] if several_sources else []),
            count(column.rows),
            count(column.null),
            count(column.empty),
            text(column.types),
            _found(column),
        )
        for column in data.columns
    ]
    named = ("Column", "Source") if several_sources else ("Column",)
    numeric = range(len(named), len(named) + 3)
    return table((*named, "Rows", "Null", "Empty", "Types", "Found"), rows, numeric=numeric)


def _found(column: DataColumn) -> str:
    parts = []
    for key, title in SCANNED:
        if number := getattr(column, key):
            first = column.first.get(key)
            at = f" (first {without_home(first[0])})" if first else ""
            parts.append(f"{title} in {several(number, 'row', 'rows')}{at}")
    return ", ".join(parts) or "nothing of note"


def _identity(data: DataJson) -> Block:
    return facts(
        (
            ("Format", text(data.format).replace("_", " + ")),
            ("Split", text(data.split).replace("_", " ") if data.split else None),
            ("Fingerprint, training", text(data.fingerprint.train)[:16]),
            ("Fingerprint, held out", text(data.fingerprint.test)[:16]),
        )
    )


def label_table(data: DataJson) -> Table | None:
    """Frequency of each answer or class in both splits, the most frequent first."""
    labels = data.labels
    if labels is None:
        return None
    train, test = _known(labels.train), _known(labels.test or {})
    values = sorted({**train, **test}, key=lambda value: -train.get(value, 0))
    if not values:
        return None
    # Only the most frequent values are stored, so shares are relative to all rows, or to all tagged words.
    totals = labels.total or SideCounts(train=data.train_rows, test=data.test_rows)
    highest = max(train.values(), default=0)
    rows = []
    for value in values[:MOST_LABELS]:
        number = train.get(value, 0)
        bar = Cell(share(number, totals.train), bar=number / highest if highest else 0)
        rows.append((value, count(number), bar, share(test.get(value, 0), totals.test if test else None)))
    distinct = labels.distinct or len(values)
    more = several(distinct - len(rows), "more value", "more values")
    note = f"{more} not shown." if distinct > len(rows) else ""
    of = "Value" if labels.of is None else labels.of.capitalize()
    return table((of, "Training", "Share", "Held out"), rows, numeric=(1, 3), note=note)


def _known(counts: Counts) -> dict[str, int]:
    return {value: number for value, number in counts.items() if number is not None}


def number_table(data: DataJson) -> Table | None:
    """Statistics of the target values of a regression in both splits."""
    numbers = data.numbers
    if numbers is None:
        return None
    sides: tuple[tuple[str, Spread | None], ...] = (("Training", numbers.train), ("Held out", numbers.test))
    rows = [
        (title, compact(one.min), compact(one.median), compact(one.max), compact(one.mean), compact(one.deviation))
        for title, one in sides
        if one is not None
    ]
    return table((text(numbers.of), "Min", "Median", "Max", "Mean", "Std"), rows, numeric=range(1, 6))


def word_table(data: DataJson) -> Table | None:
    """Words of tagged rows and entities by type, for both splits together."""
    words = data.words
    if words is None:
        return None
    numbers = [(title, getattr(words, key)) for title, key in WORDS if getattr(words, key) or key == "words"]
    rows = [(title, count(number), share(number, words.words)) for title, number in numbers]
    entities = list(_known(words.entities).items())
    rows += [(f"Entities: {kind}", count(number), "") for kind, number in entities[:MOST_LABELS]]
    more = len(entities) - MOST_LABELS
    note = f"{several(more, 'more type', 'more types')} of entities not shown." if more > 0 else ""
    return table(("Words of all rows", "Number", "Share"), rows, numeric=(1, 2), note=note)


def length_plots(data: DataJson) -> Plots | None:
    """Histogram of row lengths in tokens; None if they were not counted."""
    edges, counts = bins(data.length_histogram or Histogram())
    if not counts:
        return None
    limit, longest, shown = data.max_length, edges[-1], _even(edges)
    inside = limit if limit is not None and limit < longest else None

    def drawn(inches: tuple[float, float]) -> str:
        return drawing("Rows by their length", inches, lambda axes: _draw(axes, shown, counts, inside), _frame(inches))

    note = _note(limit, inside, longest if longest > shown[-1] else None)
    bars = _length_bars(edges, counts, inside)
    return Plots((Plot("Length of the rows", drawn, WIDE, note, narrow_inches=NARROW, bars=bars),), ())


def _length_bars(edges: Sequence[float], counts: Sequence[float], limit: float | None) -> Table:
    """The histogram as a table with a few bars, each merging several neighbors, from the first nonempty one."""
    first = next((at for at, number in enumerate(counts) if number), 0)
    step = -(-(len(counts) - first) // MOST_TEXT_BARS)
    starts = range(first, len(counts), step)
    sums = [sum(counts[at : at + step]) for at in starts]
    bounds, highest = [*(edges[at] for at in starts), edges[-1]], max(*sums, 1)
    rows = []
    for (low, high), number in zip(pairwise(bounds), sums, strict=True):
        # A row with exactly as many tokens as an edge is in the bar above it.
        mark = f"← max_length {count(limit)}" if limit is not None and low <= limit < high else ""
        rows.append((f"{count(ceil(low))} to {count(ceil(high) - 1)}", Cell(count(number), bar=number / highest), mark))
    return table(("Tokens of a row", "Rows", ""), rows)


def bins(histogram: Histogram) -> tuple[Sequence[float], Sequence[float]]:
    """Edges and counts of the histogram; both empty if they do not match."""
    edges, counts = histogram.edges, histogram.counts
    whole = len(edges) == len(counts) + 1 and all(low < high for low, high in pairwise(edges))
    return (edges, counts) if whole and 0 < len(counts) <= MOST_BARS else ((), ())


def _even(edges: Sequence[float]) -> Sequence[float]:
    """The edges, with the last bar as wide as the one before: it may contain all much longer rows."""
    if len(edges) < 3:
        return edges
    return [*edges[:-1], min(edges[-1], 2 * edges[-2] - edges[-3])]


def _note(limit: float | None, inside: float | None, longest: float | None) -> str:
    what = "Rows by number of tokens, before truncation."
    if longest is not None:
        what = f"{what} The last bar contains all longer rows; the longest has {count(longest - 1)} tokens."
    if limit is None:
        return what
    if inside is None:
        return f"{what} The maximum length, {count(limit)}, is larger than the longest row."
    return f"{what} Dashed: the maximum length; light: bars beyond it."


def _frame(inches: tuple[float, float]) -> tuple[float, float, float, float]:
    width, height = inches
    return 0.6 / width, 0.42 / height, (width - 0.8) / width, (height - 0.72) / height


def _draw(axes: "Axes", edges: Sequence[float], counts: Sequence[float], limit: float | None) -> None:
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
