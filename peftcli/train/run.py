"""`train`: baseline, training, adapter and evaluation in one process that can be stopped at any step."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, enable_full_determinism
from trl import SFTConfig

from peftcli.data.prepare import PreparedData
from peftcli.errors import Diverged
from peftcli.model.adapter_files import save_adapter, write_card
from peftcli.model.classification import tune_threshold
from peftcli.model.distributed import from_first, gather
from peftcli.model.evaluate import (
    Evaluation,
    adapter_retention,
    answered_rows,
    base_retention,
    decoding_for,
    estimate_evaluation,
    evaluate_model,
    evaluation_json,
    load_retention,
    sampling_note,
    with_threshold,
)
from peftcli.model.hardware import peak_memory_bytes
from peftcli.model.init_from import check_initial_weights, load_initial_weights
from peftcli.model.load import DTYPES, load_adapter, load_base
from peftcli.model.manifest import check_adapter, read_manifest, refuse_unknown_tokens, stated_base
from peftcli.model.padding_free import RowCheck, check_rows, enable_padding_free, kernels_used
from peftcli.model.varlen_attention import rejected
from peftcli.plan.answered_rows import answered_digest, rows_digest
from peftcli.plan.plan import DTYPE_BYTES, Plan
from peftcli.progress import Progress
from peftcli.report.format import duration
from peftcli.results import (
    Calibration,
    EvalJson,
    OutOfMemory,
    Retention,
    TrainBatching,
    TrainJson,
    load,
    load_or_default,
    save,
)
from peftcli.run_dir import RunDir, log_mark
from peftcli.tasks.base import implementation
from peftcli.tasks.registry import TASKS
from peftcli.train import checkpoint
from peftcli.train.arguments import naming_arguments
from peftcli.train.callbacks import CalibrationCallback, ForwardCallback, RunCallback
from peftcli.train.disk import Forecast, forecast
from peftcli.train.evaluations import EarlyStopping, best_step
from peftcli.train.machines import on_this_machine
from peftcli.train.module_selection import select_modules
from peftcli.train.precision import downcast_saved_modules, free_trained_base
from peftcli.train.schedule import ScheduleCallback
from peftcli.train.step import OVERFLOW, StepTrainer, TrainerSetup
from peftcli.train.stop import StoppableProgress, StopRequests, is_first_process

SAVE_EVERY_SECONDS = 600.0
"""Default interval between checkpoints (`budget.save_every`)."""
FINISH_SECONDS = 5.0
"""Time reserved for writing the adapter and the report."""


@dataclass(frozen=True)
class Session:
    """How a session of a run starts, and what may stop it.

    Attributes:
        stops: requests to stop early.
        resume_from: a verified checkpoint to resume from.
        fingerprint: data, base and versions of the run.
        checkpoint_bytes: expected size of a checkpoint.
        baseline: `eval.json` with the baseline of an earlier stage or another run.
        trainer: the trainer arguments set in the recipe.
        extends: a finished run is trained further.
        only_steps: of that run nothing but the number of steps has changed.
    """

    stops: StopRequests
    resume_from: Path | None
    fingerprint: dict[str, Any]
    checkpoint_bytes: int
    baseline: Path | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    extends: bool = False
    only_steps: bool = False


@dataclass(frozen=True)
class TrainResult:
    """How training ended; `stop_reason` is None if the run reached its last step."""

    steps: int
    stop_reason: str | None


def train(
    plan: Plan,
    run: RunDir,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    session: Session,
) -> TrainResult:
    """Train the adapter of a plan and compare it with its base.

    Writes `log.jsonl`, `checkpoints/`, `adapter/`, `train.json` and `eval.json`. A run stopped by a signal has a
    complete checkpoint and `train.json`; a run stopped by the clock has its adapter and evaluation too.

    Args:
        run: the existing run folder.
        data: tokenized train and test rows.
        session: how this session starts, and what may stop it early.

    Raises:
        Diverged: a loss, gradient or weight is not finite, or the gradient stays 0.
        MachineError: the model overflows float16.
        MemoryExhausted: even small micro-batches do not fit.
        Stopped: a stop was requested outside the training loop.
        MachineError: the weights cannot be loaded, or a package for a trainer argument is missing.
        RecipeError: the libraries reject a trainer argument.
    """
    stops, resume_from = session.stops, session.resume_from
    load_retention(plan, tokenizer)  # problems with the text are reported before loading the weights
    if resume_from is None and plan.adapter.init_from is not None:
        check_initial_weights(plan.adapter.init_from)
    trainer = _build_trainer(plan, run, data, tokenizer, progress, session)
    plan = trainer.setup.plan  # with the modules that the gradient selected
    stoppable = StoppableProgress(
        progress, stops, "before the first step" if resume_from is None else "before the next step"
    )
    known = _known_baseline(run, session, resuming=resume_from is not None)
    baseline = _baseline(plan, run, data, tokenizer, trainer.model, stoppable, known=known)
    if resume_from is None and plan.adapter.init_from is not None:
        progress.note(load_initial_weights(trainer.model, plan.adapter.init_from, plan.base))
    if plan.frees_base:
        free_trained_base(trainer.model)
    callback = RunCallback(
        trainer,
        run.log,
        progress,
        stops,
        save_every=plan.budget.save_every or SAVE_EVERY_SECONDS,
        reserve=FINISH_SECONDS
        + _evaluation_reserve(plan, data, tokenizer, trainer.model, stoppable, session, baseline),
        device=plan.base.device,
        writes=is_first_process(),
    )
    forward = ForwardCallback(plan.checkpointed_blocks, trainer.optimizations, progress.note)
    trainer.add_callback(forward)
    trainer.add_callback(
        ScheduleCallback(trainer, progress.note, extends=session.extends, only_steps=session.only_steps)
    )
    trainer.add_callback(CalibrationCallback(trainer, plan, data.train.column("length"), progress))
    trainer.add_callback(callback)  # its clock starts after the calibration
    if trainer.ranks is not None:
        trainer.add_callback(trainer.ranks)
    stop = plan.early_stop
    early = None if stop is None else EarlyStopping(stop.patience, stop.threshold, restarts=session.extends)
    if early is not None:
        trainer.add_callback(early)
    with naming_arguments(session.trainer):
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    reason = callback.stop_reason
    steps = trainer.state.global_step
    stopped_early = early is not None and early.stopped
    if reason is None:
        _note_best(trainer, progress, stopped_early=stopped_early)
    if reason is not None and not callback.stopped_by_clock:
        write_train(run, trainer, callback, forward.optimizations, stopped_early=stopped_early)
        return TrainResult(steps, reason)
    tuned = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    plan = _with_threshold(plan, data, tokenizer, tuned, progress)
    _save_adapter(trainer, run, plan)
    # After the adapter: a finished training implies that its adapter exists.
    write_train(run, trainer, callback, forward.optimizations, stopped_early=stopped_early)
    downcast_saved_modules(tuned, plan.base.dtype)
    final: Progress = StoppableProgress(progress, stops, "during the final evaluation") if reason is None else progress
    _measure_adapter(plan, run, data, tokenizer, tuned, final, baseline.found)
    return TrainResult(steps, reason)


def _build_trainer(
    plan: Plan,
    run: RunDir,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    session: Session,
) -> StepTrainer:
    """Load the base, select modules by gradient if the recipe asks for it, check the kernels, and build the trainer."""
    resume_from = session.resume_from
    if plan.trainer.get("full_determinism"):
        # Not only in the trainer: cuBLAS reads its configuration once, and kernels are checked before training.
        enable_full_determinism(plan.seed)
    model = load_base(plan.base, shards=plan.shards)
    if not TASKS[plan.task].images:
        refuse_unknown_tokens(
            model, max(side.store.largest_token() for side in (data.train, data.test_split, data.validation_split))
        )
    plan, chosen = select_modules(plan, run, data, tokenizer, model, resuming=resume_from is not None)
    if chosen is not None:
        progress.note(chosen)
    setup = TrainerSetup(
        plan,
        data,
        tokenizer,
        row_check=_check_rows(plan, model, progress) if plan.batching.kind == "padding_free" else None,
        resume_from=resume_from,
        fingerprint=session.fingerprint,
        checkpoint_bytes=session.checkpoint_bytes,
    )
    with naming_arguments(session.trainer):
        trainer: StepTrainer = implementation(TASKS[plan.task].trainer)(setup, run.checkpoints, model)
    for note in trainer.notes:
        progress.note(f"  note: {note}")
    if plan.base.dtype == "float16":
        trainer.check_float16()
    return trainer


def _note_best(trainer: StepTrainer, progress: Progress, *, stopped_early: bool) -> None:
    """Say which step is kept, and whether training stopped early."""
    state, best = trainer.state, best_step(trainer)
    stop = trainer.setup.plan.early_stop
    if stopped_early and stop is not None and state.global_step < state.max_steps:
        progress.note(
            f"  stopped early at step {state.global_step} of {state.max_steps}: no improvement in {stop.patience} "
            "evaluations"
        )
    if best is not None:
        kept = "its adapter is kept" if best.kept else f"the adapter of step {state.global_step} is kept"
        progress.note(f"  best step {best.step}: {best.metric} {best.value:.4g} on the {best.rows_from} rows; {kept}")


def _with_threshold(
    plan: Plan, data: PreparedData, tokenizer: PreTrainedTokenizerBase, model: Any, progress: Progress
) -> Plan:
    """The plan with the threshold of the trained model, if the recipe asks to choose it on the validation rows."""
    if plan.evaluation.threshold != "auto":
        return plan
    rows = plan.evaluation_batch
    found, score = tune_threshold(model, tokenizer, data, batch_rows=rows, progress=progress)
    progress.note(f"  threshold {found:.4g}: the best micro F1 on the validation rows, {score:.4g}")
    return _decided(plan, found)


def _decided(plan: Plan, threshold: float | None) -> Plan:
    base = replace(plan.base, threshold=threshold)
    return replace(plan, base=base, evaluation=with_threshold(plan.evaluation, base))


def _save_adapter(trainer: StepTrainer, run: RunDir, plan: Plan) -> None:
    """Save the trained adapter.

    Args:
        plan: with the threshold of the trained model.
    """
    setup = trainer.setup
    tuned = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if trainer.residual is not None:
        trainer.residual.convert_to_plain_lora()
    if is_first_process():
        if trainer.ranks is not None:
            trainer.ranks.write(run.ranks)
        save_adapter(tuned, setup.tokenizer, plan, setup.data, run.adapter)


def _check_rows(plan: Plan, model: PreTrainedModel, progress: Progress) -> RowCheck:
    """Whether batches may be padding-free; notes why not, and which kernels failed their check."""
    check = RowCheck("the attention of this model cannot be replaced")
    if enable_padding_free(model):
        dtype = DTYPES[plan.base.dtype]
        # As in training, so that the kernels are checked in the dtype in which they will be used.
        with torch.autocast(plan.base.device, dtype, enabled=dtype != torch.float32):
            check = check_rows(model)
    instead = "rows of similar length are batched together instead" if check.problem is None else "it is not used"
    for kernel, why in rejected.items():
        progress.note(f"  note: the attention kernel {kernel} failed its check on this machine: {why}; {instead}")
    if check.problem is not None:
        progress.note(f"  note: padded batches are used: {check.problem}")
    return check


def evaluate_trained(
    plan: Plan,
    run: RunDir,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    session: Session,
) -> TrainResult:
    """Run the evaluation that an earlier session could not, with its saved adapter.

    Raises:
        Stopped: a stop was requested again.
        MachineError: the weights cannot be loaded.
    """
    stoppable = StoppableProgress(progress, session.stops, "during the final evaluation")
    adapter = on_this_machine(run.adapter, run.received)
    check_adapter(adapter)
    model = load_adapter(load_base(plan.base, shards=plan.shards), adapter)
    known = _known_baseline(run, session, resuming=True)
    baseline = _baseline(plan, run, data, tokenizer, model, stoppable, known=known)
    stated = read_manifest(adapter)
    if stated is not None:
        plan = _decided(plan, stated_base(stated).threshold)
    _measure_adapter(plan, run, data, tokenizer, model, stoppable, baseline.found)
    return TrainResult(from_first(lambda: load_or_default(TrainJson, run.train).steps or 0), None)


def run_forecast(plan: Plan, trainer: Mapping[str, Any]) -> Forecast:
    """Disk space of a run; that of a merged model is checked when merging.

    Args:
        trainer: the trainer arguments set in the recipe.

    Raises:
        MachineError: a package for a trainer argument is missing.
        RecipeError: the libraries reject a trainer argument.
    """
    kind = implementation(TASKS[plan.task].arguments)
    with naming_arguments(trainer, only=True):
        arguments = kind(output_dir="unused", **plan.trainer)
    keep = (arguments.save_total_limit or 2) + bool(arguments.load_best_model_at_end)
    width = DTYPE_BYTES[plan.adapter_dtype]
    return forecast(plan.trained, optimizer=str(arguments.optim.value), keep=keep, width=width)


def _known_baseline(run: RunDir, session: Session, *, resuming: bool) -> Path | None:
    return run.eval if resuming and run.eval.is_file() else session.baseline


@dataclass(frozen=True)
class Baseline:
    """What is known of the base before the training.

    Attributes:
        found: `eval.json` with the base alone, None where it was not measured.
        seconds: that its measuring took.
        on_test: it was measured on the test rows, not on the forgetting text alone.
    """

    found: EvalJson | None
    seconds: float
    on_test: bool


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Disables the adapter within the context."""
    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        yield


