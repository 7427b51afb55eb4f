"""CSV and TSV files, read strictly: a cell is exactly its text, and a row begins on a known line."""

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
"""Longest cell; a quote that nothing closes would otherwise take in the rest of the file."""

_USUAL = {";": ";", "\t": "\\t", "|": "|", ",": ","}
"""Signs that usually stand between cells, and how a recipe writes them."""


def read_csv(file: DataFile) -> Iterator[Rows]:
    """The rows of a CSV or TSV file; those with more or fewer cells than the header are not read, but named.

    Raises:
        DataError: the header cannot be used, or a quote stands where none can be.
    """
    delimiter = file.section.csv.delimiter or ("\t" if file.kind == "tsv" else ",")
    quote = file.section.csv.quote
    csv.field_size_limit(CELL_CHARACTERS)  # the whole process shares it; no other reader of ours depends on it
    with open_text(file, newline="") as text:
        if delimiter == "\t" and quote is None:
            lines, quote = _lines_without_quoted_cells(file, text), "none"
        else:
            lines = iter(text)
        rows = _rows(file, lines, delimiter, quote or '"')
        names, first = _columns(file, next(rows, None), delimiter)
        yield from gather(file.name, _items(rows, first, names, file), columns_of_tuples(names))


Line = tuple[int, list[str]]
"""Where a row begins, and its cells."""


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
            if cells:  # a blank line has none
                yield number, cells
            number = reader.line_num + 1
    except csv.Error as problem:
        raise _misread(file, number, reader.line_num, quote, str(problem)) from problem


def _misread(file: DataFile, begins: int, ends: int, quote: str, said: str) -> DataError:
    place = f"{file.path}:{begins}"
    none = f"set {file.key}.csv.quote: none where quotes are plain text"
    if "unexpected end of data" in said:
        return DataError(f"{place}: a cell that begins here with {quote} is closed nowhere; close it, or {none}")
    if "field limit" in said:
        return DataError(
            f"{place}: a cell that begins here is longer than {CELL_CHARACTERS} characters; if a {quote} is not "
            f"closed there, close it, or {none}"
        )
    if "expected after" in said:
        until = f" and runs to line {ends}" if ends > begins else ""
        return DataError(
            f"{place}: the row that begins here{until} has letters behind a closing {quote}; write {quote * 2} for a "
            f"quote inside a cell, or {none}"
        )
    return DataError(f"{place}: cannot be read: {said}; mend the row")


def _lines_without_quoted_cells(file: DataFile, text: TextIO) -> Iterator[str]:
    """Lines of a TSV file whose recipe does not say what a quote means there; both answers are common."""
    for number, line in enumerate(text, start=1):
        if '"' in line and (line.startswith('"') or '\t"' in line):
            raise DataError(
                f"{file.path}:{number}: a cell begins with a quote; set {file.key}.csv.quote: '\"' where quotes "
                "enclose cells, or none where they are text"
            )
        yield line


def _columns(file: DataFile, first: Line | None, delimiter: str) -> tuple[list[str], Line | None]:
    """The names of the columns, and the first row where it was needed to find them."""
    if first is None:
        raise DataError(f"{file.path}: empty; a header line with the column names is expected")
    number, cells = first
    place = f"{file.path}:{number}"
    given = file.section.csv.column_names
    if given is not None:
        if list(given) == cells:
            raise DataError(f"{place}: the first line is a header already; leave out {file.key}.csv.column_names")
        if len(given) != len(cells):
            raise DataError(
                f"{place}: the first line has {_cells(len(cells))}, {file.key}.csv.column_names has {len(given)} "
                f"names; name every column, or set {file.key}.csv.delimiter"
            )
        return list(given), first
    if not "".join(cells).strip():
        raise DataError(f"{place}: blank; a header line with the column names is expected")
    if cells[0].startswith("sep=") and len("".join(cells)) <= 5:
        sign = cells[0][4:] or delimiter
        raise DataError(
            f"{place}: this line is a note for Excel; take it out, and set {file.key}.csv.delimiter: "
            f'"{_USUAL.get(sign, sign)}"'
        )
    if len(cells) == 1 and file.section.csv.delimiter is None:
        other = next((sign for sign in _USUAL if sign != delimiter and sign in cells[0]), None)
        if other is not None:
            raise DataError(
                f"{place}: the header is one cell `{printable(cells[0], 80)}`; set {file.key}.csv.delimiter: "
                f'"{_USUAL[other]}", or "{_USUAL.get(delimiter, delimiter)}" where that is the name of one column'
            )
    _check_names(cells, place, file.key)
    return cells, None


def _check_names(names: list[str], place: str, key: str) -> None:
    double = [name for name in double_names(names) if name.strip()]
    if double:
        raise DataError(f"{place}: the header names {listed(double)} twice; give each column a name of its own")
    empty = [str(position) for position, name in enumerate(names, start=1) if not name.strip()]
    if empty:
        raise DataError(
            f"{place}: the header has no name for column {', '.join(empty)} of {len(names)}; give it one, "
            f"or leave the column out when you export the file"
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
            yield number, UnreadableRow(f"with {_cells(len(cells))} where {where} has {width}"), sum(map(len, cells))


def _cells(number: int) -> str:
    return f"{number} cell" if number == 1 else f"{number} cells"
