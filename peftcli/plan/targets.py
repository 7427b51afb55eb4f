"""Adapter targets held against the names of the model's modules."""

from collections.abc import Iterable, Mapping, Sequence

from peftcli.errors import RecipeError
from peftcli.nearest import nearest_names
from peftcli.plan.facts import ModelFacts
from peftcli.plan.places import BLOCK

ALL_LINEAR = "all-linear"


def match_targets(wanted: Sequence[str] | str | None, facts: ModelFacts) -> dict[str, int]:
    """Count the modules that each wanted name stands for.

    A name matches a module of that name and every module whose path ends in it, as PEFT matches.

    Args:
        wanted: names, `all-linear` for every linear layer but the output layer, or None for no module at all.
        facts: of the base model.

    Returns:
        For each name the number of modules; with `all-linear` for each last part of a path.

    Raises:
        RecipeError: a name matches nothing (even beside one that matches), or it matches the output layer.
    """
    if wanted is None:
        return {}
    if wanted == ALL_LINEAR:
        counts: dict[str, int] = {}
        for module in facts.linear:
            leaf = module.rsplit(".", 1)[-1]
            counts[leaf] = counts.get(leaf, 0) + 1
        if not counts:
            raise RecipeError(f"adapter.target_modules: {facts.architecture} has no linear layer for {ALL_LINEAR}")
        return counts
    adaptable = [module for module in facts.modules if not of_head(module, facts)]  # the head is trained whole
    counts = {name: sum(matches(module, name) for module in adaptable) for name in wanted}
    nothing = [name for name, count in counts.items() if count == 0]
    if nothing:
        leaves = sorted({module.rsplit(".", 1)[-1] for module in facts.linear})
        raise RecipeError(
            f"no module of {facts.architecture} matches adapter.target_modules [{', '.join(nothing)}]; "
            f"nearest: {', '.join(_nearest(nothing, leaves))}"
        )
    output = [name for name in wanted if facts.output_layer and matches(facts.output_layer, name)]
    if output:
        raise RecipeError(
            f"adapter.target_modules names the output layer ({output[0]}), on which an adapter would not be trained "
            f"(the loss reads its weight directly); put it into adapter.modules_to_save instead"
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
            f"nearest: {', '.join(_nearest(nothing, leaves))}"
        )


def without_numbers(counts: Mapping[str, int]) -> dict[str, int]:
    """Full paths that differ only in the number of their block, counted together."""
    found: dict[str, int] = {}
    for name, count in counts.items():
        inside = BLOCK.match(name)
        short = name if inside is None else inside["inside"]
        found[short] = found.get(short, 0) + count
    return found


def matches(module: str, name: str) -> bool:
    """Whether a name stands for a module, as PEFT matches them.

    >>> matches("layers.0.q_proj", "q_proj"), matches("layers.0.aq_proj", "q_proj")
    (True, False)
    """
    """Whether a wanted name means a module: it is its path, or the end of it."""
    return module == name or module.endswith("." + name)


def of_head(module: str, facts: ModelFacts) -> bool:
    """Whether a module is a part of the head that a task adds."""
    return any(module == name or module.startswith(f"{name}.") for name in facts.head)


def _nearest(wanted: list[str], known: list[str]) -> list[str]:
    near = [name for word in wanted for name in nearest_names(word, known, most=3, least=0.4)]
    return list(dict.fromkeys(near)) or known[:12]
