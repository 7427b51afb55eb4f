"""What a person sees of labels on the terminal beside their balance: the spread of numbers, words and entities."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from peftcli.cli.show_rows import as_line

WORDS = (
    ("words", "words"),
    ("within an entity", "tagged"),
    ("without a token of their own", "silent"),
    ("cut off at max_length", "cut"),
    ("cut off, within an entity", "cut_tagged"),
    ("going on with no entity", "odd_tags"),
)
SPREAD = ("min", "median", "max", "mean", "deviation")
MOST_TYPES = 12


def numbers_table(data: Mapping[str, Any]) -> Table | None:
    """The spread of the numbers of a regression on both sides."""
    numbers = data.get("numbers")
    if not numbers:
        return None
    table = _table(as_line(numbers.get("of")), *(f"{name}|r" for name in SPREAD))
    for title, side in (("training", "train"), ("test", "test")):
        found = numbers.get(side)
        if not found:
            continue
        table.add_row(title, *("-" if found.get(name) is None else f"{found[name]:,.6g}" for name in SPREAD))
    return table


def words_table(data: Mapping[str, Any]) -> Table | None:
    """Words of tagged rows and entities by type, both sides together."""
    words = data.get("words")
    if not words:
        return None
    table = _table("words of all rows", "number|r")
    for title, key in WORDS:
        if words.get(key) or key == "words":
            table.add_row(title, f"{words.get(key, 0):,}")
    entities = list((words.get("entities") or {}).items())
    for kind, number in entities[:MOST_TYPES]:
        table.add_row(Text(f"entities: {as_line(kind)}"), f"{number:,}")
    if len(entities) > MOST_TYPES:
        table.add_row(Text(f"and {len(entities) - MOST_TYPES:,} more types", style="dim"), "")
    return table
