"""What the runs of a comparison came to: the content of `compare.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftcli.compare.curves import learning_curves
from peftcli.compare.doubts import find_doubts
from peftcli.compare.fronts import COSTS, best_of, front
from peftcli.errors import PeftcliError, RecipeError
from peftcli.recipe.load import load_recipe
from peftcli.recipe.schema import Recipe
from peftcli.report.load import Stages, figure, find, load_stages, text
from peftcli.report.metrics import BY_KEY, PRIMARY, Metric, interval, rows_scored
from peftcli.rundir import RunDir


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
    fronts = {cost: found for cost in COSTS if (found := front(rows, cost, better))}
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
        "doubts": find_doubts(known, metric, {name: one.adapter.method for name, one in recipes.items() if one}),
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
        return load_recipe(RunDir(folder).recipe).recipe
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
