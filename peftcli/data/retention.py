"""The text on which forgetting is measured, as windows of token ids."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from peftcli.data.encode import encode
from peftcli.data.readers.files import ENDINGS, PACKED, list_files
from peftcli.data.readers.open import open_source
from peftcli.data.rows import Dropped, Rows, listed
from peftcli.errors import DataError
from peftcli.recipe.schema import FilesSection

KEY = "evaluation.forgetting_text"
ENCODED_AT_ONCE = 64
"""Texts that go through the tokenizer together; more would be read in vain where few tokens are asked for."""


@dataclass
class RetentionText:
    """Windows of a text of the user's choice, without overlap.

    Attributes:
        name: of the file or folder; no folder of this machine.
        windows: ids of each window; every one but its first is predicted and counts.
        tokens: that count.
        dropped: rows that hold no text, by reason.
    """

    name: str
    windows: list[list[int]] = field(default_factory=list)
    tokens: int = 0
    dropped: Dropped = field(default_factory=Dropped)

    def table(self) -> pa.Table:
        """The windows as rows that are scored: `input_ids` and `labels`, which are the same."""
        return pa.table({"input_ids": self.windows, "labels": self.windows})

    def digest(self) -> str:
        """SHA-256 of the ids, which says whether two losses are of the same text."""
        return hashlib.sha256(repr(self.windows).encode()).hexdigest()

    def add(self, ids: list[int], length: int, most: int) -> None:
        """Cut a text into windows, as far as tokens are still wanted."""
        for start in range(0, len(ids), length):
            window = ids[start : start + min(length, most - self.tokens + 1)]
            if len(window) < 2 or self.tokens >= most:  # the first token of a window is predicted by nothing
                continue
            self.windows.append(window)
            self.tokens += len(window) - 1


def read_retention(path: Path, tokenizer: PreTrainedTokenizerBase, *, length: int, tokens: int) -> RetentionText:
    """Read the head of a text: documents as the tokenizer begins them, each cut into windows.

    Args:
        path: a file, a folder or a glob of texts, or of rows with a column `text`.
        length: tokens of a window at most.
        tokens: that count at most.

    Raises:
        DataError: the text cannot be read, or holds nothing that can be predicted.
    """
    source = open_source(_section(path), key=KEY)
    found = RetentionText(source.name)
    for texts, special in _documents(source.batches(), found.dropped):
        for ids in encode(texts, tokenizer, special=special):
            found.add(ids, length, tokens)
        if found.tokens >= tokens:
            break
    if not found.windows:
        raise DataError(f"{path}: no text that could be predicted; name another text in {KEY}")
    return found


def _section(path: Path) -> FilesSection:
    for file in list_files(path, frozenset(), None):
        name = file.name.lower()
        bare = next((name.removesuffix(packed) for packed in PACKED if name.endswith(packed)), name)
        if not bare.endswith(tuple(ENDINGS)):
            raise DataError(
                f"{file}: the ending is not known; {KEY} takes a text with the ending .txt, or rows with a column text "
                "such as .jsonl, .csv or .parquet"
            )
    return FilesSection(path=str(path))


def _documents(batches: Iterator[Rows], dropped: Dropped) -> Iterator[tuple[list[str], bool]]:
    """Texts to encode, and whether they begin a document; a text file comes in pieces, of which only the first does."""
    begins = True
    for rows in batches:
        dropped.add_unread(rows)
        texts = _texts(rows)
        dropped.add(rows, [(row, "without text") for row, text in enumerate(texts) if not _is_text(text)])
        if rows.ends is None:
            kept = [text for text in texts if _is_text(text)]
            yield from ((kept[at : at + ENCODED_AT_ONCE], True) for at in range(0, len(kept), ENCODED_AT_ONCE))
            continue
        for text, ends in zip(texts, rows.ends, strict=True):
            yield [text], begins
            begins = ends


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _texts(rows: Rows) -> list[str]:
    """The column of texts: `text`, or the only one that there is."""
    name = "text" if "text" in rows.columns else next(iter(rows.columns)) if len(rows.columns) == 1 else None
    if name is None:
        raise DataError(
            f"{rows.file}: its columns are {listed(rows.columns)}; {KEY} takes a text file, or rows with a column text"
        )
    return rows.columns[name]
