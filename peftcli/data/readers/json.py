"""JSON Lines, and JSON arrays that are streamed element by element."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from peftcli.data.chat_formats import is_chat, is_message
from peftcli.data.readers.batches import Item, UnreadableRow, gather
from peftcli.data.readers.files import DataFile
from peftcli.data.readers.text_stream import open_text
from peftcli.data.rows import Rows, shown
from peftcli.errors import DataError

DESCRIBED_BYTES = 16 * 1024 * 1024
"""Up to this size, a file with a single object is read completely to describe it in the message."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NAMES = {str: "a text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}

CHUNK_CHARACTERS = 64 * 1024

_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_WORD = 16
"""An error at least this far before the end of the buffer is not caused by the end of the buffer."""

_MESSAGES = {
    "Expecting value": "a value is expected",
    "Expecting property name": "a key in double quotes is expected",
    "Expecting ',' delimiter": "a comma or the closing bracket is expected",
    "Expecting ':' delimiter": "a colon is expected",
    "Illegal trailing comma": "a trailing comma",
    "Extra data": "extra data after the value",
    "Unterminated string": "the string that starts here is not terminated",
    "Invalid control character": "an unescaped tab or line break in a string; write \\t or \\n",
    "Invalid \\": "an invalid escape sequence; write two backslashes for a literal one",
}


