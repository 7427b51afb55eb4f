"""Rows as the readers yield them: plain Python values with their location; and counts of dropped rows."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from peftcli.recipe.problems import printable

BATCH_ROWS = 2000
"""Rows that are handled at once, so that a million of them take no more memory than a few thousand."""
BATCH_CHARACTERS = 4_000_000
"""A reader ends a batch before its rows together are much longer than this."""
FIRST_PLACES = 5
"""Rows that are named for each thing that is wrong."""

MOST_NAMES = 20
"""Columns that a message names."""
LONG_NAME = 40
"""A column name longer than this looks like a cell; letters."""


@dataclass(frozen=True)
class Rows:
    """Some consecutive rows of one file.

    Attributes:
        file: name of the file, as messages show it; one that ends in / is a folder, whose rows are files by the
            names of the column `image`.
        numbers: where each row begins: the 1-based line of a text file, the 1-based row of any other.
        columns: a list of one value for each row; None where a row lacks the column.
        unread: rows of this stretch that could not be read, with the reason; they are not in the columns.
        ends: False for a piece of a text that goes on in the next row; None where every row is whole.
    """

    file: str
    numbers: list[int]
    columns: dict[str, list[Any]]
    unread: list[tuple[int, str]] = field(default_factory=list)
    ends: list[bool] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def place(self, row: int) -> str:
        """File and line of a row, or the file that it is.

        >>> Rows("a.csv", [2, 3], {"x": ["p", "q"]}).place(1)
        'a.csv:3'
        """
        if not self.is_folder:
            return f"{self.file}:{self.numbers[row]}"
        # A name may hold bytes that are no text, which no report could be written with.
        return self.file + str(self.columns["image"][row]).encode("utf-8", "replace").decode()

    @property
    def is_folder(self) -> bool:
        """Whether each row is a file of a folder."""
        return self.file.endswith("/")


class Source(Protocol):
    """Something that rows can be read from, in batches, as often as one likes."""

    @property
    def name(self) -> str:
        """As the data report shows it; no folder of this machine."""
        ...

    def fingerprint(self) -> str:
        """Hexadecimal digest that changes when any row may have changed."""
        ...

    def batches(self) -> Iterator[Rows]:
        """The rows from the first on.

        Raises:
            DataError: the source cannot be read; the text names the place.
        """
        ...


def shown(name: str) -> str:
    """A name without what a terminal would act on; in quotes where white space at its edge would not be seen.

    >>> shown("price"), shown(" price"), shown("")
    ('price', '" price"', '""')
    """
    text = printable(name, LONG_NAME)
    return text if name and name == name.strip() else f'"{text}"'


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are.

    >>> listed(["a", "b "]), listed(map(str, range(22)))[-14:]
    ('a, "b "', '19, and 2 more')
    """
    given = [shown(name) for name in names]
    more = [f"and {len(given) - MOST_NAMES} more"] if len(given) > MOST_NAMES else []
    return ", ".join([*given[:MOST_NAMES], *more])


@dataclass
class Dropped:
    """Rows that are left out: how many by reason, and where the first stand."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, rows: Rows, left_out: Sequence[tuple[int, str]]) -> None:
        """Count rows of a batch by their number in it."""
        for row, reason in left_out:
            self._add(reason, rows.place(row))

    def add_unread(self, rows: Rows) -> None:
        """Count rows that could not be read, by their line."""
        for line, reason in rows.unread:
            self._add(reason, f"{rows.file}:{line}")

    def _add(self, reason: str, place: str) -> None:
        self.counts[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < FIRST_PLACES:
            places.append(place)
