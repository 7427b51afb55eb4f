"""The results of a comparison (`compare.json`): quality, cost, Pareto front, learning curves, and warnings
about runs that are not comparable.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftcli.compare.variants import ROWS_KEY, unique
from peftcli.errors import PeftcliError, RecipeError
from peftcli.plan.answered_rows import answered_digest
from peftcli.recipe.dump import fingerprint
from peftcli.recipe.load import load_run_recipe
from peftcli.recipe.schema import Recipe
from peftcli.report.format import compact
from peftcli.report.load import Stages, figure, find, load_stages, text
from peftcli.report.metrics import BY_KEY, COUNTED_ON_ANSWERS, PRIMARY, Metric, interval, rows_scored
from peftcli.run_dir import RunDir, read_json

RESULT = "compare.json"

Row = Mapping[str, Any]

COSTS = ("adapter_bytes", "peak_memory_bytes", "seconds", "retention_change")
"""Figures of a variant that quality is held against; lower is better."""
LOWER = (*COSTS, "loss", "trainable_parameters")
HIGHER = ("tokens_per_second", "merge_top1_agreement")


@dataclass(frozen=True)
class Entry:
    """One run of a comparison, trained or tried.

    Attributes:
        name: unique among them.
        folder: of the run.
        varied: what `--vary` set, empty for a run that was there already.
        exit_code: of its training; None where nothing was trained here.
        error: why it failed, None where it did not.
    """

    name: str
    folder: Path
    varied: Mapping[str, str] = field(default_factory=dict)
    exit_code: int | None = None
    error: str | None = None


def collect(name: str, entries: Sequence[Entry], home: Path) -> dict[str, Any]:
    """Read the runs and hold them against each other.

    Args:
        name: of the comparison.
        home: folder of the comparison; paths of runs are relative to it where they lie in it.
    """
    stages = {entry.name: _stages(entry.folder) for entry in entries}
    recipes = {entry.name: _recipe(entry.folder) for entry in entries}
    known = {name: found for name, found in stages.items() if found is not None}
    metric = _quality(list(known.values()))
    rows = [_row(entry, stages[entry.name], metric, home) for entry in entries]
    for row in rows:
        recipe = recipes[row["name"]]
        row["method"] = None if recipe is None else recipe.adapter.method
    better = "higher" if metric is None or metric.better is None else metric.better
    for key, names in best_of(rows, better).items():
        for row in rows:
            row["best"] += [key] if row["name"] in names else []
    fronts = {cost: found for cost in COSTS if (found := pareto_front(rows, cost, better))}
    for row in rows:
        row["front"] = [cost for cost, names in fronts.items() if row["name"] in names]
    scored = [count for found in known.values() if metric and (count := rows_scored(found, metric.key))]
    return {
        "schema": 1,
        "name": name,
        "status": "finished" if all(row["status"] == "finished" for row in rows) else "unfinished",
        "smoke": any(found.metrics.get("smoke") for found in known.values()),
        "task": next((found.metrics.get("task") for found in known.values()), None),
        "model": _shared(text(found.plan, "model", "name") for found in known.values()),
        "quality": None if metric is None else {"key": metric.key, "better": better, "rows": min(scored, default=None)},
        "doubts": comparability_warnings(
            known, metric, {name: one.adapter.method for name, one in recipes.items() if one}
        ),
        "variants": rows,
        "fronts": fronts,
        "curves": learning_curves(rows, recipes),
    }


def _stages(folder: Path) -> Stages | None:
    """What a run wrote, None where no stage of it has ended."""
    try:
        return load_stages(RunDir(folder))
    except PeftcliError:
        return None  # a variant that failed before its first stage ended; its error stands in its row


def _recipe(folder: Path) -> Recipe | None:
    """The recipe of a run, None where there is none or another version wrote it."""
    try:
        return load_run_recipe(RunDir(folder).recipe).recipe
    except RecipeError:
        return None


def _quality(found: Sequence[Stages]) -> Metric | None:
    """The metric that most of the runs have; of equally many, the first that the report speaks of."""
    counts = {key: sum(figure(one.metrics, "adapter", key) is not None for one in found) for key in PRIMARY}
    key = max(counts, key=lambda key: counts[key])
    return BY_KEY[key] if counts[key] else None


def _row(entry: Entry, found: Stages | None, metric: Metric | None, home: Path) -> dict[str, Any]:
    metrics = {} if found is None else found.metrics
    trainable, total = (figure(metrics, "parameters", key) for key in ("trainable", "total"))
    adapter, base = figure(metrics, "bytes", "adapter"), figure(metrics, "bytes", "base")
    bounds = interval(found, "adapter") if found is not None and metric and metric.key == "exact_match" else None
    return {
        "name": entry.name,
        "run": entry.folder.relative_to(home).as_posix() if entry.folder.is_relative_to(home) else entry.folder.name,
        "varied": dict(entry.varied),
        "status": _status(entry, metrics),
        "exit_code": entry.exit_code,
        "error": entry.error,
        "quality": None if metric is None else figure(metrics, "adapter", metric.key),
        "interval": None if bounds is None else list(bounds),
        "base_quality": None if metric is None else figure(metrics, "base", metric.key),
        "loss": figure(metrics, "adapter", "loss"),
        "base_loss": figure(metrics, "base", "loss"),
        "retention_change": figure(metrics, "retention", "change"),
        "trainable_parameters": trainable,
        "trainable_share": trainable / total if trainable is not None and total else None,
        "adapter_bytes": adapter,
        "base_bytes": base,
        "adapter_share": adapter / base if adapter is not None and base else None,
        "peak_memory_bytes": figure(metrics, "train", "peak_memory_bytes"),
        "seconds": figure(metrics, "train", "seconds"),
        "tokens_per_second": figure(metrics, "train", "tokens_per_second"),
        "steps": figure(metrics, "train", "steps"),
        "train_rows": figure(metrics, "data", "train_rows"),
        "merge_top1_agreement": figure(metrics, "merge", "top1_agreement"),
        "method": None,
        "data_cache": None if found is None else find(found.data, "cache"),
        "best": [],
        "front": [],
    }


def _status(entry: Entry, metrics: Mapping[str, Any]) -> str:
    """`finished`, `stopped`, `failed` or `not started`; a gate that is not met fails no training."""
    if entry.exit_code == 75:
        return "stopped"
    if entry.exit_code not in (None, 0, 7):
        return "failed"
    return str(metrics.get("status") or "not started")


def _shared(values: Any) -> str | None:
    found = set(values)
    return found.pop() if len(found) == 1 else None


def is_run(folder: Path) -> bool:
    """Whether a folder is a run, or a comparison, which holds runs."""
    return folder.is_dir() and (RunDir(folder).recipe.is_file() or (folder / RESULT).is_file())


def open_runs(folders: Sequence[Path]) -> list[Entry]:
    """The runs of some folders; a comparison among them stands for its variants.

    Raises:
        RecipeError: a folder is no run, or there are fewer than two.
    """
    found: list[Entry] = []
    for folder in folders:
        if not is_run(folder):
            raise RecipeError(
                f"{folder}: no run folder (recipe.yaml is missing); name runs that are there, or recipes to train"
            )
        path = Path(os.path.abspath(folder))
        found += [Entry(path.name, path)] if RunDir(path).recipe.is_file() else _variants(path)
    entries = list({entry.folder: entry for entry in found}.values())
    if len(entries) < 2:
        raise RecipeError(
            f"{', '.join(map(str, folders))}: fewer than two runs are nothing to compare; name more of them"
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
    """The variants that a comparison has trained in its own folder, in its order; one of other runs has none."""
    try:
        rows = read_json(home / RESULT)["variants"]
        return [_variant(home, row) for row in rows if (home / row["run"]).is_dir()]
    except (ValueError, KeyError, TypeError) as problem:
        raise RecipeError(f"{home / RESULT}: is no comparison of this version; train it again") from problem


def _variant(home: Path, row: dict[str, Any]) -> Entry:
    folder = home / row["run"]
    code, error = row["exit_code"], row["error"]
    if RunDir(folder).status() == "finished" and code != 7:  # trained alone since
        code, error = None, None
    return Entry(row["name"], folder, row["varied"], code, error)


def pareto_front(rows: Sequence[Row], cost: str, better: str) -> list[str]:
    """Names of the finished variants on the Pareto front, from the cheapest on.

    A variant is on it unless another one is at least as good and at most as costly, and one of the two truly.

    Args:
        cost: a key of the rows.
        better: `higher` or `lower`, of the quality.
    """
    sign = 1.0 if better == "higher" else -1.0
    points = [
        (row["name"], row[cost], sign * row["quality"])
        for row in rows
        if _counts(row) and row[cost] is not None and row["quality"] is not None
    ]
    if len(points) < 2:
        return []
    kept = [one for one in points if not any(_beats(other, one) for other in points)]
    return [name for name, _, _ in sorted(kept, key=lambda one: one[1])]


def _beats(other: tuple[str, float, float], one: tuple[str, float, float]) -> bool:
    return other[1] <= one[1] and other[2] >= one[2] and other[1:] != one[1:]


def best_of(rows: Sequence[Row], better: str) -> dict[str, list[str]]:
    """Names of the finished variants with the best figure, by key; none where all are alike."""
    found = {}
    for key in ("quality", *LOWER, *HIGHER):
        values = {row["name"]: row[key] for row in rows if _counts(row) and row[key] is not None}
        if len(set(values.values())) < 2:
            continue
        highest = better == "higher" if key == "quality" else key in HIGHER
        best = (max if highest else min)(values.values())
        found[key] = [name for name, value in values.items() if value == best]
    return found


def _counts(row: Row) -> bool:
    return bool(row["status"] == "finished")


def learning_curves(rows: Sequence[Mapping[str, Any]], recipes: Mapping[str, Recipe | None]) -> list[dict[str, Any]]:
    """Curves of quality over training rows, each of at least two finished runs.

    Args:
        rows: of `compare.json`.
        recipes: of the runs, by name; None for one that cannot be read.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        recipe = recipes[row["name"]]
        if recipe is not None and row["status"] == "finished" and row["quality"] is not None and row["train_rows"]:
            groups.setdefault(_apart_from_rows(recipe), []).append(row)
    curves = []
    for group in groups.values():
        points = sorted(group, key=lambda row: row["train_rows"])
        if len({row["train_rows"] for row in points}) > 1:
            curves.append({"name": _name(points[0]), "points": [_point(row) for row in points]})
    return curves


