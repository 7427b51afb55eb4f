"""The metrics of an evaluation during training, by which the best checkpoint is chosen and training stops early."""

from collections.abc import Iterator, Mapping
from typing import Any

from peftcli.nearest import nearest
from peftcli.recipe.library_args import Argument
from peftcli.recipe.problems import KeyPath, show
from peftcli.tasks.base import Task

PREFIX = "eval_"
"""transformers accepts the name of a metric with this prefix too."""
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "unfinished_answers", "mse", "mae"})
PATIENCE, THRESHOLD = "early_stopping_patience", "early_stopping_threshold"
EARLY_STOPPING: Mapping[str, Argument] = {
    PATIENCE: Argument(PATIENCE, frozenset({"int"})),
    THRESHOLD: Argument(THRESHOLD, frozenset({"int", "float"})),
}
"""Arguments of transformers' EarlyStoppingCallback, which a recipe has in its `trainer` section."""
EARLY_STOPPING_BOUNDS: Mapping[str, tuple[tuple[str, float], ...]] = {
    PATIENCE: ((">=", 1),),
    THRESHOLD: ((">=", 0),),
}


def metric_name(arguments: Mapping[str, Any]) -> str:
    """The metric that a training chooses by, without transformers' prefix."""
    return str(arguments.get("metric_for_best_model") or "loss").removeprefix(PREFIX)


def chooses(arguments: Mapping[str, Any]) -> bool:
    """Whether a metric of the evaluations during training decides anything."""
    by_loss = ("reduce_lr_on_plateau", "greedy")
    return (
        bool(arguments.get("load_best_model_at_end"))
        or arguments.get(PATIENCE) is not None
        or arguments.get("save_strategy") == "best"
        or arguments.get("lr_scheduler_type") in by_loss
    )


def best_model_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The metric and its direction, which transformers would guess from the end of the name; empty without a choice."""
    if not chooses(arguments):
        return {}
    name = metric_name(arguments)
    return {"metric_for_best_model": name, "greater_is_better": name not in LOWER_IS_BETTER}


def metric_faults(arguments: Mapping[str, Any], task: Task | None) -> Iterator[tuple[KeyPath, str]]:
    """Metrics that the task does not have, and early stopping without an evaluation: the key, and the message.

    Args:
        arguments: of one training, with their current names and valid types.
        task: of the recipe; None if it is not valid.
    """
    key, name = "metric_for_best_model", metric_name(arguments)
    if task is not None and name not in task.metrics:
        near = nearest(name, task.metrics)
        fix = f"did you mean {near}?" if near else f"use one of {', '.join(task.metrics[:6])}"
        text = f"trainer.{key} = {show(arguments[key])}: model.task: {task.name} has no such metric; {fix}"
        yield (key,), text
    elif arguments.get("greater_is_better") is not None and task is not None:
        higher = name not in LOWER_IS_BETTER
        if arguments["greater_is_better"] != higher:
            value = str(arguments["greater_is_better"]).lower()
            text = f"trainer.greater_is_better: {value} would choose the worst {name}, of which "
            yield ("greater_is_better",), text + f"{'higher' if higher else 'lower'} is better; remove it"
    if arguments.get(PATIENCE) is not None and str(arguments.get("eval_strategy", "no")) == "no":
        text = f"trainer.{PATIENCE} counts evaluations during training; add eval_strategy: steps or epoch"
        yield (PATIENCE,), text
    if arguments.get(THRESHOLD) is not None and arguments.get(PATIENCE) is None:
        text = f"trainer.{THRESHOLD} has no effect without {PATIENCE}; add it, or remove this one"
        yield (THRESHOLD,), text
