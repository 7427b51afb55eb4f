"""The rows that are trained: token ids drawn for a regime of lengths, and the same rows as text."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

IGNORED = -100
"""Label of a token that is read, not learned."""
END = 2
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
"""The first ids of the vocabulary; every other id is a word `w` and its number."""
HELD_OUT_ROWS = 64
FREQUENT = 64
"""Words that most tokens are drawn from, so that there is something to learn."""


@dataclass(frozen=True)
class Regime:
    """How long rows are.

    Attributes:
        name: for `--regime`.
        median: tokens of a row.
        sigma: width of the log-normal, 0 for rows of one length.
        shortest, longest: what a drawn length is cut to, tokens.
        rows: of a micro-batch; a step has one.
        tail_every: each so many-th row is `TAIL` times as long, 0 for none.
    """

    name: str
    median: int
    sigma: float
    shortest: int
    longest: int
    rows: int = 8
    tail_every: int = 0

    def stretched(self, times: int) -> "Regime":
        """The same regime with longer rows; very short ones stay very short."""
        if self.name == "short":
            return self
        median, shortest, longest = (times * tokens for tokens in (self.median, self.shortest, self.longest))
        return replace(self, median=median, shortest=shortest, longest=longest)

    @property
    def max_length(self) -> int:
        """Tokens of the longest row that can be drawn."""
        return self.longest * (TAIL if self.tail_every else 1)


TAIL = 8
REGIMES = {
    regime.name: regime
    for regime in (
        Regime("skewed", 98, 0.72, 33, 418),
        Regime("uniform", 128, 0.0, 128, 128),
        Regime("long_tail", 98, 0.72, 33, 418, tail_every=100),
        Regime("short", 6, 0.3, 4, 12, rows=32),
    )
}
"""skewed: as chats are, median 98, nine of ten up to 248 tokens."""


@dataclass(frozen=True)
class Row:
    """One row as token ids; the answer ends on the end token and is what is learned."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def ids(self) -> list[int]:
        """All tokens."""
        return [*self.prompt, *self.answer]

    @property
    def labels(self) -> list[int]:
        """What is learned, the prompt left out."""
        return [IGNORED] * len(self.prompt) + list(self.answer)


def draw_rows(regime: Regime, count: int, vocabulary: int, seed: int) -> list[Row]:
    """Rows whose lengths follow a regime, the same for the same seed.

    Half of the tokens follow from the one before, so that a model can learn them.
    """
    drawn = random.Random(f"{regime.name}-{seed}")
    rows = []
    for number in range(count):
        tokens = round(regime.median * math.exp(regime.sigma * drawn.gauss(0, 1)))
        tokens = max(regime.shortest, min(tokens, regime.longest))
        # In the middle of each hundred, so that a short run meets one too.
        if regime.tail_every and number % regime.tail_every == regime.tail_every // 2:
            tokens *= TAIL
        words = _words(drawn, tokens - 1, vocabulary)
        split = max(1, min(round(tokens * drawn.uniform(0.2, 0.6)), tokens - 2))
        rows.append(Row(tuple(words[:split]), (*words[split:], END)))
    return rows


def _words(drawn: random.Random, count: int, vocabulary: int) -> list[int]:
    first, word, made = len(SPECIAL), 0, []
    for _ in range(count):
        if drawn.random() < 0.5:
            word = (word * 5 + 7) % min(FREQUENT, vocabulary - first)
        else:
            word = drawn.randrange(vocabulary - first if drawn.random() < 0.2 else min(FREQUENT, vocabulary - first))
        made.append(first + word)
    return made


def write_rows(rows: Sequence[Row], folder: Path, name: str) -> None:
    """Write the rows twice: `NAME.jsonl` as prompt and answer in words, `NAME-ids.jsonl` as ids and labels."""
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as texts:
        for row in rows:
            texts.write(json.dumps({"prompt": _text(row.prompt), "completion": " " + _text(row.answer[:-1])}) + "\n")
    with (folder / f"{name}-ids.jsonl").open("w", encoding="utf-8") as ids:
        for row in rows:
            ids.write(json.dumps({"input_ids": row.ids, "labels": row.labels}) + "\n")


def _text(ids: Sequence[int]) -> str:
    return " ".join(f"w{number - len(SPECIAL)}" for number in ids)


def attended(rows: Sequence[Row]) -> float:
    """Tokens that a token sees in the mean: half of its own row."""
    lengths = [len(row.ids) for row in rows]
    return sum(length * length for length in lengths) / sum(lengths) / 2