def _apart_from_rows(recipe: Recipe) -> str:
    """What is the same in two runs of one curve."""
    dataset = recipe.dataset.model_copy(update={"max_train_samples": None})
    return fingerprint(recipe.model_copy(update={"dataset": dataset, "name": "", "output_dir": None}))


def _name(row: Mapping[str, Any]) -> str:
    """What the runs of a curve share, in the words of `--vary`."""
    return ", ".join(f"{key}={value}" for key, value in row["varied"].items() if key != ROWS_KEY)


def _point(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"rows": row["train_rows"], "quality": row["quality"], "interval": row["interval"], "variant": row["name"]}


def comparability_warnings(runs: Mapping[str, Stages], metric: Metric | None, methods: Mapping[str, str]) -> list[str]:
    """One sentence for each reason why the runs cannot be held against each other as they are.

    Args:
        runs: by name.
        metric: the quality that is compared.
        methods: of the runs, as far as they are known.
    """
    answered = metric is not None and metric.key in COUNTED_ON_ANSWERS
    checks: tuple[tuple[Callable[[Stages], Any], str], ...] = (
        (
            lambda run: (find(run.data, "fingerprint", "test"), answered_digest(run.eval) if answered else None),
            "were not scored on the same held-out rows, so their quality cannot be compared",
        ),
        (
            lambda run: (text(run.environment, "device", "name"), figure(run.environment, "device", "count")),
            "did not run on the same device, so memory, time and tokens/s cannot be compared",
        ),
        (
            lambda run: find(run.eval, "retention", "sha256"),
            "were not measured on the same text, so their forgetting cannot be compared",
        ),
        (
            lambda run: find(run.metrics, "smoke"),
            "are not all smoke runs, so none of their figures can be compared",
        ),
        (
            lambda run: text(run.plan, "model", "name") if metric is not None and metric.key == "loss" else None,
            "have not the same base, so a loss per token may count other tokens",
        ),
    )
    found = [
        f"The variants {sentence}: {_groups(groups)}."
        for value_of, sentence in checks
        if len(groups := _grouped(runs, value_of)) > 1
    ]
    rate = _one_rate_for_all(runs, set(methods.values()))
    return [*found, rate] if rate else found


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
    return "; against ".join(shown)


def _one_rate_for_all(runs: Mapping[str, Stages], methods: set[str]) -> str | None:
    """What several methods with one learning rate cannot show."""
    rates = {figure(run.plan, "trainer", "learning_rate") for run in runs.values()}
    if len(methods) < 2 or len(rates) != 1 or rates == {None}:
        return None
    return (
        f"All methods were trained with the learning rate {compact(rates.pop())}; each has a best one of its own, so a "
        "low score may be the rate's fault."
    )
