"""What an adapter of any method keeps for the backward pass, as a polynomial of its layer's widths."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fitted:
    """Bytes that the adapter of one linear layer keeps beside its input and its own weights.

    Most methods other than LoRA build a matrix of the size of the weight in each forward pass, or turn the input block
    by block, so that LoRA's tensors say little of them.

    Attributes:
        reads_input: the layer's own input is kept as well, which other layers may share.
        coefficients: of the terms of `terms`.
    """

    reads_input: bool
    coefficients: tuple[float, ...]

    def token_bytes(self, inputs: int, outputs: int) -> float:
        """Bytes for each token."""
        return self._sum(terms(1, inputs, outputs)[:OF_TOKENS], self.coefficients[:OF_TOKENS])

    def layer_bytes(self, inputs: int, outputs: int) -> float:
        """Bytes for the layer, however many tokens there are."""
        return self._sum(terms(1, inputs, outputs)[OF_TOKENS:], self.coefficients[OF_TOKENS:])

    @staticmethod
    def _sum(values: Sequence[float], factors: Sequence[float]) -> float:
        return max(0.0, sum(value * factor for value, factor in zip(values, factors, strict=True)))


OF_TOKENS = 4
"""Terms that grow with the tokens; they stand first."""


def terms(tokens: int, inputs: int, outputs: int) -> tuple[float, ...]:
    """What the bytes of an adapter are made of.

    >>> terms(2, 3, 5)
    (6, 10, 6, 2, 15, 9, 25, 9, 3, 5, 3, 1)
    """
    less = min(inputs, outputs)
    of_tokens = (tokens * inputs, tokens * outputs, tokens * less, tokens)
    return (*of_tokens, inputs * outputs, inputs**2, outputs**2, less**2, inputs, outputs, less, 1)