class JsonObjects:
    """A JSON decoder that detects duplicate keys, which Python ignores.

    Attributes:
        twice: a duplicate key in the last decoded value; None if there is none.
    """

    def __init__(self) -> None:
        self.twice: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def decode(self, text: str, at: int = 0) -> tuple[Any, int]:
        """The value that starts at a position, and the position after it.

        Raises:
            json.JSONDecodeError: it is not JSON, or incomplete.
            ValueError: a number has too many digits.
            RecursionError: lists are nested too deeply.
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
    """The valid type of rows in a file: objects, or strings or chats (lists of messages) if the first row is one."""

    def __init__(self) -> None:
        self._kind: type | None = None
        self._first: dict[str, None] = {}

    def row(self, value: Any, file: DataFile, number: int) -> dict[str, Any]:
        """The columns of the row that starts on line `number`.

        Raises:
            DataError: the value has an invalid type, or another type than the previous rows.
        """
        kind = type(value)
        if kind is list and not is_chat(value):
            kind = object  # an invalid row
        if kind is not self._kind:
            place = f"{file.path}:{number}"
            found = _NAMES.get(type(value), "null")
            if self._kind is not None:
                found += " without messages" if self._kind is list and kind is object else ""
                raise DataError(
                    f"{place}: is {found}, but the previous rows are {_NAMES[self._kind]}; use one type for all rows"
                )
            if kind not in (dict, str, list):
                one_list = isinstance(value, list) and file.kind == "jsonl"
                hint = "; rename a file with one list to .json" if one_list else "; write {...} for each row"
                raise DataError(f"{place}: is {found}, but each row must be an object with columns{hint}")
            self._kind = kind
        return value if kind is dict else {"messages" if kind is list else "text": value}

    def columns(self, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        """The columns of a batch; every batch has at least those of the first."""
        names = dict(self._first)
        for row in rows:
            names.update(dict.fromkeys(row))
        if not self._first:
            self._first = dict(names)
        return {name: [row.get(name) for row in rows] for name in names}


def read_lines(file: DataFile) -> Iterator[Rows]:
    """The rows of a file with one object per line."""
    rule = RowRule()
    return gather(file.name, _line_items(file, rule), rule.columns)


def read_json(file: DataFile) -> Iterator[Rows]:
    """The rows of a list of objects, or of a file with one object per line.

    Raises:
        DataError: the file is a single object that is not a row, or not JSON.
    """
    with open_text(file) as text:
        start = Window(text, file.path).next_char()
    if start == "[":
        rule = RowRule()
        return gather(file.name, _one_chat(file) or _list_items(file, rule), rule.columns)
    if start == "{" and _has_lines(file):
        return read_lines(file)
    if start == "{":
        return gather(file.name, iter([_one_row(file)]), RowRule().columns)
    raise DataError(
        f"{file.path}: "
        + (f"starts with {start}; it must be a list of rows" if start else "the file is blank; add rows")
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
        raise DataError(f"{file.path}:{number}: not JSON at column {column}: {describe(problem)}; {fix}") from problem
    except (ValueError, RecursionError) as problem:
        raise unusable(f"{file.path}:{number}", problem) from problem


def _line_fix(line: str, problem: json.JSONDecodeError, number: int) -> str:
    if problem.pos < len(line) or line[0] not in "[{":
        return "fix or remove the line"
    if number > 1:
        return "a row must be on one line; fix or remove it"
    if line[0] == "[":
        return "rename a file with one list to .json"
    return "a row must be on one line; if rows span several lines, write the file as one list and rename it to .json"


def _list_items(file: DataFile, rule: RowRule) -> Iterator[Item[dict[str, Any]]]:
    """The rows of a list with their lines, or with their numbers if the first two are on the same line."""
    items = _lined_items(file, rule)
    first = list(islice(items, 2))
    found = chain(first, items)
    if len({line for line, _, _ in first}) == len(first):
        return found
    return ((number, row, size) for number, (_, row, size) in enumerate(found, start=1))


def _lined_items(file: DataFile, rule: RowRule) -> Iterator[Item[dict[str, Any]]]:
    objects = JsonObjects()
    with open_text(file) as text:
        window = Window(text, file.path)
        window.next_char()
        window.step()
        char = window.next_char()
        while char != "]":
            number = window.line
            value, start = window.value(objects.decode)
            row = rule.row(value, file, number)
            yield number, _checked(row, window.text, start, window.at, objects), window.at - start
            char = window.next_char()
            if char == ",":
                window.step()
                if window.next_char() == "]":
                    raise window.wrong("a trailing comma")
            elif char != "]":
                raise window.wrong("the list does not end; it may be truncated" if not char else f"{char} between rows")
        window.step()
        if window.next_char():
            raise window.wrong("extra data after the list")


def _one_chat(file: DataFile) -> Iterator[Item[dict[str, Any]]] | None:
    """The row of a file with a single list of messages; None for any other list."""
    if file.path.stat().st_size > DESCRIBED_BYTES:
        return None
    objects = JsonObjects()
    with open_text(file) as text:
        window = Window(text, file.path)
        window.next_char()
        window.step()
        if window.next_char() != "{" or not is_message(window.value(objects.decode)[0]):
            return None
    items = list(_lined_items(file, RowRule()))
    turns = [row for _, row, _ in items]
    unreadable = next((row for row in turns if isinstance(row, UnreadableRow)), None)
    size = sum(size for _, _, size in items)
    if unreadable is not None:
        return iter([(1, unreadable, size)])
    return iter([(1, {"messages": turns}, size)]) if all(map(is_message, turns)) else None


def _checked(
    row: dict[str, Any], text: str, start: int, end: int, objects: JsonObjects
) -> dict[str, Any] | UnreadableRow:
    """The row, or the reason why a part of it would be lost."""
    if objects.twice is not None:
        return UnreadableRow(f"with the duplicate key {shown(objects.twice)}")
    if _SURROGATE.search(text, start, end):
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return UnreadableRow("with a lone surrogate")
    return row


def _has_lines(file: DataFile) -> bool:
    """Whether the first line is a complete object, and there are others."""
    with open_text(file, newline="\n") as text:
        lines = (line for line in text if line.strip())
        first, second = next(lines), next(lines, None)
    try:
        JsonObjects().decode(first.strip())
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        return True  # the line reader reports it with the line number
    return second is not None


def _one_row(file: DataFile) -> Item[dict[str, Any]]:
    """The only row of a file with a single object: a chat, or plain values.

    Raises:
        DataError: the object contains the rows, or the file has several objects.
    """
    expected = "use a list of rows, or one object per line"
    if file.path.stat().st_size > DESCRIBED_BYTES:
        raise DataError(f"{file.path}: has objects that span several lines; {expected}")
    objects = JsonObjects()
    with open_text(file) as text:
        content = text.read()
    start = len(content) - len(content.lstrip())
    try:
        value, end = objects.decode(content, start)
    except json.JSONDecodeError as problem:
        place = f"{file.path}:{problem.lineno}"
        raise DataError(f"{place}: not JSON at column {problem.colno}: {describe(problem)}; {expected}") from problem
    except (ValueError, RecursionError) as problem:
        raise unusable(str(file.path), problem) from problem
    if content[end:].strip():
        raise DataError(f"{file.path}: has several objects that span several lines; {expected}")
    if not _is_row(value):
        raise DataError(f"{file.path}: is one object ({_keys_of(value)}); {expected}; {_object_fix(value)}")
    return 1, _checked(value, content, start, end, objects), len(content)


def _is_row(value: dict[str, Any]) -> bool:
    """Whether an object is a chat with what belongs to it, or has plain values only."""
    items = value.values()
    return any(map(is_chat, items)) or (bool(value) and not any(isinstance(item, list | dict) for item in items))


def _keys_of(value: dict[str, Any]) -> str:
    return ", ".join(f"{shown(key)}: {_described(item)}" for key, item in list(value.items())[:8])


def _object_fix(value: dict[str, Any]) -> str:
    lists = [key for key, item in value.items() if isinstance(item, list)]
    if lists:
        return f"save the list under {shown(lists[0])} to a separate file"
    if value and all(isinstance(item, dict) for item in value.values()):
        return 'save it by rows (in pandas, to_json with orient="records")'
    return "put it in [ ] if it is one row"


def _described(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else _NAMES.get(type(value), "null")


def describe(problem: json.JSONDecodeError) -> str:
    """A description of a JSON error that does not depend on the Python version."""
    return next((text for start, text in _MESSAGES.items() if problem.msg.startswith(start)), problem.msg)


def unusable(place: str, problem: Exception) -> DataError:
    """The error for valid JSON that Python cannot represent."""
    if isinstance(problem, RecursionError):
        return DataError(f"{place}: cannot be read: lists or objects are nested too deeply; fix or remove the row")
    most = sys.get_int_max_str_digits()
    return DataError(f"{place}: cannot be read: a number has more than {most} digits; write it as a string")


class Window:
    """A buffer over a text stream that keeps track of line numbers.

    Attributes:
        text: the buffer.
        at: current position in it.
        line: 1-based current line.
    """

    def __init__(self, file: TextIO, path: Path) -> None:
        self.text = ""
        self.at = 0
        self.line = 1
        self._file = file
        self._path = path
        self._counted = 0
        self._passed = 0  # characters before the buffer
        self._line_begins = 0  # in characters from the beginning of the file

    def next_char(self) -> str:
        """Skip white space, and return the next character; empty at the end."""
        while True:
            space = _SPACE.match(self.text, self.at)
            assert space is not None  # it also matches an empty string
            self.at = space.end()
            if self.at < len(self.text) or not self._grow():
                self._count()
                return self.text[self.at : self.at + 1]

    def step(self) -> None:
        """Advance by one character."""
        self.at += 1

    def value(self, decode: Callable[[str, int], tuple[Any, int]]) -> tuple[Any, int]:
        """Decode the next value and advance past it.

        The buffer doubles until the value fits, so the work is proportional to its length.

        Returns:
            The value, and its start in `text`.

        Raises:
            DataError: there is no JSON value, or Python cannot represent it.
        """
        while True:
            try:
                value, end = decode(self.text, self.at)
            except json.JSONDecodeError as problem:
                offset = problem.pos - self.at
                open_text = problem.msg.startswith("Unterminated string")
                if (open_text or problem.pos >= len(self.text) - _LONGEST_WORD) and self._grow():
                    continue
                if open_text or self.at + offset >= len(self.text):
                    raise self.wrong("the row that starts here does not end; the file may be truncated") from problem
                self.at += offset
                raise self.wrong(describe(problem)) from problem
            except (ValueError, RecursionError) as problem:
                self._count()
                raise unusable(f"{self._path}:{self.line}", problem) from problem
            start, self.at = self.at, end
            return value, start

    def wrong(self, text: str) -> DataError:
        """An error at the current position."""
        self._count()
        column = self._passed + self.at - self._line_begins + 1
        return DataError(f"{self._path}:{self.line}: not JSON at column {column}: {text}; fix the file there")

    def _count(self) -> None:
        lines = self.text.count("\n", self._counted, self.at)
        if lines:
            self.line += lines
            self._line_begins = self._passed + self.text.rindex("\n", self._counted, self.at) + 1
        self._counted = self.at

    def _grow(self) -> bool:
        """Discard the processed part and read more; False at the end of the file."""
        self._count()
        rest = self.text[self.at :]
        more = self._file.read(max(CHUNK_CHARACTERS, len(rest)))
        self._passed += self.at
        self.text, self.at, self._counted = rest + more, 0, 0
        return bool(more)
