"""`eval.json`: the metrics and answers of each model that was measured."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftcli.results.schema import SCHEMA, Counts
from peftcli.typed_json import OMIT_NONE, OTHER_KEYS


@dataclass(frozen=True, kw_only=True)
class ClassFigures:
    """How one class fares, as `metrics.classification.ClassFigures`."""

    label: str | None = None
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    support: int | None = None
    predicted: int | None = None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The metrics of one model: figures by name, and of a model that gives labels its classes.

    Attributes:
        figures: `loss`, `accuracy` and so on; None for one that was not measured. A key of another version may hold
            anything.
        confusion_matrix: (classes, classes), rows by actual class; None where a row has several classes.
    """

    figures: Mapping[str, Any] = field(default_factory=dict, metadata=OTHER_KEYS)
    f1_average: str | None = field(default=None, metadata=OMIT_NONE)
    positive_label: str | None = field(default=None, metadata=OMIT_NONE)
    labels: tuple[str, ...] | None = field(default=None, metadata=OMIT_NONE)
    confusion_matrix: tuple[tuple[int, ...], ...] | None = field(default=None, metadata=OMIT_NONE)
    per_class: tuple[ClassFigures, ...] | None = field(default=None, metadata=OMIT_NONE)
    per_entity: tuple[ClassFigures, ...] | None = field(default=None, metadata=OMIT_NONE)
    never_predicted: tuple[str, ...] | None = field(default=None, metadata=OMIT_NONE)

    def figure(self, name: str) -> float | None:
        """A figure by its name, None where it was not measured or is no number."""
        value = self.figures.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if is_number and math.isfinite(value) else None  # type: ignore[arg-type]  # it is a number


@dataclass(frozen=True, kw_only=True)
class RetentionFigures:
    """The loss on the text that forgetting is measured on, nats per token, as `metrics.json` repeats it."""

    path: str | None = None
    tokens: int | None = None
    base_loss: float | None = None
    adapter_loss: float | None = None
    change: float | None = None


@dataclass(frozen=True, kw_only=True)
class Retention(RetentionFigures):
    """The same in `eval.json`, with rows of the text that were left out, and the SHA-256 of its token ids."""

    dropped: Counts = field(default_factory=dict)
    dropped_examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A held-out row and what each model answers."""

    prompt: str | None = None
    reference: str | None = None
    base: str | None = None
    adapter: str | None = None
    merged: str | None = field(default=None, metadata=OMIT_NONE)


@dataclass(frozen=True, kw_only=True)
class DecodingSettings:
    """How rows were answered."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


VALIDATED = ("validation", "validation_answered", "validation_sha256")
"""Keys of `eval.json` about the validation rows, which only a training measures."""


@dataclass(frozen=True, kw_only=True)
class EvalJson:
    """`eval.json`: the metrics of each model that was measured.

    Attributes:
        rows: held-out rows.
        generated_rows: how many of them were answered.
        generated_rows_sha256: tells which rows these are, see `plan.answered_rows.rows_digest`; None where none were
            answered, and in files of versions that answered the first rows.
        validation: of the adapter on the validation rows, for choices between runs; None without these rows.
        validation_answered: how many validation rows were answered.
        validation_sha256: tells which rows these are, as `generated_rows_sha256`.
        baseline_seconds: that measuring the base took in the training; None where that did not measure it.
        seconds: that an `eval` took.
    """

    schema: int = SCHEMA
    rows: int | None = None
    generated_rows: int | None = None
    generated_rows_sha256: str | None = None
    base: Scores | None = None
    adapter: Scores | None = None
    merged: Scores | None = field(default=None, metadata=OMIT_NONE)
    validation: Scores | None = field(default=None, metadata=OMIT_NONE)
    validation_answered: int | None = field(default=None, metadata=OMIT_NONE)
    validation_sha256: str | None = field(default=None, metadata=OMIT_NONE)
    samples: tuple[Sample, ...] = ()
    decoding: DecodingSettings | None = None
    retention: Retention | None = field(default=None, metadata=OMIT_NONE)
    baseline_seconds: float | None = field(default=None, metadata=OMIT_NONE)
    seconds: float | None = field(default=None, metadata=OMIT_NONE)
