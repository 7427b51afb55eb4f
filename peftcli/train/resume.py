"""Decides whether a run folder is new, can be resumed, is finished, or belongs to another run.

A checkpoint records its data, base model and library versions, and resuming with others is refused.
"""

import json
import math
import os
import shlex
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peftcli.data.file_state import file_state
from peftcli.errors import RecipeError
from peftcli.methods.registry import METHODS
from peftcli.plan.choices import count_batch
from peftcli.plan.plan import Batch
from peftcli.recipe.dump import changed_keys, dump_recipe
from peftcli.recipe.load import load_run_recipe
from peftcli.recipe.paths import input_paths, value_at, with_paths
from peftcli.recipe.problems import dotted
from peftcli.recipe.schedulers import MEASURED
from peftcli.recipe.schema import AdapterSection, Recipe
from peftcli.results import (
    DataJson,
    EvalJson,
    InputsJson,
    PlanJson,
    TrainJson,
    load,
    load_or_default,
    save,
    status_of,
)
from peftcli.run_dir import RunDir, has_log_changed, read_json, read_log, write_text
from peftcli.train.checkpoint import MANIFEST, FoundCheckpoint, clear_staging, list_checkpoints, newest_valid
from peftcli.train.lock import NAME as LOCK

HARMLESS = (
    "budget.",
    "report.",
    "gates",
    "trainer.logging_steps",
    "trainer.save_steps",
    "trainer.save_total_limit",
    "dataset.limits",
    "performance.sharding",
    "performance.disable",
)
"""Keys that do not affect the training result."""
SHARES = ("trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps")
"""Keys that split the batch of a step; they may change if the batch size stays the same."""
STORED = frozenset(
    [
        "model.name",
        "adapter.method",
        "adapter.r",
        "adapter.init_from",
        "adapter.target_modules",
        "adapter.layers",
        "adapter.use_dora",
        "adapter.dtype",
        "adapter.modules_to_save",
        "trainer.optim",
        "trainer.learning_rate",
        "trainer.weight_decay",
        "trainer.adam_beta1",
        "trainer.adam_beta2",
        "trainer.adam_epsilon",
    ]
)
"""Keys whose values are loaded with the adapter, optimizer or scheduler: a new value would be silently ignored."""

LONGER = (
    "trainer.max_steps",
    "trainer.num_train_epochs",
    "trainer.learning_rate",
    "trainer.lr_scheduler_type",
    "trainer.lr_scheduler_kwargs",
    "trainer.warmup_steps",
    "trainer.warmup_ratio",
    "dataset.path",
    "dataset.sources",
    "dataset.max_train_samples",
)
"""Keys with which a finished run can be trained further."""
DEFAULT_EPOCHS = 3.0
"""Default of `trainer.num_train_epochs` in transformers."""

VERSIONED = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
"""Libraries that affect a training step."""


@dataclass(frozen=True)
class OpenedRun:
    """How a run starts.

    Attributes:
        finished: the run is complete, and there is nothing to do.
        resume_from: a verified checkpoint to resume from.
        trained: training is complete, and only the evaluation is missing.
        stamp: the fingerprint stored with the checkpoint or the finished training; empty for a new run.
        notes: for the user.
        longer: keys that differ from those of the finished run that this session trains further; None for any other.
        suspect: the run is finished, and its data files may have changed since.
    """

    finished: bool
    resume_from: Path | None
    notes: tuple[str, ...]
    trained: bool = False
    stamp: Mapping[str, Any] = field(default_factory=dict)
    longer: tuple[str, ...] | None = None
    suspect: bool = False


