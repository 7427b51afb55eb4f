"""`metrics.json`: the summary that a script reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from peftcli.results.data import DataFigures
from peftcli.results.evaluation import RetentionFigures, Scores
from peftcli.results.merge import MergeFigures
from peftcli.results.plan import Parameters
from peftcli.results.schema import SCHEMA
from peftcli.results.training import TrainFigures
from peftcli.typed_json import OMIT_NONE


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """A gate of the recipe; `met` is None where the figure was not measured."""

    name: str = ""
    limit: str | None = None
    value: float | None = None
    met: bool | None = None


@dataclass(frozen=True, kw_only=True)
class SizeBytes:
    """Bytes of the adapter's weights, and of the base that is not quantized."""

    adapter: int | None = None
    base: int | None = None


@dataclass(frozen=True, kw_only=True)
class AnswerFigures:
    """How many of the test rows were answered; the 95 % interval of the exact match by model, None without one."""

    rows: int | None = None
    test_rows: int | None = None
    exact_match_interval: Mapping[str, tuple[float | None, ...] | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MetricsJson:
    """`metrics.json`: the summary that a script reads.

    Attributes:
        validation: of the adapter on the validation rows, by which runs are compared.
        test_rows_used_for: everything that has read the test rows, in order; None without test rows.
    """

    schema: int = SCHEMA
    status: str | None = None
    task: str | None = None
    smoke: bool = False
    base: Scores | None = None
    adapter: Scores | None = None
    merged: Scores | None = None
    validation: Scores | None = field(default=None, metadata=OMIT_NONE)
    answers: AnswerFigures | None = None
    retention: RetentionFigures | None = None
    train: TrainFigures | None = None
    test_rows_used_for: tuple[str, ...] | None = field(default=None, metadata=OMIT_NONE)
    data: DataFigures = field(default_factory=DataFigures)
    parameters: Parameters = field(default_factory=Parameters)
    bytes: SizeBytes = field(default_factory=SizeBytes)
    merge: MergeFigures | None = None
    gates: tuple[GateResult, ...] = ()

    def of(self, side: str) -> Scores:
        """The scores of `base`, `adapter` or `merged`; empty where that was not measured."""
        found: Scores | None = getattr(self, side)
        return found or Scores()
