"""Classification metrics, as scikit-learn computes them.

Averages are over the classes that occur in the labels or in the predictions, which is scikit-learn's default. A class
that is never predicted is listed and counts as a precision of 0 in the averages; its own undefined metrics are None.
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
    """The metrics of one class.

    Attributes:
        precision: None if the class is never predicted.
        recall: None if no row has the class.
        f1: None if both precision and recall are None.
        support: number of rows with this label.
        predicted: number of rows for which the class is predicted.
    """

    label: str
    precision: Figure
    recall: Figure
    f1: Figure
    support: int
    predicted: int


@dataclass(frozen=True)
class ClassScores:
    """The metrics of a single-label or multi-label classifier.

    Attributes:
        accuracy: share of rows predicted correctly; multi-label: share of rows whose whole label set is correct.
        precision, recall, f1: with the average that `f1_average` names.
        f1_average: `binary` (for the class `positive_label`), `macro` or `micro`.
        averages: `precision_macro` and so on, by name; multi-label: `_samples` too.
        confusion_matrix: (classes, classes), counts by actual and predicted class; None for multi-label.
        never_predicted: classes that occur in the labels but are never predicted.
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
        """The metrics as stored in `metrics.json`, with the averages at the same level as the others."""
        values = asdict(self)
        return {**values.pop("averages"), **values}


def classification_scores(
    predicted: Sequence[int], actual: Sequence[int], labels: Sequence[str], *, positive_label: str | None = None
) -> ClassScores:
    """Compare the predicted class of each row with the actual one.

    Args:
        predicted, actual: (rows,), class ids; at least one row.
        labels: class names by id.
        positive_label: positive class of a binary problem, for precision, recall and F1; the last class if None.

    Raises:
        ValueError: there are no rows, the two differ in length, or `positive_label` is not a class.
    """
    from sklearn.metrics import confusion_matrix  # takes a second or two to import, and only these tasks need it

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
    """Compare the predicted label set of each row with the actual one.

    Args:
        predicted, actual: (rows,), the class ids of each row, in any order; a row may have none.
        labels: class names by id.

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
    """Multi-hot labels, (rows, classes)."""
    found = np.zeros((len(rows), classes), bool)
    for number, row in enumerate(rows):
        found[number, list(row)] = True
    return found


def _present(guessed: Flags, given: Flags) -> list[int]:
    """Ids of the classes that occur in the labels or in the predictions."""
    return np.flatnonzero((guessed | given).any(0)).tolist()


def _averages(given: Any, guessed: Any, present: list[int], kinds: Sequence[str]) -> dict[str, Figure]:
    from sklearn.metrics import precision_recall_fscore_support  # slow to import, see above

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
    """Precision, recall and F1 of the positive class; 0 if it is never predicted or never occurs, None if both."""
    if positive.f1 is None:
        return [None, None, None]
    return [positive.precision or 0.0, positive.recall or 0.0, positive.f1]


def _ratio(part: int, whole: int) -> Figure:
    return part / whole if whole else None
