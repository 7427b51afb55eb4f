"""`merge`: folds, saves and reloads a model, compares it with the adapter, and deletes it if they disagree."""

import gc
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftcli.data.prepare import PreparedData
from peftcli.errors import GateNotMet, MemoryExhausted, RecipeError
from peftcli.merge.drift import Comparison, Drift, rounding_limit
from peftcli.merge.fold import bare_base, fold, skeleton_names
from peftcli.merge.placement import (
    FreeMemory,
    Placement,
    check_memory,
    choose_placements,
    measure_free_memory,
    placement_note,
)
from peftcli.merge.save import folding_bytes, write_config, write_weights
from peftcli.model.adapter_files import replace_folder, write_companions
from peftcli.model.evaluate import Evaluation, answered_rows, decoding_for, evaluate_model
from peftcli.model.files import Source, end_names, loaded_weights, original_weights, stored_names
from peftcli.model.load import DTYPES, load_base
from peftcli.model.manifest import MANIFEST, build_merged_manifest
from peftcli.model.oom import is_out_of_memory
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
KINDS = ("dequantized", "original")
"""Base weights that an adapter can be merged into."""
LIMITS_OF_FEW = (Gate("merge_kl_nats", "<=", 0.01),)
ROUNDING = "merge_mean_abs_logit_difference"
"""The drift that is limited to what rounding explains."""


@dataclass(frozen=True)
class Candidate:
    """A merged model that was written and evaluated."""

    into: str
    folder: Path
    drift: Drift
    measured: Evaluation | None
    bytes: int
    compared_on: str
    dtype: str

    @property
    def loss(self) -> float | None:
        """Loss on the test rows, None if there are none."""
        return None if self.measured is None else self.measured.metrics.loss

    def worse(self, *, by_loss: bool) -> float:
        """Criterion between candidates, lower is better: the loss, or the drift if some have no loss."""
        return self.loss if by_loss and self.loss is not None else self.drift.mean_abs_logit_difference


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
    with _explained_out_of_memory("while the adapter was loaded"):
        model, tokenizer = target.load()
    comparison = Comparison(data, tokenizer, settings.batch_rows, progress)
    try:
        reference = comparison.logits(model, "adapter")
        rounding = _rounding(target, model, reference, settings)
        with _explained_out_of_memory("while the adapter was folded into its base"):
            written = _write_all(target, model, tokenizer, data, final, settings)
        del model
        _free_memory()
        candidates = [
            _measure(target, (into, folder, size), reference, comparison, settings) for into, folder, size in written
        ]
        by_loss = all(one.loss is not None for one in candidates)
        best = min(candidates, key=lambda one: one.worse(by_loss=by_loss))
        limits = _limits(best.drift, settings, rounding)
        value = _merge_json(best, candidates, comparison, settings, limits)
        value = replace(value, seconds=round(time.monotonic() - begun, 3))
        if not value.met:
            _fail(best, value, quantized=target.base.quantization is not None)
        replace_folder(best.folder, final)
    finally:
        for into in KINDS:
            shutil.rmtree(_staging(final, into), ignore_errors=True)
    return value


def _rounding(
    target: Target, model: PreTrainedModel, reference: list[torch.Tensor], settings: MergeSettings
) -> Gate | None:
    """The limit that rounding sets; None where the base weights change too, because they were quantized or narrowed."""
    stored = settings.dtype or target.base.dtype
    wider = DTYPES[stored].itemsize >= DTYPES[target.base.dtype].itemsize
    if target.base.quantization is not None or not wider:
        return None
    limit = rounding_limit(model, DTYPES[target.base.dtype], reference)
    return Gate(ROUNDING, "<=", float(f"{limit:.3g}"))


def _limits(drift: Drift, settings: MergeSettings, rounding: Gate | None) -> tuple[Gate, ...]:
    """The merge gates of the recipe, or the default limits."""
    asked = tuple(gate for gate in settings.gates if gate.name.startswith("merge_"))
    if asked:
        return asked
    few = drift.positions < FEW_POSITIONS and drift.kl_nats is not None
    return (*(LIMITS_OF_FEW if few else DEFAULT_LIMITS), *(() if rounding is None else (rounding,)))


def _staging(final: Path, into: str) -> Path:
    """The folder in which a merged model is written before it is known to be good."""
    return final.with_name(f"{final.name}.{into}.staging")