def _baseline(
    plan: Plan,
    run: RunDir,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    progress: Progress,
    *,
    known: Path | None,
) -> Baseline:
    """Measure the base alone, or read what was measured earlier.

    Args:
        known: a file of the first process that contains it.
    """
    if sampled := sampling_note(plan.evaluation, data, plan.seed):
        progress.note(f"  note: {sampled}")
    stored = from_first(lambda: None if known is None else load(EvalJson, known))
    if stored is not None and not _answered_alike(stored, plan, data):
        if plan.base.absorbed:
            progress.note("  note: the base was measured on other test rows in an earlier stage, so it is left out")
            stored = replace(stored, base=None, samples=(), baseline_seconds=0.0)
        else:
            progress.note("  note: the base answered other test rows before (evaluation.rows), so it is measured again")
            stored = None
    if stored is not None:
        seconds = stored.baseline_seconds
        return Baseline(None if seconds is None else stored, seconds or 0.0, on_test=stored.base is not None)
    tested = plan.evaluation.baseline and data.holds_out
    if not tested and plan.evaluation.forgetting_text is None:
        return Baseline(None, 0.0, on_test=False)
    begun = time.monotonic()
    with adapter_off(model):
        measured = _measure(plan, data, tokenizer, model, progress, "base") if tested else None
        retention = base_retention(plan, tokenizer, model, progress)
    _check_losses(plan, measured, retention, trained=False)
    seconds = time.monotonic() - begun
    before = _evaluation(plan, data, tokenizer, {"base": measured, "adapter": None})
    before = replace(before, retention=retention, baseline_seconds=round(seconds, 3))
    if is_first_process():
        save(run.eval, before)
    return Baseline(before, seconds, on_test=tested)


