"""The seeded split, and what the two sides have in common."""

import hashlib
import math
from collections.abc import Iterable

import numpy as np


def split_indices(rows: int, test_size: float | int, seed: int) -> tuple[list[int], list[int]]:
    """Draw the test rows; both sides keep the order of the source.

    Args:
        rows: number of rows to split.
        test_size: share in 0..1 (rounded up) or a number of rows.
        seed: of the draw; the same seed and number of rows give the same split.

    Returns:
        Indices of the train rows and of the test rows, each ascending.

    >>> train, test = split_indices(10, 0.25, seed=0)
    >>> len(train), len(test), sorted(train + test) == list(range(10))
    (7, 3, True)
    """
    wanted = math.ceil(rows * test_size) if isinstance(test_size, float) else test_size
    test = min(wanted, rows)
    drawn = np.random.default_rng(seed).permutation(rows)
    return sorted(drawn[test:].tolist()), sorted(drawn[:test].tolist())


def fingerprint(rows: Iterable[str]) -> str:
    """SHA-256 over the rows, in their order, independent of how they are stored."""
    digest = hashlib.sha256()
    for row in rows:
        data = row.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def count_leaked(train: Iterable[str], test: Iterable[str]) -> int:
    """Number of test rows whose text stands in the training set too, case and white space aside."""
    known = {_normal(row) for row in train}
    return sum(_normal(row) in known for row in test)


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())
