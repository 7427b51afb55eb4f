"""Predicted and actual classes of texts to figures, as scikit-learn computes them.

Averages are over the classes that stand in the rows or in the predictions, as scikit-learn takes them by default. A
class that is never predicted counts with a precision of 0 in an average and is listed; a figure of its own that nothing
defines is None.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

AVERAGES = ("macro", "micro", "weighted")
Flags: TypeAlias = NDArray[np.bool_]
Figure: TypeAlias = float | None


@dataclass(frozen=True)
class ClassFigures:
    """How one class fares.

    Attributes:
        precision: None where it is never predicted.
        recall: None where no row has it.
        f1: None where neither is.
        support: rows that have it.
        predicted: rows that it is predicted for.
    """

    label: str
    precision: Figure
    recall: Figure
    f1: Figure
    support: int
    predicted: int


@dataclass(frozen=True)
class ClassScores:
    """The figures of a model that names the class of a text.

    Attributes:
        accuracy: share of rows whose class is right; of multi-label rows, whose whole set of classes is.
        precision, recall, f1: of the kind that `f1_average` names.
        f1_average: `binary` (of the class `positive_label`), `macro` or `micro`.
        averages: `precision_macro` and so on, by name; of multi-label rows also `_samples`.
        confusion_matrix: (classes, classes), rows by actual and predicted class; None for multi-label rows.
        never_predicted: classes that some row has and that no row is given.
    """

    accuracy: float
    precision: Figure
    recall: Figure
    f1: Figure
    f1_average: str
    positive_label: str | None
    averages: dict[str, Figure]
    labels: list[str]
    confusion_matrix: list[list[int]] | None
    per_class: list[ClassFigures]
    never_predicted: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The figures as `metrics.json` holds them, the averages beside the others."""
        values = asdict(self)
        return {**values.pop("averages"), **values}


def classification_scores(
    predicted: Sequence[int], actual: Sequence[int], labels: Sequence[str], *, positive_label: str | None = None
) -> ClassScores:
    """Compare one predicted class for each row with the actual one.

    Args:
        predicted, actual: (rows,), numbers of classes; at least one row.
        labels: names of the classes by number.
        positive_label: of two classes the one that precision, recall and F1 are of; the last when None.

    Raises:
        ValueError: there are no rows, the two differ in length, or there is no class of the name.
    """
    from sklearn.metrics import confusion_matrix  # a second or two, and only these tasks need it

    guessed, given = np.asarray(predicted, np.int64), np.asarray(actual, np.int64)
    _check(len(guessed), len(given))
    numbers = np.arange(len(labels))
    matrix = confusion_matrix(given, guessed, labels=numbers)
    averages = _averages(given, guessed, _present(guessed[:, None] == numbers, given[:, None] == numbers), AVERAGES)
    positive = None
    kind = "macro"
    if len(labels) == 2:
        kind, positive = "binary", labels[-1] if positive_label is None else positive_label
    classes = _per_class(matrix.diagonal(), matrix.sum(0), matrix.sum(1), labels)
    headline = [averages[f"{name}_macro"] for name in ("precision", "recall", "f1")]
    if positive is not None:
        headline = _binary(classes[_number_of(positive, labels)])
    return ClassScores(
        accuracy=float((guessed == given).mean()),
        precision=headline[0],
        recall=headline[1],
        f1=headline[2],
        f1_average=kind,
        positive_label=positive,
        averages=averages,
        labels=list(labels),
        confusion_matrix=matrix.tolist(),
        per_class=classes,
        never_predicted=[one.label for one in classes if one.support and not one.predicted],
    )


def multi_label_scores(
    predicted: Sequence[Sequence[int]], actual: Sequence[Sequence[int]], labels: Sequence[str]
) -> ClassScores:
    """Compare the predicted set of classes of each row with the actual one.

    Args:
        predicted, actual: (rows,), the numbers of the classes of each row, in any order; a row may have none.
        labels: names of the classes by number.

    Raises:
        ValueError: there are no rows, or the two differ in length.
    """
    _check(len(predicted), len(actual))
    guessed, given = _table(predicted, len(labels)), _table(actual, len(labels))
    averages = _averages(given, guessed, _present(guessed, given), (*AVERAGES, "samples"))
    classes = _per_class((guessed & given).sum(0), guessed.sum(0), given.sum(0), labels)
    return ClassScores(
        accuracy=float((guessed == given).all(1).mean()),
        precision=averages["precision_micro"],
        recall=averages["recall_micro"],
        f1=averages["f1_micro"],
        f1_average="micro",
        positive_label=None,
        averages=averages,
        labels=list(labels),
        confusion_matrix=None,
        per_class=classes,
        never_predicted=[one.label for one in classes if one.support and not one.predicted],
    )


def _check(predicted: int, actual: int) -> None:
    if predicted != actual or not predicted:
        raise ValueError(f"{predicted} predictions for {actual} rows; there must be one for each, and at least one")


def _number_of(positive: str, labels: Sequence[str]) -> int:
    if positive not in labels:
        raise ValueError(f"there is no class {positive}; the classes are {', '.join(labels)}")
    return list(labels).index(positive)


def _table(rows: Sequence[Sequence[int]], classes: int) -> Flags:
    """(rows, classes), whether a row has a class."""
    found = np.zeros((len(rows), classes), bool)
    for number, row in enumerate(rows):
        found[number, list(row)] = True
    return found


def _present(guessed: Flags, given: Flags) -> list[int]:
    """Numbers of the classes that some row has or is given."""
    return np.flatnonzero((guessed | given).any(0)).tolist()


def _averages(given: Any, guessed: Any, present: list[int], kinds: Sequence[str]) -> dict[str, Figure]:
    from sklearn.metrics import precision_recall_fscore_support  # as above

    found: dict[str, Figure] = {}
    for kind in kinds:
        figures: Sequence[Any] = [None, None, None]
        if present:
            figures = precision_recall_fscore_support(given, guessed, labels=present, average=kind, zero_division=0)
        for name, value in zip(("precision", "recall", "f1"), figures, strict=False):
            found[f"{name}_{kind}"] = None if value is None else float(value)
    return found


def _per_class(right: Any, predicted: Any, support: Any, labels: Sequence[str]) -> list[ClassFigures]:
    return [
        ClassFigures(
            label=label,
            precision=_ratio(hits, guesses),
            recall=_ratio(hits, rows),
            f1=_ratio(2 * hits, guesses + rows),
            support=rows,
            predicted=guesses,
        )
        for label, hits, guesses, rows in zip(labels, right.tolist(), predicted.tolist(), support.tolist(), strict=True)
    ]


def _binary(positive: ClassFigures) -> list[Figure]:
    """Precision, recall and F1 of the positive class; 0 where only the other side of it is missing."""
    if positive.f1 is None:
        return [None, None, None]
    return [positive.precision or 0.0, positive.recall or 0.0, positive.f1]


def _ratio(part: int, whole: int) -> Figure:
    return part / whole if whole else None