def _evaluation_reserve(
    plan: Plan,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    progress: Progress,
    session: Session,
    baseline: Baseline,
) -> float:
    """Seconds to set aside for the last evaluation, half as many again as were measured or estimated.

    Args:
        model: before the first step, with its adapter.
        baseline: whose time counts; where the base was not measured on the test rows, some of them are measured now.
    """
    if not any(gather(session.stops.seconds_left is not None)):
        return 0.0  # there is no clock to set time aside for
    seconds = baseline.seconds
    tested = data.holds_out and not baseline.on_test
    for asked in [*([data] if tested else []), *([data.scored_on_validation()] if data.validates else [])]:
        seconds += estimate_evaluation(
            model,
            tokenizer,
            asked,
            plan.evaluation,
            decoding_for(plan.evaluation, asked, tokenizer, plan.seed),
            batch_rows=plan.evaluation_batch,
            progress=progress,
        )
    if tested:
        progress.note(f"  the last evaluation will take at most about {duration(seconds)}, measured on its first rows")
    return 1.5 * seconds


def _answered_alike(stored: EvalJson, plan: Plan, data: PreparedData) -> bool:
    """Whether the base in an `eval.json` has answered the test rows that the adapter will answer."""
    if stored.base is None or answered_digest(stored) is None:
        return True
    return answered_digest(stored) == rows_digest(answered_rows(plan.evaluation, data, plan.seed))


