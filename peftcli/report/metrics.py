"""The metrics of the report: name, direction and format of each, changes from the base, and scores by class."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from peftcli.metrics.interval import wilson_interval
from peftcli.report.blocks import Block, Cell, Collapsed, Notices, Section, Table, Tone, table
from peftcli.report.format import (
    DASH,
    MINUS,
    compact,
    count,
    percent,
    score,
    several,
    share,
    significant,
    text,
)
from peftcli.report.load import Stages
from peftcli.results import ClassFigures, MetricsJson, RetentionFigures, Scores
from peftcli.tasks.base import Task
from peftcli.tasks.registry import DEFAULT, TASKS, find_task

MODELS = ("base", "adapter", "merged")
ELSEWHERE = frozenset(
    [f"{name}_{kind}" for name in ("precision", "recall", "f1") for kind in ("macro", "micro", "weighted", "samples")]
    + ["token_entity_precision", "token_entity_recall"]
)
"""Metrics that are shown with the classes, or not at all."""
PRIMARY = ("exact_match", "entity_f1", "f1", "accuracy", "pearson", "loss")
COUNTED_ON_ANSWERS = ("exact_match", "chrf", "unfinished_answers")

PREFERRED_MODELS = ("adapter", "merged", "base")
"""The model whose classes are shown: the first one with results."""
MOST_CLASSES = 12
"""A larger confusion matrix is unreadable; its most frequent mistakes are shown instead."""
MOST_MISTAKES = 15
MOST_ROWS = 60
AVERAGES = ("macro", "micro", "weighted", "samples")
MEANING = {
    "macro": "equal weight per class",
    "micro": "equal weight per row",
    "weighted": "classes weighted by their rows",
    "samples": "mean over the rows",
}


@dataclass(frozen=True)
class Metric:
    """A metric of `metrics.json`; `better` is None if it has no direction."""

    key: str
    title: str
    write: Callable[[float | None], str]
    better: Literal["lower", "higher"] | None
    points: bool = False

    @property
    def heading(self) -> str:
        return self.title + {"lower": " ↓", "higher": " ↑", None: ""}[self.better]

    def change(self, before: float, after: float) -> str:
        """The signed difference in the metric's format; in points for percentages."""
        difference = after - before
        written = f"{abs(difference) * 100:.1f} points" if self.points else self.write(abs(difference))
        if self.write(before) == self.write(after):
            return "same"
        return f"{MINUS if difference < 0 else '+'}{written.replace('< ', '').replace('> ', '')}"

    def verdict(self, before: float, after: float) -> tuple[str, Tone]:
        """Whether `after` is better or worse, as a word and a tone."""
        if self.better is None or self.write(before) == self.write(after):
            return "", ""
        return ("better", "good") if (after < before) == (self.better == "lower") else ("worse", "bad")


METRICS = (
    Metric("loss", "Loss, nats per trained token", significant, "lower"),
    Metric("perplexity", "Perplexity", significant, "lower"),
    Metric("token_accuracy", "Token accuracy", score, "higher"),
    Metric("exact_match", "Exact match", score, "higher"),
    Metric("chrf", "chrF", significant, "higher"),
    Metric("unfinished_answers", "Answers that did not stop", percent, "lower", points=True),
    Metric("accuracy", "Accuracy", score, "higher"),
    Metric("precision", "Precision", score, "higher"),
    Metric("recall", "Recall", score, "higher"),
    Metric("f1", "F1", score, "higher"),
    Metric("f1_macro", "F1, macro", score, "higher"),
    Metric("f1_weighted", "F1, weighted", score, "higher"),
    Metric("entity_precision", "Entity precision", score, "higher"),
    Metric("entity_recall", "Entity recall", score, "higher"),
    Metric("entity_f1", "Entity F1", score, "higher"),
    Metric("token_entity_f1", "F1 of words, entity or not", score, "higher"),
    Metric("mse", "Mean squared error", significant, "lower"),
    Metric("mae", "Mean absolute error", significant, "lower"),
    Metric("pearson", "Pearson correlation", score, "higher"),
    Metric("spearman", "Spearman correlation", score, "higher"),
    Metric("r2", "R squared", score, "higher"),
)
FORGETTING = Metric("forgetting_loss", "Forgetting: loss on another text, nats per token", significant, "lower")
BY_KEY = {metric.key: metric for metric in METRICS}


def primary_metric(metrics: MetricsJson) -> Metric | None:
    """The metric of the verdict: the first one measured on base and adapter, otherwise on one of them."""
    for sides in (("base", "adapter"), ("adapter",), ("base",)):
        for key in PRIMARY:
            if all(metrics.of(side).figure(key) is not None for side in sides):
                return BY_KEY[key]
    return None


