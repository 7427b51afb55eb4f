"""The data of a run: what came in, what was left out and why, what was trained, and what a row looks like."""

from collections.abc import Iterable
from typing import Any

from peftcli.report.blocks import (
    Beside,
    Block,
    Cell,
    Folded,
    Notices,
    Preview,
    PreviewRow,
    Section,
    Span,
    Table,
    Tone,
    facts,
    table,
)
from peftcli.report.format import DASH, compact, count, several, share
from peftcli.report.histogram import length_plots
from peftcli.report.labels import label_table, number_table, word_table
from peftcli.report.stages import Stages, figure, find, objects, text
from peftcli.report.text import without_home

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
        Beside((_present(left), _present(right))),
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


def _folded(title: str, made: Table | None) -> Folded | None:
    return None if made is None else Folded(title, made)


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
