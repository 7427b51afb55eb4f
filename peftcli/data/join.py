"""Joins of several files: many rows on the left, at most one on the right, and nobody lost in silence."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from peftcli.errors import DataError


@dataclass(frozen=True)
class JoinFacts:
    """One join as the data report names it; `unmatched` counts left rows without a partner."""

    path: str
    on: list[str]
    rows: int
    unmatched: int


def join_tables(left: pa.Table, right: pa.Table, on: list[str], path: str) -> tuple[pa.Table, JoinFacts]:
    """Add the columns of `right` to `left`, keeping the order of `left`.

    Left rows without a partner are dropped and counted. Keys of different types are compared as text, so that an id
    read from CSV meets the same id read from JSON.

    Args:
        left: the rows that are kept.
        right: at most one row for each key.
        on: names of the key columns, in both tables.
        path: name of the right source, for messages.

    Raises:
        DataError: a key column is missing, a key stands twice on the right, or no row finds a partner.
    """
    for name in on:
        for side, table in (("the rows joined so far", left), (path, right)):
            if name not in table.column_names:
                have = ", ".join(table.column_names)
                raise DataError(f"dataset.join {path}: {side} has no column {name}; it has {have}")
    shared = [name for name in right.column_names if name in left.column_names and name not in on]
    if shared:
        raise DataError(
            f"dataset.join {path}: both sides have a column {', '.join(shared)} that is no key; rename it in one file"
        )
    keys = [_key(table, on) for table in (left, right)]
    counts = keys[1].value_counts()
    double = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(double):
        key, times = double[0]["values"].as_py(), double[0]["counts"].as_py()
        raise DataError(
            f"dataset.join {path}: {', '.join(on)} = {key.replace(_GLUE, ', ')} stands {times} times there "
            f"({len(double)} such keys); a key may stand once on the right side of a join"
        )
    partner = pc.index_in(keys[0], value_set=keys[1])
    matched = pc.is_valid(partner)
    unmatched = left.num_rows - pc.sum(matched).as_py()
    if unmatched == left.num_rows:
        raise DataError(
            f"dataset.join {path}: no row finds a partner by {', '.join(on)}; "
            f"left has {keys[0][0].as_py()!r}, right has {keys[1][0].as_py()!r}"
        )
    joined = left.filter(matched)
    rows = right.take(partner.filter(matched))
    for name in right.column_names:
        if name not in on:
            joined = joined.append_column(name, rows.column(name))
    return joined, JoinFacts(path, on, right.num_rows, unmatched)


_GLUE = "\x1f"  # the unit separator stands in no sensible key


def _key(table: pa.Table, on: list[str]) -> pa.Array:
    parts = [pc.fill_null(pc.cast(table.column(name), pa.string()), "") for name in on]
    key = parts[0] if len(parts) == 1 else pc.binary_join_element_wise(*parts, _GLUE)
    return key.combine_chunks() if isinstance(key, pa.ChunkedArray) else key