def open_run(
    run: RunDir,
    recipe: Recipe,
    *,
    overwrite: bool,
    resume: bool,
    allowed: Collection[str] = (),
    new_run: str = "peftcli train RECIPE",
) -> OpenedRun:
    """Inspect the run folder and prepare it.

    Args:
        overwrite: remove the existing run first.
        resume: fail if there is nothing to resume.
        allowed: recipe keys that may differ from the run's.
        new_run: the command line without the run folder, for a message.

    Raises:
        RecipeError: the folder contains another run or other files, or there is nothing to resume.
    """
    if run.path.exists() and not run.path.is_dir():
        raise RecipeError(f"{run.path} is a file; set another output_dir")
    if run.path.is_dir():
        run.remove_torn()
    replaced = overwrite and run.recipe.is_file()
    if replaced:
        clear(run)
    if not run.recipe.is_file():
        # Files that the user added to a run may stay; a folder with files but without a run is refused.
        # A further machine of an earlier training has only the log of the libraries.
        ours = (LOCK, run.library_log.name, run.received.name)
        other = [path.name for path in run.path.iterdir() if path.name not in ours] if run.path.is_dir() else []
        if other and not replaced:
            raise RecipeError(
                f"{run.path} contains files that are not a peftcli run ({', '.join(sorted(other)[:3])}); "
                "set another output_dir"
            )
        if resume:
            raise RecipeError(f"{run.path}: there is no run to resume; remove --resume")
        return OpenedRun(False, None, ())
    if not _has_trained(run):
        # A run that failed before its first checkpoint has nothing that another recipe could conflict with.
        notes = _lost(run)
        run.log.unlink(missing_ok=True)
        return OpenedRun(False, None, tuple(notes))
    if run.train.is_file() and (status_of(run) == "finished" or (_is_trained(run) and changes(run, recipe))):
        return _open_finished(run, recipe, allowed, new_run)
    changed = [line for line in changes(run, recipe) if not is_allowed(_key(line), allowed)]
    stored = [line for line in changes(run, recipe) if _is_stored(_key(line))]
    if stored:
        raise RecipeError(
            f"{run.path}: these keys are stored in its checkpoints, so they cannot change when it resumes:\n"
            + _indented(stored)
            + "\nrestore them, set another output_dir, or pass --overwrite to start over"
        )
    if changed:
        raise RecipeError(
            f"{run.path} already contains a run of another recipe:\n"
            + _indented(changed)
            + "\nset another output_dir, pass --overwrite to remove that run, or --force KEY to resume with the change"
        )
    if _is_trained(run):
        return OpenedRun(False, None, ("training is finished; running the evaluation now",), True, _stamp(run.train))
    return _resume(run)


def _open_finished(run: RunDir, recipe: Recipe, allowed: Collection[str], new_run: str) -> OpenedRun:
    """Leave a finished run as it is, or train it further.

    Raises:
        RecipeError: keys differ that a finished run cannot take, there is nothing more to train, or no checkpoint.
    """
    changed = changes(run, recipe)
    done = steps_done(run)
    before = load_or_default(DataJson, run.data).file_state
    suspect = run.rows.is_file() and before is not None and file_state(recipe.dataset) not in (None, before)
    if not changed and not allowed:
        note = (
            f"{run.path} is already finished; to train it further, raise trainer.max_steps or "
            "trainer.num_train_epochs; --overwrite trains it again"
        )
        return OpenedRun(True, None, (note,), suspect=suspect)
    elsewhere = _elsewhere(run, new_run)
    refused = [line for line in changed if not _extends(line, recipe)]
    refused = [line for line in refused if _is_stored(_key(line)) or not is_allowed(_key(line), allowed)]
    if refused:
        fits = not any(_key(line).startswith(("adapter.", "model.", "quantization", "stages")) for line in refused)
        raise RecipeError(
            f"{run.path} already contains a finished run of another recipe:\n{_indented(refused)}\n"
            "set another output_dir, or pass --overwrite to remove that run"
            + (f"\nto train its adapter further in a new run: {elsewhere}" if fits else "")
        )
    planned = _planned_steps(recipe)
    if (planned is not None and planned <= done) or (not changed and not suspect):
        raise RecipeError(_nothing_left(run, done, planned, changed))
    if not can_be_longer(recipe):
        why = "it has stages" if recipe.stages else "AdaLoRA has fixed the ranks at its end"
        raise RecipeError(
            f"{run.path} is finished at step {done} and cannot be trained further: {why}; set another output_dir"
        )
    found, notes = _newest(run)
    if found.path is None:
        raise RecipeError(
            f"{run.path} is finished at step {done}, and no checkpoint is left in {run.checkpoints} to go on from\n"
            f"to train its adapter further in a new run, with a new optimizer and learning rate schedule: {elsewhere}"
        )
    notes.append(f"{run.path} is finished at step {done} and is trained further from step {found.step}")
    keys = tuple(_key(line) for line in changed)
    return OpenedRun(False, found.path, tuple(notes), stamp=_stamp(found.path / MANIFEST), longer=keys)


