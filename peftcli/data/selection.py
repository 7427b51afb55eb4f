"""The rows and columns of a source that a recipe selects: `dataset.where` and `dataset.ignore_columns`."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peftcli.data.formats import missing_columns
from peftcli.data.rows import Rows, listed
from peftcli.data.values import is_null
from peftcli.errors import DataError
from peftcli.recipe.fields import parse_gate
from peftcli.recipe.problems import show
from peftcli.recipe.schema import SourceSection

FILTERED = "left out by dataset.where"
"""Reason of the rows that do not match; they do not count for a limit."""
MOST_VALUES = 8
"""Maximum number of values of a column in a message."""


@dataclass
class Selection:
    """The selection of one source.

    Attributes:
        section: the source in the recipe.
        kept: number of rows that matched so far.
    """

    section: SourceSection
    kept: int = 0
    _seen: dict[str, dict[str, None]] = field(default_factory=dict)

    @property
    def filters(self) -> bool:
        """Whether rows are left out."""
        return self.section.where is not None

    def check(self, first: Rows) -> None:
        """Reject columns of the two keys that the first rows, after joins, do not have.

        Raises:
            DataError: such a column.
        """
        for key, names in (("where", tuple(self.section.where or ())), ("ignore_columns", self.section.ignore_columns)):
            missing = [name for name in names if name not in first.columns]
            if missing:
                raise missing_columns(first, missing, len(names), f"dataset.{key}", self.section)

    def apply(self, rows: Rows) -> tuple[Rows, list[tuple[int, str]]]:
        """The rows that match `dataset.where`, and the others with the reason."""
        where = self.section.where
        if where is None:
            return rows, []
        values = {name: rows.columns.get(name, [None] * len(rows)) for name in where}
        self._note_values(values)
        kept = [row for row in range(len(rows)) if all(matches(values[name][row], where[name]) for name in where)]
        self.kept += len(kept)
        keeps = set(kept)
        return _taken(rows, kept), [(row, FILTERED) for row in range(len(rows)) if row not in keeps]

    def offered(self, rows: Rows) -> Rows:
        """The rows without the columns that the recipe ignores, for building examples."""
        ignored = self.section.ignore_columns
        if not ignored:
            return rows
        return replace(rows, columns={name: values for name, values in rows.columns.items() if name not in ignored})

    def nothing_left(self, source: str) -> DataError:
        """The error if no row matches."""
        where = ", ".join(f"{name}: {show(wanted)}" for name, wanted in (self.section.where or {}).items())
        has = "; ".join(f"{name} has {listed(values)}" for name, values in self._seen.items())
        return DataError(f"{source}: no row matches dataset.where: {{{where}}}; {has}; use one of these values")

    def _note_values(self, values: dict[str, list[Any]]) -> None:
        for name, column in values.items():
            seen = self._seen.setdefault(name, {})
            for value in column:
                if len(seen) >= MOST_VALUES:
                    break
                seen.setdefault("null" if is_null(value) else show(value) if not isinstance(value, str) else value)


def matches(value: Any, wanted: Any) -> bool:
    """Whether a value of a column is one that `dataset.where` selects.

    Args:
        value: of a row; in CSV files always text.
        wanted: a value, a list of values, or a limit such as `>= 4`.

    >>> matches("True", True), matches(0, False), matches("4.5", ">= 4"), matches("b", ("a", "b")), matches("", None)
    (True, True, True, True, True)
    """
    if isinstance(wanted, list | tuple):
        return any(matches(value, one) for one in wanted)
    if wanted is None:
        return is_null(value) or value == ""
    if is_null(value):
        return False
    if isinstance(wanted, bool):
        return str(value).strip().lower() in (("true", "1", "1.0") if wanted else ("false", "0", "0.0"))
    if isinstance(wanted, int | float):
        number = _number(value)
        return number is not None and number == float(wanted)
    try:
        limit = parse_gate("where", wanted)
    except ValueError:
        return str(value).strip() == str(wanted).strip()
    number = _number(value)
    return number is not None and limit.met(number)


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _taken(rows: Rows, kept: Sequence[int]) -> Rows:
    columns = {name: [values[row] for row in kept] for name, values in rows.columns.items()}
    ends = None if rows.ends is None else [rows.ends[row] for row in kept]
    return Rows(rows.file, [rows.numbers[row] for row in kept], columns, rows.unread, ends)
