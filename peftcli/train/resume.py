"""Decides whether a run folder is new, can be resumed, is finished, or belongs to something else.

A checkpoint records its data, base model and library versions, and a resume with others is refused.
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
from peftcli.run_dir import RunDir, read_json, read_log, write_text
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
"""Keys that change nothing of what is trained."""
SHARES = ("trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps")
"""Keys that say how the rows of a step are shared out; they may change where their number stays."""
HELD = frozenset(
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
"""Keys whose value is loaded with the adapter, the optimizer or the schedule: a new one would be ignored in silence."""

VERSIONED = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
"""Libraries that a training step goes through."""


@dataclass(frozen=True)
class OpenedRun:
    """How a run begins.

    Attributes:
        finished: all is done already, and there is nothing to do.
        resume_from: a verified checkpoint to go on from.
        trained: training is over, and only the evaluation is missing.
        stamp: what the run was made from, as its checkpoint or its training says; empty for a new run.
        notes: for the user.
    """

    finished: bool
    resume_from: Path | None
    notes: tuple[str, ...]
    trained: bool = False
    stamp: Mapping[str, Any] = field(default_factory=dict)


def open_run(run: RunDir, recipe: Recipe, *, overwrite: bool, resume: bool, allowed: Collection[str] = ()) -> OpenedRun:
    """Look at the run folder and make it ready.

    Args:
        overwrite: remove the run that is there first.
        resume: fail where there is nothing to go on from.
        allowed: keys of the recipe that may differ from the run's.

    Raises:
        RecipeError: the folder holds another run or foreign files, or there is nothing to resume.
    """
    if run.path.exists() and not run.path.is_dir():
        raise RecipeError(f"{run.path} is a file; name another output_dir")
    if run.path.is_dir():
        run.remove_torn()
    replaced = overwrite and run.recipe.is_file()
    if replaced:
        clear(run)
    if not run.recipe.is_file():
        # What the user put into a run of ours may stay there; a folder without one is nothing to write into.
        # Where this was a further machine of a training before, there is the log of its libraries.
        ours = (LOCK, run.library_log.name, run.received.name)
        foreign = [path.name for path in run.path.iterdir() if path.name not in ours] if run.path.is_dir() else []
        if foreign and not replaced:
            raise RecipeError(
                f"{run.path} holds files that are no run of ours ({', '.join(sorted(foreign)[:3])}); "
                "name another output_dir"
            )
        if resume:
            raise RecipeError(f"{run.path}: there is no run to resume; leave --resume out")
        return OpenedRun(False, None, ())
    if not _has_trained(run):
        # A start that failed before its first checkpoint holds nothing that another recipe could spoil.
        run.log.unlink(missing_ok=True)
        return OpenedRun(False, None, (f"{run.path}: no checkpoint to go on from, so training starts at step 0",))
    changed = [line for line in changes(run, recipe) if not is_allowed(line.split(":")[0], allowed)]
    status = status_of(run)
    held = [line for line in changes(run, recipe) if _is_held(line.split(":")[0])]
    if held and status != "finished":
        raise RecipeError(
            f"{run.path}: its checkpoints hold these, so they cannot change in a run that goes on:\n"
            + "\n".join(f"  {line}" for line in held)
            + "\nput them back, name another output_dir, or pass --overwrite to begin anew"
        )
    if changed:
        state = "a finished run" if status == "finished" else "a run"
        raise RecipeError(
            f"{run.path} already holds {state} of another recipe:\n"
            + "\n".join(f"  {line}" for line in changed)
            + "\nname another output_dir, pass --overwrite to remove that run, or --force KEY to go on with the change"
        )
    if status == "finished":
        return OpenedRun(True, None, (f"{run.path} is already finished; --overwrite trains it anew",))
    if _is_trained(run):
        return OpenedRun(False, None, ("training is finished; the evaluation is made now",), True, _stamp(run.train))
    return _go_on(run)


def _has_trained(run: RunDir) -> bool:
    """Whether a run has anything to lose: a checkpoint, whole or damaged, a training that ended, or a stage."""
    checkpoints = run.checkpoints.is_dir() and any(run.checkpoints.iterdir())
    return checkpoints or run.train.is_file() or run.adapter.is_dir() or run.stages.is_dir()


def _is_trained(run: RunDir) -> bool:
    """Whether the adapter of the last step is there; `train.json` is written after it."""
    if not run.train.is_file() or not (run.adapter / "adapter_model.safetensors").is_file():
        return False
    return load_or_default(TrainJson, run.train).status == "finished"


def changes(run: RunDir, recipe: Recipe) -> list[str]:
    """The keys in which a run's recipe differs, those that change nothing of the training aside."""
    before = load_run_recipe(run.recipe).recipe
    lines = changed_keys(before, recipe)
    if not run.plan.is_file():
        return [line for line in lines if not line.startswith(HARMLESS)]
    batch, now = load_or_default(PlanJson, run.plan).batch, _batch(recipe)
    same = batch.effective == now.effective
    if not same and batch.processes != now.processes:
        rows = f"so a step would have {now.effective} rows and no longer {batch.effective}"
        lines.append(f"processes: {batch.processes} -> {now.processes}, {rows}")
    return [line for line in lines if not line.startswith((*HARMLESS, *SHARES) if same else HARMLESS)]


