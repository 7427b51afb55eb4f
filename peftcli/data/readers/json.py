"""JSON Lines, and JSON arrays that are read element by element, so that no array is held whole."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from peftcli.data.readers.batches import Item, UnreadableRow, gather
from peftcli.data.readers.files import DataFile
from peftcli.data.readers.text_stream import open_text
from peftcli.data.rows import Rows, shown
from peftcli.errors import DataError

DESCRIBED_BYTES = 16 * 1024 * 1024
"""A file that is one object is read whole, to say what it holds, up to this size."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NAMES = {str: "a text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}

CHUNK_CHARACTERS = 64 * 1024

_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_WORD = 16
"""An error that stands at least so far before the end of the stretch is not one of the stretch being too short."""

_SAID = {
    "Expecting value": "a value is expected",
    "Expecting property name": "a key in double quotes is expected",
    "Expecting ',' delimiter": "a comma or the closing bracket is expected",
    "Expecting ':' delimiter": "a colon is expected",
    "Illegal trailing comma": "nothing follows the comma",
    "Extra data": "something follows the value",
    "Unterminated string": "the text that begins here does not end",
    "Invalid control character": "a tab or line break stands in a text as it is; write \\t or \\n",
    "Invalid \\": "a backslash stands before a letter that it cannot stand before; write two for the sign itself",
}


class JsonObjects:
    """Decoder of JSON values that keeps count of what Python would pass over in silence.

    Attributes:
        twice: a key that the value decoded last holds twice; None where it holds none.
    """

    def __init__(self) -> None:
        self.twice: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def decode(self, text: str, at: int = 0) -> tuple[Any, int]:
        """The value that begins at a position, and the position behind it.

        Raises:
            json.JSONDecodeError: it is no JSON, or goes on behind the text.
            ValueError: a number has too many digits.
            RecursionError: lists stand in lists without an end.
        """
        self.twice = None
        return self._decoder.raw_decode(text, at)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            names = [name for name, _ in pairs]
            self.twice = next(name for name in names if names.count(name) > 1)
        return values


