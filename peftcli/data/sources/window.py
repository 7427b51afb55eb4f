"""The stretch of a JSON text that a decoder looks at, so that no list is ever held whole."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from peftcli.errors import DataError

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
