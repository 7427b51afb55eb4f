"""The body of `train`: run folder, lock, deadline, data, training."""

import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.cli.commands import finish, load, raise_unmet, show_result, shown_run
from peftcli.cli.console import Shown, plan_lines
from peftcli.cli.launcher import all_do, first_decides, several_processes
from peftcli.cli.recipes import is_run_folder, loaded_stages
from peftcli.data.file_state import file_state
from peftcli.errors import RecipeError, Stopped
from peftcli.plan.plan import Plan
from peftcli.plan.requirements import check_hardware, check_packages
from peftcli.recipe.load import Loaded
from peftcli.recipe.schema import Recipe
from peftcli.recipe.stages import stage_recipes
from peftcli.report.forecast import forecast_line
from peftcli.results import DataJson, MetricsJson, save
from peftcli.run_dir import RunDir, file_sha256
from peftcli.summary import refuse_lost
from peftcli.train.baseline import reuse_blocker
from peftcli.train.deadline import deadline, session_note, wall_clock_limit
from peftcli.train.disk import cannot_write, check_disk_space, check_writable
from peftcli.train.lock import RunLock
from peftcli.train.resume import (
    OpenedRun,
    accepted_data,
    accepted_stamp,
    begin_longer,
    count_steps,
    keep_base,
    open_run,
    refuse_changes,
    run_fingerprint,
    write_recipe,
)
from peftcli.train.stop import (
    StoppableProgress,
    StopRequests,
    forget_stop_file,
    is_first_of_machine,
    is_first_process,
    seconds_since_start,
)
from peftcli.typed_json import parse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftcli.cli.pipeline import Planned
    from peftcli.data.prepare import PreparedData
    from peftcli.data.split_record import SplitRecord


TIMEOUT_SECONDS = 1800.0
"""Default of `trainer.ddp_timeout` in transformers: how long a process waits for the others."""

