"""What a row of the table of methods says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

CORE = ("r", "alpha", "dropout")
"""Keys of the adapter section that many methods share, each under a name of its own in PEFT."""
GRADIENT_BATCHES = 8
"""Training batches whose gradient an adapter begins by, where the recipe gives no number."""
CAUSAL = ("causal-lm",)
ALL_TASKS = ("causal-lm", "sequence-classification", "token-classification", "image-classification")
SHAPE = "it reads the shape of each weight, which 4-bit weights do not keep"
NUMBERS = "it computes with the weights when it is built, and 4-bit weights are no numbers"
"""Why some methods do not work on 4-bit weights."""
CODES = "it computes with the numbers of each weight, and 8-bit weights are codes"
"""Why some methods do not work on 8-bit weights, which keep the shape."""
Targets = Literal["linear", "norms", "embeddings", "scaled", "writers", "whole", "none"]


def _nothing() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True)
class Method:
    """What is known of a method before anything heavy is imported.

    Attributes:
        name: as a recipe writes it.
        title: as its authors write it.
        what: one line, what is trained.
        paper: authors, year and where it is found.
        config: name of its configuration class in PEFT, or of ours.
        room: folder of that class in `peft/tuners`; None for a class of ours, whose arguments stand in `arguments`.
        core: the argument that each of `r`, `alpha` and `dropout` sets; one that is missing does nothing here.
        defaults: of the core keys and of arguments, where the recipe gives none.
        arguments: of a class of ours, by name: what may stand there, as `installed.Argument.kinds` says it.
        choices: words that an argument of ours may be, and those that PEFT takes but does not write down.
        divides: arguments that must divide the widths of all targets, with the largest value that is taken unasked.
        closed: arguments of PEFT that a recipe does not set, each with the reason.
        targets: what it stands on where the recipe does not say: all linear layers, the norms, the embeddings, the
            layers that IA3 scales, those that write into the residual stream, whole modules, or nothing.
        tasks: of `model.task`.
        four_bit: why it does not work on 4-bit weights, empty where it does.
        eight_bit: the same of 8-bit weights.
        merge: why it cannot be merged, empty where it can.
        from_weights: it is built from the values of the weights, so a merge needs all of them at once.
        padded: why its rows need padded batches, empty where rows may share a line.
        checkpointing: why activation checkpointing must be off, empty where it may be on.
    """

    name: str
    title: str
    what: str
    paper: str
    config: str
    room: str | None
    core: Mapping[str, str] = field(default_factory=_nothing)
    defaults: Mapping[str, Any] = field(default_factory=_nothing)
    arguments: Mapping[str, frozenset[str]] = field(default_factory=_nothing)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=_nothing)
    divides: Mapping[str, int] = field(default_factory=_nothing)
    closed: Mapping[str, str] = field(default_factory=_nothing)
    targets: Targets = "linear"
    tasks: tuple[str, ...] = ALL_TASKS
    four_bit: str = ""
    eight_bit: str = ""
    merge: str = ""
    from_weights: bool = False
    padded: str = ""
    checkpointing: str = ""

    def on_bits(self, bits: object) -> str:
        """Why it does not work on weights of so many bits, empty where it does."""
        return self.eight_bit if bits == 8 else self.four_bit

    @property
    def fewest_bits(self) -> int:
        """Bits of the narrowest weights that it works on; 16 where they must not be quantized."""
        return next((bits for bits in (4, 8) if not self.on_bits(bits)), 16)

    @property
    def prompts(self) -> bool:
        """Whether it puts virtual tokens before every row and leaves the layers alone."""
        return self.targets == "none"
