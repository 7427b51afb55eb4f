"""Parquet and Arrow files, streamed; locations are row numbers."""

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
        DataError: the file is corrupt, or two columns have the same name.
    """
    try:
        # Without prefetching and copying: a row group may be larger than the memory.
        with pq.ParquetFile(file.path, memory_map=True, pre_buffer=False) as parquet:
            metadata = parquet.metadata
            size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
            rows = max(1, min(BATCH_ROWS, BATCH_CHARACTERS * metadata.num_rows // max(size, 1)))
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
    """Rows of Arrow batches, split to a bounded size.

    Args:
        name: of the source.
        place: location for messages.
        batches: with the same schema.

    Raises:
        DataError: two columns have the same name, or a string is not UTF-8.
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
    """Class names by column, if the `datasets` library stored them in a Parquet or Arrow file."""
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
    except (ValueError, LookupError, TypeError, AttributeError):  # metadata of another writer
        return {}


def _names_of(kind: Any) -> list[str] | None:
    """The names in a ClassLabel feature, or a list of them, of the `datasets` library."""
    while isinstance(kind, list) or "feature" in kind:
        kind = kind[0] if isinstance(kind, list) else kind["feature"]
    return kind["names"] if kind.get("_type") == "ClassLabel" else None


def _values(column: pa.Array, place: str, name: str, number: int) -> list[Any]:
    where = f"{place}: rows {number} to {number + len(column) - 1}: "
    try:
        values: list[Any] = column.to_pylist()
        return _without_nulls(values) if pa.types.is_nested(column.type) else values
    except UnicodeDecodeError as problem:
        raise DataError(f"{where}a string in column {shown(name)} is not UTF-8; write the file again") from problem
    except (ValueError, OverflowError, LookupError):  # a time outside Python's range or precision
        try:
            return column.cast(pa.string()).to_pylist()  # type: ignore[no-any-return]
        except pa.ArrowException as problem:
            raise DataError(
                f"{where}column {shown(name)} has a {column.type} that cannot be read; write it as a string"
            ) from problem


def _without_nulls(value: Any) -> Any:
    """A nested value without the null fields of its structs.

    All structs of a column have the same fields, so a field that only other rows have is null; for example, the
    arguments of a tool call would get those of every other tool.
    """
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _arrow_batches(source: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    if source.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(source)
        batches: Iterable[pa.RecordBatch] = map(reader.get_batch, range(reader.num_record_batches))
    else:
        source.seek(0)
        batches = pa.ipc.open_stream(source)
    for batch in batches:
        # Arrow trusts the offsets in a file, and a corrupt one crashes the process.
        batch.validate(full=True)
        yield batch


def _broken(file: DataFile, problem: Exception) -> DataError:
    text = " ".join(str(problem).split())[:200]
    return DataError(f"{file.path}: cannot be read as {file.kind}: {text}; download or write the file again")
