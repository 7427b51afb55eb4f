"""Rows that are left out, counted by reason."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from peftcli.data.rows import FIRST_PLACES, Rows


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
