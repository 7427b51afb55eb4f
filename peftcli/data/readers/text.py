"""Plain text files, one document each, and CoNLL files with one token per line."""

import re
from collections.abc import Iterator
from typing import Any

from peftcli.data.readers.batches import Item, UnreadableRow, gather
from peftcli.data.readers.files import DataFile
from peftcli.data.readers.text_stream import open_text
from peftcli.data.rows import Rows
from peftcli.errors import DataError

PIECE_CHARACTERS = 64 * 1024
"""Maximum length of a piece of text that becomes one row."""
BATCH_PIECES = 32

_JSON = re.compile(r'\s*(\[\s*)?\{\s*"[^"]{1,60}"\s*:')
"""The beginning of a list of objects, or of an object."""
_LAST_GAP = re.compile(r"\s\S*\Z")


def read_text(file: DataFile) -> Iterator[Rows]:
    """The text of a file in pieces whose concatenation is the text; all line ends become line feeds."""
    numbers: list[int] = []
    texts: list[str] = []
    for number, piece in _pieces(file):
        if number == 1 and file.section.file_format is None and (match := _JSON.match(piece)):
            kind = "json" if match[1] else "jsonl"
            raise DataError(
                f"{file.path}: has rows in JSON, which would be trained as one text; set {file.key}.file_format: "
                f"{kind}, or {file.key}.file_format: text to train on it as it is"
            )
        # Hold one piece back, because only the next one shows that it is not the last.
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
    """The end of a piece: after its last complete line, or before the last word of a single long line."""
    line = text.rfind("\n") + 1
    if line:
        return line
    gap = _LAST_GAP.search(text, len(text) - 1000)
    return gap.start() + 1 if gap else len(text)


def read_conll(file: DataFile) -> Iterator[Rows]:
    """The sentences of a file with a token, a tag, and optional fields between them on each line."""
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
            wanted = f"the first line has {width}" if width else "a line needs a token and a tag"
            return number, UnreadableRow(f"with {_count(len(fields), 'field')} on a line, but {wanted}"), 0
        if not (fields[0].strip() and fields[-1].strip()):
            return number, UnreadableRow("with a line without a token or a tag"), 0
    tokens = [fields[0] for _, fields in lines]
    return lines[0][0], (tokens, [fields[-1] for _, fields in lines]), sum(map(len, tokens))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
