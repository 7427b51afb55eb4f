"""How each metric is called, written and read: which direction is better, and what changed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from peftcli.report.blocks import Cell, Table, Tone, table
from peftcli.report.format import DASH, MINUS, compact, percent, score, significant, wilson_interval
from peftcli.report.stages import Stages, figure

SIDES = ("base", "adapter", "merged")


@dataclass(frozen=True)
class Metric:
    """A metric of `metrics.json`; `better` is None where neither direction is."""

    key: str
    title: str
    write: Callable[[float | None], str]
    better: Literal["lower", "higher"] | None
    points: bool = False

    @property
    def heading(self) -> str:
        return self.title + {"lower": " ↓", "higher": " ↑", None: ""}[self.better]

    def change(self, before: float, after: float) -> str:
        """The difference, signed, in the metric's own writing; in points for what is written in percent."""
        difference = after - before
        written = f"{abs(difference) * 100:.1f} points" if self.points else self.write(abs(difference))
        if self.write(before) == self.write(after):
            return "same"
        return f"{MINUS if difference < 0 else '+'}{written.replace('< ', '').replace('> ', '')}"

    def verdict(self, before: float, after: float) -> tuple[str, Tone]:
        """Whether `after` is better or worse, in a word and a tone."""
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
    Metric("entity_precision", "Entity precision", score, "higher"),
    Metric("entity_recall", "Entity recall", score, "higher"),
    Metric("entity_f1", "Entity F1", score, "higher"),
)
BY_KEY = {metric.key: metric for metric in METRICS}
PRIMARY = ("exact_match", "entity_f1", "f1", "accuracy", "loss")
COUNTED_ON_ANSWERS = ("exact_match", "chrf", "unfinished_answers")


def primary_metric(metrics: dict[str, Any]) -> Metric | None:
    """The metric that the verdict speaks of: the first measured on base and adapter, else on one of them."""
    for sides in (("base", "adapter"), ("adapter",), ("base",)):
        for key in PRIMARY:
            if all(figure(metrics, side, key) is not None for side in sides):
                return BY_KEY[key]
    return None


def rows_scored(stages: Stages, key: str) -> int | None:
    """Held-out rows behind a metric: those answered, or all of them."""
    rows = figure(stages.eval, "generated_rows" if key in COUNTED_ON_ANSWERS else "rows")
    return int(rows) if rows else None


def interval(stages: Stages, side: str) -> tuple[float, float] | None:
    """The 95 % interval of a side's exact match, where the number of answers is known."""
    ratio, rows = figure(stages.metrics, side, "exact_match"), rows_scored(stages, "exact_match")
    return None if ratio is None or rows is None or not 0 <= ratio <= 1 else wilson_interval(ratio, rows)


def metric_table(stages: Stages) -> Table | None:
    """Base, adapter and merged model side by side; None where no metric was measured."""
    metrics = stages.metrics
    shown = [metric for metric in (*METRICS, *_unknown(metrics)) if _measured(metrics, metric.key)]
    if not shown:
        return None
    rows: list[tuple[Cell | str, ...]] = []
    for metric in shown:
        base, adapter = figure(metrics, "base", metric.key), figure(metrics, "adapter", metric.key)
        change = Cell(DASH, "quiet")
        if base is not None and adapter is not None:
            word, tone = metric.verdict(base, adapter)
            change = Cell(f"{metric.change(base, adapter)} {word}".strip(), tone)
        written = [metric.write(figure(metrics, side, metric.key)) for side in SIDES]
        rows.append((metric.heading, *written, change))
    columns = ("Metric", "Base", "Adapter", "Merged", "Change")
    made = table(columns, rows, numeric=(1, 2, 3, 4), note=_note(stages))
    return Table(made.columns, made.rows, made.numeric, strong=2, note=made.note)


def _note(stages: Stages) -> str:
    parts = ["↓ lower is better, ↑ higher is better; the change is from base to adapter."]
    rows, answered = rows_scored(stages, "loss"), rows_scored(stages, "exact_match")
    if rows is not None:
        parts.append(f"Scored on {rows:,} held-out rows" + (f", {answered:,} of them answered." if answered else "."))
    bounds = [
        f"{side} {score(found[0])} to {score(found[1])}"
        for side in SIDES
        if (found := interval(stages, side)) is not None
    ]
    if bounds:
        parts.append(f"95 % interval of the exact match: {', '.join(bounds)}.")
    return " ".join(parts)


def _measured(metrics: dict[str, Any], key: str) -> bool:
    """A known key that some side names is shown even where it is null, so that the dash is seen."""
    named = any(key in side for name in SIDES if isinstance(side := metrics.get(name), dict))
    return named and (key in BY_KEY or any(figure(metrics, side, key) is not None for side in SIDES))


def _unknown(metrics: dict[str, Any]) -> list[Metric]:
    """Metrics that this version has no name for: shown under their key, judged by nobody."""
    keys = {key for side in SIDES for key in (metrics.get(side) or {}) if key not in BY_KEY}
    return [Metric(key, key, compact, None) for key in sorted(keys)]
