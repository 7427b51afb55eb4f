"""Finds equal and nearly equal rows by short fingerprints that are stored with each row (MinHash)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

SHINGLE_BYTES = 8
"""Length of the pieces of text that two rows have in common or not."""
COMPARED_BYTES = 4096
"""Of each row, so that long ones cost no more than they tell."""
BANDS, BAND_ROWS = 6, 4
"""A pair that shares 80 % of its pieces meets in one of 6 bands of 4 hashes with a chance of 96 %, one that shares
50 % of them with 32 %."""
SIMILAR = 0.8
"""Share of the pieces (Jaccard index, estimated) from which on two rows are nearly equal."""

HASHES = BANDS * BAND_ROWS
"""Entries of a signature."""
_ODD = np.random.default_rng(20_240_229).integers(1, 2**63, size=HASHES, dtype=np.uint64) | np.uint64(1)


def normalize(text: str) -> str:
    """Text without what two rows may differ in and still be equal: case and white space.

    >>> normalize("  The  Cat\\n")
    'the cat'
    """
    return " ".join(text.casefold().split())


def digest(text: str) -> int:
    """64 bits of a text."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """MinHash signatures over pieces of 8 bytes; equal entries of two rows estimate their Jaccard index.

    Args:
        texts: n plain texts.

    Returns:
        (n, 24), uint32.

    Source: Broder 1997, "On the resemblance and containment of documents".
    """
    rows = [text.encode("utf-8", "replace")[:COMPARED_BYTES].ljust(SHINGLE_BYTES) for text in texts]
    if not rows:
        return np.zeros((0, HASHES), np.uint32)
    data = np.frombuffer(b"".join(rows), np.uint8).astype(np.uint64)
    count = len(data) - SHINGLE_BYTES + 1
    pieces = np.zeros(count, np.uint64)
    for offset in range(SHINGLE_BYTES):
        pieces |= data[offset : offset + count] << np.uint64(8 * offset)
    pieces ^= pieces >> np.uint64(31)
    ends = np.cumsum([len(row) for row in rows])
    starts = ends - [len(row) for row in rows]
    # Pieces that reach over the end of a row belong to no row: reduce over [start, end - 7) and leave the rest out.
    edges = np.stack([starts, np.minimum(ends - SHINGLE_BYTES + 1, count)], 1).ravel()
    found = np.empty((len(rows), HASHES), np.uint32)
    padded = np.append(pieces, np.uint64(0))
    for number, factor in enumerate(_ODD):
        mixed = (padded * factor) >> np.uint64(32)
        found[:, number] = np.minimum.reduceat(mixed, edges)[::2].astype(np.uint32)
    return found


def first_occurrence(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each row the first row of equal hash, itself where it is the first.

    >>> first_occurrence(np.array([7, 5, 7, 7], np.uint64))
    array([0, 1, 0, 0])
    """
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    found: NDArray[np.int64] = first[inverse]
    return found


def match_exact(left: NDArray[np.uint64], right: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each hash of the left the first place of it on the right, or -1.

    >>> match_exact(np.array([3, 9], np.uint64), np.array([9, 9, 4], np.uint64))
    array([-1,  0])
    """
    if not len(right):
        return np.full(len(left), -1, np.int64)
    values, first = np.unique(right, return_index=True)
    place = np.minimum(np.searchsorted(values, left), len(values) - 1)
    found: NDArray[np.int64] = np.where(values[place] == left, first[place], -1)
    return found


class Signatures(Protocol):
    """Signatures of rows, wherever they are kept."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def band(self, number: int) -> NDArray[np.uint64]:
        """(rows,), one hash of the entries of a band."""
        ...

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
        """(n, 24), the signatures of some rows."""
        ...


@dataclass(frozen=True)
class Matrix:
    """Signatures in memory: (rows, 24), uint32."""

    entries: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.entries)

    def band(self, number: int) -> NDArray[np.uint64]:
        """(rows,), one hash of the entries of a band."""
        return band_of(self.entries, number)

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
        """(n, 24), the signatures of some rows."""
        return self.entries[rows]


def match_near_duplicates(left: Signatures, right: Signatures | None) -> NDArray[np.int64]:
    """For each row of the left a row that is nearly equal, or -1.

    One band is looked at after the other, so that memory holds 8 bytes of a row at once and not its signature.

    Args:
        right: to look among; None to look among the earlier rows of the left.

    Returns:
        (n,), row of the right (of the left where right is None).
    """
    found = np.full(len(left), -1, np.int64)
    for number in range(BANDS):
        mine = left.band(number)
        if right is None:
            other = first_occurrence(mine)
            other[other == np.arange(len(mine))] = -1
        else:
            other = match_exact(mine, right.band(number))
        rows = np.flatnonzero((other >= 0) & (found < 0))
        for start in range(0, len(rows), 65536):
            part = rows[start : start + 65536]
            pairs = (left if right is None else right).take(other[part])
            alike = (left.take(part) == pairs).mean(axis=1) >= SIMILAR
            found[part[alike]] = other[part[alike]]
    return found


def band_of(entries: NDArray[np.uint32], number: int) -> NDArray[np.uint64]:
    """(rows,), one hash of the entries of a band of some signatures (rows, 24)."""
    return _band(entries[:, number * BAND_ROWS : (number + 1) * BAND_ROWS])


def _band(columns: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """One hash of the entries of a band."""
    mixed = np.zeros(len(columns), np.uint64)
    for number in range(columns.shape[1]):
        mixed = (mixed ^ columns[:, number].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed
