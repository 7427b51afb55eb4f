"""What stands in the columns of a source: types, gaps, damage, and what should not be learned; never the values."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from peftcli.data.rows import FIRST_PLACES, Rows
from peftcli.data.traces import SEARCHES
from peftcli.data.values import type_name
from peftcli.recipe.problems import printable

PERSONAL_SHARE = 0.01
"""Share of the rows with an e-mail address or a telephone number above which a warning is due."""
PERSONAL_ROWS = 3
"""Rows with such a trace below which none is due."""

_WARNINGS = {
    "key": ("what looks like an access key", "take it out and revoke it; a model can repeat what it learned"),
    "email": ("an e-mail address", "a model can repeat what it learned; replace the addresses if they are private"),
    "phone": ("a telephone number", "a model can repeat what it learned; replace the numbers if they are private"),
    "control_characters": ("control characters", "the model learns to write them; take them out"),
    "replacement_characters": (
        "letters that were decoded wrongly",
        "the model learns to write them; set dataset.encoding, or mend the file",
    ),
}


@dataclass
class _Column:
    """Counts of one column."""

    rows: int = 0
    null: int = 0
    empty: int = 0
    types: Counter[str] = field(default_factory=Counter)
    traces: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)
    of_type: dict[str, list[str]] = field(default_factory=dict)


class Scan:
    """Counts what stands in the used columns of a source, batch by batch."""

    def __init__(self, source: str, columns: Sequence[str]) -> None:
        """Begin with no rows.

        Args:
            source: its name in the data report.
            columns: columns to look at; one that no row has stands in no fact.
        """
        self.source = source
        self._columns = {name: _Column() for name in columns}
        self._seen: set[str] = set()

    def add(self, rows: Rows) -> None:
        """Count a batch."""
        for name, column in self._columns.items():
            values = rows.columns.get(name)
            self._seen.update([name] if values is not None else [])
            _add(column, [None] * len(rows) if values is None else values, rows)

    def facts(self) -> list[dict[str, Any]]:
        """One object for each column: rows by type, null, empty, and by trace, with the first places."""
        return [
            {
                "source": self.source,
                "column": name,
                "rows": column.rows,
                "null": column.null,
                "empty": column.empty,
                "types": dict(column.types.most_common()),
                **{trace: column.traces[trace] for trace in SEARCHES},
                "first": {what: list(places) for what, places in column.first.items()},
            }
            for name, column in self._columns.items()
            if name in self._seen
        ]

    def warnings(self) -> list[str]:
        """Sentences for the terminal, each with a count and the first place."""
        return [text for name, column in self._columns.items() for text in self._column_warnings(name, column)]

    def _column_warnings(self, name: str, column: _Column) -> Iterator[str]:
        where = f"{self.source}: column {printable(name)}"
        if len(column.types) > 1:
            (most, many), *others = column.types.most_common()
            rest = ", ".join(f"{count} {kind} (first {column.of_type[kind][0]})" for kind, count in others)
            yield f"{where} mixes types: {many} rows hold {most}, {rest}; write all of them as one type"
        for trace, (what, mend) in _WARNINGS.items():
            count = column.traces[trace]
            if trace in ("email", "phone") and (count < PERSONAL_ROWS or count <= PERSONAL_SHARE * column.rows):
                continue
            if count:
                rows = f"{count} row{'s hold' if count > 1 else ' holds'}"
                yield f"{where}: {rows} {what} (first {column.first[trace][0]}); {mend}"


def _add(column: _Column, values: Sequence[Any], rows: Rows) -> None:
    column.rows += len(values)
    is_text = set(map(type, values)) == {str}
    # A float that is no number is the only value that differs from itself.
    nulls = [] if is_text else [row for row, value in enumerate(values) if value is None or value != value]
    texts = values if is_text else [_nested_text(value) for value in values]
    column.null += len(nulls)
    _keep(column.first, "null", nulls, rows)
    _add_types(column, values, set(nulls), rows)
    blank = [row for row, text in enumerate(texts) if (not text or text.isspace()) and isinstance(values[row], str)]
    column.empty += len(blank)
    _keep(column.first, "empty", blank, rows)
    whole = "\n".join(texts)
    ends = list(accumulate(len(text) + 1 for text in texts))
    for trace, search in SEARCHES.items():
        found = list(dict.fromkeys(bisect_right(ends, position) for position in search(whole)))
        column.traces[trace] += len(found)
        _keep(column.first, trace, found, rows)


def _add_types(column: _Column, values: Sequence[Any], nulls: set[int], rows: Rows) -> None:
    names = {kind: type_name(kind) for kind in set(map(type, values))}
    counts: Counter[str] = Counter()
    for kind, count in Counter(map(type, values)).items():
        counts[names[kind]] += count
    for row in nulls:
        counts[names[type(values[row])]] -= 1
    for name, count in counts.items():
        if count > 0:
            column.types[name] += count
            if len(column.of_type.get(name, ())) < FIRST_PLACES:
                found = (row for row, v in enumerate(values) if names[type(v)] == name and row not in nulls)
                _keep(column.of_type, name, found, rows)


def _keep(first: dict[str, list[str]], what: str, found: Iterable[int], rows: Rows) -> None:
    """Keep the places of the first few."""
    for row in found:
        places = first.setdefault(what, [])
        if len(places) == FIRST_PLACES:
            return
        places.append(rows.place(row))


def _nested_text(value: Any) -> str:
    """All texts within a value, a line for each."""
    texts: list[str] = []
    open_values = [value]
    while open_values:
        one = open_values.pop()
        if isinstance(one, str):
            texts.append(one)
        elif isinstance(one, dict):
            open_values.extend(reversed(one.values()))
        elif isinstance(one, list | tuple):
            open_values.extend(reversed(one))
    return "\n".join(texts)
