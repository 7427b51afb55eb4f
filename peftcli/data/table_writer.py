"""Writes rows with all of their columns as CSV, TSV, JSON Lines or Parquet."""

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from peftcli.errors import RecipeError
from peftcli.recipe.problems import choice_text

Cells: TypeAlias = Sequence[Any]
"""The values of a row, in the order of the columns."""

JSON_TEXT = pa.large_string()
"""Parquet type of columns without a common type, whose values are written as text or JSON."""
_LARGEST = 2**63


class TableWriter(AbstractContextManager["TableWriter"], Protocol):
    """Writes rows to a file."""

    def write(self, rows: Sequence[Cells]) -> None:
        """Append rows."""
        ...


class TextWriter:
    """CSV and TSV: cells are quoted where needed; lists and objects are JSON, missing values are empty."""

    def __init__(self, path: Path, columns: Sequence[str], delimiter: str) -> None:
        self._file = path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
        self._delimiter = delimiter
        self.write([columns])

    def write(self, rows: Sequence[Cells]) -> None:
        # Not csv.writer, which leaves a carriage return unquoted if lines end with a line feed.
        quoted = f'"\r\n{self._delimiter}'
        for row in rows:
            cells = [
                f'"{text.replace(chr(34), chr(34) * 2)}"' if _has(text, quoted) else text for text in map(_text, row)
            ]
            self._file.write(self._delimiter.join(cells) + "\n")

    def __enter__(self) -> "TextWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class LinesWriter:
    """JSON Lines: one object a row; what JSON cannot represent is written as text, or null if it is not a number."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._file = path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n")
        self._columns = list(columns)

    def write(self, rows: Sequence[Cells]) -> None:
        for row in rows:
            value = dict(zip(self._columns, map(plain, row), strict=True))
            self._file.write(json.dumps(value, ensure_ascii=False) + "\n")

    def __enter__(self) -> "LinesWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class ParquetWriter:
    """Parquet with a fixed schema; one row group for each call of `write`."""

    def __init__(self, path: Path, columns: Sequence[str], types: Mapping[str, pa.DataType]) -> None:
        self._schema = pa.schema([(name, types[name]) for name in columns])
        self._writer = pq.ParquetWriter(path, self._schema)

    def write(self, rows: Sequence[Cells]) -> None:
        arrays = []
        for number, field in enumerate(self._schema):
            values = [row[number] for row in rows]
            if field.type == JSON_TEXT:
                values = [None if value is None else _text(value) for value in values]
            elif field.type == pa.float64():  # Arrow refuses large whole numbers among them
                values = [None if value is None else float(value) for value in values]
            arrays.append(pa.array(values, field.type))
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))

    def __enter__(self) -> "ParquetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()


Types: TypeAlias = Mapping[str, pa.DataType]
WRITERS: dict[str, Callable[[Path, Sequence[str], Types], TableWriter]] = {
    ".csv": lambda path, columns, types: TextWriter(path, columns, ","),
    ".tsv": lambda path, columns, types: TextWriter(path, columns, "\t"),
    ".jsonl": lambda path, columns, types: LinesWriter(path, columns),
    ".ndjson": lambda path, columns, types: LinesWriter(path, columns),
    ".parquet": ParquetWriter,
}
"""By the extension of the file."""


def check_extension(path: Path, flag: str) -> None:
    """Refuse a file name whose extension is not that of a format.

    Raises:
        RecipeError: with the known extensions.
    """
    if path.suffix.lower() not in WRITERS:
        known = choice_text(list(WRITERS))
        raise RecipeError(f"{flag} {path}: the extension decides the format; name a file that ends with {known}")


def open_writer(path: Path, suffix: str, columns: Sequence[str], types: Types) -> TableWriter:
    """A writer to a new file.

    Args:
        suffix: extension of the format, which that of the path may differ from.
        types: of each column; only used for Parquet.
    """
    return WRITERS[suffix.lower()](path, columns, types)


def plain(value: Any) -> Any:
    """A value as JSON can represent it: bytes in base64, dates and decimals as text, no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return base64.b64encode(value).decode("ascii") if isinstance(value, bytes) else str(value)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    value = plain(value)
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _has(text: str, letters: str) -> bool:
    return any(letter in text for letter in letters)


class ColumnTypes:
    """Finds the Parquet types of columns from their values, in one pass over all rows."""

    def __init__(self, stored: Mapping[str, pa.DataType]) -> None:
        """
        Args:
            stored: types in the file that the rows are from, which are kept for values that fit.
        """
        self._stored = dict(stored)
        self._seen: dict[str, set[type]] = {}
        self._large: set[str] = set()

    def add(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Add the values of some rows."""
        for name, values in columns.items():
            if name in self._stored and not _fits(values, self._stored[name]):
                del self._stored[name]
            found = set(map(type, values))
            self._seen.setdefault(name, set()).update(found)
            if int in found and any(type(value) is int and not -_LARGEST <= value < _LARGEST for value in values):
                self._large.add(name)

    def types(self) -> dict[str, pa.DataType]:
        """One type a column: that of the file; text, numbers or true/false if all values are; else JSON text."""
        found = {name: JSON_TEXT if name in self._large else _type(kinds) for name, kinds in self._seen.items()}
        return {**found, **self._stored}


def _fits(values: Sequence[Any], kind: pa.DataType) -> bool:
    try:
        pa.array(values, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False
    return True


def _type(kinds: set[type]) -> pa.DataType:
    known = kinds - {type(None)}
    if not known or known == {str}:
        return pa.string()
    if known == {bool}:
        return pa.bool_()
    if known == {int}:
        return pa.int64()
    return pa.float64() if known <= {int, float} else JSON_TEXT
