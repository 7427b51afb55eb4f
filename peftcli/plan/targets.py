"""Adapter targets held against the names of the model's modules."""

import difflib
from collections.abc import Iterable, Sequence

from peftcli.errors import RecipeError
from peftcli.plan.facts import ModelFacts

ALL_LINEAR = "all-linear"


def match_targets(wanted: Sequence[str] | str, facts: ModelFacts) -> dict[str, int]:
    """Count the modules that each wanted name stands for.

    A name matches a module of that name and every module whose path ends in it, as PEFT matches.

    Args:
        wanted: names, or `all-linear` for every linear layer but the output layer.
        facts: of the base model.

    Returns:
        For each name the number of modules; with `all-linear` for each last part of a path.

    Raises:
        RecipeError: a name matches nothing (even beside one that matches), or it matches the output layer.
    """
    if wanted == ALL_LINEAR:
        counts: dict[str, int] = {}
        for module in facts.linear:
            leaf = module.rsplit(".", 1)[-1]
            counts[leaf] = counts.get(leaf, 0) + 1
        if not counts:
            raise RecipeError(f"adapter.target_modules: {facts.architecture} has no linear layer for {ALL_LINEAR}")
        return counts
    counts = {name: sum(_matches(module, name) for module in facts.modules) for name in wanted}
    nothing = [name for name, count in counts.items() if count == 0]
    if nothing:
        leaves = sorted({module.rsplit(".", 1)[-1] for module in facts.linear})
        raise RecipeError(
            f"no module of {facts.architecture} matches adapter.target_modules [{', '.join(nothing)}]; "
            f"nearest: {', '.join(_nearest(nothing, leaves))}"
        )
    output = [name for name in wanted if facts.output_layer and _matches(facts.output_layer, name)]
    if output:
        raise RecipeError(
            f"adapter.target_modules names the output layer ({output[0]}), on which an adapter would not be trained "
            f"(the loss reads its weight directly); put it into adapter.modules_to_save instead"
        )
    return counts


def match_saved(wanted: Iterable[str], facts: ModelFacts) -> None:
    """Check the names of `adapter.modules_to_save` in the same way.

    Raises:
        RecipeError: a name matches nothing.
    """
    nothing = [name for name in wanted if not any(_matches(module, name) for module in facts.modules)]
    if nothing:
        leaves = sorted({module.rsplit(".", 1)[-1] for module in facts.modules if module})
        raise RecipeError(
            f"no module of {facts.architecture} matches adapter.modules_to_save [{', '.join(nothing)}]; "
            f"nearest: {', '.join(_nearest(nothing, leaves))}"
        )


def _matches(module: str, name: str) -> bool:
    return module == name or module.endswith("." + name)


def _nearest(wanted: list[str], known: list[str]) -> list[str]:
    near = [name for word in wanted for name in difflib.get_close_matches(word, known, n=3, cutoff=0.4)]
    return list(dict.fromkeys(near)) or known[:12]
