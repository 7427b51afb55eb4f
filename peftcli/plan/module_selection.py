"""Selects modules or layers by gradient norm within a budget of trainable parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftcli.errors import RecipeError
from peftcli.plan.module_layout import block_number

MOST_NAMED = 4
"""Maximum number of modules that a message lists."""


@dataclass(frozen=True)
class SelectionRule:
    """How modules will be selected by gradient before the first step.

    Attributes:
        kind: `modules` or `layers`.
        batches: number of training batches over which the gradient is averaged.
        budget: share of the base's parameters.
        parameters: maximum number of trainable parameters.
    """

    kind: str
    batches: int
    budget: float
    parameters: int


@dataclass(frozen=True)
class ScoredModule:
    """A module or layer that can be selected.

    Attributes:
        name: path of the module, or the number of the layer.
        score: root mean square of the gradient of its weights.
        cost: trainable parameters of its adapters.
        chosen: it is selected.
    """

    name: str
    score: float
    cost: int
    chosen: bool


@dataclass(frozen=True)
class Selection:
    """The selected modules and their scores.

    Attributes:
        kind: `modules` or `layers`.
        batches: number of batches over which the gradient was averaged.
        budget: share of the base's parameters.
        budget_parameters, used_parameters: trainable parameters allowed and used.
        scored: all candidates, in the order of the model.
        modules: full names of the trained modules.
    """

    kind: str
    batches: int
    budget: float
    budget_parameters: int
    used_parameters: int
    scored: tuple[ScoredModule, ...]
    modules: tuple[str, ...]

    def sentence(self) -> str:
        """A one-line summary of the selection."""
        taken = [one for one in self.scored if one.chosen]
        best = ", ".join(one.name for one in sorted(taken, key=lambda one: -one.score)[:MOST_NAMED])
        more = f" and {len(taken) - MOST_NAMED} more" if len(taken) > MOST_NAMED else ""
        return (
            f"  selected by gradient: {len(taken)} of {len(self.scored)} {self.kind} with {self.used_parameters:,} of "
            f"{self.budget_parameters:,} trainable parameters, largest gradient first: {best}{more}"
        )

    def as_json(self) -> dict[str, Any]:
        """The content of `selection.json`."""
        return {"schema": 1, **vars(self), "scored": [vars(one) for one in self.scored], "modules": list(self.modules)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Selection":
        """Read what `as_json` wrote."""
        fields = {key: value[key] for key in cls.__dataclass_fields__}
        scored = tuple(ScoredModule(**one) for one in value["scored"])
        return cls(**{**fields, "scored": scored, "modules": tuple(value["modules"])})


def choose_modules(
    scores: Mapping[str, float], costs: Mapping[str, int], base_parameters: int, budget: float, batches: int
) -> Selection:
    """Select modules by descending gradient as long as their adapters fit the budget.

    A module that does not fit is skipped, and a smaller one after it may still be selected.

    Args:
        scores: root mean square of the gradient per module, in the order of the model.
        costs: trainable parameters of an adapter on it.
        base_parameters: of the whole base; the budget is a share of it.

    Raises:
        RecipeError: no module fits.
    """
    allowed = int(budget * base_parameters)
    chosen = _greedy(scores, costs, allowed)
    _refuse_none(chosen, costs, allowed, budget, base_parameters, "target_modules")
    scored = tuple(ScoredModule(name, score, costs[name], name in chosen) for name, score in scores.items())
    modules = tuple(one.name for one in scored if one.chosen)
    return Selection("modules", batches, budget, allowed, sum(costs[name] for name in chosen), scored, modules)


def choose_layers(
    scores: Mapping[str, float],
    costs: Mapping[str, int],
    sizes: Mapping[str, int],
    base_parameters: int,
    budget: float,
    batches: int,
) -> Selection:
    """Select layers in the same way, each with all of its targets.

    Args:
        sizes: parameters of each module, used as weights when averaging the scores of a layer.
    """
    layers: dict[int, list[str]] = {}
    for name in scores:
        number = block_number(name)
        if number is not None:
            layers.setdefault(number, []).append(name)
    allowed = int(budget * base_parameters)
    of_layer = {
        str(number): (sum(scores[name] ** 2 * sizes[name] for name in names) / sum(sizes[name] for name in names))
        ** 0.5
        for number, names in sorted(layers.items())
    }
    cost = {str(number): sum(costs[name] for name in names) for number, names in layers.items()}
    chosen = _greedy(of_layer, cost, allowed)
    _refuse_none(chosen, cost, allowed, budget, base_parameters, "layers")
    scored = tuple(ScoredModule(name, score, cost[name], name in chosen) for name, score in of_layer.items())
    modules = tuple(name for name in scores if str(block_number(name)) in chosen)
    return Selection("layers", batches, budget, allowed, sum(cost[name] for name in chosen), scored, modules)


def _greedy(scores: Mapping[str, float], costs: Mapping[str, int], allowed: int) -> set[str]:
    chosen: set[str] = set()
    left = allowed
    # Ties keep the order of the model, so that every run selects the same.
    for name in sorted(scores, key=lambda name: -scores[name]):
        if costs[name] <= left:
            chosen.add(name)
            left -= costs[name]
    return chosen


def _refuse_none(
    chosen: Sequence[str] | set[str], costs: Mapping[str, int], allowed: int, budget: float, base: int, key: str
) -> None:
    if chosen:
        return
    least = min(costs.values(), default=0)
    raise RecipeError(
        f"adapter.{key}.budget = {budget:.4%} of {base:,} parameters allows {allowed:,} trainable ones, but the "
        f"smallest adapter has {least:,}; raise the budget to {least / base:.4%} or lower adapter.r"
    )
