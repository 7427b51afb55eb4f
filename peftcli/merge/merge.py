"""`merge`: folds, saves and reloads a model, compares it with the adapter, and deletes it if they disagree."""

import gc
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftcli.data.prepare import PreparedData
from peftcli.errors import GateNotMet, RecipeError
from peftcli.merge.drift import Comparison, Drift
from peftcli.merge.fold import bare_base, fold
from peftcli.merge.save import write_config, write_weights
from peftcli.model.adapter_files import replace_folder, write_companions
from peftcli.model.evaluate import Evaluation, decoding_for, evaluate_model
from peftcli.model.files import Source, loaded_weights, original_weights
from peftcli.model.load import DTYPES, load_base
from peftcli.model.manifest import MANIFEST, build_merged_manifest
from peftcli.model.target import Target
from peftcli.plan.plan import Base
from peftcli.progress import Progress
from peftcli.recipe.fields import Gate
from peftcli.recipe.schema import EvaluationSection
from peftcli.results import MergeCandidate, MergeJson, MergeSample
from peftcli.run_dir import write_json
from peftcli.tasks.registry import TASKS

DEFAULT_LIMITS = (Gate("merge_top1_agreement", ">=", 0.98),)
"""Limits on the drift if the recipe has no gates for the merge."""
FEW_POSITIONS = 200
"""With fewer positions a single near-tie decides the agreement, so the KL divergence is limited instead."""
LIMITS_OF_FEW = (Gate("merge_kl_nats", "<=", 0.01),)


@dataclass(frozen=True)
class Candidate:
    """A merged model that was written and evaluated."""

    into: str
    folder: Path
    drift: Drift
    measured: Evaluation | None
    bytes: int

    @property
    def loss(self) -> float | None:
        """Loss on the test rows, None if there are none."""
        return None if self.measured is None else self.measured.metrics.loss

    @property
    def worse(self) -> float:
        """Criterion between candidates, lower is better: the loss, or the drift if there are no test rows."""
        return self.drift.mean_abs_logit_difference if self.loss is None else self.loss


@dataclass(frozen=True)
class MergeSettings:
    """The options of the command.

    Attributes:
        into: `dequantized`, `original`, or `best` (both are built, and the one with the lower test loss is saved;
            without test rows the one with the smaller drift).
        dtype: of the saved weights, None for the dtype of the run.
        gates: of the recipe.
        batch_rows: batch size of the evaluation.
        seed: for sampled answers.
        rows_from: name of the compared rows, if they are neither test rows nor training rows.
    """

    into: str
    dtype: str | None
    gates: tuple[Gate, ...]
    evaluation: EvaluationSection
    batch_rows: int
    seed: int
    rows_from: str | None = None


def merge(target: Target, data: PreparedData, final: Path, settings: MergeSettings, progress: Progress) -> MergeJson:
    """Write a stand-alone model from an adapter, and measure its drift.

    Args:
        target: an adapter.
        data: its test rows are used for the evaluation; if it has none, training rows are used for the drift only.
        final: folder of the merged model; created only after all checks passed.

    Returns:
        The content of `merge.json`.

    Raises:
        RecipeError: the adapter cannot be merged into the requested base.
        GateNotMet: the merged model differs too much from the adapter and was deleted; the exception's `merge` has the
            measurements.
    """
    begun = time.monotonic()
    assert target.adapter is not None
    if target.base.absorbed and target.base.quantization is not None and settings.into != "dequantized":
        raise RecipeError(
            f"--into {settings.into}: the earlier stages of this run were trained on "
            f"{target.base.quantization['bits']}-bit weights and only fit those; remove --into"
        )
    model, tokenizer = target.load()
    comparison = Comparison(data, tokenizer, settings.batch_rows, progress)
    reference = comparison.logits(model, "adapter")
    written = _write_all(target, model, tokenizer, data, final, settings)
    del model
    _free_memory()
    try:
        candidates = [
            _measure(target, (into, folder, size), reference, comparison, settings) for into, folder, size in written
        ]
        best = min(candidates, key=lambda one: one.worse)
        value = _merge_json(best, candidates, comparison, settings, time.monotonic() - begun, target)
        if not value.met:
            _fail(best, value, quantized=target.base.quantization is not None)
        replace_folder(best.folder, final)
    finally:
        for _, folder, _ in written:
            shutil.rmtree(folder, ignore_errors=True)
    return value


