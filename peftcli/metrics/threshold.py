"""The threshold of multi-label classification with the best F1."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def best_threshold(probabilities: NDArray[Any], actual: NDArray[np.bool_]) -> tuple[float, float]:
    """The probability from which a label is predicted that gives the highest micro F1, and that F1.

    Thresholds lie halfway between two probabilities that occur; of equally good ones the nearest to 0.5 is taken.

    Args:
        probabilities: (rows, classes), 0..1.
        actual: (rows, classes), whether the row has the label.

    >>> best_threshold(np.array([[0.2, 0.4], [0.1, 0.3]]), np.array([[False, True], [False, True]]))
    (0.25, 1.0)
    """
    flat, labels = np.asarray(probabilities, np.float64).ravel(), np.asarray(actual, bool).ravel()
    values, inverse = np.unique(flat, return_inverse=True)
    hits, found = np.zeros(len(values)), np.zeros(len(values))
    np.add.at(hits, inverse, labels)
    np.add.at(found, inverse, 1)
    # At index i, all labels with at least the i-th probability are predicted.
    right, predicted = hits[::-1].cumsum()[::-1], found[::-1].cumsum()[::-1]
    scores = 2 * right / np.maximum(predicted + labels.sum(), 1)
    below = np.concatenate([[0.0], values[:-1]])
    thresholds = np.where((below < 0.5) & (values >= 0.5), 0.5, (below + values) / 2)
    best = np.flatnonzero(scores == scores.max())
    chosen = best[np.argmin(np.abs(thresholds[best] - 0.5))]
    return float(thresholds[chosen]), float(scores[chosen])
