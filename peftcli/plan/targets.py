"""Adapter targets: matched against the module names of the model, or derived from its structure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from peftcli.errors import RecipeError
from peftcli.methods.base import Method
from peftcli.methods.registry import METHODS
from peftcli.nearest import nearest_names
from peftcli.plan.machine import ModelFacts
from peftcli.plan.module_layout import (
    BLOCK,
    block_number,
    bottleneck_targets,
    full_targets,
    layout_of,
    refuse_unknown_layers,
    within,
)
from peftcli.plan.module_selection import Selection, SelectionRule
from peftcli.plan.optimizer import Trained
from peftcli.plan.plan import Decision, Plan
from peftcli.recipe.schema import AdapterSection, SelectSection

ALL_LINEAR = "all-linear"


def match_targets(wanted: Sequence[str] | str | None, facts: ModelFacts) -> dict[str, int]:
    """Count the modules that each target name matches.

    A name matches a module of that name and every module whose path ends with it, as in PEFT.

    Args:
        wanted: names, `all-linear` for every linear layer except the output layer, or None for no module.
        facts: of the base model.

    Returns:
        The number of modules per name; with `all-linear` per last part of the path.

    Raises:
        RecipeError: a name matches nothing (even if others match), or it matches the output layer.
    """
    if wanted is None:
        return {}
    if wanted == ALL_LINEAR:
        counts: dict[str, int] = {}
        for module in facts.linear:
            leaf = module.rsplit(".", 1)[-1]
            counts[leaf] = counts.get(leaf, 0) + 1
        if not counts:
            raise RecipeError(
                f"adapter.target_modules: {facts.architecture} has no linear layer for {ALL_LINEAR}; list modules"
            )
        return counts
    # The head is fully trained.
    adaptable = [one for one in facts.modules if not of_head(one, facts) and not is_within(one, facts.towers)]
    counts = {name: sum(matches(module, name) for module in adaptable) for name in wanted}
    nothing = [name for name, count in counts.items() if count == 0]
    if nothing:
        leaves = sorted({module.rsplit(".", 1)[-1] for module in facts.linear})
        raise RecipeError(
            f"no module of {facts.architecture} matches adapter.target_modules [{', '.join(nothing)}]; "
            f"nearest names: {', '.join(_nearest(nothing, leaves))}"
        )
    output = [name for name in wanted if facts.output_layer and matches(facts.output_layer, name)]
    if output:
        raise RecipeError(
            f"adapter.target_modules contains the output layer ({output[0]}), where an adapter would not be trained "
            f"(the loss reads its weight directly); move it to adapter.modules_to_save"
        )
    return without_numbers(counts)


def match_saved(wanted: Iterable[str], facts: ModelFacts) -> None:
    """Check the names of `adapter.modules_to_save` in the same way.

    Raises:
        RecipeError: a name matches nothing.
    """
    nothing = [name for name in wanted if not any(matches(module, name) for module in facts.modules)]
    if nothing:
        leaves = sorted({module.rsplit(".", 1)[-1] for module in facts.modules if module})
        raise RecipeError(
            f"no module of {facts.architecture} matches adapter.modules_to_save [{', '.join(nothing)}]; "
            f"nearest names: {', '.join(_nearest(nothing, leaves))}"
        )


def without_numbers(counts: Mapping[str, int]) -> dict[str, int]:
    """Merge the counts of full paths that differ only in the block number."""
    found: dict[str, int] = {}
    for name, count in counts.items():
        inside = BLOCK.match(name)
        short = name if inside is None else inside["inside"]
        found[short] = found.get(short, 0) + count
    return found


def matches(module: str, name: str) -> bool:
    """Whether a name matches a module, as in PEFT.

    >>> matches("layers.0.q_proj", "q_proj"), matches("layers.0.aq_proj", "q_proj")
    (True, False)
    """
    return module == name or module.endswith("." + name)


def of_head(module: str, facts: ModelFacts) -> bool:
    """Whether a module is in the head that a task adds."""
    return is_within(module, facts.head)


def is_within(module: str, names: Iterable[str]) -> bool:
    """Whether a module is one of some modules, or in one of them."""
    return any(module == name or module.startswith(f"{name}.") for name in names)


def _nearest(wanted: list[str], known: list[str]) -> list[str]:
    near = [name for word in wanted for name in nearest_names(word, known, most=3, least=0.4)]
    return list(dict.fromkeys(near)) or known[:12]


def choice_of(adapter: AdapterSection, facts: ModelFacts) -> tuple[AdapterSection, SelectionRule | None]:
    """The adapter with all candidates as targets, and the selection rule; None if nothing is selected by gradient."""
    targets, layers = adapter.target_modules, adapter.layers
    asked = next((one for one in (targets, layers) if isinstance(one, SelectSection)), None)
    if asked is None:
        return adapter, None
    kind = "modules" if isinstance(targets, SelectSection) else "layers"
    candidates = {"target_modules": ALL_LINEAR} if kind == "modules" else {"layers": None}
    choice = SelectionRule(kind, asked.batches, asked.budget, int(asked.budget * facts.parameters))
    return adapter.model_copy(update=candidates), choice


def within_choice(trained: Trained, choice: SelectionRule | None) -> Trained:
    """The maximum number of trainable parameters, given those of all candidates."""
    return trained if choice is None else trained.resized(min(trained.parameters, choice.parameters))


def choice_decisions(choice: SelectionRule | None) -> tuple[Decision, ...]:
    """The decision to show for a selection by gradient."""
    if choice is None:
        return ()
    what = f"{choice.kind} selected by gradient, at most {choice.parameters:,} trainable parameters"
    reason = f"{choice.budget:.2%} of the base's parameters; averaged over {choice.batches} training batches"
    return (Decision(f"chosen {choice.kind}", what, reason),)


def resolve_targets(plan: Plan, selection: Selection, saved: int) -> Plan:
    """The plan of a run after its modules are selected.

    Args:
        saved: parameters of modules that are fully trained besides the adapter.
    """
    trainable = selection.used_parameters + saved
    base = plan.total_parameters - plan.trainable_parameters
    modules = without_numbers(dict.fromkeys(selection.modules, 1))
    listed = ", ".join(f"{name} x {count}" for name, count in modules.items())
    values = {
        "adapter": f"{plan.adapter.method} on {len(selection.modules)} modules selected by gradient",
        "trainable": f"{trainable:,} parameters",
    }
    reasons = {"adapter": listed, "trainable": f"{trainable / (base + trainable):.2%} of {base + trainable:,}"}
    return replace(
        plan,
        adapter=plan.adapter.model_copy(update={"target_modules": selection.modules, "layers": None}),
        targets=modules,
        trained=plan.trained.resized(trainable),
        total_parameters=base + trainable,
        decisions=tuple(
            replace(one, value=values[one.key], reason=reasons[one.key]) if one.key in values else one
            for one in plan.decisions
        ),
    )


def named_targets(adapter: AdapterSection) -> tuple[str, ...] | str | None:
    """The targets of an adapter without anything left to select."""
    assert not isinstance(adapter.target_modules, SelectSection)  # `choice_of` replaced it
    return adapter.target_modules


def candidates(adapter: AdapterSection, facts: ModelFacts) -> tuple[str, ...]:
    """Full names of the linear layers that an adapter section matches, in the order of the model."""
    targets = named_targets(adapter)
    if targets == ALL_LINEAR:
        return facts.linear
    return tuple(name for name in facts.linear if any(matches(name, one) for one in targets or ()))


def stand_in_layers(adapter: AdapterSection, facts: ModelFacts) -> AdapterSection:
    """The adapter with its targets as full names if it is limited to some layers.

    Raises:
        RecipeError: a layer does not exist, or those layers have no such module.
    """
    layers = adapter.layers
    if layers is None or isinstance(layers, SelectSection) or METHODS[adapter.method].targets in ("writers", "whole"):
        return adapter
    _check_layers(layers, facts)
    targets = named_targets(adapter)
    modules = facts.linear if targets == ALL_LINEAR else facts.modules
    wanted = modules if targets == ALL_LINEAR else targets or ()
    names = [name for name in modules if block_number(name) in layers and any(matches(name, one) for one in wanted)]
    if not names:
        raise RecipeError(
            f"adapter.layers {list(layers)}: these layers have none of the modules {list(targets or ())}; "
            "change adapter.layers or adapter.target_modules"
        )
    return adapter.model_copy(update={"target_modules": tuple(names), "layers": None})


def structural_targets(adapter: AdapterSection, facts: ModelFacts) -> AdapterSection:
    """The adapter of one of our own tuners with its target modules as full names.

    Raises:
        RecipeError: the model has no such modules.
    """
    method = METHODS[adapter.method]
    layers = adapter.layers if not isinstance(adapter.layers, SelectSection) else None
    if layers is not None:
        _check_layers(layers, facts)
    try:
        if method.targets == "writers":
            linears = {name: facts.widths[name] for name in facts.linear if name in facts.widths}
            placement = str(_argument(adapter, method, "placement"))
            names = bottleneck_targets(linears, facts.hidden, placement, layers)
            return adapter.model_copy(update={"target_modules": tuple(names), "layers": None})
        return _whole(adapter, method, layers, facts)
    except ValueError as problem:
        raise RecipeError(f"adapter.method {adapter.method}: {problem}") from problem


def _whole(adapter: AdapterSection, method: Method, layers: Sequence[int] | None, facts: ModelFacts) -> AdapterSection:
    inner = [name for name in facts.owners if not any(within(name, one) for one in (*facts.head, *facts.towers))]
    embedding = facts.embeddings[0] if facts.embeddings else None
    parts = layout_of(inner, embedding, facts.output_layer)
    names = full_targets(
        parts,
        last_layers=int(_argument(adapter, method, "last_layers") or 0),
        layers=layers,
        head=bool(_argument(adapter, method, "head")),
        embeddings=bool(_argument(adapter, method, "embeddings")),
        everything=bool(_argument(adapter, method, "everything")),
    )
    if not names and not facts.head and not _argument(adapter, method, "trainable_token_indices"):
        raise ValueError("no module is trained; set adapter.last_layers, layers, head or embeddings")
    ends = tuple(name for name in names if name in parts.ends)
    update = {
        "target_modules": tuple(name for name in names if name not in ends),
        "modules_to_save": (*(adapter.modules_to_save or ()), *ends) or None,
        "layers": None,
    }
    return adapter.model_copy(update=update)


def _argument(adapter: AdapterSection, method: Method, key: str) -> Any:
    return adapter.arguments.get(key, method.defaults.get(key))


def _check_layers(layers: Sequence[int], facts: ModelFacts) -> None:
    numbers = {block_number(name) for name in facts.linear} - {None}
    try:
        refuse_unknown_layers(layers, len(numbers))
    except ValueError as problem:
        raise RecipeError(f"adapter.{problem}") from problem
