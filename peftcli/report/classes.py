"""What the report says of classes and tags one by one: which are taken for which, and how each fares."""

from typing import Any

from peftcli.report.blocks import Block, Cell, Folded, Notices, Section, Table, table
from peftcli.report.format import count, score, several, share
from peftcli.report.stages import Stages, figure, find, objects, text

PREFERRED_MODELS = ("adapter", "merged", "base")
"""The model whose classes are shown: the first that was measured."""
MOST_CLASSES = 12
"""A matrix of more classes is no longer read; their most frequent mistakes are."""
MOST_MISTAKES = 15
MOST_ROWS = 60
AVERAGES = ("macro", "micro", "weighted", "samples")
MEANING = {
    "macro": "each class weighs the same",
    "micro": "each row weighs the same",
    "weighted": "each class weighs as many rows as it has",
    "samples": "the mean over the rows",
}


def classes_section(stages: Stages) -> Section | None:
    """The confusion matrix and the figures of each class; None where the model gives no classes."""
    side = next((name for name in PREFERRED_MODELS if objects(stages.metrics, name, "per_class")), None)
    if side is None:
        return None
    found = find(stages.metrics, side)
    of_words = stages.metrics.get("task") == "token-classification"
    unit = "Words" if of_words else "Rows"
    classes = _class_table("Tag" if of_words else "Class", unit, objects(found, "per_class"))
    blocks: list[Block | None] = [
        _never(found),
        _class_table("Entity", "Entities", objects(found, "per_entity")),
        _matrix(found, unit.lower()),
        classes if not of_words or classes is None else Folded("Figures of each tag", classes),
        _averages(found),
    ]
    return Section("classes", "Classes", tuple(block for block in blocks if block is not None), _lead(found, side))


def f1_kind(found: Any) -> str:
    """What precision, recall and F1 of a model are of, as a sentence; empty where nothing says it."""
    kind, positive = find(found, "f1_average"), find(found, "positive_label")
    if kind is None:
        return ""
    if positive is not None:
        return f"Precision, recall and F1 are those of the class {positive}."
    return f"Precision, recall and F1 are {kind} averages."


def _lead(found: Any, side: str) -> str:
    parts = [f"Held-out rows, labelled by the {side if side == 'adapter' else side + ' model'}."]
    return " ".join([*parts, *filter(None, [f1_kind(found)])])


def _never(found: Any) -> Notices | None:
    names = find(found, "never_predicted") or []
    if not names:
        return None
    shown = ", ".join(str(name) for name in names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return Notices((f"Never predicted, though held-out rows have it: {shown}.",))


def _class_table(title: str, unit: str, classes: list[dict[str, Any]]) -> Table | None:
    if not classes:
        return None
    ordered = sorted(classes, key=lambda one: -(figure(one, "support") or 0))
    rows: list[tuple[Cell | str, ...]] = [
        (
            text(one, "label"),
            *(score(figure(one, key)) for key in ("precision", "recall")),
            _scored(figure(one, "f1")),
            count(figure(one, "support")),
            count(figure(one, "predicted")),
        )
        for one in ordered[:MOST_ROWS]
    ]
    more = len(ordered) - len(rows)
    note = f"{several(more, 'class', 'classes')} with fewer not shown." if more > 0 else ""
    columns = (title, "Precision ↑", "Recall ↑", "F1 ↑", unit, "Predicted")
    return table(columns, rows, numeric=range(1, 6), note=note)


def _scored(value: float | None) -> Cell:
    return Cell(score(value), "quiet" if value is None else "", shade=value)


def _matrix(found: Any, unit: str) -> Table | None:
    """Actual against predicted classes; of many classes the most frequent mistakes."""
    matrix, labels = find(found, "confusion_matrix"), [str(name) for name in find(found, "labels") or []]
    if not _is_square(matrix, len(labels)):
        return None
    if len(labels) > MOST_CLASSES:
        return _mistakes(matrix, labels, unit)
    rows: list[tuple[Cell | str, ...]] = []
    for label, line in zip(labels, matrix, strict=True):
        whole = sum(line)
        cells = [Cell(_with_share(part, whole), shade=part / whole if whole else 0.0) for part in line]
        rows.append((label, *cells))
    note = f"Held-out {unit} by actual class (line) and predicted class (column), with the share of the line."
    return table(("Actual ↓ predicted →", *labels), rows, numeric=range(1, len(labels) + 1), note=note)


def _is_square(matrix: Any, size: int) -> bool:
    if not isinstance(matrix, list) or len(matrix) != size or not size:
        return False
    lines = [line for line in matrix if isinstance(line, list) and len(line) == size]
    return len(lines) == size and all(isinstance(part, int) and part >= 0 for line in lines for part in line)


def _with_share(part: int, whole: int) -> str:
    return f"{count(part)} · {share(part, whole)}" if part else "0"


def _mistakes(matrix: list[list[int]], labels: list[str], unit: str) -> Table | None:
    wrong = [
        (part, actual, predicted)
        for actual, line in enumerate(matrix)
        for predicted, part in enumerate(line)
        if part and actual != predicted
    ]
    wrong.sort(key=lambda one: (-one[0], one[1], one[2]))
    rows = [
        (labels[actual], labels[predicted], count(part), Cell(share(part, sum(matrix[actual])), bar=part / wrong[0][0]))
        for part, actual, predicted in wrong[:MOST_MISTAKES]
    ]
    if not rows:
        return None
    more = len(wrong) - len(rows)
    note = "The most frequent mistakes" + (f"; {count(more)} other pairs of classes not shown." if more else ".")
    return table(("Actual", "Taken for", unit.capitalize(), "Share of the actual"), rows, numeric=(2,), note=note)


def _averages(found: Any) -> Folded | None:
    rows = [
        (
            f"{kind} ({MEANING[kind]})",
            *(score(figure(found, f"{name}_{kind}")) for name in ("precision", "recall", "f1")),
        )
        for kind in AVERAGES
        if any(figure(found, f"{name}_{kind}") is not None for name in ("precision", "recall", "f1"))
    ]
    if not rows:
        return None
    made = table(("Average", "Precision", "Recall", "F1"), rows, numeric=(1, 2, 3))
    return Folded("Other averages over the classes", made)
