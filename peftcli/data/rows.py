"""Rows from the readers (plain Python values with their location), and counts of dropped rows."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from peftcli.recipe.problems import printable

BATCH_ROWS = 2000
"""Rows per batch, so that memory does not depend on the number of rows."""
BATCH_CHARACTERS = 4_000_000
"""Approximate maximum number of characters in a batch."""
FIRST_PLACES = 5
"""Number of rows to list for each problem."""

MOST_NAMES = 20
"""Maximum number of columns in a message."""
LONG_NAME = 40
"""A longer column name is probably the value of a cell, characters."""


@dataclass(frozen=True)
class Rows:
    """Some consecutive rows of one file.

    Attributes:
        file: name of the file in messages; ends with / for a folder, whose rows are the files in the column `image`.
        numbers: location of each row: the 1-based line in a text file, the 1-based row in other files.
        columns: a list with one value per row; None if a row does not have the column.
        unread: rows that could not be read, with the reason; they are not in the columns.
        ends: False for a piece of a text that continues in the next row; None if every row is complete.
    """

    file: str
    numbers: list[int]
    columns: dict[str, list[Any]]
    unread: list[tuple[int, str]] = field(default_factory=list)
    ends: list[bool] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def place(self, row: int) -> str:
        """File and line of a row, or the file name of an image.

        >>> Rows("a.csv", [2, 3], {"x": ["p", "q"]}).place(1)
        'a.csv:3'
        """
        if not self.is_folder:
            return f"{self.file}:{self.numbers[row]}"
        # A file name may have bytes that are not valid UTF-8, which could not be written to a report.
        return self.file + str(self.columns["image"][row]).encode("utf-8", "replace").decode()

    @property
    def is_folder(self) -> bool:
        """Whether each row is a file of a folder."""
        return self.file.endswith("/")


class Source(Protocol):
    """A source of rows that can be read in batches, repeatedly."""

    @property
    def name(self) -> str:
        """Name in the data report, without local paths."""
        ...

    def fingerprint(self) -> str:
        """Hexadecimal hash that changes whenever rows may have changed."""
        ...

    def batches(self) -> Iterator[Rows]:
        """All rows from the beginning.

        Raises:
            DataError: the source cannot be read; the message has the location.
        """
        ...


def shown(name: str) -> str:
    """A name with control characters escaped; in quotes if it has leading or trailing white space.

    >>> shown("price"), shown(" price"), shown("")
    ('price', '" price"', '""')
    """
    text = printable(name, LONG_NAME)
    return text if name and name == name.strip() else f'"{text}"'


def listed(names: Iterable[str]) -> str:
    """The first names, and the number of the others.

    >>> listed(["a", "b "]), listed(map(str, range(22)))[-14:]
    ('a, "b "', '19, and 2 more')
    """
    given = [shown(name) for name in names]
    more = [f"and {len(given) - MOST_NAMES} more"] if len(given) > MOST_NAMES else []
    return ", ".join([*given[:MOST_NAMES], *more])


def first_value(first: Rows, name: str) -> Any:
    """The first non-null value of a column."""
    return next((value for value in first.columns.get(name, ()) if value is not None), None)


@dataclass
class Dropped:
    """Dropped rows: counts and the first locations, by reason."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, rows: Rows, dropped: Sequence[tuple[int, str]]) -> None:
        """Count dropped rows of a batch, by index."""
        for row, reason in dropped:
            self._add(reason, rows.place(row))

    def add_unread(self, rows: Rows) -> None:
        """Count rows that could not be read."""
        for line, reason in rows.unread:
            self._add(reason, f"{rows.file}:{line}")

    def _add(self, reason: str, place: str) -> None:
        self.counts[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < FIRST_PLACES:
            places.append(place)