def _check_losses(plan: Plan, measured: Evaluation | None, retention: Retention | None, *, trained: bool) -> None:
    """Stop if a loss is not finite; every process has the same.

    Args:
        retention: the result of `base_retention` or `adapter_retention`.
        trained: it is the trained adapter, not the base.

    Raises:
        Diverged: a loss is not finite.
    """
    whose = "the adapter after training" if trained else f"{plan.base.name} before training"
    forgetting = None
    if retention is not None:
        forgetting = retention.adapter_loss if trained else retention.base_loss
    on_test = None if measured is None else float(measured.scores().figures["loss"])
    fix = "set model.dtype: float32, and check the weight files of the base against the original ones"
    for rows, loss in (("the test rows", on_test), ("evaluation.forgetting_text", forgetting)):
        if loss is not None and not math.isfinite(loss):
            problem = Diverged(
                f"the loss of {whose} on {rows} is {loss} in {plan.base.dtype}; "
                f"{OVERFLOW if plan.base.dtype == 'float16' else fix}"
            )
            problem.in_all = True
            raise problem


def _measure(
    plan: Plan, data: PreparedData, tokenizer: PreTrainedTokenizerBase, model: Any, progress: Progress, what: str
) -> Evaluation:
    decoding = decoding_for(plan.evaluation, data, tokenizer, plan.seed)
    rows = plan.evaluation_batch
    return evaluate_model(
        model, tokenizer, data, plan.evaluation, decoding, batch_rows=rows, progress=progress, what=what
    )


