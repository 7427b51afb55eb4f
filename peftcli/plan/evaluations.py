"""What a plan says of the evaluations during training: the metric that chooses the step, and early stopping."""

from peftcli.plan.plan import Decision, EarlyStop
from peftcli.recipe.best_model import LOWER_IS_BETTER, PATIENCE, THRESHOLD, chooses, metric_name
from peftcli.recipe.schema import Recipe

ANSWER_METRICS = ("exact_match", "chrf", "unfinished_answers")
"""Metrics of generated answers; they are measured during training only if the best step is chosen by one of them."""
MOST_ANSWERS = 100
"""Maximum number of validation rows that are answered in an evaluation during training."""


def early_stop(recipe: Recipe) -> EarlyStop | None:
    """The early stopping of a recipe; None without."""
    patience = recipe.trainer.get(PATIENCE)
    return None if patience is None else EarlyStop(int(patience), float(recipe.trainer.get(THRESHOLD) or 0.0))


def evaluation_decisions(recipe: Recipe) -> tuple[Decision, ...]:
    """How the step that is kept is chosen; empty if nothing is chosen."""
    if not chooses(recipe.trainer):
        return ()
    name = metric_name(recipe.trainer)
    better = "lower" if name in LOWER_IS_BETTER else "higher"
    rows = "validation rows" if recipe.dataset.validates else "test rows"
    reason = f"{better} is better; measured on the {rows}"
    if name in ANSWER_METRICS:
        reason += f", of which at most {MOST_ANSWERS} are answered"
    kept = "the best step is kept" if recipe.trainer.get("load_best_model_at_end") else "the last step is kept"
    found = [Decision("choice by", name, f"{reason}; {kept}")]
    stop = early_stop(recipe)
    if stop is not None:
        counted = "an improvement" if not stop.threshold else f"an improvement of more than {stop.threshold:g}"
        found.append(Decision("early stopping", f"patience {stop.patience}", f"evaluations without {counted}"))
    return tuple(found)
