"""`compare.json`: runs side by side, their Pareto fronts and learning curves."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from peftcli.results.schema import SCHEMA


@dataclass(frozen=True, kw_only=True)
class VariantRow:
    """One run of a comparison.

    Attributes:
        run: its folder, relative to that of the comparison where it is in it.
        varied: what `--vary` set, by recipe key; empty for a run that was there already.
        status: `finished`, `stopped`, `failed` or `not started`.
        exit_code: of its training; None where nothing was trained.
        error: why it failed.
        quality, base_quality: the metric of the comparison, of the adapter and of the base.
        rows: held-out rows that the quality was measured on.
        interval: the 95 % interval of the quality, lower and upper bound.
        data_cache: whether its data were `made` or `reused`.
        best: names of the fields in which no other variant is better.
        front: costs on whose Pareto front it is.
    """

    name: str = ""
    run: str = ""
    varied: Mapping[str, str] = field(default_factory=dict)
    status: str = ""
    exit_code: int | None = None
    error: str | None = None
    quality: float | None = None
    rows: int | None = None
    interval: tuple[float, ...] | None = None
    base_quality: float | None = None
    loss: float | None = None
    base_loss: float | None = None
    retention_change: float | None = None
    trainable_parameters: int | None = None
    trainable_share: float | None = None
    adapter_bytes: int | None = None
    base_bytes: int | None = None
    adapter_share: float | None = None
    peak_memory_bytes: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    steps: int | None = None
    train_rows: int | None = None
    merge_top1_agreement: float | None = None
    method: str | None = None
    data_cache: str | None = None
    best: tuple[str, ...] = ()
    front: tuple[str, ...] = ()

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

    def figure(self, name: str) -> float | None:
        """A figure by the name of its field, for tables of several."""
        value: float | None = getattr(self, name)
        return value


@dataclass(frozen=True, kw_only=True)
class ComparedQuality:
    """The metric that variants are compared by.

    Attributes:
        key: a metric of `metrics.json`.
        better: `higher` or `lower`.
        rows: the fewest held-out rows that a variant was scored on.
        rows_from: `validation` if all runs have validation rows, otherwise `test`.
        comparable: all variants were scored on the same rows; otherwise there is no best one.
    """

    key: str
    better: str
    rows: int | None = None
    comparable: bool = True
    rows_from: str = "test"


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A variant on a learning curve."""

    rows: int
    quality: float
    interval: tuple[float, ...] | None = None
    variant: str = ""


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """Quality over training rows; the name says what the variants of this curve share."""

    name: str = ""
    points: tuple[CurvePoint, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CompareJson:
    """`compare.json`; `fronts` holds the names of variants by cost, `doubts` what makes figures not comparable."""

    schema: int = SCHEMA
    name: str = ""
    status: str = ""
    smoke: bool = False
    task: str | None = None
    model: str | None = None
    quality: ComparedQuality | None = None
    doubts: tuple[str, ...] = ()
    variants: tuple[VariantRow, ...] = ()
    fronts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    curves: tuple[LearningCurve, ...] = ()
