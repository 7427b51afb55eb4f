"""A choice that is left to the gradient: `{select: gradient, batches: 8, budget: 0.5%}`."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from peftcli.nearest import nearest
from peftcli.recipe.fields import freeze_names, read_targets, wrong
from peftcli.recipe.section import Section

EXAMPLE = "{select: gradient, batches: 8, budget: 0.5%}"
MOST_BATCHES = 1000


class SelectSection(Section):
    """Modules or layers chosen by the gradient on training rows, before the first step."""

    select: Literal["gradient"]
    """What is asked: the size of the loss's gradient by the weights."""
    batches: int = 8
    """Training batches that it is a mean of."""
    budget: float
    """Share of the base's parameters that may become trainable, 0..1; a recipe may write 0.5%."""


def read_target_modules(value: Any) -> Any:
    """Read `adapter.target_modules`: names, all-linear, or a choice."""
    return read_select(value) if isinstance(value, Mapping | SelectSection) else read_targets(value)


def read_layers(value: Any) -> Any:
    """Read `adapter.layers`: numbers of layers, or a choice."""
    if value is None or isinstance(value, Mapping | SelectSection):
        return None if value is None else read_select(value)
    if not isinstance(value, list | tuple) or not value or not all(_is_whole(number) for number in value):
        raise wrong(f"must be a list of layer numbers from 0 on, such as [0, 1], or {EXAMPLE}")
    freeze_names([str(number) for number in value])  # none of them twice
    return tuple(value)


def read_select(value: Any) -> SelectSection:
    """Read a choice."""
    if isinstance(value, SelectSection):
        return value
    for key in value:
        if key not in SelectSection.model_fields:
            near = nearest(str(key), SelectSection.model_fields)
            raise wrong(f"has no key {key}" + (f"; did you mean {near}?" if near else f"; write {EXAMPLE}"))
    if value.get("select") != "gradient":
        raise wrong(f"must say `select: gradient`, as in {EXAMPLE}")
    if "budget" not in value:
        raise wrong(f"needs a budget, a share of the base's parameters, as in {EXAMPLE}")
    batches = value.get("batches", SelectSection.model_fields["batches"].default)
    if not _is_whole(batches) or not 1 <= batches <= MOST_BATCHES:
        raise wrong(f"has batches {batches}; it must be a whole number from 1 to {MOST_BATCHES}")
    return SelectSection(select="gradient", batches=batches, budget=_read_budget(value["budget"]))


def _read_budget(value: Any) -> float:
    percent = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*%\s*", value) if isinstance(value, str) else None
    share = float(percent[1]) / 100 if percent else value
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise wrong(f"has budget {value}; it must be a share of the base's parameters, such as 0.5% or 0.005")
    return float(share)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
