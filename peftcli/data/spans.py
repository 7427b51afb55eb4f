"""Spans of a row by their role in training; imports nothing heavy."""

from collections.abc import Sequence
from dataclasses import dataclass

PROMPT, TRAINED, DROPPED = "prompt", "trained", "dropped"
SHORTEST_CUT = 40
"""Minimum length of a shortened part, characters."""


@dataclass(frozen=True)
class Part:
    """A part of a row.

    Attributes:
        kind: `prompt` (input only), `trained`, or `dropped` (truncated).
        text: decoded, including special tokens.
    """

    kind: str
    text: str


def shorten(parts: Sequence[Part], limit: int = 600) -> list[Part]:
    """Remove the middle of long parts so that a row fits on a screen.

    Args:
        parts: of one row.
        limit: maximum characters of the row, not counting the replacement text.

    >>> shorten([Part("prompt", "a" * 300 + "z" * 700), Part("trained", "yes")], limit=83)
    [Part(kind='prompt', text='aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ... 920 characters ... \
zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz'), Part(kind='trained', text='yes')]
    """
    share = max(SHORTEST_CUT, _share([len(part.text) for part in parts], limit))
    return [Part(part.kind, _cut(part.text, share)) for part in parts]


def _share(lengths: list[int], limit: int) -> int:
    """Maximum characters per part; what short parts do not use goes to the long ones."""
    left, budget = sorted(lengths), limit
    while left and left[0] <= budget // len(left):
        budget -= left.pop(0)
    return budget // len(left) if left else limit


def _cut(text: str, length: int) -> str:
    gone = len(text) - length
    if gone <= SHORTEST_CUT:
        return text
    half = length // 2
    return f"{text[:half]} ... {len(text) - 2 * half:,} characters ... {text[len(text) - half :]}"
