"""One row for each method: its name in a recipe, its class in PEFT, what it takes and what it can do."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """What is known of a method before anything heavy is imported.

    Attributes:
        name: as a recipe writes it.
        title: one line, what it is.
        config: name of its configuration class in PEFT, or of ours.
    """

    name: str
    title: str
    config: str


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (Method("lora", "low-rank update of linear layers (Hu et al. 2021, arXiv:2106.09685)", "LoraConfig"),)
}
