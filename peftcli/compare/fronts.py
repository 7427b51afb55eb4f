"""Which variants are best at something, and which no other one beats at quality and at a cost together."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

COSTS = ("adapter_bytes", "peak_memory_bytes", "seconds", "retention_change")
"""Figures of a variant that quality is held against; lower is better."""
LOWER = (*COSTS, "loss", "trainable_parameters")
HIGHER = ("tokens_per_second", "merge_top1_agreement")


def front(rows: Sequence[Row], cost: str, better: str) -> list[str]:
    """Names of the finished variants on the Pareto front, from the cheapest on.

    A variant is on it unless another one is at least as good and at most as costly, and one of the two truly.

    Args:
        cost: a key of the rows.
        better: `higher` or `lower`, of the quality.
    """
    sign = 1.0 if better == "higher" else -1.0
    points = [
        (row["name"], row[cost], sign * row["quality"])
        for row in rows
        if _counts(row) and row[cost] is not None and row["quality"] is not None
    ]
    if len(points) < 2:
        return []
    kept = [one for one in points if not any(_beats(other, one) for other in points)]
    return [name for name, _, _ in sorted(kept, key=lambda one: one[1])]


def _beats(other: tuple[str, float, float], one: tuple[str, float, float]) -> bool:
    return other[1] <= one[1] and other[2] >= one[2] and other[1:] != one[1:]


def best_of(rows: Sequence[Row], better: str) -> dict[str, list[str]]:
    """Names of the finished variants with the best figure, by key; none where all are alike."""
    found = {}
    for key in ("quality", *LOWER, *HIGHER):
        values = {row["name"]: row[key] for row in rows if _counts(row) and row[key] is not None}
        if len(set(values.values())) < 2:
            continue
        highest = better == "higher" if key == "quality" else key in HIGHER
        best = (max if highest else min)(values.values())
        found[key] = [name for name, value in values.items() if value == best]
    return found


def _counts(row: Row) -> bool:
    return bool(row["status"] == "finished")
