"""Plain text, one document per file, and CoNLL files with one token per line."""

import re
from collections.abc import Iterator
from typing import Any

from peftcli.data.readers.batches import Item, UnreadableRow, gather
from peftcli.data.readers.files import DataFile
from peftcli.data.readers.text_stream import open_text
from peftcli.data.rows import Rows

PIECE_CHARACTERS = 64 * 1024
"""Longest piece of a text that is one row."""
BATCH_PIECES = 32

_LAST_GAP = re.compile(r"\s\S*\Z")


def read_text(file: DataFile) -> Iterator[Rows]:
    """The text of a file in pieces that give it back when joined; every kind of line end becomes a line feed."""
    numbers: list[int] = []
    texts: list[str] = []
    for number, piece in _pieces(file):
        # One piece stays here: only when another follows is it known not to be the last.
        if len(texts) > BATCH_PIECES:
            yield Rows(file.name, numbers[:-1], {"text": texts[:-1]}, ends=[False] * (len(texts) - 1))
            numbers, texts = numbers[-1:], texts[-1:]
        numbers.append(number)
        texts.append(piece)
    yield Rows(file.name, numbers, {"text": texts}, ends=[False] * (len(texts) - 1) + [True])


def _pieces(file: DataFile) -> Iterator[tuple[int, str]]:
    number, rest = 1, ""
    with open_text(file) as text:
        while more := text.read(PIECE_CHARACTERS - len(rest)):
            rest += more
            if len(rest) < PIECE_CHARACTERS:
                continue
            cut = _cut(rest)
            yield number, rest[:cut]
            number += rest.count("\n", 0, cut)
            rest = rest[cut:]
    if rest:
        yield number, rest


def _cut(text: str) -> int:
    """Where a piece ends: after its last line, or before its last word where it is one long line."""
    line = text.rfind("\n") + 1
    if line:
        return line
    gap = _LAST_GAP.search(text, len(text) - 1000)
    return gap.start() + 1 if gap else len(text)


def read_conll(file: DataFile) -> Iterator[Rows]:
    """The sentences of a file with a token, a tag and perhaps more between them on each line."""
    return gather(file.name, _sentences(file), _conll_columns)


def _conll_columns(rows: list[tuple[list[str], list[str]]]) -> dict[str, list[Any]]:
    return {"tokens": [tokens for tokens, _ in rows], "tags": [tags for _, tags in rows]}


def _sentences(file: DataFile) -> Iterator[Item[tuple[list[str], list[str]]]]:
    width = 0
    lines: list[tuple[int, list[str]]] = []
    with open_text(file) as text:
        for number, line in enumerate(text, start=1):
            fields = line.rstrip("\n").split("\t") if "\t" in line else line.split()
            if line.strip() and fields[0] != "-DOCSTART-":
                lines.append((number, fields))
                width = width or (len(fields) if len(fields) > 1 else 0)
            elif lines:
                yield _sentence(lines, width)
                lines = []
    if lines:
        yield _sentence(lines, width)


def _sentence(lines: list[tuple[int, list[str]]], width: int) -> Item[tuple[list[str], list[str]]]:
    for number, fields in lines:
        if len(fields) != width or width < 2:
            wanted = f"the file's first has {width}" if width else "a token and its tag are expected"
            return number, UnreadableRow(f"with {_count(len(fields), 'field')} on a line where {wanted}"), 0
        if not (fields[0].strip() and fields[-1].strip()):
            return number, UnreadableRow("with a line that lacks the token or its tag"), 0
    tokens = [fields[0] for _, fields in lines]
    return lines[0][0], (tokens, [fields[-1] for _, fields in lines]), sum(map(len, tokens))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
