"""`merge.json`: how far a merged model is from its adapter."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from peftcli.results.evaluation import Scores
from peftcli.results.schema import SCHEMA


@dataclass(frozen=True, kw_only=True)
class DriftFigures:
    """Differences between the outputs of a merged model and those of its adapter."""

    max_abs_logit_difference: float | None = None
    mean_abs_logit_difference: float | None = None
    kl_nats: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True, kw_only=True)
class MergeFigures(DriftFigures):
    """The drift of the merged model that was kept, as `metrics.json` repeats it."""

    into: str | None = None


@dataclass(frozen=True, kw_only=True)
class MergeCandidate(DriftFigures):
    """One way to merge, and what was measured of it."""

    into: str | None = None
    loss: float | None = None
    rows: int | None = None
    positions: int | None = None


@dataclass(frozen=True, kw_only=True)
class MergeSample:
    """A held-out row and the answer of the merged model."""

    prompt: str | None = None
    merged: str | None = None


@dataclass(frozen=True, kw_only=True)
class MergeJson(MergeFigures):
    """`merge.json`: how far the merged model is from its adapter.

    Attributes:
        rows_from: what the rows are that both were compared on.
        compared_on: the devices that held the merged model meanwhile, in words.
        limit: by name of a figure.
        limits_met: by the same names; None for a figure that was not measured.
    """

    schema: int = SCHEMA
    dtype: str | None = None
    rows_from: str | None = None
    compared_on: str | None = None
    rows: int | None = None
    positions: int | None = None
    limit: Mapping[str, str | None] = field(default_factory=dict)
    limits_met: Mapping[str, bool | None] = field(default_factory=dict)
    met: bool | None = None
    metrics: Scores | None = None
    candidates: tuple[MergeCandidate, ...] = ()
    samples: tuple[MergeSample, ...] = ()
    bytes: int | None = None
    seconds: float | None = None
