"""Confidence interval of a counted share."""

import math


def wilson_interval(ratio: float, rows: int) -> tuple[float, float]:
    """Bounds of the 95 % interval of a share that was counted on independent rows.

    Args:
        ratio: the share counted, 0..1.
        rows: how many rows were counted, at least 1.

    Source: Wilson 1927, Journal of the American Statistical Association 22(158), 209-212.

    >>> [round(bound, 3) for bound in wilson_interval(0.5, 100)]
    [0.404, 0.596]
    """
    z = 1.959964
    centre = (ratio + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z * math.sqrt(ratio * (1 - ratio) / rows + z * z / (4 * rows * rows)) / (1 + z * z / rows)
    return max(0.0, centre - half), min(1.0, centre + half)