OWN_OPTIMIZERS = (None, "adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "sgd")
"""Optimizers of torch and transformers; many of the others need bitsandbytes. None is the trainer's default."""


@dataclass(frozen=True)
class TrainFlags:
    """The flags of `train` that are not recipe keys."""

    output_dir: Path | None
    resume: bool
    overwrite: bool
    smoke: bool
    as_json: bool
    force: tuple[str, ...] = ()
    baseline_from: Path | None = None


def train_command(recipe_name: str, overrides: Sequence[str], flags: TrainFlags) -> None:
    """Train a recipe, or resume its run."""
    loaded = load(recipe_name, overrides, smoke=flags.smoke)
    own = Path(recipe_name) if is_run_folder(Path(recipe_name)) and not flags.smoke else None
    run = RunDir(flags.output_dir or own or Path(loaded.recipe.output_dir or Path("runs") / loaded.recipe.name))
    now, budget = time.time(), loaded.recipe.budget.wall_clock
    limit, name = wall_clock_limit(budget, deadline(now), now - seconds_since_start())
    lock = RunLock(run.path)
    patience = float(loaded.recipe.trainer.get("ddp_timeout", TIMEOUT_SECONDS))
    stopping = StopRequests(run.path, limit, limit_name=name)
    with several_processes(patience), stopping as stops, closing(lock):

        def prepare_folder() -> OpenedRun:
            if not run.path.is_file():
                check_writable(run.path)
                lock.acquire()
            found = open_run(
                run,
                loaded.recipe,
                overwrite=flags.overwrite,
                resume=flags.resume,
                allowed=flags.force,
                new_run=new_run_command(recipe_name, overrides),
            )
            if not found.finished and found.longer is None:
                run.path.mkdir(parents=True, exist_ok=True)
                write_recipe(run, loaded.recipe)
            return found

        beginning = first_decides(prepare_folder)
        all_do(lambda: _prepare_here(run, beginning))
        with shown_run(run.library_log if not beginning.finished else None) as (shown, streams):
            if beginning.suspect:
                all_do(lambda: _refuse_changed_rows(loaded, run, shown, flags))
            for line in (*beginning.notes, session_note(budget, now)):
                if line is not None:
                    shown.note(line)
            reason = None
            if not beginning.finished:
                reason = _train_stages(loaded, run, shown, stops, beginning, flags)

            def conclude() -> None:
                if beginning.finished:
                    refuse_lost(run)
                metrics = finish(run, loaded.recipe)
                show_result(run, metrics, streams, as_json=flags.as_json)
                _raise_unless_good(run, metrics, reason)

            first_decides(conclude)  # all exit with its code


def new_run_command(name: str, overrides: Sequence[str]) -> str:
    """The command line of a new run of a recipe, without its folder."""
    words = [word for text in overrides for word in ("--set", text)]
    return shlex.join(["peftcli", "train", name, *words])


def _refuse_changed_rows(loaded: Loaded, run: RunDir, shown: Shown, flags: TrainFlags) -> None:
    """Compare the rows with those of a finished run, whose data files have another size or time.

    Raises:
        RecipeError: rows are new, or gone.
    """
    import_peft(loaded.recipe)
    from peftcli.cli.pipeline import changed_rows, plan_recipe, prepare_data

    last = loaded_stages(loaded, smoke=flags.smoke)[-1]
    _, data = prepare_data(plan_recipe(last, smoke=flags.smoke).plan, shown)
    changed = changed_rows(run, data)
    if changed is None:
        return
    more = "" if last.recipe.trainer.get("max_steps", -1) <= 0 else "raise trainer.max_steps and "
    raise RecipeError(
        f"{run.path} is already finished, but its data changed since then: {changed}\nto train it further on all rows, "
        f"{more}pass --force data (its test rows stay test rows); to train it again, pass --overwrite"
    )


def _prepare_here(run: RunDir, beginning: OpenedRun) -> None:
    """Create the run folder on this machine, which may have its own disk, and remove leftovers of an earlier launch."""
    if not is_first_of_machine():
        return
    if not beginning.finished:
        check_writable(run.path)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(run.path, error) from error
    forget_stop_file(run.path)
    _forget_received(run)


def _train_stages(
    loaded: Loaded, run: RunDir, shown: Shown, stops: StopRequests, beginning: OpenedRun, flags: TrainFlags
) -> str | None:
    """Train the stages of a recipe, the last one in the run folder itself; returns why that one stopped early, if so.

    Raises:
        Stopped: an earlier stage stopped.
    """
    check_packages(loaded.recipe)
    import_peft(loaded.recipe)
    from peftcli.model.hardware import probe_machine

    stages = loaded_stages(loaded, smoke=flags.smoke)
    machine = probe_machine()
    for stage in stages:
        check_hardware(stage.recipe, machine)
    before: list[RunDir] = []
    for number, stage in enumerate(stages[:-1], start=1):
        part = run.stage(number, loaded.recipe.stages[number - 1].name)
        shown.note(f"stage {number} of {len(stages)}: {part.path.name}")
        _train_part(stage, part, shown, stops, flags, before)
        before.append(part)
    if before:
        shown.note(f"stage {len(stages)} of {len(stages)}: {loaded.recipe.stages[-1].name}")
    return _train(stages[-1], run, shown, stops, beginning, flags, before)


def _train_part(
    loaded: Loaded,
    run: RunDir,
    shown: Shown,
    stops: StopRequests,
    flags: TrainFlags,
    before: Sequence[RunDir],
) -> None:
    """Train an earlier stage in its own folder, unless it is finished."""
    recipe = loaded.recipe.model_copy(update={"gates": ()})

    def prepare_folder() -> OpenedRun:
        found = open_run(run, recipe, overwrite=False, resume=False, allowed=flags.force)
        if not found.finished:
            run.path.mkdir(parents=True, exist_ok=True)
            write_recipe(run, recipe)
        return found

    beginning = first_decides(prepare_folder)
    for line in beginning.notes:
        shown.note(line)
    if beginning.finished:
        return
    reason = _train(loaded, run, shown, stops, beginning, flags, before)
    first_decides(lambda: finish(run, recipe))
    if reason is not None:
        stopped = Stopped(
            f"stopped in stage {run.path.name} by {reason}; a complete checkpoint is in {run.checkpoints}; "
            "run the same command again to resume"
        )
        stopped.in_all = True
        raise stopped


def _train(
    loaded: Loaded,
    run: RunDir,
    shown: Shown,
    stops: StopRequests,
    beginning: OpenedRun,
    flags: TrainFlags,
    before: Sequence[RunDir],
) -> str | None:
    """The heavy part of `train`; returns why it stopped early, if so.

    Args:
        before: the runs of earlier stages, whose results are merged into the base.
    """
    from peftcli.cli.pipeline import earlier_record, forecast_run, save_record
    from peftcli.data.input_files import record_inputs
    from peftcli.model.files import base_facts
    from peftcli.model.hardware import describe_environment
    from peftcli.model.load import base_hash
    from peftcli.train.machines import check_alike, on_this_machine, what_must_be_alike
    from peftcli.train.run import Session, evaluate_trained, run_forecast, train

    resumes = beginning.resume_from is not None or beginning.trained
    continued = earlier_record(loaded.recipe, before, resumed=run if resumes else None)
    heard = StoppableProgress(shown, stops, "before the first step")
    planned, tokenizer, data = all_do(lambda: _planned_rows(loaded, run, heard, before, continued, smoke=flags.smoke))
    plan = planned.plan
    environment = describe_environment(planned.machine, command_line())
    base = base_facts(plan.base.path, plan.base.revision)
    weights = base_hash(base.weights_sha256 or base.config_sha256, plan.base.absorbed)
    stamp = run_fingerprint(data.facts, weights, environment.packages)
    check_alike(what_must_be_alike(plan, stamp), flags.force)
    before_now = accepted_stamp(run, beginning.stamp)
    accepted = all_do(lambda: refuse_changes(before_now, stamp, [*flags.force, *accepted_data(beginning)]))
    for note in accepted:
        shown.note(f"  note: {note}")
    same_test_rows = before_now.get("data.test") in (None, stamp["data.test"])
    for note in first_decides(lambda: _adapt_run(run, loaded.recipe, beginning, data, same_test_rows=same_test_rows)):
        shown.note(note)
    forecast = forecast_run(planned)
    decided = plan.as_json(forecast)
    facts = replace(parse(DataJson, data.facts), file_state=file_state(loaded.recipe.dataset))
    if is_first_process():
        save(run.plan, decided)
        save(run.environment, replace(environment, recipe_sha256=file_sha256(run.recipe)))
        save(run.data, facts)
        save_record(run, data, continued)
        save(run.inputs, record_inputs(loaded.recipe, run))
    all_do(lambda: data.raise_if_crossed(f"peftcli data {loaded.path}"))
    for line in [*plan_lines(decided, facts), *(f"  note: {notice}" for notice in plan.notices)]:
        shown.note(line)
    if twice := plan.batch.repeated(len(data.train.rows)):
        shown.note(f"  note: {twice} rows are repeated per epoch so that every process gets the same number of batches")
    if plan.batch.effective > len(data.train.rows):
        shown.note(
            f"  note: a step takes {plan.batch.effective:,} rows, but only {len(data.train.rows):,} are trained on, "
            "so each step is an epoch; lower trainer.per_device_train_batch_size or gradient_accumulation_steps"
        )
    for warning in facts.warnings:
        shown.note(f"  note: {warning}")
    if summary := forecast_line(forecast):
        shown.note(summary)
    shown.note(f"  run folder {run.path}")
    baseline = first_decides(
        lambda: before[0].eval if before else _reused_baseline(loaded.recipe, plan, stamp, shown, flags.baseline_from)
    )
    resume_from = beginning.resume_from and on_this_machine(beginning.resume_from, run.received)
    trainer = loaded.recipe.trainer
    checkpoint_bytes = run_forecast(plan, trainer).checkpoint_bytes
    only_steps = not accepted and set(beginning.longer or ()) <= {"trainer.max_steps", "trainer.num_train_epochs"}
    extends = beginning.longer is not None
    session = Session(stops, resume_from, stamp, checkpoint_bytes, baseline, trainer, extends, only_steps)
    run_stage = evaluate_trained if beginning.trained else train
    try:
        return run_stage(plan, run, data, tokenizer, shown, session).stop_reason
    finally:
        _forget_received(run)


def _adapt_run(
    run: RunDir, recipe: Recipe, beginning: OpenedRun, data: "PreparedData", *, same_test_rows: bool
) -> list[str]:
    """Prepare the folder of a run that goes on with other steps or rows; returns notes."""
    if beginning.longer is None or beginning.resume_from is None:
        if beginning.stamp and not same_test_rows:
            keep_base(run, same_test_rows=False)
        return []
    step = int(beginning.resume_from.name.rsplit("-", 1)[1])
    total = count_steps(recipe, len(data.train.rows))
    notes = begin_longer(run, recipe, step, total, same_test_rows=same_test_rows)
    return [*notes, f"  steps {step + 1} to {total} are trained, with the optimizer state of step {step}"]


def _planned_rows(
    loaded: Loaded,
    run: RunDir,
    progress: StoppableProgress,
    before: Sequence[RunDir],
    continued: "SplitRecord | None",
    *,
    smoke: bool,
) -> tuple["Planned", "PreTrainedTokenizerBase", "PreparedData"]:
    """The plan of a recipe, its tokenizer and its rows, prepared by one process per machine.

    Args:
        before: the runs of earlier stages.
        continued: the rows of the trainings that this one continues.
    """
    from peftcli.cli.pipeline import (
        SHOWN_ROWS,
        add_view,
        check_ends,
        keep_date,
        plan_recipe,
        plan_with_labels,
        plan_with_rows,
        prepare_data,
        real_tokenizer,
    )
    from peftcli.model.distributed import first_of_machine_first
    from peftcli.train.machines import on_this_machine
    from peftcli.train.run import run_forecast

    earlier = [str(on_this_machine(part.adapter, run.received)) for part in before]

    def prepare() -> tuple["Planned", "PreTrainedTokenizerBase", "PreparedData"]:
        planned = keep_date(plan_recipe(loaded, smoke=smoke, merged_adapters=earlier), run)
        plan = planned.plan
        if is_first_process():
            check_disk_space(run.path, run_forecast(plan, loaded.recipe.trainer))
        begun = time.monotonic()
        tokenizer, data = prepare_data(plan, progress, earlier=continued)
        data.facts["prepare_seconds"] = round(time.monotonic() - begun, 3)
        return plan_with_rows(plan_with_labels(planned, data), loaded.recipe, data), tokenizer, data

    planned, tokenizer, data = first_of_machine_first(prepare, is_first=is_first_of_machine())
    plan = planned.plan
    ends = check_ends(real_tokenizer(plan), tokenizer, data, plan.adapter) if plan.own_tokenizer else []
    add_view(data, tokenizer, plan.labels, SHOWN_ROWS, ends)
    return planned, tokenizer, data


def _forget_received(run: RunDir) -> None:
    """Remove the files that the first process sent to this machine, if any."""
    if is_first_of_machine():
        shutil.rmtree(run.received, ignore_errors=True)


def _reused_baseline(
    recipe: Recipe, plan: Plan, stamp: Mapping[str, Any], shown: Shown, source_run: Path | None
) -> Path | None:
    """The `eval.json` of another run, if its baseline evaluation can be reused."""
    if source_run is None or (not recipe.dataset.holds_out and recipe.evaluation.forgetting_text is None):
        return None
    reason = reuse_blocker(RunDir(source_run), recipe, plan, stamp)
    if reason is None:
        shown.note(f"  reusing the baseline of {source_run.name}")
    else:
        shown.note(f"  re-running the baseline; cannot reuse the one from {source_run.name} ({reason})")
    return RunDir(source_run).eval if reason is None else None


def _raise_unless_good(run: RunDir, metrics: MetricsJson, stop_reason: str | None) -> None:
    if stop_reason is not None:
        steps = metrics.train.steps if metrics.train else None
        raise Stopped(
            f"stopped at step {steps} by {stop_reason}; a complete checkpoint is in {run.checkpoints}; "
            "run the same command again to resume"
        )
    raise_unmet(metrics)


def command_line() -> str:
    return "peftcli " + shlex.join(sys.argv[1:]) if sys.argv[1:] else "peftcli"


def import_peft(recipe: Recipe) -> None:
    """Import PEFT and transformers without packages that they would import needlessly if installed.

    bitsandbytes imports torch's compiler, and only an object detection loss needs scipy: together a fifth of the
    startup time and 70 MB, and more on a CUDA machine. Older versions of transformers import scikit-learn for assisted
    generation, which does not load without scipy, so both are hidden.
    """
    if "peft" in sys.modules:
        return
    unused = {"scipy", "sklearn"}
    own = all(one.trainer.get("optim") in OWN_OPTIMIZERS for one in stage_recipes(recipe))
    if own and recipe.quantization is None:
        unused.add("bitsandbytes")
    hidden = unused - sys.modules.keys()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None means not found
    try:
        from peft.import_utils import is_bnb_available

        is_bnb_available()  # PEFT caches the result
    finally:
        for name in hidden:
            del sys.modules[name]