def can_be_longer(recipe: Recipe) -> bool:
    """Whether a finished run of a recipe can be trained further."""
    return not recipe.stages and not METHODS[recipe.adapter.method].allocates_ranks


def _extends(line: str, recipe: Recipe) -> bool:
    """Whether a finished run can be trained further with a change."""
    measured = any(name in line for name in MEASURED) or recipe.trainer.get("lr_scheduler_type") in MEASURED
    # A schedule that depends on the loss keeps its own learning rate, and would ignore another one.
    return is_allowed(_key(line), LONGER) and not (measured and is_allowed(_key(line), LONGER[2:5]))


def _nothing_left(run: RunDir, done: int, planned: int | None, changed: Sequence[str]) -> str:
    """Why a finished run has no step to train, and what to set."""
    said = f"{run.path} is already finished at step {done}"
    if planned is not None and any(_key(line) == "trainer.max_steps" for line in changed):
        return f"{said}, so trainer.max_steps = {planned} leaves nothing to train; set more than {done} steps"
    more = "raise trainer.num_train_epochs" if planned is None else f"set trainer.max_steps to more than {done}"
    what = f"; without more steps this has no effect:\n{_indented(changed)}\n" if changed else ", and --force has no "
    return f"{said}{what}{'' if changed else 'change to accept; '}{more} to train it further, or pass --overwrite"


def _elsewhere(run: RunDir, new_run: str) -> str:
    """The command that starts a new run from the adapter of this one."""
    free = next(path for number in range(2, 10_000) if not (path := Path(f"{run.path}-{number}")).exists())
    words = ["--set", f"adapter.init_from={os.path.abspath(run.path)}", "--output-dir", str(free)]
    return f"{new_run} {shlex.join(words)}"


def steps_done(run: RunDir) -> int:
    """The steps that a run has trained, of its checkpoints where `train.json` is missing."""
    steps = load_or_default(TrainJson, run.train).steps
    return max((step for step, _ in list_checkpoints(run.checkpoints)), default=0) if steps is None else steps


def _planned_steps(recipe: Recipe) -> int | None:
    """`trainer.max_steps`; None if the epochs decide."""
    planned = recipe.trainer.get("max_steps")
    return planned if isinstance(planned, int) and planned > 0 else None


def count_steps(recipe: Recipe, rows: int) -> int:
    """The steps of a training, as transformers counts them.

    Args:
        rows: training rows, repeated ones included.
    """
    planned = _planned_steps(recipe)
    if planned is not None:
        return planned
    epochs = float(recipe.trainer.get("num_train_epochs", DEFAULT_EPOCHS))
    return math.ceil(epochs * math.ceil(rows / _batch(recipe).effective))


def begin_longer(run: RunDir, recipe: Recipe, step: int, total: int, *, same_test_rows: bool) -> list[str]:
    """Turn a finished run into one that is being trained, without results that a reader could take for the new ones.

    The order matters: a process that is killed in between leaves a run that the same command trains further.

    Args:
        step: of the checkpoint that the training goes on from.
        total: steps that the run will have.
        same_test_rows: the base need not be measured again.

    Returns:
        Notes for the user.

    Raises:
        RecipeError: the run has that many steps already.
    """
    done = steps_done(run)
    if total <= done:
        raise RecipeError(
            f"{run.path} is already finished at step {done}, and this recipe has {total} steps; raise "
            "trainer.max_steps or trainer.num_train_epochs to train it further"
        )
    run.train.unlink(missing_ok=True)
    write_recipe(run, recipe)
    for path in (run.metrics, run.report_md, run.report_html):
        path.unlink(missing_ok=True)
    keep_base(run, same_test_rows=same_test_rows)
    return _go_back(run, step)


def keep_base(run: RunDir, *, same_test_rows: bool) -> None:
    """Keep only the base in `eval.json`, or nothing if it was measured on other rows."""
    before = load(EvalJson, run.eval)
    if before is None:
        return
    if not same_test_rows:
        run.eval.unlink()
        return
    retention = before.retention and replace(before.retention, adapter_loss=None, change=None)
    samples = tuple(replace(sample, adapter=None, merged=None) for sample in before.samples)
    base = replace(before, adapter=None, merged=None, samples=samples, retention=retention, seconds=None)
    save(run.eval, replace(base, validation=None, validation_answered=None, validation_sha256=None))


