"""Rows gathered into batches of a bounded size, for every kind of source alike."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from peftcli.data.rows import BATCH_CHARACTERS, BATCH_ROWS, Rows

Row = TypeVar("Row")


@dataclass(frozen=True)
class UnreadableRow:
    """Stands for a row that could not be read; the reason goes on as in "12 rows with ..."."""

    reason: str


Item = tuple[int, Row | UnreadableRow, int]
"""Where a row begins, the row, and about how many characters it holds."""


def gather(
    name: str, items: Iterator[Item[Row]], columns: Callable[[list[Row]], dict[str, list[Any]]]
) -> Iterator[Rows]:
    """Batches of rows, each of at most BATCH_ROWS rows and little more than BATCH_CHARACTERS characters.

    Args:
        name: of the file, as rows show it.
        items: the rows in order, read as far as they are asked for.
        columns: turns the rows of one batch into columns.
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
    """What `gather` needs for rows that hold one value for each of these names, in their order."""

    def columns(rows: list[Any]) -> dict[str, list[Any]]:
        return {name: [row[position] for row in rows] for position, name in enumerate(names)}

    return columns


def double_names(names: list[str]) -> list[str]:
    """The names that stand more than once, in their order."""
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]
