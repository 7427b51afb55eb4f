"""Rows of token ids in one line, and the cut of those that are longer than the limit."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = NDArray[np.int32]
Flags: TypeAlias = NDArray[np.bool_]
Counts: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Encoded:
    """The rows of a batch in one line, before any cut.

    Attributes:
        flat: (tokens,), ids of all rows.
        trained: (tokens,), whether a token is trained.
        lengths: (rows,), tokens of each row.
        merged: (rows,), whether a token reaches over the edge between prompt and completion.
        whole: (rows,), whether the row ends where its text ends.
    """

    flat: Ids
    trained: Flags
    lengths: Counts
    merged: Flags
    whole: Flags


@dataclass(frozen=True)
class Cut:
    """Rows after the cut; `of` is the row of the batch that each was made from, `uncut` its tokens before."""

    flat: Ids
    trained: Flags
    lengths: Counts
    of: Counts
    uncut: Counts
    truncated: Flags
    ends: Flags


def cut_rows(encoded: Encoded, limit: int, *, split: bool) -> Cut:
    """Cut what is longer than the limit, or split it into rows of about equal length.

    Args:
        limit: largest number of tokens of a row.
        split: make several rows of a long one; nothing is lost then.
    """
    lengths = encoded.lengths
    if not split:
        long = lengths > limit
        inside = positions(lengths) < limit
        of = np.arange(len(lengths))
        short = np.minimum(lengths, limit)
        return Cut(encoded.flat[inside], encoded.trained[inside], short, of, lengths, long, encoded.whole)
    pieces = np.maximum(-(-lengths // limit), 1)
    of = np.repeat(np.arange(len(lengths)), pieces)
    number = positions(pieces)
    # Piece k of n holds the tokens from k * length // n to (k + 1) * length // n.
    sizes = (number + 1) * lengths[of] // pieces[of] - number * lengths[of] // pieces[of]
    last = number == pieces[of] - 1
    none = np.zeros(len(of), bool)
    return Cut(encoded.flat, encoded.trained, sizes, of, sizes, none, encoded.whole[of] & last)


def positions(lengths: Counts) -> Counts:
    """Position of each token in its row.

    >>> positions(np.array([2, 0, 3]))
    array([0, 1, 0, 1, 2])
    """
    starts = np.cumsum(lengths) - lengths
    found: Counts = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
    return found


def row_sums(flags: Flags, lengths: Counts) -> Counts:
    """Number of flags that are set in each row.

    >>> row_sums(np.array([True, False, True]), np.array([2, 0, 1]))
    array([1, 0, 1])
    """
    total = np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])
    ends = np.cumsum(lengths)
    found: Counts = total[ends] - total[ends - lengths]
    return found
