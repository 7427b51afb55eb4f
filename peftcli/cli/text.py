"""Text for people and JSON for scripts: control characters escaped, and lines wrapped to the width of a terminal.

Only a terminal gets wrapped lines. In a file, a pipe or a notebook each message stays on one line, so that `grep` finds
all of it; pagers, CI pages and notebooks wrap it themselves.
"""

import os
import unicodedata
from typing import TextIO

HANGING = 2
"""Additional indentation of the continuation lines of a wrapped line."""
USUAL_COLUMNS = 80
"""Width of a terminal that does not report one."""


def printable(text: str) -> str:
    """Text with control characters made visible, so that data cannot color or rewrite the terminal.

    >>> printable("a\\x1b[31mb")
    'a\\u241b[31mb'
    """
    return "".join(_visible(letter) for letter in text)


def _visible(letter: str) -> str:
    code = ord(letter)
    if letter == "\n" or code >= 0xA0 or 0x20 <= code < 0x7F:
        return "\ufffd" if 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069 or 0xD800 <= code < 0xE000 else letter
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"


def say(text: str, stream: TextIO) -> None:
    """Print text on its own lines, wrapped if the stream is a terminal."""
    stream.write(wrapped(printable(text), terminal_width(stream)) + "\n")
    stream.flush()


def terminal_width(stream: TextIO) -> int | None:
    """Columns of a terminal, or None if the stream is none; COLUMNS in the environment overrides it, as in rich."""
    if not stream.isatty():
        return None
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(stream.fileno()).columns or USUAL_COLUMNS
    except (OSError, ValueError):
        return USUAL_COLUMNS


def wrapped(text: str, width: int | None) -> str:
    """Lines of at most some columns, broken at spaces, with a hanging indent.

    A longer word, such as a path or a command, stays whole so that it can be copied.

    >>> print(wrapped("note: one two three", 13))
    note: one two
      three
    """
    if width is None:
        return text
    return "\n".join(piece for line in text.split("\n") for piece in _pieces(line, width))


def _pieces(line: str, width: int) -> list[str]:
    if cells(line) <= width:
        return [line]
    words = line.lstrip(" ").split(" ")
    indent = len(line) - len(line.lstrip(" "))
    hanging = indent + HANGING if indent + HANGING < width else 0
    found, current = [], " " * indent + words[0]
    for word in words[1:]:
        if cells(current) + 1 + cells(word) <= width:
            current += f" {word}"
        else:
            found.append(current.rstrip(" "))
            current = " " * hanging + word
    return [*found, current]


def cells(text: str) -> int:
    """Columns that a text takes on a terminal.

    >>> cells("ab"), cells("模型"), cells("e\\u0301")
    (2, 4, 1)
    """
    if text.isascii():
        return len(text)
    return sum(_cells(letter) for letter in text)


def _cells(letter: str) -> int:
    if unicodedata.combining(letter) or unicodedata.category(letter) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


class JsonOutput:
    """The one JSON object that a command with `--json` prints: its result or, if there is none, its error."""

    def __init__(self) -> None:
        self.is_written = False

    def write(self, text: str, stream: TextIO) -> None:
        """Print the object of the command."""
        stream.write(text + "\n")
        stream.flush()
        self.is_written = True


JSON_OUTPUT = JsonOutput()
"""Of this process, like its stdout."""
