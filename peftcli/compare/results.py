"""The results of a comparison (`compare.json`): quality, cost, Pareto fronts, learning curves, and warnings about runs
that are not comparable.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peftcli.compare.variants import ROWS_KEY, unique
from peftcli.errors import RecipeError
from peftcli.plan.answered_rows import answered_digest
from peftcli.recipe.dump import fingerprint
from peftcli.recipe.load import load_run_recipe
from peftcli.recipe.schema import Recipe
from peftcli.report.format import compact, text
from peftcli.report.load import Stages, load_stages
from peftcli.report.metrics import BY_KEY, COUNTED_ON_ANSWERS, PRIMARY, Metric, interval, rows_scored
from peftcli.results import (
    ComparedQuality,
    CompareJson,
    CurvePoint,
    DataJson,
    Device,
    LearningCurve,
    MergeFigures,
    MetricsJson,
    RetentionFigures,
    Scores,
    TrainFigures,
    VariantRow,
    status_of,
)
from peftcli.run_dir import RunDir, read_json
from peftcli.typed_json import parse

RESULT = "compare.json"

COSTS = ("adapter_bytes", "peak_memory_bytes", "seconds", "retention_change")
"""Costs of a variant that quality is compared with; lower is better."""
MEASURED_ON_ROWS = ("quality", "loss")
"""Figures without a best variant where the held-out rows differ."""
LOWER = (*COSTS, "loss", "trainable_parameters")
HIGHER = ("tokens_per_second", "merge_top1_agreement")


@dataclass(frozen=True)
class Entry:
    """One run of a comparison, whether or not its training succeeded.

    Attributes:
        name: unique in the comparison.
        folder: of the run.
        varied: the keys that `--vary` set, empty for an existing run.
        exit_code: of its training; None if it was not trained by the comparison.
        error: why it failed, None if it did not.
    """

    name: str
    folder: Path
    varied: Mapping[str, str] = field(default_factory=dict)
    exit_code: int | None = None
    error: str | None = None


def collect(name: str, entries: Sequence[Entry], home: Path) -> CompareJson:
    """Read the runs and compare them.

    Args:
        name: of the comparison.
        home: folder of the comparison; paths of runs inside it are relative to it.
    """
    stages = {entry.name: _stages(entry.folder) for entry in entries}
    recipes = {entry.name: _recipe(entry.folder) for entry in entries}
    methods = {name: recipe.adapter.method for name, recipe in recipes.items() if recipe is not None}
    known = {name: found for name, found in stages.items() if found is not None}
    validated = bool(known) and all(found.metrics.validation is not None for found in known.values())
    if validated:
        known = {name: _on_validation(found) for name, found in known.items()}
        stages = {name: known.get(name) for name in stages}
    metric = _quality(list(known.values()))
    better = "higher" if metric is None or metric.better is None else metric.better
    rows = [replace(_row(one, stages[one.name], metric, home), method=methods.get(one.name)) for one in entries]
    comparable = metric is None or len(_grouped(known, lambda run: _scored_rows(run, metric))) < 2
    ranked = comparable and len({row.quality for row in rows if row.is_finished and row.quality is not None}) > 1
    fronts = {cost: tuple(found) for cost in COSTS if ranked and (found := pareto_front(rows, cost, better))}
    best = {key: names for key, names in best_of(rows, better).items() if comparable or key not in MEASURED_ON_ROWS}
    rows = [_with_places(row, best, fronts) for row in rows]
    scored = [count for found in known.values() if metric and (count := rows_scored(found, metric.key))]
    scored_on = min(scored, default=None)
    return CompareJson(
        name=name,
        status="finished" if all(row.is_finished for row in rows) else "unfinished",
        smoke=any(found.metrics.smoke for found in known.values()),
        task=next((found.metrics.task for found in known.values()), None),
        model=_shared(text(found.plan.model.name) for found in known.values()),
        quality=None
        if metric is None
        else ComparedQuality(
            key=metric.key,
            better=better,
            rows=scored_on,
            comparable=comparable,
            rows_from="validation" if validated else "test",
        ),
        doubts=(*_incomplete(entries, stages), *comparability_warnings(known, metric, methods)),
        variants=tuple(rows),
        fronts=fronts,
        curves=tuple(learning_curves(rows, recipes)),
    )


def _on_validation(run: Stages) -> Stages:
    """A run with its validation rows as held-out rows: a choice between runs by their test rows would be biased."""
    metrics, data = run.metrics, run.data or DataJson()
    scores, rows = metrics.validation or Scores(), data.validation_rows
    fingerprint = None if data.validation is None else data.validation.fingerprint
    held_out = replace(data, test_rows=rows, fingerprint=replace(data.fingerprint, test=fingerprint))
    figures = replace(metrics.data, test_rows=rows)
    return replace(
        run,
        metrics=replace(metrics, adapter=scores, base=None, merged=None, answers=None, data=figures),
        data=held_out,
        eval=replace(
            run.eval,
            rows=rows,
            generated_rows=run.eval.validation_answered,
            generated_rows_sha256=run.eval.validation_sha256,
        ),
    )


def _incomplete(entries: Sequence[Entry], stages: Mapping[str, Stages | None]) -> Iterator[str]:
    """One sentence for each trained run with missing files."""
    for entry in entries:
        run, found = RunDir(entry.folder), stages[entry.name]
        lost = [path.name for path in (run.plan, run.metrics) if not path.exists()] if found is None else found.lost
        if lost and run.adapter.is_dir():
            are = "is" if len(lost) == 1 else "are"
            yield f"{' and '.join(lost)} {are} missing in the folder of {entry.name}, so its figures are not complete."


def _with_places(row: VariantRow, best: Mapping[str, list[str]], fronts: Mapping[str, Sequence[str]]) -> VariantRow:
    """A row with the columns that it is the best of, and the fronts that it is on."""
    return replace(
        row,
        best=tuple(key for key, names in best.items() if row.name in names),
        front=tuple(cost for cost, names in fronts.items() if row.name in names),
    )


def _stages(folder: Path) -> Stages | None:
    """The results of a run, None if none of its stages has finished."""
    try:
        return load_stages(RunDir(folder))
    except RecipeError:
        return None  # the variant failed in its first stage; its row has the error


def _recipe(folder: Path) -> Recipe | None:
    """The recipe of a run, None if there is none or it cannot be read by this version."""
    try:
        return load_run_recipe(RunDir(folder).recipe).recipe
    except RecipeError:
        return None


def _quality(found: Sequence[Stages]) -> Metric | None:
    """The metric that most runs have; among equals, the first in the order of the report."""
    counts = {key: sum(one.metrics.of("adapter").figure(key) is not None for one in found) for key in PRIMARY}
    key = max(counts, key=lambda key: counts[key])
    return BY_KEY[key] if counts[key] else None


def _row(entry: Entry, found: Stages | None, metric: Metric | None, home: Path) -> VariantRow:
    metrics = MetricsJson() if found is None else found.metrics
    adapter, base, numbers, sizes = metrics.of("adapter"), metrics.of("base"), metrics.parameters, metrics.bytes
    train = metrics.train or TrainFigures()
    bounds = interval(found, "adapter") if found is not None and metric and metric.key == "exact_match" else None
    return VariantRow(
        name=entry.name,
        run=entry.folder.relative_to(home).as_posix() if entry.folder.is_relative_to(home) else entry.folder.name,
        varied=dict(entry.varied),
        status=_status(entry, metrics),
        exit_code=entry.exit_code,
        error=entry.error,
        quality=None if metric is None else adapter.figure(metric.key),
        rows=None if found is None or metric is None else rows_scored(found, metric.key),
        interval=bounds,
        base_quality=None if metric is None else base.figure(metric.key),
        loss=adapter.figure("loss"),
        base_loss=base.figure("loss"),
        retention_change=(metrics.retention or RetentionFigures()).change,
        trainable_parameters=numbers.trainable,
        trainable_share=_ratio(numbers.trainable, numbers.total),
        adapter_bytes=sizes.adapter,
        base_bytes=sizes.base,
        adapter_share=_ratio(sizes.adapter, sizes.base),
        peak_memory_bytes=train.peak_memory_bytes,
        seconds=train.seconds,
        tokens_per_second=train.tokens_per_second,
        steps=train.steps,
        train_rows=metrics.data.train_rows,
        merge_top1_agreement=(metrics.merge or MergeFigures()).top1_agreement,
        data_cache=None if found is None or found.data is None else found.data.cache,
    )


def _ratio(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None


def _status(entry: Entry, metrics: MetricsJson) -> str:
    """`finished`, `stopped`, `failed` or `not started`; an unmet gate does not count as a failed training."""
    if entry.exit_code == 75:
        return "stopped"
    if entry.exit_code not in (None, 0, 7):
        return "failed"
    return metrics.status or "not started"


def _shared(values: Any) -> str | None:
    found = set(values)
    return found.pop() if len(found) == 1 else None


def is_run(folder: Path) -> bool:
    """Whether a folder is a run, or a comparison, which contains runs."""
    return folder.is_dir() and (RunDir(folder).recipe.is_file() or (folder / RESULT).is_file())


def open_runs(folders: Sequence[Path]) -> list[Entry]:
    """The runs in some folders; a comparison is replaced by its variants.

    Raises:
        RecipeError: a folder is not a run, or there are fewer than two runs.
    """
    found: list[Entry] = []
    for folder in folders:
        if not is_run(folder):
            raise RecipeError(
                f"{folder}: not a run folder (recipe.yaml is missing); pass existing runs, or recipes to train"
            )
        path = Path(os.path.abspath(folder))
        found += [Entry(path.name, path)] if RunDir(path).recipe.is_file() else _variants(path)
    entries = list({entry.folder: entry for entry in found}.values())
    if len(entries) < 2:
        raise RecipeError(
            f"{', '.join(map(str, folders))}: a comparison needs at least two runs; pass more run folders"
        )
    names = [entry.name for entry in entries]
    shown = [
        name if names.count(name) == 1 else f"{one.folder.parent.name}-{name}"
        for one, name in zip(entries, names, strict=True)
    ]
    return [
        Entry(name, one.folder, one.varied, one.exit_code, one.error)
        for name, one in zip(unique(iter(shown)), entries, strict=True)
    ]


def _variants(home: Path) -> list[Entry]:
    """The variants that a comparison trained in its own folder, in order; none if it compares other runs."""
    try:
        found = parse(CompareJson, read_json(home / RESULT))
    except ValueError as problem:  # not JSON, or of the wrong types
        raise RecipeError(f"{home / RESULT}: not a comparison of this version; run it again") from problem
    return [_variant(home, row) for row in found.variants if (home / row.run).is_dir()]


def _variant(home: Path, row: VariantRow) -> Entry:
    folder = home / row.run
    code, error = row.exit_code, row.error
    if status_of(RunDir(folder)) == "finished" and code != 7:  # trained separately since then
        code, error = None, None
    return Entry(row.name, folder, row.varied, code, error)


def pareto_front(rows: Sequence[VariantRow], cost: str, better: str) -> list[str]:
    """Names of the finished variants on the Pareto front, cheapest first.

    A variant is on the front unless another one is at least as good and at most as expensive, and strictly better in
    one of the two.

    Args:
        cost: a field of the rows.
        better: whether `higher` or `lower` quality values are better.
    """
    sign = 1.0 if better == "higher" else -1.0
    points = [
        (row.name, paid, sign * row.quality)
        for row in rows
        if row.is_finished and (paid := row.figure(cost)) is not None and row.quality is not None
    ]
    if len(points) < 2:
        return []
    front = [one for one in points if not any(_dominates(other, one) for other in points)]
    return [name for name, _, _ in sorted(front, key=lambda one: one[1])]


def _dominates(other: tuple[str, float, float], one: tuple[str, float, float]) -> bool:
    return other[1] <= one[1] and other[2] >= one[2] and other[1:] != one[1:]


def best_of(rows: Sequence[VariantRow], better: str) -> dict[str, list[str]]:
    """Names of the finished variants with the best value, by key; none if all values are equal."""
    found = {}
    for key in ("quality", *LOWER, *HIGHER):
        values = {row.name: value for row in rows if row.is_finished and (value := row.figure(key)) is not None}
        if len(set(values.values())) < 2:
            continue
        highest = better == "higher" if key == "quality" else key in HIGHER
        best = (max if highest else min)(values.values())
        found[key] = [name for name, value in values.items() if value == best]
    return found


def learning_curves(rows: Sequence[VariantRow], recipes: Mapping[str, Recipe | None]) -> list[LearningCurve]:
    """Curves of quality over the number of training rows, each from at least two finished runs.

    Args:
        rows: of `compare.json`.
        recipes: of the runs, by name; None if it cannot be read.
    """
    groups: dict[str, list[tuple[VariantRow, CurvePoint]]] = {}
    for row in rows:
        recipe = recipes[row.name]
        if recipe is not None and row.is_finished and row.quality is not None and row.train_rows:
            point = CurvePoint(rows=row.train_rows, quality=row.quality, interval=row.interval, variant=row.name)
            groups.setdefault(_fingerprint_without_rows(recipe), []).append((row, point))
    curves = []
    for group in groups.values():
        group.sort(key=lambda one: one[1].rows)
        points = tuple(point for _, point in group)
        if len({point.rows for point in points}) > 1:
            curves.append(LearningCurve(name=_name(group[0][0]), points=points))
    return curves


def _fingerprint_without_rows(recipe: Recipe) -> str:
    """The same for all runs of one curve."""
    dataset = recipe.dataset.model_copy(update={"max_train_samples": None})
    return fingerprint(recipe.model_copy(update={"dataset": dataset, "name": "", "output_dir": None}))


def _name(row: VariantRow) -> str:
    """The `--vary` values that the runs of a curve share."""
    return ", ".join(f"{key}={value}" for key, value in row.varied.items() if key != ROWS_KEY)


def comparability_warnings(runs: Mapping[str, Stages], metric: Metric | None, methods: Mapping[str, str]) -> list[str]:
    """One sentence for each reason why the runs are not directly comparable.

    Args:
        runs: by name.
        metric: the quality that is compared.
        methods: of the runs, as far as known.
    """
    checks: tuple[tuple[Callable[[Stages], Any], str], ...] = (
        (
            lambda run: _scored_rows(run, metric),
            "were not evaluated on the same held-out rows, so their quality cannot be compared",
        ),
        (
            lambda run: _device(run),
            "did not run on the same device, so memory, time and tokens/s cannot be compared",
        ),
        (
            lambda run: run.eval.retention and run.eval.retention.sha256,
            "were not measured on the same text, so their forgetting cannot be compared",
        ),
        (
            lambda run: run.metrics.smoke,
            "are not all smoke runs, so none of their figures can be compared",
        ),
        (
            lambda run: text(run.plan.model.name) if metric is not None and metric.key == "loss" else None,
            "do not have the same base model, so their losses per token may refer to different tokens",
        ),
    )
    found = [
        f"The variants {sentence}: {_groups(groups)}."
        for value_of, sentence in checks
        if len(groups := _grouped(runs, value_of)) > 1
    ]
    rate = _one_rate_for_all(runs, set(methods.values()))
    return [*found, rate] if rate else found


def _scored_rows(run: Stages, metric: Metric | None) -> tuple[str | None, str | None]:
    """The held-out rows of a run, and those of them that were answered where the metric counts answers."""
    answered = metric is not None and metric.key in COUNTED_ON_ANSWERS
    return _test_rows(run), answered_digest(run.eval) if answered else None


def _test_rows(run: Stages) -> str | None:
    return None if run.data is None else run.data.fingerprint.test


def _device(run: Stages) -> tuple[str | None, int | None]:
    device = Device() if run.environment is None else run.environment.device
    return device.name, device.count


def _grouped(runs: Mapping[str, Stages], value_of: Callable[[Stages], Any]) -> dict[Any, list[str]]:
    groups: dict[Any, list[str]] = {}
    for name, run in runs.items():
        groups.setdefault(value_of(run), []).append(name)
    groups.pop(None, None)
    return groups


def _groups(groups: Mapping[Any, list[str]]) -> str:
    shown = [
        ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") for names in groups.values()
    ]
    return " versus ".join(shown)


def _one_rate_for_all(runs: Mapping[str, Stages], methods: set[str]) -> str | None:
    """A warning if several methods were trained with the same learning rate."""
    rates = {run.plan.trainer.get("learning_rate") for run in runs.values()}
    if len(methods) < 2 or len(rates) != 1 or rates == {None}:
        return None
    return (
        f"All methods were trained with the learning rate {compact(rates.pop())}; methods differ in their best "
        "learning rate, so this ranking may be unfair."
    )
