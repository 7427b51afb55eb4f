"""Parquet and Arrow files, read a few rows at a time; a row is named by its number."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from peftcli.data.readers.batches import double_names
from peftcli.data.readers.files import DataFile
from peftcli.data.rows import BATCH_CHARACTERS, BATCH_ROWS, Rows, listed, shown
from peftcli.errors import DataError


def read_parquet(file: DataFile) -> Iterator[Rows]:
    """The rows of a Parquet file.

    Raises:
        DataError: the file is broken, or two columns have one name.
    """
    try:
        # Neither read ahead nor copied: a row group may be larger than the memory.
        with pq.ParquetFile(file.path, memory_map=True, pre_buffer=False) as parquet:
            facts = parquet.metadata
            size = sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
            rows = max(1, min(BATCH_ROWS, BATCH_CHARACTERS * facts.num_rows // max(size, 1)))
            yield from rows_of_arrow(file.name, str(file.path), parquet.iter_batches(batch_size=rows))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as problem:
        raise _broken(file, problem) from problem


def read_arrow(file: DataFile) -> Iterator[Rows]:
    """The rows of an Arrow file, in the file or the stream format.

    Raises:
        DataError: as `read_parquet`.
    """
    try:
        with pa.memory_map(str(file.path)) as source:
            yield from rows_of_arrow(file.name, str(file.path), _arrow_batches(source))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as problem:
        raise _broken(file, problem) from problem


def rows_of_arrow(name: str, place: str, batches: Iterable[pa.RecordBatch]) -> Iterator[Rows]:
    """Rows of Arrow batches, cut to a bounded size.

    Args:
        name: as the rows show it.
        place: as messages show it.
        batches: all of one schema.

    Raises:
        DataError: two columns have one name, or a text is not UTF-8.
    """
    number = 1
    for batch in batches:
        double = double_names(batch.schema.names)
        if double:
            raise DataError(f"{place}: two columns are named {listed(double)}; rename one of them")
        step = BATCH_ROWS
        if batch.nbytes > BATCH_CHARACTERS:
            step = max(1, min(BATCH_ROWS, batch.num_rows * BATCH_CHARACTERS // batch.nbytes))
        for start in range(0, batch.num_rows, step):
            piece = batch.slice(start, step)
            columns = {column: _values(piece.column(column), place, column, number) for column in piece.schema.names}
            yield Rows(name, list(range(number, number + piece.num_rows)), columns)
            number += piece.num_rows


def class_names(file: DataFile) -> dict[str, tuple[str, ...]]:
    """Names of the classes by column, where the `datasets` library wrote them into a Parquet or Arrow file."""
    with pa.memory_map(str(file.path)) as source:
        if file.kind == "parquet":
            metadata = pq.read_schema(source).metadata
        else:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            metadata = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source).schema.metadata
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: tuple(map(str, found)) for name, kind in features.items() if (found := _names_of(kind))}
    except (ValueError, LookupError, TypeError, AttributeError):  # another writer's notes
        return {}


def _names_of(kind: Any) -> list[str] | None:
    """The names of a class, or of a list of classes, in the notation of the `datasets` library."""
    while isinstance(kind, list) or "feature" in kind:
        kind = kind[0] if isinstance(kind, list) else kind["feature"]
    return kind["names"] if kind.get("_type") == "ClassLabel" else None


def _values(column: pa.Array, place: str, name: str, number: int) -> list[Any]:
    where = f"{place}: rows {number} to {number + len(column) - 1}: "
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError as problem:
        raise DataError(f"{where}a text in column {shown(name)} is not UTF-8; write the file again") from problem
    except (ValueError, OverflowError, LookupError):  # a time beyond the years or the precision that Python knows
        try:
            return column.cast(pa.string()).to_pylist()  # type: ignore[no-any-return]
        except pa.ArrowException as problem:
            raise DataError(
                f"{where}column {shown(name)} holds a {column.type} that cannot be read; write it as text"
            ) from problem


def _arrow_batches(source: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    if source.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(source)
        batches: Iterable[pa.RecordBatch] = map(reader.get_batch, range(reader.num_record_batches))
    else:
        source.seek(0)
        batches = pa.ipc.open_stream(source)
    for batch in batches:
        # Arrow trusts the offsets in a file, and one spoilt byte there ends the process without a word.
        batch.validate(full=True)
        yield batch


def _broken(file: DataFile, problem: Exception) -> DataError:
    said = " ".join(str(problem).split())[:200]
    return DataError(f"{file.path}: cannot be read as {file.kind}: {said}; fetch or write the file again")
