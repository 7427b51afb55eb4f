"""What a task with labels changes in a plan: the head that is trained whole, and its size once the labels are known."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from peftcli.errors import RecipeError
from peftcli.methods.registry import METHODS
from peftcli.plan.machine import ModelFacts
from peftcli.plan.optimizer import Trained
from peftcli.plan.plan import Base, Decision, Plan
from peftcli.plan.targets import ALL_LINEAR, matches, of_head
from peftcli.recipe.schema import AdapterSection, Recipe
from peftcli.tasks.registry import TASKS

NUMBER = "value"
"""Name of the one output of a regression."""
ADDED_BY_PEFT = ("classifier", "score")
"""Ends of the names of modules that PEFT trains whole by itself for these tasks."""


def first_labels(recipe: Recipe) -> tuple[str, ...]:
    """The outputs of the head as far as the recipe alone tells; two stand in for those that the rows will name."""
    if TASKS[recipe.model.task].generates:
        return ()
    if recipe.model.problem_type == "regression":
        return (NUMBER,)
    return tuple(recipe.dataset.labels or ("0", "1"))


def with_head(adapter: AdapterSection, facts: ModelFacts, task: str) -> AdapterSection:
    """The adapter section with the parts of the head that PEFT would not train by itself, and no target among them."""
    if facts.head:
        adapter = adapter.model_copy(update={"target_modules": targets_beside_head(adapter.target_modules, facts)})
    added = () if TASKS[task].peft_type is None else ADDED_BY_PEFT
    more = [name for name in facts.head if not (added and name.endswith(added))]
    return (
        adapter.model_copy(update={"modules_to_save": (*(adapter.modules_to_save or ()), *more)}) if more else adapter
    )


def targets_beside_head(wanted: Any, facts: ModelFacts) -> Any:
    """Targets by their whole names where a short one would match a part of the head too, which is trained whole."""
    if wanted == ALL_LINEAR:
        return facts.linear
    if not isinstance(wanted, tuple):
        return wanted
    matched = [module for module in facts.modules if any(matches(module, name) for name in wanted)]
    beside = tuple(module for module in matched if not of_head(module, facts))
    return wanted if len(beside) == len(matched) else beside


def head_decisions(recipe: Recipe, facts: ModelFacts) -> tuple[Decision, ...]:
    """What a person should know of the head.

    Raises:
        RecipeError: the method cannot tell where a row ends, which this model's head reads, or nothing of the model can
            be quantized.
    """
    if not facts.head:
        return ()
    if TASKS[recipe.model.task].images and recipe.adapter.arguments.get("init_lora_weights") == "eva":
        raise RecipeError(
            "adapter.init_lora_weights: eva begins from rows of text, and the rows are images; leave it out"
        )
    if facts.convolutions and recipe.quantization is not None:
        raise RecipeError(
            f"quantization: {facts.architecture} is made of convolutions, and only linear layers can be quantized; "
            "leave it out"
        )
    if facts.reads_end and METHODS[recipe.adapter.method].hides_tokens:
        raise RecipeError(
            f"adapter.method: {recipe.adapter.method} hides from {facts.architecture} where a row ends, and its class "
            "is read there; take lora or prefix, or an encoder"
        )
    where = (
        "reads the last token of a row"
        if facts.reads_end
        else "reads the row"
        if _of_rows(recipe)
        else "reads each token"
    )
    kept = "" if recipe.quantization is None else f", and stays out of {recipe.quantization.bits} bits"
    head = Decision("head", ", ".join(facts.head), f"new for the task, trained whole{kept}; it {where}")
    return (head, *_of_convolutions(recipe, facts))


def _of_convolutions(recipe: Recipe, facts: ModelFacts) -> tuple[Decision, ...]:
    said = []
    if facts.convolutions and recipe.adapter.target_modules in (None, ALL_LINEAR):
        why = f"{facts.architecture} has no linear layer but in its head; {ALL_LINEAR} means its convolutions"
        said.append(Decision("targets", f"{len(facts.linear)} convolutions", why))
    if facts.statistics:
        why = "the running means of the batch norms stay those of the base, also in training"
        said.append(Decision("batch norms", "frozen", why))
    return tuple(said)


def head_notices(recipe: Recipe) -> tuple[str, ...]:
    """What the figures of the base mean for such a task."""
    honest = TASKS[recipe.model.task].baseline
    if not honest or not recipe.evaluation.baseline:
        return ()
    if recipe.model.problem_type == "regression":
        honest = "the error of the mean"
    return (f"the base has a new, untrained head, so its figures are those of a guess; compare with {honest}",)


def resolve_labels(
    plan: Plan, labels: tuple[str, ...], problem_type: str | None, count: Callable[[AdapterSection], Trained]
) -> Plan:
    """The plan with the labels that the rows turned out to have.

    Args:
        labels: names by number; empty for a regression.
        problem_type: of sequence-classification, as the rows decide it.
        count: the trainable parameters of an adapter with a head of that size.

    Raises:
        RecipeError: `evaluation.positive_label` is none of two classes.
    """
    if TASKS[plan.task].generates:
        return plan
    _check_positive(plan.evaluation.positive_label, labels, problem_type)
    names = labels or (NUMBER,)
    trained = count(plan.adapter)
    trainable = trained.parameters
    grown = trainable - plan.trainable_parameters
    total = plan.total_parameters + 2 * grown  # the untrained head stays in the base beside the trained one
    decisions = tuple(
        replace(one, value=f"{trainable:,} parameters", reason=f"{trainable / total:.2%} of {total:,}")
        if one.key == "trainable"
        else one
        for one in plan.decisions
    )
    return replace(
        plan,
        base=replace(plan.base, labels=names, problem_type=problem_type),
        trained=trained,
        total_parameters=total,
        decisions=decisions,
    )


def _check_positive(positive: str | None, labels: tuple[str, ...], problem_type: str | None) -> None:
    if positive is None:
        return
    if problem_type != "single-label" or len(labels) != 2:
        what = "the labels are numbers" if problem_type == "regression" else f"the rows have {len(labels)} labels"
        raise RecipeError(f"evaluation.positive_label chooses one of two classes, and {what}; leave it out")
    if positive not in labels:
        raise RecipeError(f"evaluation.positive_label is {positive}, and the classes are {labels[0]} and {labels[1]}")


def keep_labels(plan: Plan, base: Base) -> Plan:
    """The plan with rows read by the labels of a trained base, so that each keeps its number."""
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
