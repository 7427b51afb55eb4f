"""Metrics of a language model: perplexity, exact match and chrF."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Metrics:
    """The metrics of one model on the test split; None if not measured.

    Attributes:
        loss: nats per trained token, averaged over the tokens of all rows.
        perplexity: exp(loss).
        token_accuracy: share of trained tokens that are the model's first choice.
        exact_match: share of answers equal to the reference, ignoring leading and trailing white space.
        chrf: character n-gram F-score of the answers, 0 to 100 (Popovic 2015, W15-3049, as sacrebleu computes it).
        unfinished_answers: share of answers that reached the length limit without an end token.
    """

    loss: float | None
    perplexity: float | None
    token_accuracy: float | None
    exact_match: float | None = None
    chrf: float | None = None
    unfinished_answers: float | None = None


def perplexity(loss: float) -> float | None:
    """exp(loss), or None if it overflows a float.

    >>> perplexity(0.0)
    1.0
    >>> perplexity(1e6) is None
    True
    """
    return math.exp(loss) if loss < 700 else None


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers equal to their reference, ignoring leading and trailing white space.

    >>> exact_match([" frozen", "dairy"], ["frozen", "dairy eggs"])
    0.5
    """
    pairs = zip(answers, references, strict=True)
    return sum(answer.strip() == reference.strip() for answer, reference in pairs) / len(answers)


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF of the answers, 0 to 100.

    >>> chrf(["the cat"], ["the cat"])
    100.0
    """
    from sacrebleu.metrics.chrf import CHRF  # imports lxml, which is only needed once there are answers

    return float(CHRF().corpus_score(list(answers), [list(references)]).score)