@contextmanager
def _explained_out_of_memory(when: str) -> Iterator[None]:
    """Say of an out-of-memory error when it happened in a merge, and that nothing is lost.

    Raises:
        MemoryExhausted: in its place.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as problem:
        if not is_out_of_memory(problem):
            raise
        raise MemoryExhausted(
            f"out of memory {when}: {' '.join(str(problem).split())[:200]}; nothing of the merged model was kept, and "
            "the adapter is unchanged; close other programs that use the memory, or merge on a machine with more"
        ) from problem


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
    wider = [] if best.dtype == "float32" else ["a wider --dtype"]
    fixes = [*(f"try --into {one}" for one in others), *wider, "set another limit in gates"]
    unexplained = ROUNDING.removeprefix("merge_") in value.limit and not (quantized or wider)
    why = " (more than float32 rounding explains, so a part of the adapter may be missing)" if unexplained else ""
    raise DriftTooLarge(
        f"the model merged into the {best.into} base is too far from the adapter: {'; '.join(exceeded)}{why}; it was "
        f"not saved; use the adapter unmerged, or {', or '.join(fixes)}",
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
    wanted: Sequence[str] = KINDS if settings.into == "best" else (settings.into,)
    if not quantized:
        wanted = ("original",)
    dtype = DTYPES[settings.dtype or target.base.dtype]
    written = []
    # The wrapped model has PEFT's prefixes in its module names, so the unwrapped base model is folded.
    bare = bare_base(model)
    for into in wanted:
        folder = _staging(final, into)
        shutil.rmtree(folder, ignore_errors=True)
        from_files = quantized and into == "original"
        source = _original(target.base, bare) if from_files else loaded_weights(bare)
        folded = fold(bare, target.adapter, source)
        weights = sum(folded.sizes.values()) * torch.empty((), dtype=dtype).element_size()
        free = measure_free_memory(on_gpu=target.base.device == "cuda", with_own=True)
        check_memory(weights, folding_bytes(folded, dtype), free)
        folder.mkdir(parents=True)
        size = write_weights(folded, dtype, folder)
        write_config(bare, dtype, folded.unties, folder)
        write_companions(bare, tokenizer, data.stop_ids, folder)
        stored = settings.dtype or target.base.dtype
        write_json(folder / MANIFEST, build_merged_manifest(target.identity, stored, folder, target.base.tokenizer))
        written.append((into, folder, size))
    return written


def _original(base: Base, bare: PreTrainedModel) -> Source:
    """The unquantized weights of a base model, from its files if these have all of them under the names of the model.

    Otherwise the model is loaded completely: transformers renames weights of earlier versions and fuses experts, and
    new tokens have no rows in the files.
    """
    stored, ends = stored_names(base.path, base.revision), end_names(bare)
    tied = f"{ends[1]}.weight" if ends else ""
    converted = stored is not None and any(name not in stored for name in skeleton_names(bare) if name != tied)
    if not TASKS[base.task].images and not base.add_tokens and not converted:
        return original_weights(base, bare)
    return loaded_weights(load_base(replace(base, device="cpu"), quantized=False))


def _measure(
    target: Target,
    written: tuple[str, Path, int],
    reference: list[torch.Tensor],
    comparison: Comparison,
    settings: MergeSettings,
) -> Candidate:
    """Load a candidate as a user would, and compare it with the adapter; on another device if memory runs out.

    Args:
        written: kind, folder and bytes of the candidate.
        reference: outputs of the adapter.

    Raises:
        MemoryExhausted: it fits nowhere.
    """
    weights = written[2]
    free = measure_free_memory(on_gpu=target.base.device == "cuda")
    check_memory(weights, 0, free)
    *others, last = choose_placements(weights, free)
    for place in others:
        _announce(place, weights, free, comparison.progress)
        try:
            return _measure_on(place, target, written, reference, comparison, settings)
        except MemoryExhausted as problem:
            comparison.progress.note(f"note: {problem}")
        # Outside the handler, which keeps the tensors of the failed attempt alive.
        _free_memory()
    _announce(last, weights, free, comparison.progress)
    return _measure_on(last, target, written, reference, comparison, settings)


def _announce(place: Placement, weights: int, free: FreeMemory, progress: Progress) -> None:
    if note := placement_note(place, weights, free):
        progress.note(f"note: {note}")


def _measure_on(
    place: Placement,
    target: Target,
    written: tuple[str, Path, int],
    reference: list[torch.Tensor],
    comparison: Comparison,
    settings: MergeSettings,
) -> Candidate:
    into, folder, weights = written
    data, tokenizer = comparison.data, comparison.tokenizer
    stored = settings.dtype or target.base.dtype
    merged = replace(
        target.base,
        path=str(folder),
        revision=None,
        quantization=None,
        absorbed=(),
        add_tokens=(),
        dtype=stored,
    )
    with _explained_out_of_memory(f"while the merged model was loaded on {place.name}"):
        model = load_base(replace(merged, device=place.device), max_memory=place.max_memory)
    if not place.offloads and "disk" in (getattr(model, "hf_device_map", None) or {}).values():
        raise MemoryExhausted(f"the layers of the merged model do not fit on {place.name} one by one")
    model.eval()
    what = f"merged into {into}"
    logits = comparison.logits(model, what, place.rows)
    whole = place.rows is None and data.holds_out
    measured = _scored(model, data, tokenizer, settings, comparison.progress, what) if whole else None
    del model
    _free_memory()
    drift = comparison.drift(reference[: len(logits)], logits)
    return Candidate(into, folder, drift, measured, weights, place.name, stored)


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
    limits: tuple[Gate, ...],
) -> MergeJson:
    drift = asdict(best.drift)
    met = {name: _met(gate, drift[name]) for gate in limits for name in (gate.name.removeprefix("merge_"),)}
    return MergeJson(
        into=best.into,
        dtype=best.dtype,
        rows_from=settings.rows_from or comparison.rows_from,
        compared_on=best.compared_on,
        **drift,
        limit={gate.name.removeprefix("merge_"): gate.text for gate in limits},
        limits_met=met,
        met=all(one is not False for one in met.values()),
        metrics=None if best.measured is None else best.measured.scores(),
        candidates=tuple(MergeCandidate(into=one.into, loss=one.loss, **asdict(one.drift)) for one in candidates),
        samples=_samples(best, comparison.data, settings),
        bytes=best.bytes,
    )


def _samples(best: Candidate, data: PreparedData, settings: MergeSettings) -> tuple[MergeSample, ...]:
    """The first answers with their prompts; none if nothing was answered."""
    if best.measured is None:
        return ()
    rows = answered_rows(settings.evaluation, data, settings.seed)
    prompts = data.test.column("prompt")
    answered = list(zip(rows, best.measured.answers, strict=True))[: settings.evaluation.samples]
    return tuple(MergeSample(prompt=prompts[row].as_py(), merged=answer.text) for row, answer in answered)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
