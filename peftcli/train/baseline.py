"""Reuses the baseline evaluation of another run if nothing that it depends on differs."""

from collections.abc import Mapping
from typing import Any

from peftcli.errors import PeftcliError, RecipeError
from peftcli.plan.answered_rows import answered_digest, choose_answered_rows, rows_digest
from peftcli.plan.plan import Plan
from peftcli.plan.planner import LOSS_MASK_KEYS
from peftcli.recipe.dump import changed_keys
from peftcli.recipe.load import load_run_recipe
from peftcli.recipe.schema import Recipe
from peftcli.results import DataJson, EvalJson, PlanJson, TrainJson, load
from peftcli.run_dir import RunDir
from peftcli.tasks.registry import TASKS

FREE = (
    "name",
    "output_dir",
    "gates",
    "adapter.",
    "budget.",
    "performance.",
    "report.",
    "trainer.",
    "dataset.max_train_samples",
    "dataset.limits",
)
"""Keys that do not affect the baseline; for `trainer`, except `LOSS_MASK_KEYS`."""
DECIDED = ("device", "model.dtype", "model.attention", "quantization.compute_dtype")
"""Decisions of the machine that affect how the base computes."""
STAMPED = ("data.test", "base")


def reuse_blocker(source_run: RunDir, recipe: Recipe, plan: Plan, stamp: Mapping[str, Any]) -> str | None:
    """Why the baseline must be evaluated again; None if that of the other run can be reused.

    Args:
        source_run: another run.
        recipe: of this run.
        stamp: the fingerprint of this run.

    Raises:
        RecipeError: the source is not a run.
    """
    if not source_run.recipe.is_file():
        raise RecipeError(f"--baseline-from {source_run.path}: not a run folder (no recipe.yaml); pass a finished run")
    try:
        changed = [
            line for line in changed_keys(load_run_recipe(source_run.recipe).recipe, recipe) if not _is_free(line)
        ]
        evaluation, train = load(EvalJson, source_run.eval), load(TrainJson, source_run.train)
        stored, data = load(PlanJson, source_run.plan), load(DataJson, source_run.data)
    except (OSError, PeftcliError):
        return "its results are missing"
    if evaluation is None or train is None or stored is None or data is None:
        return "its results are missing"
    if changed:
        return changed[0]
    if stamp.get("data.test") is None:
        return "this run has no test rows"
    if not TASKS[plan.task].generates:
        return "the base includes a new head"
    if evaluation.baseline_seconds is None or (plan.evaluation.baseline and evaluation.base is None):
        return "it has no baseline evaluation"
    before = train.stamp
    keys = (*STAMPED, *(key for key in stamp if key.startswith("versions.")))
    other = next((key for key in keys if stamp.get(key) is None or before.get(key) != stamp[key]), None)
    if other is not None:
        return f"{other} differs"
    if plan.evaluation.baseline and data.format != "text" and _answered_others(evaluation, plan):
        return "its base answered other test rows (evaluation.rows)"
    return _different_decision(stored, plan)


def _answered_others(evaluation: EvalJson, plan: Plan) -> bool:
    """Whether the answers of another run's base, to the same test split, are not to the rows of this plan."""
    digest = answered_digest(evaluation)
    return digest is not None and digest != rows_digest(
        choose_answered_rows(plan.evaluation, evaluation.rows or 0, plan.seed)
    )


def _is_free(line: str) -> bool:
    key = line.split(":")[0]
    # If a section is empty in one of the two, its keys are also listed one by one.
    return f"{key}.".startswith(FREE) and key.removeprefix("trainer.") not in LOSS_MASK_KEYS


def _different_decision(source_run: PlanJson, plan: Plan) -> str | None:
    before = {one.key: one.value for one in source_run.decisions}
    now = {one.key: one.value for one in plan.decisions}
    return next(
        (f"{key}: {before.get(key)} -> {now.get(key)}" for key in DECIDED if before.get(key) != now.get(key)), None
    )
