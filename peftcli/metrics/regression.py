"""Regression metrics: errors, and correlations between predicted and actual numbers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class NumberScores:
    """The metrics of a regression model.

    Attributes:
        mse, mae: mean squared and mean absolute error, in the (squared) unit of the labels.
        pearson, spearman: correlation of the numbers and of their ranks, -1 to 1; None if either is constant.
        r2: explained share of the variance; negative if predicting the mean is better, None if labels are constant.
    """

    mse: float
    mae: float
    pearson: float | None
    spearman: float | None
    r2: float | None

    def as_dict(self) -> dict[str, Any]:
        """The metrics as stored in `metrics.json`."""
        return asdict(self)


def regression_scores(predicted: Sequence[float], actual: Sequence[float]) -> NumberScores:
    """Compare the predicted number of each row with the actual one.

    Args:
        predicted, actual: (rows,), finite; at least one row.

    Raises:
        ValueError: there are no rows, or the two differ in length.

    >>> regression_scores([1.0, 2.0, 3.0], [1.0, 2.0, 4.0]).as_dict()["mae"]
    0.3333333333333333
    """
    if len(predicted) != len(actual) or not len(actual):
        raise ValueError(f"{len(predicted)} predictions for {len(actual)} rows; one for each is needed")
    guessed, given = np.asarray(predicted, np.float64), np.asarray(actual, np.float64)
    errors = guessed - given
    squared = float((errors**2).mean())
    variance = float(given.var()) if np.ptp(given) else 0.0
    return NumberScores(
        mse=squared,
        mae=float(np.abs(errors).mean()),
        pearson=_correlation(guessed, given),
        spearman=_correlation(_ranks(guessed), _ranks(given)),
        r2=1 - squared / variance if variance else None,
    )


def _correlation(one: Floats, other: Floats) -> float | None:
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    one, other = one - one.mean(), other - other.mean()
    size = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum()) / size if size else None


def _ranks(values: Floats) -> Floats:
    """The rank of each value, starting at 1; ties get their mean rank.

    >>> _ranks(np.array([10.0, 30.0, 10.0]))
    array([1.5, 3. , 1.5])
    """
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[which]
    return ranks
