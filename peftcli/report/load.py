"""Loads the JSON files of a run for the report: any file may be absent, and any value may be null."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftcli.errors import RecipeError
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
    lost_files,
)
from peftcli.run_dir import RunDir, has_log_changed, read_log


@dataclass(frozen=True, kw_only=True)
class EarlierStage:
    """A stage before the final one."""

    name: str
    plan: PlanJson
    metrics: MetricsJson


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The files of each stage of a run; None for a stage that did not run."""

    plan: PlanJson = field(default_factory=PlanJson)
    metrics: MetricsJson = field(default_factory=MetricsJson)
    environment: EnvironmentJson | None = None
    data: DataJson | None = None
    train: TrainJson | None = None
    eval: EvalJson = field(default_factory=EvalJson)
    merge: MergeJson | None = None
    selection: Selection | None = None
    """The modules selected by gradient; None without such a selection."""
    ranks: RanksJson | None = None
    """The history of AdaLoRA's ranks; None for other methods."""
    log: tuple[Mapping[str, Any], ...] = ()
    earlier: tuple[EarlierStage, ...] = ()
    lost: tuple[str, ...] = ()
    """Names of files that are missing, although `metrics.json` has figures of them."""
    log_changed: bool = False
    """The log is not as training wrote it."""

    @property
    def data_figures(self) -> DataFigures:
        """The row counts, from `data.json` or else from `metrics.json`."""
        return self.metrics.data if self.data is None else self.data

    @property
    def training(self) -> TrainJson | None:
        """`train.json`, or the copy in `metrics.json`."""
        if self.train is None and self.metrics.train is not None:
            return TrainJson(**vars(self.metrics.train))
        return self.train

    @property
    def merging(self) -> MergeJson | None:
        """`merge.json`, or the copy in `metrics.json`."""
        if self.merge is None and self.metrics.merge is not None:
            return MergeJson(**vars(self.metrics.merge))
        return self.merge

    @property
    def is_images(self) -> bool:
        return self.data is not None and self.data.format == "images"


def load_stages(run: RunDir) -> Stages:
    """Read the JSON files of a run.

    Raises:
        RecipeError: no stage of the run has finished, so there is nothing to report.
        DataError: a file is not JSON, another version of peftcli wrote it, or a value has the wrong type.
    """
    plan, metrics = load(PlanJson, run.plan), load(MetricsJson, run.metrics)
    if plan is None or metrics is None:
        missing = run.plan.name if plan is None else run.metrics.name
        raise RecipeError(
            f"{run.path} contains no finished stage; run `peftcli train RECIPE --output-dir {run.path}` first "
            f"({missing} is missing)"
        )
    train = load(TrainJson, run.train)
    return Stages(
        plan=plan,
        metrics=metrics,
        environment=load(EnvironmentJson, run.environment),
        data=load(DataJson, run.data),
        train=train,
        eval=load_or_default(EvalJson, run.eval),
        merge=load(MergeJson, run.merge),
        selection=load(Selection, run.selection),
        ranks=load(RanksJson, run.ranks),
        log=tuple(read_log(run.log)),
        lost=lost_files(run, metrics),
        log_changed=train is not None and has_log_changed(run.log, train.log),
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
    """A finite number of a log row, or None if it is null, missing, not a number, or not finite."""
    found = row.get(key)
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    return found if math.isfinite(found) else None
