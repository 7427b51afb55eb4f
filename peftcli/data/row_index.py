"""The hashes that are stored with each row: of its text, its prompt and its split columns."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peftcli.data.dedup import digest, normalize, signatures
from peftcli.data.first_rows import no_split_column
from peftcli.data.formats import Examples
from peftcli.data.rows import Rows
from peftcli.data.tokenize import TokenizedBatch
from peftcli.recipe.schema import DatasetSection

Hashes = NDArray[np.uint64]


def row_hashes(rows: Rows, examples: Examples, batch: TokenizedBatch, dataset: DatasetSection) -> dict[str, Any]:
    """The columns of a store that are computed from the text and the columns of the rows.

    Args:
        rows: a batch of a source.
        examples: built from the batch.
        batch: the tokenized rows of the examples.
        dataset: of the recipe; its split may use columns.

    Returns:
        An array for each name, with one entry per row of `batch`.

    Raises:
        DataError: a column of the split is missing.
    """
    kept = np.array(examples.kept, np.int64)[batch.of]
    # Images are compared by their pixels, independent of the file.
    of_images = [examples.columns[name] for name in ("pixels", "label") if "pixels" in examples.columns]
    wholes = ["\x1f".join(parts) for parts in zip(*(of_images or examples.columns.values()), strict=True)]
    return {
        "number": np.array(rows.numbers, np.int64)[kept],
        "exact": _digests(wholes)[batch.of],
        "plain": _pieces(_digests(list(map(normalize, wholes))), batch),
        "prompt": _prompts(examples, batch),
        "class": _column(rows, dataset.split.stratify, "stratify")[kept],
        "group": _groups(rows, dataset)[kept],
    }


def signatures_of(examples: Examples, batch: TokenizedBatch) -> NDArray[np.uint32]:
    """(rows, 24), MinHash signatures; the pieces of one text get different ones."""
    found = signatures(list(map(normalize, examples.content)))[batch.of]
    changed: NDArray[np.uint32] = found + _piece_numbers(batch).astype(np.uint32)[:, None]
    return changed


def _groups(rows: Rows, dataset: DatasetSection) -> Hashes:
    """Hashes of the groups that must not be split: the group column, or the text of several pieces."""
    if dataset.split.group is None and dataset.too_long == "split" and rows.ends is None:
        return _digests([rows.place(row) for row in range(len(rows))])
    return _column(rows, dataset.split.group, "group")


def _prompts(examples: Examples, batch: TokenizedBatch) -> Hashes:
    """64-bit hashes of the prompts, or of the inputs of labels; zeros if there are none."""
    if "label" in examples.columns or "tags" in examples.columns:
        return _pieces(_digests(list(map(normalize, examples.content))), batch)
    prompts = examples.columns.get("prompt")
    return np.zeros(len(batch.of), np.uint64) if prompts is None else _digests(list(map(normalize, prompts)))[batch.of]


def _column(rows: Rows, name: str | None, key: str) -> Hashes:
    """64-bit hashes of the values of a column; zeros if the recipe names none."""
    if name is None:
        return np.zeros(len(rows), np.uint64)
    if name not in rows.columns:
        raise no_split_column(rows, key, name)
    return _digests([repr(value) for value in rows.columns[name]])


def _digests(texts: Sequence[str]) -> Hashes:
    return np.fromiter(map(digest, texts), np.uint64, len(texts))


def _pieces(hashes: Hashes, batch: TokenizedBatch) -> Hashes:
    """The hash of each row, changed for each further piece of a text, so that pieces do not count as duplicates."""
    return hashes[batch.of] + _piece_numbers(batch).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def _piece_numbers(batch: TokenizedBatch) -> NDArray[np.int64]:
    """0 for the first row of an example, 1 for the next, and so on."""
    return np.arange(len(batch.of)) - np.searchsorted(batch.of, batch.of, side="left")
