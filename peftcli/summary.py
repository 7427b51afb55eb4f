"""`metrics.json`: a summary of the run's JSON files for scripts, with the result of each gate."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from peftcli.errors import DataError
from peftcli.metrics.interval import wilson_interval
from peftcli.recipe.fields import Gate
from peftcli.results import (
    AnswerFigures,
    DataFigures,
    DataJson,
    EvalJson,
    GateResult,
    MergeFigures,
    MergeJson,
    MetricsJson,
    PlanJson,
    RetentionFigures,
    SizeBytes,
    TrainFigures,
    TrainJson,
    load,
    load_or_default,
    lost_files,
    save,
)
from peftcli.run_dir import RunDir

T = TypeVar("T")

FORGETTING_GATES = {"forgetting_loss": "adapter_loss", "forgetting_change": "change"}
"""Gate names, and the value of `retention` that each one checks."""


def write_metrics(run: RunDir, gates: Sequence[Gate]) -> MetricsJson:
    """Write `metrics.json` from the steps that have run; a value that was not measured is null.

    Returns:
        The content of the file.

    Raises:
        DataError: a file of an earlier step is missing, and the summary would lose its figures.
    """
    refuse_lost(run, rewritten=run.merge)  # a resumed training removes it
    plan, evaluation = load_or_default(PlanJson, run.plan), load_or_default(EvalJson, run.eval)
    train, merge = load(TrainJson, run.train), load(MergeJson, run.merge)
    measured = MetricsJson(
        status=train.status if train else "started",
        task=plan.task,
        smoke=plan.smoke,
        base=evaluation.base,
        adapter=evaluation.adapter,
        merged=merge.metrics if merge else None,
        validation=evaluation.validation,
        answers=_answers(evaluation, merge),
        retention=_part(RetentionFigures, evaluation.retention),
        train=_part(TrainFigures, train),
        test_rows_used_for=_test_uses(evaluation, train, merge),
        data=_part(DataFigures, load(DataJson, run.data)) or DataFigures(),
        parameters=plan.parameters,
        bytes=SizeBytes(adapter=_adapter_bytes(run), base=plan.model.bytes),
        merge=_part(MergeFigures, merge),
    )
    value = replace(measured, gates=tuple(_judge(gate, measured) for gate in gates))
    save(run.metrics, value)
    return value


def _test_uses(evaluation: EvalJson, train: TrainJson | None, merge: MergeJson | None) -> tuple[str, ...] | None:
    """What has read the test rows: no choice, except in runs that began before there were validation rows."""
    best = None if train is None else train.best
    chosen_on_test = best is not None and best.rows_from == "test"
    candidates = () if merge is None else merge.candidates
    uses = {
        "evaluations during training": chosen_on_test,
        "the choice of the best step": chosen_on_test and best is not None and best.kept,
        "scoring of the base, which decides nothing": evaluation.base is not None,
        "final scoring of the adapter": evaluation.adapter is not None,
        "the choice of the merged weights": merge is not None and merge.rows_from == "test" and len(candidates) > 1,
        "final scoring of the merged model": merge is not None and merge.metrics is not None,
    }
    return tuple(use for use, is_so in uses.items() if is_so) or None


def refuse_lost(run: RunDir, *, rewritten: Path | None = None) -> None:
    """Refuse to summarize a run again if files are missing whose figures `metrics.json` still has.

    Args:
        rewritten: a file that may be missing, because it is written next.

    Raises:
        DataError: a file is missing.
    """
    lost = lost_files(run, load_or_default(MetricsJson, run.metrics))
    names = [name for name in lost if rewritten is None or name != rewritten.name]
    if names:
        raise DataError(
            f"{run.path}: {' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing, although "
            f"{run.metrics.name} still has the figures; restore what is missing, or train again with --overwrite"
        )


def unmet(metrics: MetricsJson) -> list[str]:
    """One sentence for each gate that was measured and not met."""
    return [
        f"{gate.name} is {gate.value:.4g}, but the recipe requires {gate.limit}"
        for gate in metrics.gates
        if gate.met is False
    ]


def _part(kind: type[T], whole: T | None) -> T | None:
    """The fields of one file that another file repeats."""
    if whole is None:
        return None
    names: list[str] = [one.name for one in fields(kind)]  # type: ignore[arg-type]  # these are dataclasses
    return kind(**{name: getattr(whole, name) for name in names})


def _judge(gate: Gate, metrics: MetricsJson) -> GateResult:
    value: Any
    if gate.name.startswith("merge_"):
        value = getattr(metrics.merge, gate.name.removeprefix("merge_"), None)
    elif gate.name in FORGETTING_GATES:
        value = getattr(metrics.retention, FORGETTING_GATES[gate.name], None)
    else:
        value = metrics.of("adapter").figures.get(gate.name)
    return GateResult(name=gate.name, limit=gate.text, value=value, met=None if value is None else gate.met(value))


def _answers(evaluation: EvalJson, merge: MergeJson | None) -> AnswerFigures | None:
    """How many of the test rows were answered, and how far that number lets the exact match be off."""
    rows = evaluation.generated_rows
    if not rows:
        return None
    models = {"base": evaluation.base, "adapter": evaluation.adapter, "merged": merge.metrics if merge else None}
    ratios = {name: model.figure("exact_match") if model else None for name, model in models.items()}
    intervals = {name: None if one is None else wilson_interval(one, rows) for name, one in ratios.items()}
    return AnswerFigures(rows=rows, test_rows=evaluation.rows, exact_match_interval=intervals)


def _adapter_bytes(run: RunDir) -> int | None:
    sizes = [file.stat().st_size for file in run.adapter.glob("adapter_model*.safetensors")]
    return sum(sizes) if sizes else None
