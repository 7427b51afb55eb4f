"""`merge`: fold, save, reload what was saved, compare it with the adapter, and keep it only if it agrees."""

import gc
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftcli.data.prepare import PreparedData
from peftcli.errors import GateNotMet, RecipeError
from peftcli.merge.drift import Comparison, Drift
from peftcli.merge.fold import bare_base, fold
from peftcli.merge.save import write_config, write_weights
from peftcli.model.adapter_files import replace_folder, write_companions
from peftcli.model.evaluate import Evaluation, answered_rows, decoding_for, evaluate_model
from peftcli.model.files import Source, loaded_weights, original_weights
from peftcli.model.generation import Answer
from peftcli.model.load import DTYPES, load_base
from peftcli.model.manifest import MANIFEST, build_merged_manifest
from peftcli.model.target import Target
from peftcli.plan.plan import Base
from peftcli.progress import Progress
from peftcli.recipe.fields import Gate
from peftcli.recipe.schema import EvaluationSection
from peftcli.run_dir import write_json
from peftcli.tasks.registry import TASKS

DEFAULT_LIMITS = (Gate("merge_top1_agreement", ">=", 0.98),)
"""Held against the drift where the recipe's gates say nothing about the merge."""
FEW_POSITIONS = 200
"""With fewer, one near-tie decides the agreement, and the divergence is held instead."""
LIMITS_OF_FEW = (Gate("merge_kl_nats", "<=", 0.01),)


@dataclass(frozen=True)
class Candidate:
    """One merged model that was written and measured."""

    into: str
    folder: Path
    drift: Drift
    measured: Evaluation | None
    bytes: int

    @property
    def loss(self) -> float | None:
        """Of the test rows, None without any."""
        return None if self.measured is None else self.measured.metrics.loss

    @property
    def worse(self) -> float:
        """What decides between candidates, lower is better: the loss, or without test rows the drift."""
        return self.drift.mean_abs_logit_difference if self.loss is None else self.loss


@dataclass(frozen=True)
class MergeSettings:
    """What the user asked for.

    Attributes:
        into: `dequantized`, `original` or `best` (both are made, the one with the lower test loss is kept; without test
            rows the one with the smaller drift).
        dtype: of the stored weights, None for the dtype of the run.
        gates: those of the recipe.
        batch_rows: rows measured at once.
        seed: for sampled answers.
        rows_from: what the rows of the comparison are called, where they are neither test rows nor training rows.
    """

    into: str
    dtype: str | None
    gates: tuple[Gate, ...]
    evaluation: EvaluationSection
    batch_rows: int
    seed: int
    rows_from: str | None = None


def merge(
    target: Target, data: PreparedData, final: Path, settings: MergeSettings, progress: Progress
) -> dict[str, Any]:
    """Write a stand-alone model of an adapter and measure its drift from it.

    Args:
        target: an adapter.
        data: whose test rows serve for the measuring; without any, training rows serve for the drift alone.
        final: folder of the merged model; it appears when all is well, and not before.

    Returns:
        The content of `merge.json`.

    Raises:
        RecipeError: the base asked for is not one that the adapter can be merged into.
        GateNotMet: the merged model is too far from the adapter; nothing is left of it, and the exception's `merge`
            holds what was measured.
    """
    begun = time.monotonic()
    assert target.adapter is not None
    if target.base.absorbed and target.base.quantization is not None and settings.into != "dequantized":
        raise RecipeError(
            f"--into {settings.into}: the earlier stages of this run were trained on "
            f"{target.base.quantization['bits']}-bit weights, so they fit those alone; leave --into out"
        )
    model, tokenizer = target.load()
    comparison = Comparison(data, tokenizer, settings.batch_rows, progress)
    reference = comparison.logits(model, "adapter")
    written = _write_all(target, model, tokenizer, data, final, settings)
    del model
    _forget()
    try:
        candidates = [
            _measure(target, (into, folder, size), reference, comparison, settings) for into, folder, size in written
        ]
        kept = min(candidates, key=lambda one: one.worse)
        value = _merge_json(kept, candidates, comparison, settings, time.monotonic() - begun, target)
        if not value["met"]:
            _fail(kept, value, quantized=target.base.quantization is not None)
        replace_folder(kept.folder, final)
    finally:
        for _, folder, _ in written:
            shutil.rmtree(folder, ignore_errors=True)
    return value


class DriftTooLarge(GateNotMet):
    """The tolerance was not met; `merge` holds the content of `merge.json`."""

    def __init__(self, message: str, merge: dict[str, Any]) -> None:
        super().__init__(message)
        self.merge = merge


def _fail(kept: Candidate, value: dict[str, Any], *, quantized: bool) -> None:
    crossed = [
        f"{name} is {value[name]:.4g}, the limit is {limit}"
        for name, limit in value["limit"].items()
        if value["limits_met"][name] is False
    ]
    others = [one for one in ("dequantized", "original") if one != kept.into] if quantized else []
    fixes = [*(f"--into {one}" for one in others), "a wider --dtype", "another limit in gates"]
    raise DriftTooLarge(
        f"the model merged into the {kept.into} base is too far from the adapter: {'; '.join(crossed)}; nothing was "
        f"kept; try {', '.join(fixes[:-1])} or {fixes[-1]}",
        value,
    )


