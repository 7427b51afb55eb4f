"""What the labels of the rows decide about the training loss and the predictions: class weights, and the threshold."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from peftcli.errors import RecipeError
from peftcli.nearest import nearest
from peftcli.plan.plan import Decision, Plan

WEIGHTED = ("single-label", None)
"""Problem types whose loss is a cross-entropy over classes; None is tagging."""
CLASS_WEIGHTS = "class weights"
"""Key of the decision."""
SHOWN = 12
"""Maximum number of class weights in a message."""


def with_class_weights(plan: Plan, names: Sequence[str], problem_type: str | None, counts: Sequence[int]) -> Plan:
    """The plan with a weight for each class, in the order of the classes, if the recipe asks for weights.

    Args:
        counts: training rows, or words, of each class.

    Raises:
        RecipeError: the labels are no classes, or the weights do not fit them.
    """
    asked = plan.class_weights
    if asked is None:
        return plan
    if problem_type not in WEIGHTED:
        raise RecipeError(
            f"model.class_weights weights the cross-entropy of classes, but the labels are {problem_type}; remove it"
            + (", or set evaluation.threshold: auto" if problem_type == "multi-label" else "")
        )
    if asked == "balanced":
        weights, reason = balanced_weights(counts), "balanced: rows / (classes x rows of the class)"
    elif isinstance(asked, Mapping):
        weights, reason = _named_weights(asked, names), "model.class_weights"
    else:
        assert isinstance(asked, tuple)  # the schema has no other text
        weights, reason = _listed_weights(asked, names), "model.class_weights, in the order of the classes"
    pairs = [f"{name} {weight:.4g}" for name, weight in zip(names, weights, strict=True)]
    shown = ", ".join(pairs[:SHOWN]) + (f" and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else "")
    note = f"class weights of the training loss: {shown} ({reason}); the losses of evaluations are unweighted"
    decided = Decision(CLASS_WEIGHTS, shown, reason)
    return replace(
        plan,
        class_weights=weights,
        decisions=tuple(decided if one.key == CLASS_WEIGHTS else one for one in plan.decisions),
        notices=(*plan.notices, note),
    )


def class_weight_decisions(asked: object) -> tuple[Decision, ...]:
    """The class weights of a recipe before the rows are read; empty without."""
    if asked is None:
        return ()
    value = asked if isinstance(asked, str) else "of the recipe"
    return (Decision(CLASS_WEIGHTS, value, "of the training loss; their values follow from the classes of the rows"),)


def balanced_weights(counts: Sequence[int]) -> tuple[float, ...]:
    """Weights with which every class has the same share of the loss, and the mean weight of a row is 1.

    A class without rows has the weight 1, which no row uses.

    >>> balanced_weights([1, 3, 0])
    (2.0, 0.6666666666666666, 1.0)
    """
    present = sum(count > 0 for count in counts)
    return tuple(sum(counts) / (present * count) if count else 1.0 for count in counts)


def _named_weights(asked: Mapping[str, float], names: Sequence[str]) -> tuple[float, ...]:
    for name in asked:
        if name not in names:
            near = nearest(name, names)
            fix = f"did you mean {near}?" if near else f"the classes are {', '.join(names[:SHOWN])}"
            raise RecipeError(f"model.class_weights: there is no class {name}; {fix}")
    return tuple(float(asked.get(name, 1.0)) for name in names)


def _listed_weights(asked: Sequence[float], names: Sequence[str]) -> tuple[float, ...]:
    if len(asked) != len(names):
        raise RecipeError(
            f"model.class_weights has {len(asked)} weights, but there are {len(names)} classes "
            f"({', '.join(names[:SHOWN])}); give one for each, in this order, or name them as in {{{names[0]}: 2}}"
        )
    return tuple(float(weight) for weight in asked)


def check_threshold(plan: Plan, problem_type: str | None) -> None:
    """Refuse a threshold for labels that are not chosen by one.

    Raises:
        RecipeError: the rows have one class each, or numbers.
    """
    if plan.evaluation.threshold is not None and problem_type != "multi-label":
        raise RecipeError(
            f"evaluation.threshold is for rows with any number of classes, but the labels are {problem_type}; remove it"
        )
