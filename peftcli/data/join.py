"""Joins of several files: many rows on the left, at most one on the right, and nobody lost in silence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftcli.data.rows import Rows, Source, listed
from peftcli.errors import DataError
from peftcli.recipe.problems import printable


@dataclass(frozen=True)
class JoinFacts:
    """One join as the data report names it; `unmatched` counts left rows without a partner."""

    path: str
    on: list[str]
    rows: int
    unmatched: int


class Join:
    """A table that stands ready to be joined; the left rows come in batches and keep their order."""

    def __init__(self, source: Source, on: Sequence[str]) -> None:
        """Read the right side whole.

        Args:
            source: at most one row for each key.
            on: names of the key columns, in both tables.

        Raises:
            DataError: a key column is missing, a key stands twice, or the source cannot be read.
        """
        self.name = source.name
        self._on = list(on)
        self._partners: dict[str, list[Any]] = {}
        self._columns: list[str] = []
        self._unmatched = 0
        self._first_left: str | None = None
        places: dict[str, str] = {}
        for rows in source.batches():
            self._need(list(rows.columns), "it has")
            self._columns = [name for name in rows.columns if name not in self._on]
            values = [rows.columns[name] for name in self._columns]
            for number, key in enumerate(self._keys(rows)):
                if key is None:
                    continue  # a row without a key is nobody's partner
                if key in places:
                    raise DataError(
                        f"{rows.place(number)}: {', '.join(self._on)} = {_shown(key)} stands there again "
                        f"(first {places[key]}); a key may stand once on the right side of a join"
                    )
                places[key] = rows.place(number)
                self._partners[key] = [column[number] for column in values]
        if not self._partners:
            raise DataError(f"{source.name}: no row with a value of {', '.join(self._on)} to join by")

    def apply(self, rows: Rows) -> tuple[Rows, list[tuple[int, str]]]:
        """The rows that have a partner, with its columns, and the others with the reason why they are left out.

        Raises:
            DataError: a key column is missing on the left, or both sides have another column of one name.
        """
        self._need(list(rows.columns), "the rows that it is joined to have")
        shared = [name for name in self._columns if name in rows.columns]
        if shared:
            raise DataError(
                f"dataset.join {self.name}: both sides have a column {listed(shared)} that is no key; rename it in "
                "one file"
            )
        keys = self._keys(rows)
        if self._first_left is None and keys:
            self._first_left = keys[0]
        found = [None if key is None else self._partners.get(key) for key in keys]
        kept = [number for number, partner in enumerate(found) if partner is not None]
        lost = [(number, f"without a partner in {self.name}") for number, one in enumerate(found) if one is None]
        self._unmatched += len(lost)
        columns = {name: [values[number] for number in kept] for name, values in rows.columns.items()}
        for place, name in enumerate(self._columns):
            columns[name] = [partner[place] for partner in found if partner is not None]
        ends = None if rows.ends is None else [rows.ends[number] for number in kept]
        return Rows(rows.file, [rows.numbers[number] for number in kept], columns, rows.unread, ends), lost

    def facts(self) -> JoinFacts:
        """What was joined so far."""
        return JoinFacts(self.name, self._on, len(self._partners), self._unmatched)

    def no_partner(self) -> str:
        """Says why no row is left after the join."""
        right = next(iter(self._partners))
        return (
            f"dataset.join {self.name}: no row finds a partner by {', '.join(self._on)}; "
            f"left has {_shown(self._first_left or '')!r}, right has {_shown(right)!r}; write the keys alike"
        )

    def _need(self, names: list[str], where: str) -> None:
        for name in self._on:
            if name not in names:
                raise DataError(
                    f"dataset.join {self.name}: {where} no column {name}, only {listed(names)}; a key stands on both "
                    "sides"
                )

    def _keys(self, rows: Rows) -> list[str | None]:
        """One text for each row, so that an id read from CSV meets the same id read from JSON."""
        parts = [rows.columns[name] for name in self._on]
        if len(parts) == 1:
            return [None if value is None else str(value) for value in parts[0]]
        whole = zip(*parts, strict=True)
        return [None if None in values else _GLUE.join(map(str, values)) for values in whole]


_GLUE = "\x1f"  # the unit separator stands in no sensible key


def _shown(key: str) -> str:
    return printable(key.replace(_GLUE, ", "), 100)