def _write_all(
    target: Target,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    final: Path,
    settings: MergeSettings,
) -> list[tuple[str, Path, int]]:
    """Write each candidate beside the final folder: its kind, folder and bytes."""
    assert target.adapter is not None
    quantized = target.base.quantization is not None
    wanted: Sequence[str] = ("dequantized", "original") if settings.into == "best" else (settings.into,)
    if not quantized:
        wanted = ("original",)
    dtype = DTYPES[settings.dtype or target.base.dtype]
    written = []
    # The wrapped base names its layers with PEFT's prefixes; a bare one of the same weights is what is folded.
    bare = bare_base(model)
    for into in wanted:
        folder = final.with_name(f"{final.name}.{into}.staging")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        from_files = quantized and into == "original"
        source = _original(target.base, bare) if from_files else loaded_weights(bare)
        folded = fold(bare, target.adapter, source)
        size = write_weights(folded, dtype, folder)
        write_config(bare, dtype, folded.unties, folder)
        write_companions(bare, tokenizer, data.stop_ids, folder)
        stored = settings.dtype or target.base.dtype
        write_json(folder / MANIFEST, build_merged_manifest(target.identity, stored, folder, target.base.tokenizer))
        written.append((into, folder, size))
    return written


def _original(base: Base, bare: PreTrainedModel) -> Source:
    """The weights of a base without quantization; of a model of images loaded whole, since its files may name them as
    earlier versions of transformers did."""
    if not TASKS[base.task].images:
        return original_weights(base, bare)
    return loaded_weights(load_base(replace(base, device="cpu"), quantized=False))


def _measure(
    target: Target,
    written: tuple[str, Path, int],
    reference: list[torch.Tensor],
    comparison: Comparison,
    settings: MergeSettings,
) -> Candidate:
    """Load what was written, as anybody would, and hold it against the adapter.

    Args:
        written: its kind, folder and bytes.
        reference: outputs of the adapter.
    """
    into, folder, size = written
    data, tokenizer = comparison.data, comparison.tokenizer
    stored = settings.dtype or target.base.dtype
    device = target.base.device
    if device == "cuda" and size > 0.9 * torch.cuda.mem_get_info()[0]:
        device = "cpu"  # the card held the quantized weights; unpacked they are several times as large
    merged = replace(target.base, path=str(folder), revision=None, quantization=None, absorbed=(), dtype=stored)
    merged = replace(merged, device=device)
    model = load_base(merged)
    model.eval()
    what = f"merged into {into}"
    logits = comparison.logits(model, what)
    measured = _scored(model, data, tokenizer, settings, comparison.progress, what) if data.holds_out else None
    del model
    _forget()
    return Candidate(into, folder, comparison.drift(reference, logits), measured, size)


def _scored(
    model: PreTrainedModel,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    settings: MergeSettings,
    progress: Progress,
    what: str,
) -> Evaluation:
    decoding = decoding_for(settings.evaluation, data, tokenizer, settings.seed)
    rows = settings.batch_rows
    return evaluate_model(
        model, tokenizer, data, settings.evaluation, decoding, batch_rows=rows, progress=progress, what=what
    )


def _met(gate: Gate, value: float | None) -> bool | None:
    return None if value is None else gate.met(value)


def _merge_json(
    kept: Candidate,
    candidates: list[Candidate],
    comparison: Comparison,
    settings: MergeSettings,
    seconds: float,
    target: Target,
) -> dict[str, Any]:
    drift = asdict(kept.drift)
    few = kept.drift.positions < FEW_POSITIONS and kept.drift.kl_nats is not None
    default = LIMITS_OF_FEW if few else DEFAULT_LIMITS
    limits = tuple(gate for gate in settings.gates if gate.name.startswith("merge_")) or default
    met = {name: _met(gate, drift[name]) for gate in limits for name in (gate.name.removeprefix("merge_"),)}
    return {
        "schema": 1,
        "into": kept.into,
        "dtype": settings.dtype or target.base.dtype,
        "rows_from": settings.rows_from or comparison.rows_from,
        **drift,
        "limit": {gate.name.removeprefix("merge_"): gate.text for gate in limits},
        "limits_met": met,
        "met": all(one is not False for one in met.values()),
        "metrics": None if kept.measured is None else kept.measured.figures(),
        "candidates": [{"into": one.into, "loss": one.loss, **asdict(one.drift)} for one in candidates],
        "samples": [
            {"prompt": comparison.data.test.column("prompt")[row].as_py(), "merged": answer.text}
            for row, answer in _shown_answers(kept, comparison.data, settings)
        ],
        "bytes": kept.bytes,
        "seconds": round(seconds, 3),
    }


def _shown_answers(kept: Candidate, data: PreparedData, settings: MergeSettings) -> list[tuple[int, Answer]]:
    """The first answers, each with the index of its test row; none where nothing was answered."""
    if kept.measured is None:
        return []
    rows = answered_rows(settings.evaluation, data, settings.seed)
    return list(zip(rows, kept.measured.answers, strict=True))[: settings.evaluation.samples]


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
