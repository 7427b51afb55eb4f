"""`train.json`, `ranks.json` and `environment.json`: what training took, and on what it ran."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftcli.results.schema import SCHEMA
from peftcli.typed_json import OMIT_NONE, renamed_from

TRAIN_SCHEMA = 2
"""Schema 1 has `levers` instead of `optimizations`, and `pieces` instead of `micro_batches`."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """The device of a run; `capability` is None for a CPU."""

    kind: str | None = None
    name: str | None = None
    capability: str | None = None
    memory_bytes: int | None = None
    count: int | None = None


@dataclass(frozen=True, kw_only=True)
class EnvironmentJson:
    """`environment.json`: versions by package (None where one is not installed), hardware, and the command.

    Attributes:
        recipe_sha256: of `recipe.yaml` in the run folder, as the last session wrote it.
    """

    schema: int = SCHEMA
    python: str | None = None
    platform: str | None = None
    packages: Mapping[str, str | None] = field(default_factory=dict)
    device: Device = field(default_factory=Device)
    cpu_count: int | None = None
    ram_bytes: int | None = None
    command: str | None = None
    recipe_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class BestStep:
    """The step with the best metric of the evaluations during training.

    Attributes:
        kept: the adapter is that of this step; otherwise it is that of the last one.
        rows_from: `validation`, or `test` in runs of earlier versions.
    """

    step: int | None = None
    metric: str | None = None
    value: float | None = None
    greater_is_better: bool | None = None
    kept: bool | None = None
    rows_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainFigures:
    """What training took, as `metrics.json` repeats it.

    Attributes:
        best: None if no metric of an evaluation during training was chosen by.
        stopped_early: early stopping ended the training before its last planned step.
    """

    steps: int | None = None
    rows: int | None = None
    epochs: float | None = None
    tokens: int | None = None
    trained_tokens: int | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    resumed_from_step: int | None = None
    best: BestStep | None = field(default=None, metadata=OMIT_NONE)
    stopped_early: bool | None = field(default=None, metadata=OMIT_NONE)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The first micro-batch, forward and backward, before the first step."""

    tokens: int | None = None
    seconds: float | None = None
    step_seconds: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """A step that ran out of memory, and the micro-batches that its rows were then divided into."""

    step: int | None = None
    micro_batches: int | None = field(default=None, metadata=renamed_from("pieces"))


@dataclass(frozen=True, kw_only=True)
class TrainBatching:
    """How the rows of a step were run; the tokens with and without padding.

    Attributes:
        row_difference: root mean square of what the other rows of a padding-free batch change in the logits of a row,
            over the standard deviation of the logits; None where it was not checked.
    """

    kind: str | None = None
    attention: tuple[str, ...] | None = None
    rejected_kernels: Mapping[str, Any] = field(default_factory=dict)
    row_difference: float | None = None
    real_tokens: int | None = None
    padded_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainJson(TrainFigures):
    """`train.json`: how training ended and what it took.

    Attributes:
        optimizations: names of the optimizations that were used.
        stamp: what the run was made from: hashes of the data and the base, versions of packages.
        log: size and hash of `log.jsonl`, as `run_dir.log_mark` returns them.
    """

    schema: int = TRAIN_SCHEMA
    status: str | None = None
    stop_reason: str | None = None
    planned_steps: int | None = None
    resident_before_bytes: int | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    out_of_memory: tuple[OutOfMemory, ...] = ()
    batching: TrainBatching = field(default_factory=TrainBatching)
    optimizations: tuple[str, ...] = field(default=(), metadata=renamed_from("levers"))
    calibration: Calibration | None = None
    stamp: Mapping[str, Any] = field(default_factory=dict)
    log: str | None = None


@dataclass(frozen=True, kw_only=True)
class RanksJson:
    """`ranks.json`: the ranks of each module of AdaLoRA at each step at which they changed."""

    schema: int = SCHEMA
    first: int | None = None
    target: int | None = None
    modules: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    ranks: tuple[tuple[int, ...], ...] = ()
