"""The gate of equal loss: a tool that learns something else gets no speed."""

from collections.abc import Sequence
from dataclasses import dataclass

LARGEST_SHARE = 0.005
"""By which a loss may differ from the reference, of the reference; a smaller limit can be measured."""
SPREADS = 3
"""The limit is so many times the spread of the reference over several seeds, where that was measured."""


@dataclass(frozen=True)
class Gate:
    """How the losses of a tool stand to those of the reference.

    Attributes:
        held_out_share: difference of the held-out losses, of the reference; None where there is none.
        mean_share: mean difference of the losses of the steps, of the reference; None where the steps differ.
        largest: largest difference of the loss of a step, nats; None where the steps differ.
        limit: for both shares.
    """

    held_out_share: float | None
    mean_share: float | None
    largest: float | None
    limit: float

    @property
    def met(self) -> bool:
        """The losses are equal within the limit; those of the steps count where the steps are the same."""
        if self.held_out_share is None or not abs(self.held_out_share) <= self.limit:
            return False
        return self.mean_share is None or self.mean_share <= self.limit


def limit_of(held_out: Sequence[float]) -> float:
    """The limit, from held-out losses of the reference over several seeds; fewer than two leave the largest one.

    >>> limit_of([6.0, 6.006, 6.003])
    0.003
    """
    if len(held_out) < 2:
        return LARGEST_SHARE
    spread = (max(held_out) - min(held_out)) / min(held_out)
    return round(min(LARGEST_SHARE, SPREADS * spread), 9)


def judge_losses(
    losses: Sequence[float],
    held_out: float | None,
    reference: Sequence[float],
    reference_held_out: float | None,
    limit: float,
) -> Gate:
    """Hold the losses of a tool against those of the reference."""
    share = None
    if held_out is not None and reference_held_out is not None:
        share = (held_out - reference_held_out) / reference_held_out
    if len(losses) != len(reference) or not reference:
        return Gate(share, None, None, limit)
    apart = [abs(one - other) for one, other in zip(losses, reference, strict=True)]
    return Gate(share, sum(apart) / sum(reference), max(apart), limit)
