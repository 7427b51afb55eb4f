"""`metrics.json`: the stages' JSON files drawn together into what a script reads, with the gates held against it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftcli.metrics.interval import wilson_interval
from peftcli.recipe.fields import Gate
from peftcli.run_dir import RunDir, read_json, write_json

MERGE_FIGURES = ("into", "max_abs_logit_difference", "mean_abs_logit_difference", "kl_nats", "top1_agreement")
TRAIN_FIGURES = (
    "steps",
    "rows",
    "epochs",
    "tokens",
    "trained_tokens",
    "tokens_per_second",
    "seconds",
    "peak_memory_bytes",
    "resumed_from_step",
)
RETENTION_FIGURES = ("path", "tokens", "base_loss", "adapter_loss", "change")
FORGETTING_GATES = {"forgetting_loss": "adapter_loss", "forgetting_change": "change"}
"""Names of gates, and the figure of `retention` that each watches."""
DATA_FIGURES = ("train_rows", "test_rows", "dropped_rows", "truncated_rows", "leaked_rows")


def write_metrics(run: RunDir, gates: Sequence[Gate]) -> dict[str, Any]:
    """Write `metrics.json` from the stages that have run; a figure that was not measured is null.

    Returns:
        What was written.
    """
    plan = read_json(run.plan)
    data, train, evaluation, merge = (_read(path) for path in (run.data, run.train, run.eval, run.merge))
    value: dict[str, Any] = {
        "schema": 1,
        "status": train.get("status", "started"),
        "task": plan["task"],
        "smoke": plan["smoke"],
        "base": evaluation.get("base"),
        "adapter": evaluation.get("adapter"),
        "merged": merge.get("metrics"),
        "answers": _answers(evaluation, merge),
        "retention": _retention(evaluation),
        "train": {name: train.get(name) for name in TRAIN_FIGURES} if train else None,
        "data": {name: data.get(name) for name in DATA_FIGURES},
        "parameters": plan["parameters"],
        "bytes": {"adapter": _adapter_bytes(run), "base": plan["model"].get("bytes")},
        "merge": {name: merge.get(name) for name in MERGE_FIGURES} if merge else None,
    }
    value["gates"] = [_judge(gate, value) for gate in gates]
    write_json(run.metrics, value)
    return value


def unmet(metrics: dict[str, Any]) -> list[str]:
    """The gates that were measured and not met, as sentences."""
    return [
        f"{gate['name']} is {gate['value']:.4g}, the recipe asks for {gate['limit']}"
        for gate in metrics["gates"]
        if gate["met"] is False
    ]


def _judge(gate: Gate, metrics: dict[str, Any]) -> dict[str, Any]:
    holder, name = "adapter", gate.name
    if gate.name.startswith("merge_"):
        holder, name = "merge", gate.name.removeprefix("merge_")
    elif gate.name in FORGETTING_GATES:
        holder, name = "retention", FORGETTING_GATES[gate.name]
    value = (metrics[holder] or {}).get(name)
    return {"name": gate.name, "limit": gate.text, "value": value, "met": None if value is None else gate.met(value)}


def _answers(evaluation: dict[str, Any], merge: dict[str, Any]) -> dict[str, Any] | None:
    """How many of the test rows were answered, and how far that number lets the exact match be off."""
    rows = int(evaluation.get("generated_rows") or 0)
    if not rows:
        return None
    models = {"base": evaluation.get("base"), "adapter": evaluation.get("adapter"), "merged": merge.get("metrics")}
    ratios = {name: (model or {}).get("exact_match") for name, model in models.items()}
    intervals = {name: None if one is None else list(wilson_interval(one, rows)) for name, one in ratios.items()}
    return {"rows": rows, "test_rows": evaluation["rows"], "exact_match_interval": intervals}


def _retention(evaluation: dict[str, Any]) -> dict[str, Any] | None:
    found = evaluation.get("retention")
    return {name: found.get(name) for name in RETENTION_FIGURES} if found else None


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _adapter_bytes(run: RunDir) -> int | None:
    sizes = [file.stat().st_size for file in run.adapter.glob("adapter_model*.safetensors")]
    return sum(sizes) if sizes else None