def _has_trained(run: RunDir) -> bool:
    """Whether a run has anything to lose: a checkpoint (even a damaged one), a finished training, or a stage."""
    checkpoints = run.checkpoints.is_dir() and any(run.checkpoints.iterdir())
    return checkpoints or run.train.is_file() or run.adapter.is_dir() or run.stages.is_dir()


def _is_trained(run: RunDir) -> bool:
    """Whether the final adapter exists; `train.json` is written after it."""
    if not run.train.is_file() or not (run.adapter / "adapter_model.safetensors").is_file():
        return False
    return load_or_default(TrainJson, run.train).status == "finished"


def changes(run: RunDir, recipe: Recipe) -> list[str]:
    """The recipe keys that differ from the run's, except those that do not affect training."""
    lines = changed_keys(_moved_with(run, load_run_recipe(run.recipe).recipe, recipe), recipe)
    if not run.plan.is_file():
        return [line for line in lines if not line.startswith(HARMLESS)]
    batch, now = load_or_default(PlanJson, run.plan).batch, _batch(recipe)
    same = batch.effective == now.effective
    if not same and batch.processes != now.processes:
        rows = f"so a step would have {now.effective} rows instead of {batch.effective}"
        lines.append(f"processes: {batch.processes} -> {now.processes}, {rows}")
    return [line for line in lines if not line.startswith((*HARMLESS, *SHARES) if same else HARMLESS)]


def _moved_with(run: RunDir, before: Recipe, now: Recipe) -> Recipe:
    """The recipe of a run, with the paths that a recipe names now where the run was trained on those files.

    If the run folder was moved, its relative paths no longer lead there.
    """
    recorded = {one.key: one.path for one in load_or_default(InputsJson, run.inputs).inputs}
    same = {key: path for key, path in input_paths(now).items() if recorded.get(dotted(key)) == path}
    return with_paths(before, {key: path for key, path in same.items() if value_at(before, key) is not None})


def _batch(recipe: Recipe) -> Batch:
    return count_batch(recipe.trainer, int(os.environ.get("WORLD_SIZE", "1")))


def write_recipe(run: RunDir, recipe: Recipe) -> None:
    """Write the parsed recipe into the run folder."""
    write_text(run.recipe, dump_recipe(recipe, run.recipe))


def clear(run: RunDir) -> None:
    """Remove the files that peftcli wrote, and nothing else."""
    for path in (run.checkpoints, run.adapter, run.merged, run.stages):
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
    files = (run.recipe, run.plan, run.environment, run.data, run.log, run.library_log, run.train, run.eval, run.merge)
    for path in (
        *files,
        run.inputs,
        run.selection,
        run.rows,
        run.metrics,
        run.report_md,
        run.report_html,
        run.path / "STOP",
    ):
        path.unlink(missing_ok=True)


def _resume(run: RunDir) -> OpenedRun:
    clear_staging(run.checkpoints)
    found, notes = _newest(run)
    if found.path is None:
        if not run.stages.is_dir():  # the training may be in an earlier stage
            notes += _lost(run)
        run.log.unlink(missing_ok=True)
        return OpenedRun(False, None, tuple(notes))
    if has_log_changed(run.log, read_json(found.path / MANIFEST).get("log")):
        notes.append(f"{run.log} was changed since the checkpoint, so the training curve of the report may be wrong")
    notes += _go_back(run, found.step)
    planned = load_or_default(TrainJson, run.train).planned_steps
    notes.append(f"resuming from step {found.step}" + (f" of {planned}" if planned else "") + " (checkpoint verified)")
    return OpenedRun(False, found.path, tuple(notes), stamp=_stamp(found.path / MANIFEST))


def _newest(run: RunDir) -> tuple[FoundCheckpoint, list[str]]:
    """The newest complete checkpoint, and notes about damaged ones."""
    found = newest_valid(run.checkpoints)
    return found, [
        f"{name} is damaged ({reason}); renamed to {name}.bad; {int(name.rsplit('-', 1)[1]) - found.step} steps are "
        "repeated"
        for name, reason in found.damaged
    ]


