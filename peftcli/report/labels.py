"""What the report says of labels in the data: how often each stands on either side, numbers, words and entities."""

from typing import Any

from peftcli.report.blocks import Cell, Table, table
from peftcli.report.format import compact, count, several, share
from peftcli.report.stages import figure, find, text

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