class RowRule:
    """What may be a row: an object, or a text where the first row is one; the rest of the file is alike."""

    def __init__(self) -> None:
        self._kind: type | None = None
        self._first: dict[str, None] = {}

    def row(self, value: Any, file: DataFile, number: int) -> dict[str, Any]:
        """The columns of the row that begins on line `number`.

        Raises:
            DataError: the value is neither, or another kind than the rows before.
        """
        kind = type(value)
        if kind is not self._kind:
            place = f"{file.path}:{number}"
            said = _NAMES.get(kind, "null")
            if self._kind is not None:
                raise DataError(f"{place}: holds {said}, the rows before {_NAMES[self._kind]}; give all rows one kind")
            if kind not in (dict, str):
                one_list = kind is list and file.kind == "jsonl"
                hint = "; a file that is one list is named .json" if one_list else "; write {...} for each row"
                raise DataError(f"{place}: holds {said}; each row is an object of columns{hint}")
            self._kind = kind
        return value if kind is dict else {"text": value}

    def columns(self, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        """The columns of a batch; those of the first batch stand in every other too."""
        names = dict(self._first)
        for row in rows:
            names.update(dict.fromkeys(row))
        if not self._first:
            self._first = dict(names)
        return {name: [row.get(name) for row in rows] for name in names}


def read_lines(file: DataFile) -> Iterator[Rows]:
    """The rows of a file with one object a line."""
    rule = RowRule()
    return gather(file.name, _line_items(file, rule), rule.columns)


def read_json(file: DataFile) -> Iterator[Rows]:
    """The rows of one list of objects, or of a file with one object a line.

    Raises:
        DataError: the file is one object, or no JSON.
    """
    with open_text(file) as text:
        start = Window(text, file.path).next_sign()
    if start == "[":
        rule = RowRule()
        return gather(file.name, _list_items(file, rule), rule.columns)
    if start == "{" and _has_lines(file):
        return read_lines(file)
    if start == "{":
        raise _one_object(file)
    raise DataError(
        f"{file.path}: " + (f"begins with {start}; a list of rows is expected" if start else "no rows; it is blank")
    )


def _line_items(file: DataFile, rule: RowRule) -> Iterator[Item[dict[str, Any]]]:
    objects = JsonObjects()
    with open_text(file, newline="\n") as text:
        for number, line in enumerate(text, start=1):
            if not line.strip():
                continue
            row = rule.row(_line_value(line, objects, file, number), file, number)
            yield number, _checked(row, line, 0, len(line), objects), len(line)


def _line_value(line: str, objects: JsonObjects, file: DataFile, number: int) -> Any:
    stripped = line.strip()
    try:
        value, end = objects.decode(stripped)
        if end == len(stripped):
            return value
        raise json.JSONDecodeError("Extra data", stripped, end)
    except json.JSONDecodeError as problem:
        column = problem.pos + 1 + len(line) - len(line.lstrip())
        fix = _line_fix(stripped, problem, number)
        raise DataError(f"{file.path}:{number}: not JSON at column {column}: {said(problem)}; {fix}") from problem
    except (ValueError, RecursionError) as problem:
        raise unusable(f"{file.path}:{number}", problem) from problem


def _line_fix(line: str, problem: json.JSONDecodeError, number: int) -> str:
    if problem.pos < len(line) or line[0] not in "[{":
        return "mend the line or take it out"
    if number > 1:
        return "the row must end on this line; mend it or take it out"
    if line[0] == "[":
        return "a file that is one list is named .json"
    return "a row must stand on one line; if rows span lines, make the file one list and name it .json"


def _list_items(file: DataFile, rule: RowRule) -> Iterator[Item[dict[str, Any]]]:
    objects = JsonObjects()
    with open_text(file) as text:
        window = Window(text, file.path)
        window.next_sign()
        window.step()
        sign = window.next_sign()
        while sign != "]":
            number = window.line
            value, start = window.value(objects.decode)
            row = rule.row(value, file, number)
            yield number, _checked(row, window.text, start, window.at, objects), window.at - start
            sign = window.next_sign()
            if sign == ",":
                window.step()
                if window.next_sign() == "]":
                    raise window.wrong("nothing follows the comma")
            elif sign != "]":
                raise window.wrong("the list does not end; it may be cut off" if not sign else f"{sign} between rows")
        window.step()
        if window.next_sign():
            raise window.wrong("something follows the list")


def _checked(
    row: dict[str, Any], text: str, start: int, end: int, objects: JsonObjects
) -> dict[str, Any] | UnreadableRow:
    """The row, unless a part of it would be lost."""
    if objects.twice is not None:
        return UnreadableRow(f"with the key {shown(objects.twice)} twice")
    if _SURROGATE.search(text, start, end):
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return UnreadableRow("with half of a surrogate pair")
    return row


def _has_lines(file: DataFile) -> bool:
    """Whether the first line is a whole object and not the only one."""
    with open_text(file, newline="\n") as text:
        lines = (line for line in text if line.strip())
        first, second = next(lines), next(lines, None)
    try:
        JsonObjects().decode(first.strip())
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        return True  # the reader of lines says it with the line
    return second is not None


def _one_object(file: DataFile) -> DataError:
    expected = "a list of rows is expected, or one object a line"
    if file.path.stat().st_size > DESCRIBED_BYTES:
        return DataError(f"{file.path}: holds objects that span lines; {expected}")
    with open_text(file) as text:
        content = text.read()
    try:
        value = json.loads(content)
    except json.JSONDecodeError as problem:
        if problem.msg == "Extra data":
            return DataError(f"{file.path}: holds several objects that span lines; {expected}")
        return DataError(
            f"{file.path}:{problem.lineno}: not JSON at column {problem.colno}: {said(problem)}; {expected}"
        )
    except (ValueError, RecursionError) as problem:
        return unusable(str(file.path), problem)
    keys = ", ".join(f"{shown(key)}: {_described(item)}" for key, item in list(value.items())[:8])
    fix = "name the file .jsonl if it is one row"
    lists = [key for key, item in value.items() if isinstance(item, list)]
    if lists:
        fix = f"write the list under {shown(lists[0])} into a file of its own"
    elif value and all(isinstance(item, dict) for item in value.values()):
        fix = 'write it by rows (in pandas, to_json with orient="records")'
    return DataError(f"{file.path}: holds one object ({keys}); {expected}; {fix}")


def _described(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else _NAMES.get(type(value), "null")


def said(problem: json.JSONDecodeError) -> str:
    """What is wrong with a JSON text, in the same words whatever the version of Python."""
    return next((text for start, text in _SAID.items() if problem.msg.startswith(start)), problem.msg)


def unusable(place: str, problem: Exception) -> DataError:
    """The error for JSON that is written well and cannot be held."""
    if isinstance(problem, RecursionError):
        return DataError(f"{place}: cannot be read: lists or objects are nested too deeply; mend or drop the row")
    most = sys.get_int_max_str_digits()
    return DataError(f"{place}: cannot be read: a number has more than {most} digits; write it as text")


class Window:
    """A text that is read in stretches, with the line of each place.

    Attributes:
        text: the stretch.
        at: position in it of what comes next.
        line: 1-based line of what comes next.
    """

    def __init__(self, file: TextIO, path: Path) -> None:
        self.text = ""
        self.at = 0
        self.line = 1
        self._file = file
        self._path = path
        self._counted = 0
        self._passed = 0  # characters before the stretch
        self._line_begins = 0  # in characters from the beginning of the file

    def next_sign(self) -> str:
        """Go on to what is no white space, and return its first sign; empty at the end."""
        while True:
            space = _SPACE.match(self.text, self.at)
            assert space is not None  # it matches nothing too
            self.at = space.end()
            if self.at < len(self.text) or not self._grow():
                self._count()
                return self.text[self.at : self.at + 1]

    def step(self) -> None:
        """Go on by one sign."""
        self.at += 1

    def value(self, decode: Callable[[str, int], tuple[Any, int]]) -> tuple[Any, int]:
        """Decode the value that comes next and go on behind it.

        The stretch doubles until the value fits, so that the work stays in proportion to its length.

        Returns:
            The value, and where in `text` it began.

        Raises:
            DataError: no JSON value stands there, or one that cannot be held.
        """
        while True:
            try:
                value, end = decode(self.text, self.at)
            except json.JSONDecodeError as problem:
                behind = problem.pos - self.at
                open_text = problem.msg.startswith("Unterminated string")
                if (open_text or problem.pos >= len(self.text) - _LONGEST_WORD) and self._grow():
                    continue
                if open_text or self.at + behind >= len(self.text):
                    raise self.wrong("the row that begins here does not end; the file may be cut off") from problem
                self.at += behind
                raise self.wrong(said(problem)) from problem
            except (ValueError, RecursionError) as problem:
                self._count()
                raise unusable(f"{self._path}:{self.line}", problem) from problem
            start, self.at = self.at, end
            return value, start

    def wrong(self, said: str) -> DataError:
        """The error for what stands at this place."""
        self._count()
        column = self._passed + self.at - self._line_begins + 1
        return DataError(f"{self._path}:{self.line}: not JSON at column {column}: {said}; mend the file from there on")

    def _count(self) -> None:
        lines = self.text.count("\n", self._counted, self.at)
        if lines:
            self.line += lines
            self._line_begins = self._passed + self.text.rindex("\n", self._counted, self.at) + 1
        self._counted = self.at

    def _grow(self) -> bool:
        """Drop what is behind and read on; False at the end of the file."""
        self._count()
        rest = self.text[self.at :]
        more = self._file.read(max(CHUNK_CHARACTERS, len(rest)))
        self._passed += self.at
        self.text, self.at, self._counted = rest + more, 0, 0
        return bool(more)
