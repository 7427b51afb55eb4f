"""Finds duplicate and near-duplicate rows with hashes and MinHash signatures that are stored with each row."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

SHINGLE_BYTES = 8
"""Length of a shingle."""
COMPARED_BYTES = 4096
"""Maximum bytes of a row that are compared."""
BANDS, BAND_ROWS = 6, 4
"""With 6 bands of 4 hashes, a pair with a Jaccard index of 0.8 matches in a band with probability 96 %, one with 0.5
with 32 %."""
SIMILAR = 0.8
"""Minimum estimated Jaccard index of near duplicates."""

HASHES = BANDS * BAND_ROWS
"""Length of a signature."""
_ODD = np.random.default_rng(20_240_229).integers(1, 2**63, size=HASHES, dtype=np.uint64) | np.uint64(1)


def normalize(text: str) -> str:
    """Remove differences that do not count: case and white space.

    >>> normalize("  The  Cat\\n")
    'the cat'
    """
    return " ".join(text.casefold().split())


def digest(text: str) -> int:
    """64-bit hash of a text."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """MinHash signatures over shingles of 8 bytes; the share of equal entries estimates the Jaccard index of two rows.

    Args:
        texts: n normalized texts.

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
    # Shingles that cross the end of a row do not count: reduce over [start, end - 7) and ignore the rest.
    edges = np.stack([starts, np.minimum(ends - SHINGLE_BYTES + 1, count)], 1).ravel()
    found = np.empty((len(rows), HASHES), np.uint32)
    padded = np.append(pieces, np.uint64(0))
    for number, factor in enumerate(_ODD):
        mixed = (padded * factor) >> np.uint64(32)
        found[:, number] = np.minimum.reduceat(mixed, edges)[::2].astype(np.uint32)
    return found


def first_occurrence(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each row, the first row with the same hash, which may be the row itself.

    >>> first_occurrence(np.array([7, 5, 7, 7], np.uint64))
    array([0, 1, 0, 0])
    """
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    found: NDArray[np.int64] = first[inverse]
    return found


def match_exact(left: NDArray[np.uint64], right: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each hash on the left, the first index of the same hash on the right, or -1.

    >>> match_exact(np.array([3, 9], np.uint64), np.array([9, 9, 4], np.uint64))
    array([-1,  0])
    """
    if not len(right):
        return np.full(len(left), -1, np.int64)
    values, first = np.unique(right, return_index=True)
    index = np.minimum(np.searchsorted(values, left), len(values) - 1)
    found: NDArray[np.int64] = np.where(values[index] == left, first[index], -1)
    return found


class Signatures(Protocol):
    """Signatures of rows, in memory or on disk."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def band(self, number: int) -> NDArray[np.uint64]:
        """(rows,), a hash of one band of each signature."""
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
        """(rows,), a hash of one band of each signature."""
        return band_of(self.entries, number)

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
        """(n, 24), the signatures of some rows."""
        return self.entries[rows]


def match_near_duplicates(left: Signatures, right: Signatures | None) -> NDArray[np.int64]:
    """For each row on the left, a near duplicate, or -1.

    The bands are processed one by one, so that memory needs 8 bytes per row instead of the whole signature.

    Args:
        right: rows to search; None to search the earlier rows of the left.

    Returns:
        (n,), row indices of the right (of the left if right is None).
    """
    found = np.full(len(left), -1, np.int64)
    for number in range(BANDS):
        band = left.band(number)
        if right is None:
            other = first_occurrence(band)
            other[other == np.arange(len(band))] = -1
        else:
            other = match_exact(band, right.band(number))
        rows = np.flatnonzero((other >= 0) & (found < 0))
        for start in range(0, len(rows), 65536):
            part = rows[start : start + 65536]
            pairs = (left if right is None else right).take(other[part])
            alike = (left.take(part) == pairs).mean(axis=1) >= SIMILAR
            found[part[alike]] = other[part[alike]]
    return found


def band_of(entries: NDArray[np.uint32], number: int) -> NDArray[np.uint64]:
    """(rows,), a hash of one band of signatures (rows, 24)."""
    return _band(entries[:, number * BAND_ROWS : (number + 1) * BAND_ROWS])


def _band(columns: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """A hash of the entries of each row."""
    mixed = np.zeros(len(columns), np.uint64)
    for number in range(columns.shape[1]):
        mixed = (mixed ^ columns[:, number].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed
