"""Files and Hub data sets, read into one Arrow table each, with values as they are written there."""

import csv
import difflib
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from peftcli.errors import DataError
from peftcli.recipe.schema import DatasetSection

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")


@dataclass(frozen=True)
class SourceFacts:
    """One source as the data report names it."""

    path: str
    rows: int


def read_source(dataset: DatasetSection) -> tuple[pa.Table, SourceFacts]:
    """Read the rows of `dataset.path` or of the Hub data set `dataset.name`.

    Raises:
        DataError: the source is missing, unreadable or empty.
    """
    if dataset.name is not None:
        table = read_hub(dataset.name, dataset.config, dataset.revision)
        return table, SourceFacts(dataset.name, table.num_rows)
    assert dataset.path is not None  # the recipe has exactly one of the two
    return read_path(Path(dataset.path))


def read_path(path: Path) -> tuple[pa.Table, SourceFacts]:
    """Read one file, a folder of files or a glob; several files must have the same columns."""
    files = list_files(path)
    tables = [read_file(file) for file in files]
    for file, table in zip(files[1:], tables[1:], strict=True):
        if table.column_names != tables[0].column_names:
            raise DataError(
                f"{file}: its columns are {', '.join(table.column_names)}, those of {files[0].name} are "
                f"{', '.join(tables[0].column_names)}; files of one data set need the same columns"
            )
    table = pa.concat_tables(tables, promote_options="permissive") if len(tables) > 1 else tables[0]
    if table.num_rows == 0:
        raise DataError(f"{path}: no rows")
    return table, SourceFacts(path.name, table.num_rows)


def list_files(path: Path) -> list[Path]:
    """The files that a path, a folder or a glob stands for, in the order of their names."""
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _suffix(file) in SUFFIXES)
        if not files:
            raise DataError(f"{path}: no data file in this folder; known endings are {', '.join(SUFFIXES)}")
        return files
    if any(letter in path.name for letter in "*?["):
        files = sorted(file for file in path.parent.glob(path.name) if file.is_file())
        if not files:
            raise DataError(f"{path}: no file matches")
        return files
    near: list[str] = []
    if path.parent.is_dir():
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1)
    raise DataError(f"{path}: no such file" + (f"; did you mean {near[0]}?" if near else ""))


def read_file(path: Path) -> pa.Table:
    """Read one file by its ending; the values of a CSV file stay the text that they are.

    Raises:
        DataError: unknown ending, not UTF-8, or a line that cannot be read, with its number where known.
    """
    suffix = _suffix(path)
    try:
        if suffix in (".csv", ".tsv"):
            return _read_csv(path, "\t" if suffix == ".tsv" else ",")
        if suffix in (".jsonl", ".ndjson"):
            return _table_of(list(_json_lines(path)), path)
        if suffix == ".json":
            return _table_of(_json_list(path), path)
        if suffix == ".parquet":
            return pa.parquet.read_table(path)
    except UnicodeDecodeError as problem:
        raise DataError(
            f"{path}: byte {problem.start} is not UTF-8; save the file as UTF-8 (it may be Latin-1 or UTF-16)"
        ) from problem
    except (pa.ArrowInvalid, csv.Error, EOFError, gzip.BadGzipFile, OSError) as problem:
        raise DataError(f"{path}: cannot be read: {' '.join(str(problem).split())[:300]}") from problem
    raise DataError(f"{path}: the ending {suffix or '(none)'} is not known; known are {', '.join(SUFFIXES)}")


def read_hub(name: str, config: str | None, revision: str | None) -> pa.Table:
    """Read the train split of a Hub data set.

    Raises:
        DataError: the data set, its configuration or its train split cannot be had.
    """
    import datasets  # half a second, and only a Hub source needs it

    try:
        rows = datasets.load_dataset(name, config, revision=revision, split="train")
    except Exception as problem:  # the Hub library raises many kinds; each means that the rows cannot be had
        first = " ".join(str(problem).split())[:300]
        raise DataError(f"dataset.name {name}: cannot be loaded: {type(problem).__name__}: {first}") from problem
    return rows.with_format("arrow")[:]


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _open_text(path: Path) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open("r", encoding="utf-8-sig", newline="")


def _read_csv(path: Path, delimiter: str) -> pa.Table:
    with _open_text(path) as file:
        header = next(csv.reader(file, delimiter=delimiter), None)
    if not header:
        raise DataError(f"{path}: empty; a header line with the column names is expected")
    double = sorted({name for name in header if header.count(name) > 1})
    if double:
        raise DataError(f"{path}:1: the header names {', '.join(double)} twice")
    # Every column is read as text: an id such as 007 keeps its zeros and a name such as NA is no null.
    return pa.csv.read_csv(
        path,
        parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types={name: pa.string() for name in header}, strings_can_be_null=False, check_utf8=True
        ),
    )


def _json_lines(path: Path) -> Iterator[Any]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as problem:
                raise DataError(f"{path}:{number}: not JSON at column {problem.colno}: {problem.msg}") from problem
            except (ValueError, RecursionError) as problem:  # a number of thousands of digits, or endless nesting
                raise DataError(f"{path}:{number}: cannot be read: {str(problem)[:100]}") from problem


def _json_list(path: Path) -> list[Any]:
    with _open_text(path) as file:
        try:
            value = json.load(file)
        except json.JSONDecodeError as problem:
            hint = "; is it JSON lines? then name it .jsonl" if problem.msg == "Extra data" else ""
            raise DataError(f"{path}:{problem.lineno}: not JSON: {problem.msg}{hint}") from problem
    if not isinstance(value, list):
        raise DataError(f"{path}: holds one {type(value).__name__}; a list of rows is expected")
    return value


def _table_of(rows: list[Any], path: Path) -> pa.Table:
    if not rows:
        raise DataError(f"{path}: no rows")
    if all(isinstance(row, str) for row in rows):
        return pa.table({"text": rows})
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number} is a {type(row).__name__}; each row is an object of columns")
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    table = {}
    for name in columns:
        values = [row.get(name) for row in rows]
        try:
            table[name] = pa.array(values)
        except (UnicodeEncodeError, OverflowError) as problem:
            raise DataError(
                f"{path}: the column {name} holds a value that cannot be stored ({str(problem)[:80]}): half of a "
                "surrogate pair, or a number beyond 64 bits"
            ) from None
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            kinds = sorted({type(value).__name__ for value in values})
            raise DataError(
                f"{path}: the column {name} mixes types ({', '.join(kinds)}); give all rows one type"
            ) from None
    return pa.table(table)
