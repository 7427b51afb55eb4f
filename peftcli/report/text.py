"""Strings of strangers: what cannot be seen is made visible, so that text stays text wherever it is shown."""

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

# Joiners are part of how emoji and several scripts are written; any other format character only misleads.
JOINERS = "\u200c\u200d"
HOME = re.compile(r"(?:/home/|/Users/|[A-Za-z]:\\Users\\)[^/\\\s\"']+|/root(?=/)")


@dataclass(frozen=True)
class Piece:
    """A run of text, or a mark that stands for a character that cannot be seen; a `break` ends a line."""

    kind: Literal["text", "mark", "break"]
    text: str


def visible(text: str) -> str:
    """Replace every character that cannot be seen by a picture or a code point; line breaks become ⏎.

    The result can always be encoded, holds no control character and has no direction override.

    >>> visible("a\\x1b[31mb"), visible("x\\u202ey"), visible("two\\nlines")
    ('a␛[31mb', 'x‹U+202E›y', 'two⏎lines')
    """
    return "".join(_picture(character) or character for character in text.replace("\r\n", "\n"))


def pieces(text: str) -> list[Piece]:
    """Split a prompt or an answer into text and marks, with the spaces at both of its ends marked.

    >>> [piece.text for piece in pieces(" food\\n")]
    ['·', 'food', '⏎', '']
    """
    text = text.replace("\r\n", "\n")
    start = len(text) - len(text.lstrip(" "))
    end = len(text.rstrip(" "))
    found: list[Piece] = []
    plain = ""
    for index, character in enumerate(text):
        mark = "·" if character == " " and (index < start or index >= end) else _picture(character)
        if mark is None:
            plain += character
            continue
        if plain:
            found.append(Piece("text", plain))
            plain = ""
        found.append(Piece("mark", mark))
        if character == "\n":
            found.append(Piece("break", ""))
    return [*found, Piece("text", plain)] if plain else found


def clip(text: str, limit: int) -> str:
    """Cut a long text and say how much was cut.

    >>> clip("abcdef", 4)
    'abcd… (2 more characters)'
    """
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} more characters)"


def without_home(text: str) -> str:
    """Write the home folder of a path as `~`, since a report is passed on.

    >>> without_home("/home/ada/data/products.csv")
    '~/data/products.csv'
    """
    return HOME.sub("~", text)


def _picture(character: str) -> str | None:
    code = ord(character)
    if 0x20 <= code < 0x7F:
        return None
    if character == "\n":
        return "⏎"
    if character == "\t":
        return "⇥"
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\N{SYMBOL FOR DELETE}"
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in JOINERS
    return f"‹U+{code:04X}›" if hidden else None
