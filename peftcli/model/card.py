"""The model card of an adapter: what it is, on what it was trained, and how well it did."""

from pathlib import Path
from typing import Any

import yaml

from peftcli.plan.choices import EIGHT_BIT
from peftcli.recipe.rules import IMAGES, SEQUENCE, TOKENS
from peftcli.rundir import RunDir, read_json, write_text

LABELS = {
    "loss": "loss (nats per trained token)",
    "token_accuracy": "token accuracy",
    "exact_match": "exact match",
    "chrf": "chrF",
    "unfinished_answers": "answers that did not stop",
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "entity_precision": "entity precision",
    "entity_recall": "entity recall",
    "entity_f1": "entity F1",
    "mae": "mean absolute error",
    "r2": "R squared",
}
PIPELINES = {SEQUENCE: "text-classification", TOKENS: "token-classification", IMAGES: IMAGES}
"""The Hub's names of tasks with labels."""


def write_card(run: RunDir) -> None:
    """Write `adapter/README.md` from the run's JSON files."""
    plan, data, evaluation = read_json(run.plan), read_json(run.data), read_json(run.eval)
    base = Path(plan["model"]["name"]).name if Path(plan["model"]["name"]).is_absolute() else plan["model"]["name"]
    head: dict[str, Any] = {"library_name": "peft", "tags": ["peft", "lora"]}
    if plan["task"] in PIPELINES:
        head["pipeline_tag"] = PIPELINES[plan["task"]]
    if not base.startswith("tiny:") and base.count("/") == 1:
        head["base_model"] = base
    chosen = {decision["key"]: decision["value"] for decision in plan["decisions"]}
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=True).strip(),
        "---",
        "",
        f"# {plan['name']}",
        "",
        f"A PEFT adapter ({chosen['adapter']}) for {base}, made with peftcli.",
        *(["", "**A smoke run on a random stand-in: of no use but as a rehearsal.**"] if plan["smoke"] else []),
        "",
        f"- trained on {data['train_rows']} rows ({data['format']}), {_tested(data)}",
        f"- data fingerprint {data['fingerprint']['train'][:16]}",
        f"- {plan['parameters']['trainable']} trainable parameters, base in {chosen['model.dtype']}"
        + (" quantized to 4 bit" if "quantization.compute_dtype" in chosen else "")
        + (" quantized to 8 bit" if EIGHT_BIT in chosen else ""),
        "- licence: to be stated by whoever publishes it; that of the base and of the data apply",
        "",
        *_table(evaluation),
    ]
    if outputs := (evaluation.get("adapter") or {}).get("labels"):
        lines += ["", f"Labels, in the order of its outputs: {', '.join(outputs)}."]
    write_text(run.adapter / "README.md", "\n".join(lines) + "\n")


def _tested(data: dict[str, Any]) -> str:
    return f"tested on {data['test_rows']} others" if data["test_rows"] else "all there are, so it was not tested"


def _table(evaluation: dict[str, Any]) -> list[str]:
    models = [name for name in ("base", "adapter") if evaluation.get(name)]
    if not models:
        return []
    lines = ["| on the test rows | " + " | ".join(models) + " |", "|---|" + "---:|" * len(models)]
    for key, label in LABELS.items():
        if key == "loss" and not any("perplexity" in evaluation[name] for name in models):
            label = "loss"
        values = [evaluation[name].get(key) for name in models]
        if any(value is not None for value in values):
            shown = ["-" if value is None else f"{value:.4f}" for value in values]
            lines.append(f"| {label} | " + " | ".join(shown) + " |")
    return lines
