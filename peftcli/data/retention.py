"""The text for measuring forgetting, as windows of token ids."""

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
"""Texts per tokenizer batch; larger batches would be wasted if few tokens are needed."""


@dataclass
class RetentionText:
    """Non-overlapping windows of a text.

    Attributes:
        name: of the file or folder, without its path.
        windows: ids of each window; all but the first are predicted.
        tokens: number of predicted tokens.
        dropped: rows without text, by reason.
    """

    name: str
    windows: list[list[int]] = field(default_factory=list)
    tokens: int = 0
    dropped: Dropped = field(default_factory=Dropped)

    def table(self) -> pa.Table:
        """The windows as rows for the evaluation, with `input_ids` equal to `labels`."""
        return pa.table({"input_ids": self.windows, "labels": self.windows})

    def digest(self) -> str:
        """SHA-256 of the ids, which tells whether two losses are comparable."""
        return hashlib.sha256(repr(self.windows).encode()).hexdigest()

    def add(self, ids: list[int], length: int, most: int) -> None:
        """Cut a text into windows, until there are enough tokens."""
        for start in range(0, len(ids), length):
            window = ids[start : start + min(length, most - self.tokens + 1)]
            if len(window) < 2 or self.tokens >= most:  # the first token of a window is not predicted
                continue
            self.windows.append(window)
            self.tokens += len(window) - 1


def read_retention(path: Path, tokenizer: PreTrainedTokenizerBase, *, length: int, tokens: int) -> RetentionText:
    """Read the beginning of a text: documents with the tokenizer's start token, cut into windows.

    Args:
        path: a file, a folder or a glob of texts, or of rows with a column `text`.
        length: maximum tokens of a window.
        tokens: maximum number of predicted tokens.

    Raises:
        DataError: the text cannot be read, or has no tokens to predict.
    """
    source = open_source(_section(path), key=KEY)
    found = RetentionText(source.name)
    for texts, special in _documents(source.batches(), found.dropped):
        for ids in encode(texts, tokenizer, special=special):
            found.add(ids, length, tokens)
        if found.tokens >= tokens:
            break
    if not found.windows:
        raise DataError(f"{path}: no text to evaluate; set {KEY} to another text")
    return found


def _section(path: Path) -> FilesSection:
    for file in list_files(path, frozenset(), None):
        name = file.name.lower()
        bare = next((name.removesuffix(packed) for packed in PACKED if name.endswith(packed)), name)
        if not bare.endswith(tuple(ENDINGS)):
            raise DataError(
                f"{file}: unknown file extension; {KEY} needs a text file (.txt), or rows with a column text "
                "(such as .jsonl, .csv or .parquet)"
            )
    return FilesSection(path=str(path))


def _documents(batches: Iterator[Rows], dropped: Dropped) -> Iterator[tuple[list[str], bool]]:
    """Texts to encode, and whether they start a document; only the first piece of a text file does."""
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
    """The text column: `text`, or the only column."""
    name = "text" if "text" in rows.columns else next(iter(rows.columns)) if len(rows.columns) == 1 else None
    if name is None:
        raise DataError(
            f"{rows.file}: its columns are {listed(rows.columns)}; {KEY} needs a text file, or rows with a column text"
        )
    return rows.columns[name]
