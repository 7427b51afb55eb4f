"""Loads the JSON files of a run for the report: each may be absent, each value may be null."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftcli.errors import DataError, RecipeError
from peftcli.plan.module_selection import Selection
from peftcli.results import (
    DataFigures,
    DataJson,
    EnvironmentJson,
    EvalJson,
    MergeJson,
    MetricsJson,
    PlanJson,
    RanksJson,
    TrainJson,
    load,
    load_or_default,
)
from peftcli.run_dir import RunDir, read_log


@dataclass(frozen=True, kw_only=True)
class EarlierStage:
    """A stage before the run's own."""

    name: str
    plan: PlanJson
    metrics: MetricsJson


@dataclass(frozen=True, kw_only=True)
class Stages:
    """What each stage of a run wrote; None for the file of one that did not run."""

    plan: PlanJson = field(default_factory=PlanJson)
    metrics: MetricsJson = field(default_factory=MetricsJson)
    environment: EnvironmentJson | None = None
    data: DataJson | None = None
    train: TrainJson | None = None
    eval: EvalJson = field(default_factory=EvalJson)
    merge: MergeJson | None = None
    selection: Selection | None = None
    """What the gradient chose to train; None where nothing was left to it."""
    ranks: RanksJson | None = None
    """How AdaLoRA's ranks moved; None for every other method."""
    log: tuple[Mapping[str, Any], ...] = ()
    earlier: tuple[EarlierStage, ...] = ()

    @property
    def data_figures(self) -> DataFigures:
        """The numbers of rows, of `data.json` or else of `metrics.json`."""
        return self.metrics.data if self.data is None else self.data

    @property
    def training(self) -> TrainJson | None:
        """`train.json`, or what `metrics.json` repeats of it."""
        if self.train is None and self.metrics.train is not None:
            return TrainJson(**vars(self.metrics.train))
        return self.train

    @property
    def merging(self) -> MergeJson | None:
        """`merge.json`, or what `metrics.json` repeats of it."""
        if self.merge is None and self.metrics.merge is not None:
            return MergeJson(**vars(self.metrics.merge))
        return self.merge

    @property
    def is_images(self) -> bool:
        return self.data is not None and self.data.format == "images"


def load_stages(run: RunDir) -> Stages:
    """Read the JSON files of a run.

    Raises:
        RecipeError: no stage of the run has ended, so there is nothing to report.
        DataError: a file is not JSON, another version of peftcli wrote it, or a value has the wrong type.
    """
    plan, metrics = load(PlanJson, run.plan), load(MetricsJson, run.metrics)
    if plan is None or metrics is None:
        raise RecipeError(
            f"{run.path} holds no finished stage; run `peftcli train RECIPE --output-dir {run.path}` first"
        )
    try:
        log = read_log(run.log)
    except json.JSONDecodeError as error:
        raise DataError(f"{run.log} has a line that is not JSON ({error.msg}); delete the line") from error
    return Stages(
        plan=plan,
        metrics=metrics,
        environment=load(EnvironmentJson, run.environment),
        data=load(DataJson, run.data),
        train=load(TrainJson, run.train),
        eval=load_or_default(EvalJson, run.eval),
        merge=load(MergeJson, run.merge),
        selection=load(Selection, run.selection),
        ranks=load(RanksJson, run.ranks),
        log=tuple(row for row in log if isinstance(row, dict)),
        earlier=tuple(_earlier(RunDir(folder)) for folder in sorted(run.stages.glob("*"), key=_number)),
    )


def _earlier(run: RunDir) -> EarlierStage:
    return EarlierStage(
        name=run.path.name,
        plan=load_or_default(PlanJson, run.plan),
        metrics=load_or_default(MetricsJson, run.metrics),
    )


def _number(path: Path) -> int:
    number, _, _ = path.name.partition("-")
    return int(number) if number.isdigit() else 0


def logged(row: Mapping[str, Any], key: str) -> float | None:
    """A finite number of a row of the log, or None: null, missing, not a number, or not finite."""
    found = row.get(key)
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    return found if math.isfinite(found) else None
