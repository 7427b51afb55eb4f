"""Many-to-one joins of tables; rows without a match are counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftcli.data.rows import Rows, Source, listed
from peftcli.errors import DataError
from peftcli.recipe.problems import printable


@dataclass(frozen=True)
class JoinFacts:
    """One join in the data report; `unmatched` counts left rows without a match."""

    path: str
    on: list[str]
    rows: int
    unmatched: int


class Join:
    """The right table of a join, in memory; the left rows come in batches and keep their order."""

    def __init__(self, source: Source, on: Sequence[str]) -> None:
        """Read the right table.

        Args:
            source: at most one row per key.
            on: names of the key columns, in both tables.

        Raises:
            DataError: a key column is missing, a key is not unique, or the source cannot be read.
        """
        self.name = source.name
        self._on = list(on)
        self._matches: dict[str, list[Any]] = {}
        self._columns: list[str] = []
        self._unmatched = 0
        self._first_left: str | None = None
        places: dict[str, str] = {}
        for rows in source.batches():
            self._check_keys(list(rows.columns), "it has")
            self._columns = [name for name in rows.columns if name not in self._on]
            values = [rows.columns[name] for name in self._columns]
            for number, key in enumerate(self._keys(rows)):
                if key is None:
                    continue  # a row without a key never matches
                if key in places:
                    raise DataError(
                        f"{rows.place(number)}: {', '.join(self._on)} = {_shown(key)} is a duplicate "
                        f"(first {places[key]}); the keys of a joined table must be unique"
                    )
                places[key] = rows.place(number)
                self._matches[key] = [column[number] for column in values]
        if not self._matches:
            raise DataError(f"{source.name}: no row has a value of the join key {', '.join(self._on)}")

    def apply(self, rows: Rows) -> tuple[Rows, list[tuple[int, str]]]:
        """The rows with a match, with the joined columns, and the other rows with the reason.

        Raises:
            DataError: a key column is missing on the left, or both tables have another column of the same name.
        """
        self._check_keys(list(rows.columns), "the left rows have")
        shared = [name for name in self._columns if name in rows.columns]
        if shared:
            raise DataError(
                f"dataset.join {self.name}: both tables have a column {listed(shared)} that is not a key; rename it "
                "in one file"
            )
        keys = self._keys(rows)
        if self._first_left is None and keys:
            self._first_left = keys[0]
        found = [None if key is None else self._matches.get(key) for key in keys]
        kept = [number for number, match in enumerate(found) if match is not None]
        lost = [(number, f"without a match in {self.name}") for number, one in enumerate(found) if one is None]
        self._unmatched += len(lost)
        columns = {name: [values[number] for number in kept] for name, values in rows.columns.items()}
        for index, name in enumerate(self._columns):
            columns[name] = [match[index] for match in found if match is not None]
        ends = None if rows.ends is None else [rows.ends[number] for number in kept]
        return Rows(rows.file, [rows.numbers[number] for number in kept], columns, rows.unread, ends), lost

    def facts(self) -> JoinFacts:
        """Statistics of the join so far."""
        return JoinFacts(self.name, self._on, len(self._matches), self._unmatched)

    def no_partner(self) -> str:
        """The message if no row is left after the join."""
        right = next(iter(self._matches))
        return (
            f"dataset.join {self.name}: no row has a match on {', '.join(self._on)}; "
            f"left has {_shown(self._first_left or '')!r}, right has {_shown(right)!r}; write the keys in the same form"
        )

    def _check_keys(self, names: list[str], where: str) -> None:
        for name in self._on:
            if name not in names:
                raise DataError(
                    f"dataset.join {self.name}: {where} no column {name}, only {listed(names)}; use a key that both "
                    "tables have"
                )

    def _keys(self, rows: Rows) -> list[str | None]:
        """The keys as strings, so that an id from CSV matches the same id from JSON."""
        parts = [rows.columns[name] for name in self._on]
        if len(parts) == 1:
            return [None if value is None else str(value) for value in parts[0]]
        whole = zip(*parts, strict=True)
        return [None if None in values else _GLUE.join(map(str, values)) for values in whole]


_GLUE = "\x1f"  # the unit separator, which does not occur in keys


def _shown(key: str) -> str:
    return printable(key.replace(_GLUE, ", "), 100)
