"""Forgetting in numbers: the loss of a model on a text that the recipe names, before and after training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftcli.data.retention import RetentionText, read_retention
from peftcli.model.measure import router_silent
from peftcli.model.score import score_shared
from peftcli.plan.plan import Plan
from peftcli.progress import Progress


def load_retention(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> RetentionText | None:
    """The text of a plan; None where the recipe names none.

    Raises:
        DataError: the text cannot be read, or holds nothing that could be predicted.
    """
    asked = plan.evaluation
    if asked.retention is None:
        return None
    return read_retention(
        Path(asked.retention), tokenizer, length=plan.labels.max_length, tokens=asked.retention_tokens
    )


def base_retention(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, progress: Progress
) -> dict[str, Any]:
    """Measure the base: what stands in `eval.json` under `retention`, whose change is not known yet.

    Args:
        model: without its adapter.

    Returns:
        An object with that one key; an empty one where the recipe names no text.
    """
    text = load_retention(plan, tokenizer)
    if text is None:
        return {}
    return {"retention": _facts(text, _loss(text, plan, tokenizer, model, progress, "base: retention"), None)}


def adapter_retention(
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    progress: Progress,
    before: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Measure the adapter beside what `base_retention` found; of a text that changed in between no change is known.

    Args:
        before: `eval.json` with the base, None where it was not measured.

    Returns:
        As `base_retention`.
    """
    text = load_retention(plan, tokenizer)
    if text is None:
        return {}
    loss = _loss(text, plan, tokenizer, model, progress, "adapter: retention")
    known = (before or {}).get("retention")
    base = known["base_loss"] if known and known["sha256"] == text.digest() else None
    if known and base is None:
        progress.note(
            f"  note: {text.name} is no longer the text that the base was measured on; its change is not known"
        )
    return {"retention": _facts(text, base, loss)}


def _facts(text: RetentionText, base: float | None, adapter: float | None) -> dict[str, Any]:
    return {
        "path": text.name,
        "tokens": text.tokens,
        "dropped": dict(text.dropped.counts),
        "dropped_examples": text.dropped.places,
        "sha256": text.digest(),
        "base_loss": base,
        "adapter_loss": adapter,
        "change": None if base is None or adapter is None else adapter - base,
    }


def _loss(
    text: RetentionText,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    progress: Progress,
    what: str,
) -> float:
    """Nats per token; several processes share the windows and all get the whole result."""
    table, rows = text.table(), plan.evaluation_batch
    with router_silent(model):
        pad = tokenizer.pad_token_id or 0
        parts = score_shared(model, table, pad_id=pad, batch_rows=rows, progress=progress, what=what)
    return float(sum(part.nll for part in parts) / sum(part.tokens for part in parts))
