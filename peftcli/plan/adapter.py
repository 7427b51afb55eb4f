"""Resolves an adapter for a model: target names, and sizes that divide the widths of the targets."""

import math
from collections.abc import Iterable

from peftcli.errors import RecipeError
from peftcli.methods.base import Method
from peftcli.methods.registry import METHODS
from peftcli.plan.adapter_targets import exclude_towers, resolve_pattern
from peftcli.plan.machine import ModelFacts
from peftcli.plan.plan import Decision
from peftcli.plan.targets import ALL_LINEAR, named_targets, stand_in_layers, structural_targets
from peftcli.recipe.schema import AdapterSection

SCALED = ("k_proj", "v_proj", "key", "value", "c_attn", "query_key_value", "qkv_proj", "k_lin", "v_lin")
"""Names of key and value projections in various model families."""
SCALED_INPUTS = ("down_proj", "fc2", "mlp.c_proj", "output.dense", "dense_4h_to_h", "lin2", "fc_out")
"""Second layers of the MLP, whose input IA3 scales.

Source: TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING in peft/utils/constants.py.
"""


def resolve_adapter(adapter: AdapterSection, facts: ModelFacts) -> tuple[AdapterSection, tuple[Decision, ...]]:
    """Resolve what the recipe leaves to the method.

    Returns:
        The adapter, whose targets are names, `all-linear`, or None for a method without target modules, and the
        decisions made.

    Raises:
        RecipeError: the model has no module for the method.
    """
    method = METHODS[adapter.method]
    adapter = resolve_pattern(adapter, facts)
    if method.targets == "whole" or (method.targets == "writers" and adapter.target_modules is None):
        return structural_targets(adapter, facts), ()
    if adapter.target_modules is None and not method.prompts:
        adapter = adapter.model_copy(update={"target_modules": _own_targets(method, facts)})
    adapter = exclude_towers(stand_in_layers(adapter, facts), facts)
    if method.targets == "scaled" and "feedforward_modules" not in adapter.arguments:
        assert adapter.target_modules is not None  # set above
        inputs = [name for name in _names(adapter, facts) if any(_ends(name, one) for one in SCALED_INPUTS)]
        adapter = _with_argument(adapter, "feedforward_modules", inputs)
    decisions = []
    for argument, most in method.must_divide.items():
        if argument in adapter.arguments or argument in adapter.model_fields_set:
            continue
        size = _divisor(_widths(adapter, facts), most)
        if size is not None and size < most:
            adapter = _with_argument(adapter, argument, size)
            decisions.append(Decision(f"adapter.{argument}", str(size), "largest divisor of the widths of all targets"))
    return adapter, tuple(decisions)


def _with_argument(adapter: AdapterSection, name: str, value: object) -> AdapterSection:
    if name in AdapterSection.model_fields:
        return adapter.model_copy(update={name: value})
    return adapter.model_copy(update={"arguments": {**adapter.arguments, name: value}})


def _own_targets(method: Method, facts: ModelFacts) -> tuple[str, ...]:
    if method.targets == "norms":
        found = _leaves(facts.norms)
    elif method.targets == "embeddings":
        found = facts.embeddings[:1]
    else:
        present = (*SCALED, *SCALED_INPUTS)
        found = tuple(name for name in present if any(_ends(module, name) for module in facts.linear))
    if not found:
        raise RecipeError(
            f"adapter.method {method.name}: {facts.architecture} has none of the method's default modules; list "
            "modules in adapter.target_modules"
        )
    return found


def _names(adapter: AdapterSection, facts: ModelFacts) -> tuple[str, ...]:
    targets = named_targets(adapter)
    return _leaves(facts.linear) if targets == ALL_LINEAR else tuple(targets or ())


def _leaves(modules: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(module.rsplit(".", 1)[-1] for module in modules))


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith("." + name)


def _widths(adapter: AdapterSection, facts: ModelFacts) -> tuple[int, ...]:
    if facts.shape is None:
        return ()
    names = _names(adapter, facts)
    chosen = [one for one in facts.shape.linears if any(_ends(one.name, n) or _ends(n, one.name) for n in names)]
    return tuple(width for one in chosen for width in (one.inputs, one.outputs))


def _divisor(widths: tuple[int, ...], most: int) -> int | None:
    """The largest number up to `most` that divides all widths; None if they are unknown.

    >>> _divisor((896, 4864, 128), 256), _divisor((), 64)
    (128, None)
    """
    common = math.gcd(*widths) if widths else 0
    return next((size for size in range(most, 0, -1) if common % size == 0), None) if common else None
