"""What classification and regression change in a plan: the head that is fully trained, and its size by the labels."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from peftcli.errors import RecipeError
from peftcli.methods.registry import METHODS
from peftcli.nearest import nearest
from peftcli.plan.label_loss import check_threshold, with_class_weights
from peftcli.plan.machine import ModelFacts
from peftcli.plan.optimizer import Trained
from peftcli.plan.plan import Base, Decision, Plan
from peftcli.plan.targets import ALL_LINEAR, matches, of_head
from peftcli.recipe.best_model import chooses, metric_name
from peftcli.recipe.schema import AdapterSection, Recipe
from peftcli.tasks.base import CLASS_METRICS, ENTITY_METRICS, NUMBER_METRICS
from peftcli.tasks.registry import TASKS

NUMBER = "value"
"""Name of the single output of a regression."""
ADDED_BY_PEFT = ("classifier", "score")
"""Suffixes of modules that PEFT trains in full by itself for these tasks."""


def first_labels(recipe: Recipe) -> tuple[str, ...]:
    """The outputs of the head as far as the recipe defines them; two placeholders until the rows are read."""
    if TASKS[recipe.model.task].generates:
        return ()
    if recipe.model.problem_type == "regression":
        return (NUMBER,)
    return tuple(recipe.dataset.labels or ("0", "1"))


def with_head(adapter: AdapterSection, facts: ModelFacts, task: str) -> AdapterSection:
    """The adapter section with the head modules that PEFT would not train by itself, and no targets in the head."""
    if facts.head:
        adapter = adapter.model_copy(update={"target_modules": targets_beside_head(adapter.target_modules, facts)})
    added = () if TASKS[task].peft_type is None else ADDED_BY_PEFT
    more = [name for name in facts.head if not (added and name.endswith(added))]
    return (
        adapter.model_copy(update={"modules_to_save": (*(adapter.modules_to_save or ()), *more)}) if more else adapter
    )


def targets_beside_head(wanted: Any, facts: ModelFacts) -> Any:
    """Targets by full name if a short name would also match the head, which is fully trained."""
    if wanted == ALL_LINEAR:
        return facts.linear
    if not isinstance(wanted, tuple):
        return wanted
    matched = [module for module in facts.modules if any(matches(module, name) for name in wanted)]
    beside = tuple(module for module in matched if not of_head(module, facts))
    return wanted if len(beside) == len(matched) else beside


def head_decisions(recipe: Recipe, facts: ModelFacts) -> tuple[Decision, ...]:
    """The decisions to show about the head.

    Raises:
        RecipeError: the method hides the end of a row from a head that reads it there, or no layer of the model can be
        quantized.
    """
    if not facts.head:
        return ()
    if TASKS[recipe.model.task].images and recipe.adapter.arguments.get("init_lora_weights") == "eva":
        raise RecipeError(
            "adapter.init_lora_weights: eva is initialized from texts, but the rows are images; remove it"
        )
    if facts.convolutions and recipe.quantization is not None:
        raise RecipeError(
            f"quantization: {facts.architecture} consists of convolutions, but only linear layers can be quantized; "
            "remove it"
        )
    if facts.reads_end and METHODS[recipe.adapter.method].hides_tokens:
        raise RecipeError(
            f"adapter.method: {recipe.adapter.method} hides the end of a row from {facts.architecture}, whose "
            "head reads it; use lora or prefix, or an encoder model"
        )
    where = (
        "reads the last token of a row"
        if facts.reads_end
        else "reads the row"
        if _of_rows(recipe)
        else "reads each token"
    )
    unquantized = "" if recipe.quantization is None else f", and not quantized to {recipe.quantization.bits} bits"
    head = Decision("head", ", ".join(facts.head), f"new for the task, fully trained{unquantized}; it {where}")
    return (head, *_of_convolutions(recipe, facts))


def _of_convolutions(recipe: Recipe, facts: ModelFacts) -> tuple[Decision, ...]:
    found = []
    if facts.convolutions and recipe.adapter.target_modules in (None, ALL_LINEAR):
        why = f"{facts.architecture} has linear layers only in its head; {ALL_LINEAR} selects its convolutions"
        found.append(Decision("targets", f"{len(facts.linear)} convolutions", why))
    if facts.statistics:
        why = "the running statistics of the batch norms stay those of the base, also in training"
        found.append(Decision("batch norms", "frozen", why))
    return tuple(found)


def head_notices(recipe: Recipe) -> tuple[str, ...]:
    """What the baseline metrics of such a task mean."""
    fair_baseline = TASKS[recipe.model.task].baseline
    if not fair_baseline or not recipe.evaluation.baseline:
        return ()
    if recipe.model.problem_type == "regression":
        fair_baseline = "the error of the mean"
    return (f"the base has a new, untrained head, so its metrics are chance level; compare with {fair_baseline}",)


def resolve_labels(
    plan: Plan,
    labels: tuple[str, ...],
    problem_type: str | None,
    count: Callable[[AdapterSection], Trained],
    class_rows: Sequence[int] = (),
) -> Plan:
    """The plan with the labels found in the rows.

    Args:
        labels: label names by index; empty for a regression.
        class_rows: training rows, or words, of each label.
        problem_type: of sequence-classification, as detected from the rows.
        count: counts the trainable parameters of an adapter with a head of that size.

    Raises:
        RecipeError: `evaluation.positive_label` is not one of two classes, or class weights, a threshold or the metric
            of the best step do not fit the labels.
    """
    if TASKS[plan.task].generates:
        return plan
    _check_positive(plan.evaluation.positive_label, labels, problem_type)
    _check_metric(plan, problem_type)
    check_threshold(plan, problem_type)
    plan = with_class_weights(plan, labels or (NUMBER,), problem_type, class_rows)
    names = labels or (NUMBER,)
    trained = count(plan.adapter)
    trainable = trained.parameters
    added = trainable - plan.trainable_parameters
    total = plan.total_parameters + 2 * added  # the base contains the untrained head too
    decisions = tuple(
        replace(one, value=f"{trainable:,} parameters", reason=f"{trainable / total:.2%} of {total:,}")
        if one.key == "trainable"
        else one
        for one in plan.decisions
    )
    return replace(
        plan,
        base=replace(plan.base, labels=names, problem_type=problem_type, threshold=_fixed(plan.evaluation.threshold)),
        trained=trained,
        total_parameters=total,
        decisions=decisions,
    )


def _fixed(threshold: float | str | None) -> float | None:
    """A threshold that the recipe fixes; None if it is chosen after training."""
    return threshold if isinstance(threshold, float) else None


def _check_metric(plan: Plan, problem_type: str | None) -> None:
    """Refuse to choose the best step by a metric that labels of this kind do not have."""
    name = metric_name(plan.trainer)
    if not chooses(plan.trainer) or name == "loss":
        return
    measured = NUMBER_METRICS if problem_type == "regression" else CLASS_METRICS
    if problem_type is None:
        measured = (*CLASS_METRICS, *ENTITY_METRICS)
    if problem_type != "multi-label":
        measured = tuple(one for one in measured if not one.endswith("_samples"))
    if name not in measured:
        near = nearest(name, measured) or measured[0]
        kind = "tags" if problem_type is None else problem_type
        raise RecipeError(
            f"trainer.metric_for_best_model = {name}: the labels are {kind}, which have no such metric; use loss or "
            f"{near}"
        )


def _check_positive(positive: str | None, labels: tuple[str, ...], problem_type: str | None) -> None:
    if positive is None:
        return
    if problem_type != "single-label" or len(labels) != 2:
        what = "the labels are numbers" if problem_type == "regression" else f"the rows have {len(labels)} labels"
        raise RecipeError(f"evaluation.positive_label needs exactly two classes, but {what}; remove it")
    if positive not in labels:
        raise RecipeError(
            f"evaluation.positive_label is {positive}, but the classes are {labels[0]} and {labels[1]}; set one of them"
        )


def keep_labels(plan: Plan, base: Base) -> Plan:
    """The plan with the labels of a trained base, so that each keeps its index."""
    problem_type = base.problem_type or "auto"
    dataset = plan.dataset
    if problem_type != "regression":
        dataset = dataset.model_copy(update={"labels": base.labels})
    return replace(plan, dataset=dataset, labels=replace(plan.labels, problem_type=problem_type))


def base_with_head(base: Base, recipe: Recipe, facts: ModelFacts) -> Base:
    """The base with the task, its labels as far as they are known, and the seed of a new head."""
    if TASKS[recipe.model.task].generates:
        return base
    problem_type = recipe.model.problem_type if _of_rows(recipe) and recipe.model.problem_type != "auto" else None
    return replace(
        base,
        task=recipe.model.task,
        labels=first_labels(recipe),
        problem_type=problem_type,
        head=facts.head,
        seed=recipe.seed,
    )


def _of_rows(recipe: Recipe) -> bool:
    return TASKS[recipe.model.task].label_of == "row"
