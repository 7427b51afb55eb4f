"""`plan.json`: what was decided before the first step, and the forecast."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftcli.results.schema import Counts
from peftcli.typed_json import OTHER_KEYS, renamed_from

PLAN_SCHEMA = 2
"""Schema 1 has `mends` instead of `suggestions`, and `card` instead of `gpu`."""


@dataclass(frozen=True, kw_only=True)
class ForecastRows:
    """The rows that a forecast counted with; not known before the data were read."""

    longest_tokens: int = 0
    mean_tokens: float = 0.0
    known: bool = True


@dataclass(frozen=True, kw_only=True)
class MicroBatchTokens:
    """Tokens of the planned micro-batch, and of the largest one that fits."""

    tokens: int = 0
    largest_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class ForecastMemory:
    """Bytes at the peak of a step: each part by name, all together, and what the machine has."""

    parts: Counts = field(default_factory=dict, metadata=OTHER_KEYS)
    total: int = 0
    machine: int | None = None


@dataclass(frozen=True, kw_only=True)
class ForecastChange:
    """Recipe keys that lower the memory, and what it is then."""

    keys: tuple[str, ...] = ()
    total_bytes: int = 0
    fits: bool = False


@dataclass(frozen=True, kw_only=True)
class EvaluationTime:
    """The estimated time of evaluation.

    Attributes:
        passes: models that are evaluated: the base and the adapter, or the adapter alone.
        scored_rows: rows whose loss is computed, None where the test rows were not read.
        answered_rows: generated answers of a pass, at most.
        answer_tokens: of an answer, at most.
        evaluations: of the validation rows, during training.
        seconds: of all passes, of the evaluations during training, and of the adapter on the validation rows.
    """

    estimated: bool = True
    passes: int = 1
    scored_rows: int | None = None
    answered_rows: int = 0
    answers_at_once: int = 1
    answer_tokens: int = 0
    pass_seconds: float = 0.0
    evaluations: int = 0
    validation_rows: int | None = None
    during_seconds: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ForecastTime:
    """Time of the training, and of evaluation; None for a device whose speed is not known."""

    steps: int | None = None
    flops_per_token: int | None = None
    tokens_per_step: int | None = None
    step_seconds: float | None = None
    seconds: float | None = None
    gpu: str | None = field(default=None, metadata=renamed_from("card"))
    evaluation: EvaluationTime | None = None


@dataclass(frozen=True, kw_only=True)
class ForecastDisk:
    """Bytes on the disk, and how many checkpoints are there at once."""

    adapter: int | None = None
    checkpoint: int | None = None
    checkpoints_at_once: int | None = None
    total: int | None = None


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run needs, estimated before anything is loaded.

    Attributes:
        peak_memory_bytes: the part of the total that `train.json` measures under the same name.
        tight: it fits, with less than the margin to spare.
    """

    schema: int = PLAN_SCHEMA
    rows: ForecastRows = field(default_factory=ForecastRows)
    micro_batch: MicroBatchTokens = field(default_factory=MicroBatchTokens)
    memory_bytes: ForecastMemory = field(default_factory=ForecastMemory)
    peak_memory_bytes: int | None = None
    fits: bool | None = None
    tight: bool | None = None
    suggestions: tuple[ForecastChange, ...] = field(default=(), metadata=renamed_from("mends"))
    "Changes of the recipe that lower the memory, the cheapest first."
    time: ForecastTime = field(default_factory=ForecastTime)
    disk_bytes: ForecastDisk = field(default_factory=ForecastDisk)


@dataclass(frozen=True)
class Decision:
    """One choice that was made, and why."""

    key: str = ""
    value: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class PlanModel:
    """The base model of a plan; its bytes are those of weights that are not quantized."""

    name: str | None = None
    revision: str | None = None
    architecture: str | None = None
    parameters: int | None = None
    bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class PlanAdapter:
    """The method, and the rank where it has one."""

    method: str | None = None
    r: int | None = None


@dataclass(frozen=True, kw_only=True)
class PlanTarget:
    """Name of a target, and how many modules it matches."""

    name: str | None = None
    modules: int | None = None


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters; the total is those of the base and the adapter."""

    trainable: int | None = None
    total: int | None = None


@dataclass(frozen=True, kw_only=True)
class PlanBatch:
    """Rows of one step: per device x accumulation x processes."""

    per_device: int | None = None
    accumulation: int | None = None
    processes: int | None = None
    shards: int | None = None
    effective: int | None = None


@dataclass(frozen=True, kw_only=True)
class PlanBatching:
    """How the rows of a step are run, and the most tokens at once."""

    kind: str | None = None
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class PlanJson:
    """`plan.json`: what was decided; `trainer` holds the arguments of the trainer by name."""

    schema: int = PLAN_SCHEMA
    name: str | None = None
    task: str | None = None
    smoke: bool = False
    model: PlanModel = field(default_factory=PlanModel)
    decisions: tuple[Decision, ...] = ()
    notices: tuple[str, ...] = ()
    adapter: PlanAdapter = field(default_factory=PlanAdapter)
    targets: tuple[PlanTarget, ...] = ()
    parameters: Parameters = field(default_factory=Parameters)
    batch: PlanBatch = field(default_factory=PlanBatch)
    batching: PlanBatching = field(default_factory=PlanBatching)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    forecast: Forecast | None = None

    @property
    def chosen(self) -> dict[str, Decision]:
        """The decisions by their key."""
        return {one.key: one for one in self.decisions}