def _lost(run: RunDir) -> list[str]:
    """A note on steps that were trained but not saved; none if no step was trained."""
    steps = max((row.get("step", 0) for row in read_log(run.log)), default=0)
    damaged = run.checkpoints.is_dir() and any(run.checkpoints.glob("*.bad"))
    return [f"{run.path}: no checkpoint to resume from, so training starts at step 0"] if steps or damaged else []


def _go_back(run: RunDir, step: int) -> list[str]:
    """Remove what later steps have left behind, before they are trained; returns a note on a merged model."""
    _cut_log(run, step)
    if not run.merge.is_file():
        return []
    run.merge.unlink()  # its adapter will be replaced
    return [f"{run.merged} was merged from the adapter of an earlier step; merge again after this session"]


def _stamp(file: Path) -> dict[str, Any]:
    return dict(read_json(file).get("stamp") or {})


def _cut_log(run: RunDir, step: int) -> None:
    """Drop log rows of steps that will be repeated."""
    rows = [row for row in read_log(run.log) if row.get("step", 0) <= step]
    write_text(run.log, "".join(json.dumps(row) + "\n" for row in rows))


def _key(line: str) -> str:
    return line.split(":")[0]


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)


def _is_stored(key: str) -> bool:
    section, _, name = key.partition(".")
    # Arguments of a method determine the shapes of its weights, or their initial values.
    return key in STORED or (section == "adapter" and name.partition(".")[0] not in AdapterSection.model_fields)


def run_fingerprint(data: Mapping[str, Any], base: str | None, versions: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a resumed run to give bit-identical results.

    Args:
        data: the content of `data.json`.
        base: hash of the base model's files; None if unknown.
        versions: of the installed packages, by name.
    """
    return {
        "data.train": data["fingerprint"]["train"],
        "data.validation": (data.get("validation") or {}).get("fingerprint"),
        "data.test": data["fingerprint"]["test"],
        "data.template": json.dumps(data["template"], sort_keys=True) if data.get("template") else None,
        "base": base,
        **{f"versions.{name}": versions.get(name) for name in VERSIONED},
    }


def accepted_stamp(run: RunDir, stamp: Mapping[str, Any]) -> dict[str, Any]:
    """The fingerprint of a checkpoint with the rows that an earlier session accepted since then, if any."""
    stored = load_or_default(DataJson, run.data)
    rows = stored.fingerprint
    if not stamp or rows.train is None:
        return dict(stamp)
    validation = None if stored.validation is None else stored.validation.fingerprint
    return {**stamp, "data.train": rows.train, "data.validation": validation, "data.test": rows.test}


def accepted_data(beginning: OpenedRun) -> list[str]:
    """`data`, if the user has trained a finished run further with other keys of the dataset."""
    return ["data"] if any(key.startswith("dataset.") for key in beginning.longer or ()) else []


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str]) -> list[str]:
    """Compare the fingerprint of a checkpoint with that of this session.

    Args:
        allowed: keys, or their prefixes such as `data`, passed with `--force`.

    Returns:
        Messages about allowed differences.

    Raises:
        RecipeError: something else differs; all such keys are listed.
    """
    changed = {
        key: f"{key}: {shown_value(before[key])} -> {shown_value(now.get(key))}"
        for key in before
        if before[key] is not None and now.get(key) is not None and before[key] != now[key]
    }
    refused = [line for key, line in changed.items() if not is_allowed(key, allowed)]
    if refused:
        keys = sorted({key.split(".")[0] for key in changed if not is_allowed(key, allowed)})
        raise RecipeError(
            "the run cannot resume to the same result, because this changed since its checkpoint:\n"
            + "\n".join(f"  {line}" for line in refused)
            + f"\nrestore it, pass --overwrite to start over, or accept it with --force {' --force '.join(keys)}"
        )
    return [f"changed and accepted: {line}" for line in changed.values()]


def is_allowed(key: str, allowed: Collection[str]) -> bool:
    """Whether a key or its section was passed with --force.

    >>> is_allowed("versions.torch", ["versions"]), is_allowed("data.train", ["data.test"])
    (True, False)
    """
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def shown_value(value: Any) -> str:
    """A value for a message; hashes are shortened."""
    text = str(value)
    return text[:12] if len(text) == 64 else text