def rows_scored(stages: Stages, key: str) -> int | None:
    """Number of held-out rows of a metric: the generated answers, or all rows."""
    return (stages.eval.generated_rows if key in COUNTED_ON_ANSWERS else stages.eval.rows) or None


def task_of(stages: Stages) -> Task:
    """The task of a run; runs of earlier versions without it are language models."""
    return find_task(stages.metrics.task) or TASKS[DEFAULT]


def interval(stages: Stages, side: str) -> tuple[float, float] | None:
    """The 95 % interval of a model's exact match, if the number of answers is known."""
    ratio, rows = stages.metrics.of(side).figure("exact_match"), rows_scored(stages, "exact_match")
    return None if ratio is None or rows is None or not 0 <= ratio <= 1 else wilson_interval(ratio, rows)


def metric_table(stages: Stages) -> Table | None:
    """Base, adapter and merged model side by side; None if no metric was measured."""
    metrics = stages.metrics
    shown = [metric for metric in (*METRICS, *_unknown(metrics)) if _measured(metrics, metric.key)]
    task = task_of(stages)
    if not task.generates:
        shown = [replace(metric, title=task.loss_title) if metric.key == "loss" else metric for metric in shown]
    if not shown and not metrics.retention:
        return None
    rows: list[tuple[Cell | str, ...]] = []
    for metric in shown:
        figures = [metrics.of(side).figure(metric.key) for side in MODELS]
        rows.append((metric.heading, *map(metric.write, figures), _change(metric, *figures[:2])))
    rows += _retention_row(metrics.retention)
    columns = ("Metric", "Base", "Adapter", "Merged", "Change")
    made = table(columns, rows, numeric=(1, 2, 3, 4), note=_note(stages))
    return Table(made.columns, made.rows, made.numeric, strong=2, note=made.note)


def _note(stages: Stages) -> str:
    parts = ["↓ lower is better, ↑ higher is better; the change is from base to adapter."]
    rows, answered = rows_scored(stages, "loss"), rows_scored(stages, "exact_match")
    if rows is not None:
        drawn = ", drawn by the seed" if answered and answered < rows else ""
        answers = f", {answered:,} of them answered{drawn}" if answered else ""
        parts.append(f"Scored on {rows:,} held-out rows{answers}.")
    parts += filter(None, [f1_kind(stages.metrics.adapter or stages.metrics.of("base"))])
    bounds = [
        f"{side} {score(found[0])} to {score(found[1])}"
        for side in MODELS
        if (found := interval(stages, side)) is not None
    ]
    if bounds:
        parts.append(f"95 % interval of the exact match: {', '.join(bounds)}.")
    if retention := stages.metrics.retention:
        where = f"{count(retention.tokens)} tokens of {text(retention.path)}"
        parts.append(f"Forgetting is measured as the loss on {where}{_left_out(stages)}.")
    return " ".join(parts)


def _left_out(stages: Stages) -> str:
    dropped = stages.eval.retention.dropped if stages.eval.retention else {}
    parts = [f"{several(number or 0, 'row', 'rows')} {reason}" for reason, number in dropped.items()]
    return f" (excluded: {', '.join(parts)})" if parts else ""


def _retention_row(found: RetentionFigures | None) -> list[tuple[Cell | str, ...]]:
    """The row of the loss on the forgetting text; none if it was not measured."""
    if not found:
        return []
    losses = found.base_loss, found.adapter_loss
    return [(FORGETTING.heading, *map(FORGETTING.write, losses), DASH, _change(FORGETTING, *losses))]


def _change(metric: Metric, base: float | None, adapter: float | None) -> Cell:
    if base is None or adapter is None:
        return Cell(DASH, "quiet")
    word, tone = metric.verdict(base, adapter)
    return Cell(f"{metric.change(base, adapter)} {word}".strip(), tone)


def _measured(metrics: MetricsJson, key: str) -> bool:
    """Whether to show a metric; a known one is shown even if null, as a dash."""
    sides = [metrics.of(name) for name in MODELS]
    named = any(key in side.figures for side in sides)
    return named and (key in BY_KEY or any(side.figure(key) is not None for side in sides))


def _unknown(metrics: MetricsJson) -> list[Metric]:
    """Metrics unknown to this version: shown under their key, without a direction."""
    known = BY_KEY.keys() | ELSEWHERE
    sides = [metrics.of(name) for name in MODELS]
    keys = {key for side in sides for key in side.figures if key not in known and side.figure(key) is not None}
    return [Metric(key, key, compact, None) for key in sorted(keys)]


