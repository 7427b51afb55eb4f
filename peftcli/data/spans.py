"""Spans of a row by what the trainer does with them; imports nothing heavy, so that every view may use it."""

from collections.abc import Sequence
from dataclasses import dataclass

PROMPT, TRAINED, DROPPED = "prompt", "trained", "dropped"
SHORTEST_CUT = 40
"""Characters that a part keeps at least, however many parts a row has."""


@dataclass(frozen=True)
class Part:
    """A stretch of a row.

    Attributes:
        kind: `prompt` (read, not trained), `trained`, or `dropped` (cut off, so neither).
        text: as the tokenizer writes it, special tokens by name.
    """

    kind: str
    text: str


def shorten(parts: Sequence[Part], limit: int = 600) -> list[Part]:
    """Cut the middle out of long parts until a row fits on a screen; each part keeps both of its ends.

    Args:
        parts: of one row.
        limit: characters that the row may take, what stands for the cuts aside.

    >>> shorten([Part("prompt", "a" * 300 + "z" * 700), Part("trained", "yes")], limit=83)
    [Part(kind='prompt', text='aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ... 920 characters ... \
zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz'), Part(kind='trained', text='yes')]
    """
    share = max(SHORTEST_CUT, _share([len(part.text) for part in parts], limit))
    return [Part(part.kind, _cut(part.text, share)) for part in parts]


def _share(lengths: list[int], limit: int) -> int:
    """Characters that each part may keep, so that short ones leave their room to long ones."""
    left, room = sorted(lengths), limit
    while left and left[0] <= room // len(left):
        room -= left.pop(0)
    return room // len(left) if left else limit


def _cut(text: str, length: int) -> str:
    gone = len(text) - length
    if gone <= SHORTEST_CUT:
        return text
    half = length // 2
    return f"{text[:half]} ... {len(text) - 2 * half:,} characters ... {text[len(text) - half :]}"
