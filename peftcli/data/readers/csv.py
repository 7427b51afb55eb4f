"""Strict reader for CSV and TSV files: cells are not converted, and each row has a line number."""

import csv
from collections.abc import Iterator
from typing import TextIO

from peftcli.data.readers.batches import Item, UnreadableRow, columns_of_tuples, double_names, gather
from peftcli.data.readers.files import DataFile
from peftcli.data.readers.text_stream import open_text
from peftcli.data.rows import Rows, listed
from peftcli.errors import DataError
from peftcli.recipe.problems import printable

CELL_CHARACTERS = 64 * 1024 * 1024
"""Maximum size of a cell; an unclosed quote would otherwise consume the rest of the file."""

_USUAL = {";": ";", "\t": "\\t", "|": "|", ",": ","}
"""Common delimiters, and how to write them in a recipe."""


def read_csv(file: DataFile) -> Iterator[Rows]:
    """The rows of a CSV or TSV file; rows with more or fewer cells than the header are reported as unreadable.

    Raises:
        DataError: the header is not usable, or a quote is misplaced.
    """
    delimiter = file.section.csv.delimiter or ("\t" if file.kind == "tsv" else ",")
    quote = file.section.csv.quote
    csv.field_size_limit(CELL_CHARACTERS)  # global for the process; no other reader depends on it
    with open_text(file, newline="") as text:
        if delimiter == "\t" and quote is None:
            lines, quote = _lines_without_quoted_cells(file, text), "none"
        else:
            lines = iter(text)
        rows = _rows(file, lines, delimiter, quote or '"')
        names, first = _columns(file, next(rows, None), delimiter)
        yield from gather(file.name, _items(rows, first, names, file), columns_of_tuples(names))


Line = tuple[int, list[str]]
"""The line of a row, and its cells."""


def _rows(file: DataFile, lines: Iterator[str], delimiter: str, quote: str) -> Iterator[Line]:
    if delimiter == quote:
        raise DataError(f"{file.key}.csv: delimiter and quote are both {quote}; change one of them")
    if quote == "none":
        reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
    else:
        reader = csv.reader(lines, delimiter=delimiter, quotechar=quote, strict=True)
    number = 1
    try:
        for cells in reader:
            if cells:  # blank lines have no cells
                yield number, cells
            number = reader.line_num + 1
    except csv.Error as problem:
        raise _misread(file, number, reader.line_num, quote, str(problem)) from problem


def _misread(file: DataFile, start: int, end: int, quote: str, problem: str) -> DataError:
    place = f"{file.path}:{start}"
    none = f"set {file.key}.csv.quote: none if quotes are plain text"
    if "unexpected end of data" in problem:
        return DataError(f"{place}: the cell that starts here with {quote} is never closed; close it, or {none}")
    if "field limit" in problem:
        return DataError(
            f"{place}: the cell that starts here is longer than {CELL_CHARACTERS} characters; close its {quote}, or "
            f"{none}"
        )
    if "expected after" in problem:
        until = f" and ends on line {end}" if end > start else ""
        return DataError(
            f"{place}: the row that starts here{until} has text after a closing {quote}; write {quote * 2} for a "
            f"quote inside a cell, or {none}"
        )
    return DataError(f"{place}: cannot be read: {problem}; fix the row")


def _lines_without_quoted_cells(file: DataFile, text: TextIO) -> Iterator[str]:
    """Lines of a TSV file without `csv.quote` in the recipe; a quoted cell is an error, since it is ambiguous."""
    for number, line in enumerate(text, start=1):
        if '"' in line and (line.startswith('"') or '\t"' in line):
            raise DataError(
                f"{file.path}:{number}: a cell starts with a quote; set {file.key}.csv.quote: '\"' if quotes "
                "enclose cells, or none if they are text"
            )
        yield line


def _columns(file: DataFile, first: Line | None, delimiter: str) -> tuple[list[str], Line | None]:
    """The column names, and the first row if it was read to find them."""
    if first is None:
        raise DataError(f"{file.path}: empty; add a header line with the column names")
    number, cells = first
    place = f"{file.path}:{number}"
    given = file.section.csv.column_names
    if given is not None:
        if list(given) == cells:
            raise DataError(f"{place}: the first line is already a header; remove {file.key}.csv.column_names")
        if len(given) != len(cells):
            raise DataError(
                f"{place}: the first line has {_cells(len(cells))}, but {file.key}.csv.column_names has {len(given)} "
                f"names; name every column, or set {file.key}.csv.delimiter"
            )
        return list(given), first
    if not "".join(cells).strip():
        raise DataError(f"{place}: blank; the first line must be a header with the column names")
    if cells[0].startswith("sep=") and len("".join(cells)) <= 5:
        separator = cells[0][4:] or delimiter
        raise DataError(
            f"{place}: this line is a hint for Excel; remove it, and set {file.key}.csv.delimiter: "
            f'"{_USUAL.get(separator, separator)}"'
        )
    if len(cells) == 1 and file.section.csv.delimiter is None:
        other = next((char for char in _USUAL if char != delimiter and char in cells[0]), None)
        if other is not None:
            raise DataError(
                f"{place}: the header is one cell `{printable(cells[0], 80)}`; set {file.key}.csv.delimiter: "
                f'"{_USUAL[other]}", or "{_USUAL.get(delimiter, delimiter)}" if this is a single column'
            )
    _check_names(cells, place, file.key)
    return cells, None


def _check_names(names: list[str], place: str, key: str) -> None:
    double = [name for name in double_names(names) if name.strip()]
    if double:
        raise DataError(f"{place}: the header has {listed(double)} twice; give each column a unique name")
    empty = [str(position) for position, name in enumerate(names, start=1) if not name.strip()]
    if empty:
        raise DataError(
            f"{place}: the header has no name for column {', '.join(empty)} of {len(names)}; add one, "
            f"or omit the column when you export the file"
        )


def _items(rows: Iterator[Line], first: Line | None, names: list[str], file: DataFile) -> Iterator[Item[list[str]]]:
    width = len(names)
    where = "the header" if first is None else f"{file.key}.csv.column_names"
    if first is not None:
        yield first[0], first[1], sum(map(len, first[1]))
    for number, cells in rows:
        if len(cells) == width:
            yield number, cells, sum(map(len, cells))
        else:
            yield number, UnreadableRow(f"with {_cells(len(cells))}, but {where} has {width}"), sum(map(len, cells))


def _cells(number: int) -> str:
    return f"{number} cell" if number == 1 else f"{number} cells"