def classes_section(stages: Stages) -> Section | None:
    """The confusion matrix and the scores of each class; None without classes."""
    side = next((name for name in PREFERRED_MODELS if stages.metrics.of(name).per_class), None)
    if side is None:
        return None
    found = stages.metrics.of(side)
    of_words = task_of(stages).label_of == "token"
    unit = "Words" if of_words else "Rows"
    classes = _class_table("Tag" if of_words else "Class", unit, found.per_class)
    blocks: list[Block | None] = [
        _never(found),
        _class_table("Entity", "Entities", found.per_entity),
        _matrix(found, unit.lower()),
        classes if not of_words or classes is None else Collapsed("Scores of each tag", classes),
        _averages(found),
    ]
    return Section("classes", "Classes", tuple(block for block in blocks if block is not None), _lead(found, side))


def f1_kind(found: Scores) -> str:
    """What precision, recall and F1 refer to, as a sentence; empty if unknown."""
    if found.f1_average is None:
        return ""
    if found.positive_label is not None:
        return f"Precision, recall and F1 are for the class {found.positive_label}."
    return f"Precision, recall and F1 are {found.f1_average} averages."


def _lead(found: Scores, side: str) -> str:
    parts = [f"Held-out rows, labeled by the {side if side == 'adapter' else side + ' model'}."]
    return " ".join([*parts, *filter(None, [f1_kind(found)])])


def _never(found: Scores) -> Notices | None:
    names = found.never_predicted
    if not names:
        return None
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return Notices((f"Never predicted, although present in held-out rows: {shown}.",))


def _class_table(title: str, unit: str, classes: Sequence[ClassFigures] | None) -> Table | None:
    if not classes:
        return None
    ordered = sorted(classes, key=lambda one: -(one.support or 0))
    rows: list[tuple[Cell | str, ...]] = [
        (
            text(one.label),
            score(one.precision),
            score(one.recall),
            _scored(one.f1),
            count(one.support),
            count(one.predicted),
        )
        for one in ordered[:MOST_ROWS]
    ]
    more = len(ordered) - len(rows)
    note = f"{several(more, 'class', 'classes')} with fewer rows not shown." if more > 0 else ""
    columns = (title, "Precision ↑", "Recall ↑", "F1 ↑", unit, "Predicted")
    return table(columns, rows, numeric=range(1, 6), note=note)


def _scored(value: float | None) -> Cell:
    return Cell(score(value), "quiet" if value is None else "", shade=value)


def _matrix(found: Scores, unit: str) -> Table | None:
    """The confusion matrix; with many classes, the most frequent mistakes."""
    matrix, labels = found.confusion_matrix or (), found.labels or ()
    if not _is_square(matrix, len(labels)):
        return None
    if len(labels) > MOST_CLASSES:
        return _mistakes(matrix, labels, unit)
    rows: list[tuple[Cell | str, ...]] = []
    for label, line in zip(labels, matrix, strict=True):
        whole = sum(line)
        cells = [Cell(_with_share(part, whole), shade=part / whole if whole else 0.0) for part in line]
        rows.append((label, *cells))
    note = f"Held-out {unit} by actual class (row) and predicted class (column), with the share of the row."
    return table(("Actual ↓ predicted →", *labels), rows, numeric=range(1, len(labels) + 1), note=note)


def _is_square(matrix: Sequence[Sequence[int]], size: int) -> bool:
    lines = [line for line in matrix if len(line) == size and all(part >= 0 for part in line)]
    return size > 0 and len(lines) == len(matrix) == size


def _with_share(part: int, whole: int) -> str:
    return f"{count(part)} · {share(part, whole)}" if part else "0"


def _mistakes(matrix: Sequence[Sequence[int]], labels: Sequence[str], unit: str) -> Table | None:
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
    return table(("Actual", "Predicted", unit.capitalize(), "Share of the actual"), rows, numeric=(2,), note=note)


def _averages(found: Scores) -> Collapsed | None:
    rows = [
        (
            f"{kind} ({MEANING[kind]})",
            *(score(found.figure(f"{name}_{kind}")) for name in ("precision", "recall", "f1")),
        )
        for kind in AVERAGES
        if any(found.figure(f"{name}_{kind}") is not None for name in ("precision", "recall", "f1"))
    ]
    if not rows:
        return None
    made = table(("Average", "Precision", "Recall", "F1"), rows, numeric=(1, 2, 3))
    return Collapsed("Other averages over the classes", made)