class DriftTooLarge(GateNotMet):
    """The tolerance was not met; `merge` has the content of `merge.json`."""

    def __init__(self, message: str, merge: MergeJson) -> None:
        super().__init__(message)
        self.merge = merge


def _fail(best: Candidate, value: MergeJson, *, quantized: bool) -> None:
    exceeded = [
        f"{name} is {getattr(value, name):.4g}, the limit is {limit}"
        for name, limit in value.limit.items()
        if value.limits_met[name] is False
    ]
    others = [one for one in ("dequantized", "original") if one != best.into] if quantized else []
    fixes = [*(f"--into {one}" for one in others), "a wider --dtype", "another limit in gates"]
    raise DriftTooLarge(
        f"the model merged into the {best.into} base is too far from the adapter: {'; '.join(exceeded)}; it was not "
        f"saved; try {', '.join(fixes[:-1])} or {fixes[-1]}",
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
    """Write each candidate next to the final folder; returns kind, folder and bytes."""
    assert target.adapter is not None
    quantized = target.base.quantization is not None
    wanted: Sequence[str] = ("dequantized", "original") if settings.into == "best" else (settings.into,)
    if not quantized:
        wanted = ("original",)
    dtype = DTYPES[settings.dtype or target.base.dtype]
    written = []
    # The wrapped model has PEFT's prefixes in its module names, so the unwrapped base model is folded.
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
    """The unquantized weights of a base model; an image model is loaded completely, since its files may use the names
    of earlier versions of transformers."""
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
    """Load a candidate as a user would, and compare it with the adapter.

    Args:
        written: kind, folder and bytes of the candidate.
        reference: outputs of the adapter.
    """
    into, folder, size = written
    data, tokenizer = comparison.data, comparison.tokenizer
    stored = settings.dtype or target.base.dtype
    device = target.base.device
    if device == "cuda" and size > 0.9 * torch.cuda.mem_get_info()[0]:
        device = "cpu"  # the dequantized weights are several times as large as the quantized ones that fit the GPU
    merged = replace(target.base, path=str(folder), revision=None, quantization=None, absorbed=(), dtype=stored)
    merged = replace(merged, device=device)
    model = load_base(merged)
    model.eval()
    what = f"merged into {into}"
    logits = comparison.logits(model, what)
    measured = _scored(model, data, tokenizer, settings, comparison.progress, what) if data.holds_out else None
    del model
    _free_memory()
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
    best: Candidate,
    candidates: list[Candidate],
    comparison: Comparison,
    settings: MergeSettings,
    seconds: float,
    target: Target,
) -> MergeJson:
    drift = asdict(best.drift)
    few = best.drift.positions < FEW_POSITIONS and best.drift.kl_nats is not None
    default = LIMITS_OF_FEW if few else DEFAULT_LIMITS
    limits = tuple(gate for gate in settings.gates if gate.name.startswith("merge_")) or default
    met = {name: _met(gate, drift[name]) for gate in limits for name in (gate.name.removeprefix("merge_"),)}
    answers = [] if best.measured is None else best.measured.answers
    prompts = comparison.rows.column("prompt")
    shown = min(settings.evaluation.samples, len(answers))
    return MergeJson(
        into=best.into,
        dtype=settings.dtype or target.base.dtype,
        rows_from=settings.rows_from or comparison.rows_from,
        **drift,
        limit={gate.name.removeprefix("merge_"): gate.text for gate in limits},
        limits_met=met,
        met=all(one is not False for one in met.values()),
        metrics=None if best.measured is None else best.measured.scores(),
        candidates=tuple(MergeCandidate(into=one.into, loss=one.loss, **asdict(one.drift)) for one in candidates),
        samples=tuple(MergeSample(prompt=prompts[row].as_py(), merged=answers[row].text) for row in range(shown)),
        bytes=best.bytes,
        seconds=round(seconds, 3),
    )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
