"""Decides whether a run folder is new, can be resumed, is finished, or belongs to another run.

A checkpoint records its data, base model and library versions, and resuming with others is refused.
"""

import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftcli.errors import RecipeError
from peftcli.plan.choices import count_batch
from peftcli.plan.plan import Batch
from peftcli.recipe.dump import changed_keys, dump_recipe
from peftcli.recipe.load import load_run_recipe
from peftcli.recipe.schema import AdapterSection, Recipe
from peftcli.results import PlanJson, TrainJson, load_or_default, status_of
from peftcli.run_dir import RunDir, has_log_changed, read_json, read_log, write_text
from peftcli.train.checkpoint import MANIFEST, clear_staging, newest_valid
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
    """

    finished: bool
    resume_from: Path | None
    notes: tuple[str, ...]
    trained: bool = False
    stamp: Mapping[str, Any] = field(default_factory=dict)


def open_run(run: RunDir, recipe: Recipe, *, overwrite: bool, resume: bool, allowed: Collection[str] = ()) -> OpenedRun:
    """Inspect the run folder and prepare it.

    Args:
        overwrite: remove the existing run first.
        resume: fail if there is nothing to resume.
        allowed: recipe keys that may differ from the run's.

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
        run.log.unlink(missing_ok=True)
        return OpenedRun(False, None, (f"{run.path}: no checkpoint to resume from, so training starts at step 0",))
    changed = [line for line in changes(run, recipe) if not is_allowed(line.split(":")[0], allowed)]
    status = status_of(run)
    stored = [line for line in changes(run, recipe) if _is_stored(line.split(":")[0])]
    if stored and status != "finished":
        raise RecipeError(
            f"{run.path}: these keys are stored in its checkpoints, so they cannot change when it resumes:\n"
            + "\n".join(f"  {line}" for line in stored)
            + "\nrestore them, set another output_dir, or pass --overwrite to start over"
        )
    if changed:
        state = "a finished run" if status == "finished" else "a run"
        raise RecipeError(
            f"{run.path} already contains {state} of another recipe:\n"
            + "\n".join(f"  {line}" for line in changed)
            + "\nset another output_dir, pass --overwrite to remove that run, or --force KEY to resume with the change"
        )
    if status == "finished":
        return OpenedRun(True, None, (f"{run.path} is already finished; pass --overwrite to train it again",))
    if _is_trained(run):
        return OpenedRun(False, None, ("training is finished; running the evaluation now",), True, _stamp(run.train))
    return _resume(run)


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
    before = load_run_recipe(run.recipe).recipe
    lines = changed_keys(before, recipe)
    if not run.plan.is_file():
        return [line for line in lines if not line.startswith(HARMLESS)]
    batch, now = load_or_default(PlanJson, run.plan).batch, _batch(recipe)
    same = batch.effective == now.effective
    if not same and batch.processes != now.processes:
        rows = f"so a step would have {now.effective} rows instead of {batch.effective}"
        lines.append(f"processes: {batch.processes} -> {now.processes}, {rows}")
    return [line for line in lines if not line.startswith((*HARMLESS, *SHARES) if same else HARMLESS)]


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
    for path in (*files, run.selection, run.rows, run.metrics, run.report_md, run.report_html, run.path / "STOP"):
        path.unlink(missing_ok=True)


def _resume(run: RunDir) -> OpenedRun:
    clear_staging(run.checkpoints)
    found = newest_valid(run.checkpoints)
    notes = [
        f"{name} is damaged ({reason}); renamed to {name}.bad; {int(name.rsplit('-', 1)[1]) - found.step} steps are "
        "repeated"
        for name, reason in found.damaged
    ]
    if found.path is None:
        run.log.unlink(missing_ok=True)
        if not run.stages.is_dir():  # the training may be in an earlier stage
            notes.append(f"{run.path}: no checkpoint to resume from, so training starts at step 0")
        return OpenedRun(False, None, tuple(notes))
    if has_log_changed(run.log, read_json(found.path / MANIFEST).get("log")):
        notes.append(f"{run.log} was changed since the checkpoint, so the training curve of the report may be wrong")
    _cut_log(run, found.step)
    if run.merge.is_file():
        run.merge.unlink()  # its adapter will be replaced
        notes.append(f"{run.merged} was merged from the adapter of an earlier step; merge again after this session")
    planned = load_or_default(TrainJson, run.train).planned_steps
    notes.append(f"resuming from step {found.step}" + (f" of {planned}" if planned else "") + " (checkpoint verified)")
    return OpenedRun(False, found.path, tuple(notes), stamp=_stamp(found.path / MANIFEST))


def _stamp(file: Path) -> dict[str, Any]:
    return dict(read_json(file).get("stamp") or {})


def _cut_log(run: RunDir, step: int) -> None:
    """Drop log rows of steps that will be repeated."""
    rows = [row for row in read_log(run.log) if row.get("step", 0) <= step]
    write_text(run.log, "".join(json.dumps(row) + "\n" for row in rows))


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
        "data.test": data["fingerprint"]["test"],
        "base": base,
        **{f"versions.{name}": versions.get(name) for name in VERSIONED},
    }


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