def _evaluation(
    plan: Plan, data: PreparedData, tokenizer: PreTrainedTokenizerBase, measured: dict[str, Evaluation | None]
) -> EvalJson:
    decoding = decoding_for(plan.evaluation, data, tokenizer, plan.seed)
    return evaluation_json(data, plan.evaluation, decoding, measured)


def _measure_adapter(
    plan: Plan,
    run: RunDir,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    progress: Progress,
    before: EvalJson | None,
) -> None:
    """Evaluate the adapter, and write it with its baseline into `eval.json` and the model card."""
    asked = data.scored_on_validation()
    validated = _measure(plan, asked, tokenizer, model, progress, "validation rows") if data.validates else None
    after = _measure(plan, data, tokenizer, model, progress, "adapter") if data.holds_out else None
    retention = adapter_retention(plan, tokenizer, model, progress, before)
    _check_losses(plan, after, retention, trained=True)
    if not is_first_process():
        return
    value = _evaluation(plan, data, tokenizer, {"base": None, "adapter": after})
    if validated is not None:
        rows = answered_rows(plan.evaluation, asked, plan.seed)
        value = replace(
            value, validation=validated.scores(), validation_answered=len(rows), validation_sha256=rows_digest(rows)
        )
    if before is not None:
        value = replace(value, base=before.base, baseline_seconds=before.baseline_seconds)
        if before.base is not None:
            pairs = zip(value.samples, before.samples, strict=True)
            value = replace(value, samples=tuple(replace(sample, base=old.base) for sample, old in pairs))
    save(run.eval, replace(value, retention=retention))
    write_card(run)


def rows_seen(epochs: float, rows: int, arguments: SFTConfig) -> int:
    """Number of rows trained on, over all epochs; the last step of an epoch may be short.

    Args:
        epochs: as counted by the trainer, by steps.
        rows: number of training rows.
    """
    step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    whole = int(epochs)
    steps = round((epochs - whole) * -(-rows // step))
    return whole * rows + int(min(steps * step, rows))


def write_train(
    run: RunDir,
    trainer: StepTrainer,
    callback: RunCallback,
    optimizations: frozenset[str],
    *,
    stopped_early: bool = False,
) -> None:
    """Write `train.json`; the counts are of all processes, and the first one writes.

    Args:
        optimizations: names of those in use.
        stopped_early: early stopping ended the training.
    """
    plan, resume_from = trainer.setup.plan, trainer.setup.resume_from
    state = trainer.state
    rows = len(trainer.train_dataset)
    counted = trainer.counters()
    if not is_first_process():
        return
    seconds, of_tokens = counted["seconds"], trainer.counts == "tokens"
    facts = TrainJson(
        status="finished" if callback.stop_reason is None else "stopped",
        stop_reason=callback.stop_reason,
        steps=state.global_step,
        planned_steps=state.max_steps,
        rows=rows_seen(state.epoch or 0.0, rows, trainer.args),
        epochs=state.epoch,
        tokens=int(counted["tokens"]) if of_tokens else None,
        trained_tokens=int(counted["trained_tokens"]) if of_tokens else None,
        tokens_per_second=round(counted["tokens"] / seconds, 1) if seconds and of_tokens else None,
        seconds=round(seconds, 3),
        peak_memory_bytes=peak_memory_bytes(trainer.args.device.type),
        resident_before_bytes=callback.resident_before,
        resumed_from_step=None if resume_from is None else int(resume_from.name.rsplit("-", 1)[1]),
        best=best_step(trainer),
        stopped_early=stopped_early if plan.early_stop is not None else None,
        first_loss=callback.losses[0][1] if callback.losses else None,
        last_loss=callback.losses[-1][1] if callback.losses else None,
        out_of_memory=tuple(
            OutOfMemory(step=step, micro_batches=count) for step, count in trainer.micro_batches.events
        ),
        batching=TrainBatching(
            kind=plan.batching.kind if trainer.micro_batches.padding_free else "padded",
            attention=tuple(sorted(kernels_used)) if trainer.micro_batches.padding_free else None,
            rejected_kernels={str(name): reason for name, reason in rejected.items()},
            row_difference=None if trainer.setup.row_check is None else trainer.setup.row_check.difference,
            real_tokens=trainer.micro_batches.real,
            padded_tokens=trainer.micro_batches.padded,
        ),
        optimizations=tuple(sorted(optimizations)),
        calibration=None if trainer.calibration is None else Calibration(**trainer.calibration),
        stamp=dict(trainer.setup.fingerprint),
        log=log_mark(run.log),
    )
    save(run.train, facts)
    checkpoint.clear_staging(run.checkpoints)
