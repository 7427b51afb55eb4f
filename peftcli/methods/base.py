"""What the table says about a PEFT method: its class, its arguments, and what it supports.

Also the options of LoRA that papers count as methods of their own, and the PEFT methods that are not offered.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from peftcli.tasks.registry import TASKS

ARGUMENT_NAMES = ("r", "alpha", "dropout")
"""Keys of the adapter section that many methods share, each under a name of its own in PEFT."""
GRADIENT_BATCHES = 8
"""Training batches whose gradient an adapter begins by, where the recipe gives no number."""
ALL_TASKS = tuple(TASKS)
GENERATING_TASKS = tuple(task.name for task in TASKS.values() if task.generates)
SHAPE = "it reads the shape of each weight, which 4-bit weights do not keep"
NUMBERS = "it computes with the weights when it is built, and 4-bit weights are no numbers"
"""Why some methods do not work on 4-bit weights."""
CODES = "it computes with the numbers of each weight, and 8-bit weights are codes"
"""Why some methods do not work on 8-bit weights, which keep the shape."""
Targets = Literal["linear", "norms", "embeddings", "scaled", "writers", "whole", "none"]

LEFT_OUT: Mapping[str, str] = {
    "POLY": "each row must say which task it belongs to, and a recipe has one task",
    "MULTITASK_PROMPT_TUNING": "each row must say which task it belongs to, and a recipe has one task",
    "CPT": "it needs a type for every token of the context, which a recipe does not give",
    "CARTRIDGE": "its start is the cache of a document, made outside of training",
    "ADAPTION_PROMPT": "it replaces the attention of the model, with which TRL's loss fails",
    "XLORA": "it mixes adapters that were trained before, and a recipe trains one",
    "SHADOW": "it trains a second, smaller network beside the model, with a loss of its own",
    "BEFT": "it trains the biases of layers, which most decoders do not have, and cannot be merged without them",
    "ADAMSS": "it decomposes and clusters every weight to be built, a quarter of a minute for each block of a 7B model",
    "FROD": "it decomposes all weights together to be built, more than four minutes for one block of a 7B model",
    "OSF": "it trains half of the directions of every weight, so its adapter is half as large as the model",
}


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
        peft_module: folder of that class in `peft/tuners`; None for a class of ours, whose arguments stand in
        `arguments`. argument_names: the argument that each of `r`, `alpha` and `dropout` sets; one that is missing
        does nothing here. defaults: of the core keys and of arguments, where the recipe gives none.
        arguments: of a class of ours, by name: what may stand there, as `installed.Argument.kinds` says it.
        choices: words that an argument of ours may be, and those that PEFT takes but does not write down.
        must_divide: arguments that must divide the widths of all targets, with the largest value that is taken unasked.
        unsupported_arguments: arguments of PEFT that a recipe does not set, each with the reason.
        targets: what it stands on where the recipe does not say: all linear layers, the norms, the embeddings, the
            layers that IA3 scales, those that write into the residual stream, whole modules, or nothing.
        tasks: of `model.task`.
        four_bit: why it does not work on 4-bit weights, empty where it does.
        eight_bit: the same of 8-bit weights.
        merge: why it cannot be merged, empty where it can.
        from_weights: it is built from the values of the weights, so a merge needs all of them at once.
        padded: why its rows need padded batches, empty where rows may share a line.
        checkpointing: why activation checkpointing must be off, empty where it may be on.
        is_lora: its layers are PEFT's plain LoRA layers, which can be fused, sharded and checkpointed one by one.
        counted: the forecast counts its activations tensor by tensor; those of others are measured on a small layer.
        allocates_ranks: it moves ranks between modules while it trains.
        hides_tokens: the model sees its vectors in place of token ids, and so cannot tell where a row ends.
    """

    name: str
    title: str
    what: str
    paper: str
    config: str
    peft_module: str | None
    argument_names: Mapping[str, str] = field(default_factory=_nothing)
    defaults: Mapping[str, Any] = field(default_factory=_nothing)
    arguments: Mapping[str, frozenset[str]] = field(default_factory=_nothing)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=_nothing)
    must_divide: Mapping[str, int] = field(default_factory=_nothing)
    unsupported_arguments: Mapping[str, str] = field(default_factory=_nothing)
    targets: Targets = "linear"
    tasks: tuple[str, ...] = ALL_TASKS
    four_bit: str = ""
    eight_bit: str = ""
    merge: str = ""
    from_weights: bool = False
    padded: str = ""
    checkpointing: str = ""
    is_lora: bool = False
    counted: bool = False
    allocates_ranks: bool = False
    hides_tokens: bool = False

    def on_bits(self, bits: object) -> str:
        """Why it does not work on weights of so many bits, empty where it does."""
        return self.eight_bit if bits == 8 else self.four_bit

    @property
    def fewest_bits(self) -> int:
        """Bits of the narrowest weights that it works on; 16 where they must not be quantized."""
        return next((bits for bits in (4, 8) if not self.on_bits(bits)), 16)

    @property
    def trains_norms(self) -> bool:
        """Whether the weights of norms are trained."""
        return self.targets in ("norms", "whole")

    @property
    def trains_all(self) -> bool:
        """Whether every layer of the model is trained whole."""
        return bool(self.defaults.get("everything"))

    @property
    def prompts(self) -> bool:
        """Whether it puts virtual tokens before every row and leaves the layers alone."""
        return self.targets == "none"


@dataclass(frozen=True)
class Option:
    """A way to begin, to scale or to train LoRA.

    Attributes:
        name: as people call it.
        keys: what a recipe writes.
        what: one line, what it changes.
        paper: authors, year and where it is found.
        needs: what the recipe must have beside it, empty for nothing.
    """

    name: str
    keys: str
    what: str
    paper: str
    needs: str = ""


OPTIONS = (
    Option(
        "rsLoRA",
        "use_rslora: true",
        "the update is scaled by alpha / sqrt(r)",
        "Kalajdzievski 2023, arXiv:2312.03732",
    ),
    Option(
        "DoRA",
        "use_dora: true",
        "the magnitude of each column is learned apart from its direction",
        "Liu et al. 2024, arXiv:2402.09353",
    ),
    Option(
        "LoRA+",
        "loraplus_lr_ratio: 16",
        "the second matrix learns faster than the first by this factor",
        "Hayou et al. 2024, arXiv:2402.12354",
    ),
    Option(
        "PiSSA",
        "init_lora_weights: pissa",
        "begins as the principal part of each weight",
        "Meng et al. 2024, arXiv:2404.02948",
    ),
    Option(
        "OLoRA",
        "init_lora_weights: olora",
        "begins as the QR decomposition of each weight",
        "Büyükakyüz 2024, arXiv:2406.01775",
    ),
    Option(
        "LoftQ",
        "init_lora_weights: loftq",
        "begins as what quantization loses of each weight",
        "Li et al. 2023, arXiv:2310.08659",
        "quantization",
    ),
    Option(
        "LoRA-GA",
        "init_lora_weights: lora_ga",
        "begins along the gradient of training rows, so that its first step is like that of full tuning",
        "Wang et al. 2024, arXiv:2407.05000",
    ),
    Option(
        "EVA",
        "init_lora_weights: eva",
        "begins as the principal directions of each layer's inputs, with more rank where they explain more",
        "Paischer et al. 2024, arXiv:2410.07170",
    ),
)
