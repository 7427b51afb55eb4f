"""Gathers rows into batches of bounded size, for all readers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from peftcli.data.rows import BATCH_CHARACTERS, BATCH_ROWS, Rows

Row = TypeVar("Row")


@dataclass(frozen=True)
class UnreadableRow:
    """Replaces a row that could not be read; the reason continues "12 rows ..."."""

    reason: str


Item = tuple[int, Row | UnreadableRow, int]
"""The line or number of a row, the row, and its approximate number of characters."""


def gather(
    name: str, items: Iterator[Item[Row]], columns: Callable[[list[Row]], dict[str, list[Any]]]
) -> Iterator[Rows]:
    """Batches of at most BATCH_ROWS rows and about BATCH_CHARACTERS characters.

    Args:
        name: of the file.
        items: the rows in order, read lazily.
        columns: converts the rows of a batch to columns.
    """
    numbers: list[int] = []
    rows: list[Row] = []
    unread: list[tuple[int, str]] = []
    characters = 0
    for number, row, size in items:
        if isinstance(row, UnreadableRow):
            unread.append((number, row.reason))
        else:
            numbers.append(number)
            rows.append(row)
        characters += size
        if characters >= BATCH_CHARACTERS or len(rows) + len(unread) >= BATCH_ROWS:
            yield Rows(name, numbers, columns(rows), unread)
            numbers, rows, unread, characters = [], [], [], 0
    if rows or unread:
        yield Rows(name, numbers, columns(rows), unread)


def columns_of_tuples(names: list[str]) -> Callable[[list[Any]], dict[str, list[Any]]]:
    """A `columns` function for `gather`, for rows with one value per name, in order."""

    def columns(rows: list[Any]) -> dict[str, list[Any]]:
        return {name: [row[position] for row in rows] for position, name in enumerate(names)}

    return columns


def double_names(names: list[str]) -> list[str]:
    """The names that occur more than once, in order."""
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]
