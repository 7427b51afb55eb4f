"""Token classification metrics: per word, and per entity as seqeval finds them.

Tags are BIO, BIOES, BILOU or IO tags, or plain names. With plain names and O, each run of equal tags is an entity;
without O (parts of speech) there are no entities.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peftcli.metrics.classification import ClassFigures, Figure, classification_scores
from peftcli.tasks.labels import OUTSIDE

_SPAN = re.compile(r"[BIESLU](-.+)?")
_SAME_END = {"L": "E", "U": "S"}

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class TagScores:
    """The metrics of a token classifier.

    Attributes:
        accuracy: share of words tagged correctly, including O.
        precision, recall, f1: micro-averaged over words, with O as the negative class.
        f1_average: the name of this average.
        entity_precision, entity_recall, entity_f1: whole entities; type, first and last word must match.
        token_entity_precision, token_entity_recall, token_entity_f1: whether a word is inside any entity.
        labels: the tags, in the order of the confusion matrix.
        confusion_matrix: (tags, tags), word counts by actual and predicted tag.
        per_class: per tag, over words.
        per_entity: per entity type, over whole entities.
        never_predicted: tags that occur in the labels but are never predicted.
    """

    accuracy: float
    precision: Figure
    recall: Figure
    f1: Figure
    f1_average: str
    entity_precision: Figure
    entity_recall: Figure
    entity_f1: Figure
    token_entity_precision: Figure
    token_entity_recall: Figure
    token_entity_f1: Figure
    labels: list[str]
    confusion_matrix: list[list[int]] | None
    per_class: list[ClassFigures]
    per_entity: list[ClassFigures]
    never_predicted: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The metrics as stored in `metrics.json`."""
        return asdict(self)


def tagging_scores(predicted: Rows, actual: Rows, labels: Sequence[str]) -> TagScores:
    """Compare the predicted tag of each word with the actual one.

    Args:
        predicted, actual: (rows, words), tag names; at least one word.
        labels: all tags, in the order of their ids.

    Raises:
        ValueError: there are no words, or a row has a different number of predictions than words.
    """
    if list(map(len, predicted)) != list(map(len, actual)):
        raise ValueError("a row has a different number of predictions than words")
    numbers = {label: number for number, label in enumerate(labels)}
    flat = [[numbers[tag] for row in rows for tag in row] for rows in (predicted, actual)]
    words = classification_scores(flat[0], flat[1], labels)
    matrix = words.confusion_matrix or []
    learned = [(one, matrix[number][number]) for number, one in enumerate(words.per_class) if one.label != OUTSIDE]
    by_word = _three(
        sum(right for _, right in learned),
        sum(one.predicted for one, _ in learned),
        sum(one.support for one, _ in learned),
    )
    has_outside = OUTSIDE in labels
    counts = _count_entities(predicted, actual, labels) if has_outside else {}
    whole = _three(*(sum(count[at] for count in counts.values()) for at in range(3)))
    inside = _within(flat[0], flat[1], numbers[OUTSIDE]) if has_outside else (None, None, None)
    return TagScores(
        words.accuracy,
        *by_word,
        "micro, without O" if has_outside else "micro",
        *whole,
        *inside,
        labels=list(labels),
        confusion_matrix=words.confusion_matrix,
        per_class=words.per_class,
        per_entity=[ClassFigures(kind, *_exact(*counts[kind])) for kind in sorted(counts)],
        never_predicted=words.never_predicted,
    )


def span_tags(rows: Rows, labels: Sequence[str]) -> list[list[str]]:
    """The tags in the notation that seqeval reads: BILOU as BIOES, and plain names as IO.

    >>> span_tags([["SRC", "O"]], ["SRC", "REL", "O"]), span_tags([["U-PER", "O"]], ["B-PER", "L-PER", "U-PER", "O"])
    ([['I-SRC', 'O']], [['S-PER', 'O']])
    """
    named = {label: label for label in labels}
    others = [label for label in labels if label != OUTSIDE]
    if not all(_SPAN.fullmatch(label) for label in others):
        named |= {label: f"I-{label}" for label in others}
    else:
        named |= {label: _SAME_END.get(label[0], label[0]) + label[1:] for label in others}
    return [[named[tag] for tag in row] for row in rows]


def entities_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Type, first and last word of each entity in one row of `span_tags`."""
    from seqeval.metrics.sequence_labeling import get_entities  # imports scikit-learn, and only this task needs it

    return [(str(kind), int(first), int(last)) for kind, first, last in get_entities(list(tags))]


def _count_entities(predicted: Rows, actual: Rows, labels: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """Per entity type: the number of correct, predicted and actual entities."""
    counts: dict[str, list[int]] = {}
    for guessed, given in zip(span_tags(predicted, labels), span_tags(actual, labels), strict=True):
        found, wanted = set(entities_of(guessed)), set(entities_of(given))
        for at, part in enumerate((found & wanted, found, wanted)):
            for kind, _, _ in part:
                counts.setdefault(kind, [0, 0, 0])[at] += 1
    return {kind: (right, found, wanted) for kind, (right, found, wanted) in counts.items()}


def _exact(right: int, predicted: int, support: int) -> tuple[Figure, Figure, Figure, int, int]:
    return (
        right / predicted if predicted else None,
        right / support if support else None,
        2 * right / (predicted + support) if predicted + support else None,
        support,
        predicted,
    )


def _three(right: int, predicted: int, support: int) -> tuple[Figure, Figure, Figure]:
    """Precision, recall and F1; 0 if there are only predictions or only labels, None if there are neither."""
    if not predicted + support:
        return None, None, None
    precision, recall, f1, _, _ = _exact(right, predicted, support)
    return precision or 0.0, recall or 0.0, f1


def _within(guessed: Sequence[int], given: Sequence[int], outside: int) -> tuple[Figure, Figure, Figure]:
    pairs = [(one != outside, other != outside) for one, other in zip(guessed, given, strict=True)]
    both = sum(one and other for one, other in pairs)
    return _three(both, sum(one for one, _ in pairs), sum(other for _, other in pairs))
