"""One row of the method table: the PEFT class, its arguments, and what the method supports.

Also the LoRA options that papers present as separate methods, and the PEFT methods that are not offered.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from peftcli.tasks.registry import TASKS

ARGUMENT_NAMES = ("r", "alpha", "dropout")
"""Keys of the adapter section that many methods share; PEFT names them differently for each method."""
GRADIENT_BATCHES = 8
"""Default number of training batches for a gradient-based initialization."""
ALL_TASKS = tuple(TASKS)
GENERATING_TASKS = tuple(task.name for task in TASKS.values() if task.generates)
SHAPE = "it reads the shape of each weight, and packed 4-bit weights have a different shape"
NUMBERS = "it computes with the weight values at construction, so it needs dequantized weights"
"""Why some methods do not work on 4-bit weights."""
CODES = "it computes with the weight values, so it needs dequantized weights"
"""Why some methods do not work on 8-bit weights, whose shape is unchanged."""
Targets = Literal["linear", "norms", "embeddings", "scaled", "writers", "whole", "none"]

LEFT_OUT: Mapping[str, str] = {
    "POLY": "each row must say which task it belongs to, and a recipe has one task",
    "MULTITASK_PROMPT_TUNING": "each row must say which task it belongs to, and a recipe has one task",
    "CPT": "it needs a type for every token of the context, which a recipe does not give",
    "CARTRIDGE": "it is initialized from the KV cache of a document, which is computed before training",
    "ADAPTION_PROMPT": "it replaces the attention modules, and TRL's loss fails with them",
    "XLORA": "it mixes adapters that are already trained, and a recipe trains one",
    "SHADOW": "it trains a second, smaller network next to the model, with its own loss",
    "BEFT": "it trains the biases of layers, which most decoders do not have, and cannot be merged without them",
    "ADAMSS": "its setup decomposes and clusters every weight, about 15 seconds for each block of a 7B model",
    "FROD": "its setup decomposes all weights jointly, more than four minutes for one block of a 7B model",
    "OSF": "it trains half of the directions of every weight, so its adapter is half as large as the model",
}


def _nothing() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True)
class Method:
    """What is known about a method before anything heavy is imported.

    Attributes:
        name: the name in a recipe.
        title: the name in the paper.
        what: what is trained, in one line.
        paper: authors, year and reference.
        config: name of its configuration class, PEFT's or ours.
        peft_module: folder of that class in `peft/tuners`; None for our own class, whose arguments are listed in
            `arguments`.
        argument_names: the PEFT argument that each of `r`, `alpha` and `dropout` sets; the method has no such
            argument if the key is missing.
        defaults: for the core keys and arguments that the recipe does not set.
        arguments: types of the arguments of our own class by name, in the form of `library_args.Argument.kinds`.
        choices: allowed values of our own arguments, and values that PEFT accepts but does not declare.
        must_divide: arguments that must divide the widths of all targets, with the largest default.
        unsupported_arguments: PEFT arguments that a recipe cannot set, each with the reason.
        targets: default targets: all linear layers, the norms, the embeddings, the layers that IA3 scales, the layers
            that write to the residual stream, whole modules, or nothing.
        tasks: supported values of `model.task`.
        four_bit: why it does not work on 4-bit weights; empty if it does.
        eight_bit: why it does not work on 8-bit weights; empty if it does.
        merge: why it cannot be merged; empty if it can.
        from_weights: the adapter is computed from the base weights, so a merge needs all of them at once.
        padded: why it needs padded batches; empty if padding-free batches work.
        checkpointing: why activation checkpointing must be off; empty if it works.
        is_lora: its layers are plain LoRA layers of PEFT, which can be fused, sharded and checkpointed one by one.
        counted: the memory estimate adds up its activations tensor by tensor; those of other methods are measured on a
            small layer.
        allocates_ranks: it moves ranks between modules during training.
        hides_tokens: the model gets vectors in place of token ids, so it cannot tell where a row ends.
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
        """Why it does not work on 4-bit or 8-bit weights; empty if it does."""
        return self.eight_bit if bits == 8 else self.four_bit

    @property
    def fewest_bits(self) -> int:
        """The smallest number of bits per weight that it works on; 16 if the weights must not be quantized."""
        return next((bits for bits in (4, 8) if not self.on_bits(bits)), 16)

    @property
    def trains_norms(self) -> bool:
        """Whether the weights of norms are trained."""
        return self.targets in ("norms", "whole")

    @property
    def trains_all(self) -> bool:
        """Whether every layer of the model is trained completely."""
        return bool(self.defaults.get("everything"))

    @property
    def prompts(self) -> bool:
        """Whether it prepends virtual tokens to every row and adapts no layer."""
        return self.targets == "none"


@dataclass(frozen=True)
class Option:
    """A variant of LoRA: another initialization, scaling or learning rate.

    Attributes:
        name: its usual name.
        keys: the recipe keys that select it.
        what: what it changes, in one line.
        paper: authors, year and reference.
        needs: the section that the recipe must also have; empty for none.
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
        "the magnitude of each column is learned separately from its direction",
        "Liu et al. 2024, arXiv:2402.09353",
    ),
    Option(
        "LoRA+",
        "loraplus_lr_ratio: 16",
        "the learning rate of B is that of A times this factor",
        "Hayou et al. 2024, arXiv:2402.12354",
    ),
    Option(
        "PiSSA",
        "init_lora_weights: pissa",
        "initialized with the principal singular components of each weight",
        "Meng et al. 2024, arXiv:2404.02948",
    ),
    Option(
        "OLoRA",
        "init_lora_weights: olora",
        "initialized with the QR decomposition of each weight",
        "Büyükakyüz 2024, arXiv:2406.01775",
    ),
    Option(
        "LoftQ",
        "init_lora_weights: loftq",
        "initialized with the quantization error of each weight",
        "Li et al. 2023, arXiv:2310.08659",
        "quantization",
    ),
    Option(
        "LoRA-GA",
        "init_lora_weights: lora_ga",
        "initialized along the gradient of training rows, so that the first step is close to that of full fine-tuning",
        "Wang et al. 2024, arXiv:2407.05000",
    ),
    Option(
        "EVA",
        "init_lora_weights: eva",
        "initialized with the principal directions of each layer's inputs, with more rank where they explain more",
        "Paischer et al. 2024, arXiv:2410.07170",
    ),
)