def _batch(recipe: Recipe) -> Batch:
    return count_batch(recipe.trainer, int(os.environ.get("WORLD_SIZE", "1")))


def write_recipe(run: RunDir, recipe: Recipe) -> None:
    """Put the recipe as it was understood into the run folder."""
    write_text(run.recipe, dump_recipe(recipe, run.recipe))


def clear(run: RunDir) -> None:
    """Remove what a run of ours wrote, and nothing else."""
    for path in (run.checkpoints, run.adapter, run.merged, run.stages):
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
    files = (run.recipe, run.plan, run.environment, run.data, run.log, run.library_log, run.train, run.eval, run.merge)
    for path in (*files, run.selection, run.metrics, run.report_md, run.report_html, run.path / "STOP"):
        path.unlink(missing_ok=True)


def _go_on(run: RunDir) -> OpenedRun:
    clear_staging(run.checkpoints)
    found = newest_valid(run.checkpoints)
    notes = [
        f"{name} is damaged ({reason}); kept as {name}.bad; {int(name.rsplit('-', 1)[1]) - found.step} steps are "
        "trained again"
        for name, reason in found.damaged
    ]
    if found.path is None:
        run.log.unlink(missing_ok=True)
        if not run.stages.is_dir():  # the training may be in an earlier stage
            notes.append(f"{run.path}: no checkpoint to go on from, so training starts at step 0")
        return OpenedRun(False, None, tuple(notes))
    _cut_log(run, found.step)
    if run.merge.is_file():
        run.merge.unlink()  # of an adapter that this session replaces
        notes.append(f"{run.merged} was merged from the adapter of an earlier step; merge again after this session")
    planned = load_or_default(TrainJson, run.train).planned_steps
    notes.append(f"going on from step {found.step}" + (f" of {planned}" if planned else "") + " (checkpoint verified)")
    return OpenedRun(False, found.path, tuple(notes), stamp=_stamp(found.path / MANIFEST))


def _stamp(file: Path) -> dict[str, Any]:
    return dict(read_json(file).get("stamp") or {})


def _cut_log(run: RunDir, step: int) -> None:
    """Drop log rows of steps that will be trained again."""
    kept = [row for row in read_log(run.log) if row.get("step", 0) <= step]
    write_text(run.log, "".join(json.dumps(row) + "\n" for row in kept))


def _is_held(key: str) -> bool:
    section, _, name = key.partition(".")
    # What a method takes beside the shared keys decides the shapes of its weights, or what they began as.
    return key in HELD or (section == "adapter" and name.partition(".")[0] not in AdapterSection.model_fields)


def run_fingerprint(data: Mapping[str, Any], base: str | None, versions: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to go on to the same bits.

    Args:
        data: the content of `data.json`.
        base: identity of the base model's files, None where it is not known.
        versions: of the installed packages, by name.
    """
    return {
        "data.train": data["fingerprint"]["train"],
        "data.test": data["fingerprint"]["test"],
        "base": base,
        **{f"versions.{name}": versions.get(name) for name in VERSIONED},
    }


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str]) -> list[str]:
    """Compare the stamp of a checkpoint with that of this session.

    Args:
        allowed: keys, or their first parts such as `data`, that `--force` names.

    Returns:
        What differs and is allowed to, as sentences.

    Raises:
        RecipeError: something else differs; every key of it is listed.
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
            "the run cannot go on to the same result, since this changed after its checkpoint:\n"
            + "\n".join(f"  {line}" for line in refused)
            + f"\nput it back, pass --overwrite to begin anew, or accept it with --force {' --force '.join(keys)}"
        )
    return [f"changed and accepted: {line}" for line in changed.values()]


def is_allowed(key: str, allowed: Collection[str]) -> bool:
    """Whether a key, or a section that it stands in, was named.

    >>> is_allowed("versions.torch", ["versions"]), is_allowed("data.train", ["data.test"])
    (True, False)
    """
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def shown_value(value: Any) -> str:
    """A value for a message: a hash by its beginning."""
    text = str(value)
    return text[:12] if len(text) == 64 else text
