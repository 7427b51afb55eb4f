"""The inputs of a plan besides the recipe: the machine and the structure of the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from peftcli.plan.memory.model_shape import ModelDimensions

SHARES_BATCH = "PEFTCLI_SHARES_BATCH"
"""Variable that is set where nobody asked for the processes of this launch by number: they keep the steps of one."""


@dataclass(frozen=True)
class Machine:
    """What this machine can do; `model.probe` asks it, tests make their own.

    Attributes:
        device: `cuda` or `cpu`.
        name: of the processor, or of the GPUs that are used.
        capability: (major, minor) of the GPU, the least of several; None on a CPU.
        native_bf16: the card computes bfloat16 itself (an emulation does not count).
        arch_list: architectures the installed torch wheel was built for, such as `sm_75` or `compute_90`.
        memory_bytes: of one GPU, the smallest of several, or the RAM on a CPU.
        count: cards that this process sees, 1 on a CPU.
        processes: processes of this launch.
        shares_batch: they share the rows of the recipe's step, in place of taking as many each.
        flash_attention: names of the installed FlashAttention implementations.
        fused_norms: the installed torch has a kernel for RMSNorm on its GPUs.
        liger: liger-kernel is installed beside a GPU.
        fsdp: accelerate's own configuration asks for FSDP.
        fsdp_more: what it asks for besides, under accelerate's names.
    """

    device: str
    name: str
    capability: tuple[int, int] | None
    native_bf16: bool
    arch_list: tuple[str, ...]
    memory_bytes: int
    count: int = 1
    processes: int = 1
    shares_batch: bool = False
    flash_attention: tuple[str, ...] = ()
    fused_norms: bool = False
    liger: bool = False
    fsdp: bool = False
    fsdp_more: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name with the architecture, for messages."""
        if self.capability is None:
            return self.name
        return f"{self.name} (sm_{self.capability[0]}{self.capability[1]})"


@dataclass(frozen=True)
class ModelFacts:
    """The structure of a base model, known from its configuration alone.

    Attributes:
        path: local folder, or the Hub id where nothing is local.
        architecture: class name, such as LlamaForCausalLM.
        parameters: number of parameters.
        modules: names of all modules.
        linear: names of the modules that an adapter of LoRA's kind can stand on, the output layer aside.
        output_layer: name of the module that makes the logits, None where there is none.
        positions: longest row that the model was made for, None where it does not say.
        norms: paths of the norms.
        embeddings: paths of the embeddings of tokens, that of the input first.
        sdpa: the architecture can use torch's scaled dot product attention.
        notes: what is unusual about where the structure comes from, none as a rule.
        own_tokenizer: the tokenizer is the model's own; a smoke run may have to take another.
        shape: the widths that memory and time are computed from, None where they cannot be read.
        owners: names of the modules that own parameters, in order; empty where they do not stand apart.
        widths: inputs and outputs of all linear layers by name, in order.
        hidden: width of the residual stream, 0 where it is not known.
        head: names of the modules that a task adds and trains whole, empty for a language model.
        reads_end: a text is classified by its last token, as a model does that reads from left to right.
        convolutions: it has no linear layer but in its head, so `linear` names its convolutions.
        statistics: it keeps running statistics of what it has seen, as batch norms do.
        checkpointing: it can compute its activations a second time.
        not_flat: why the rows of a flat line would not stay apart in it; empty where they do, or where nobody knows.
        divisible: transformers knows its blocks, so that processes can each hold a part of them.
    """

    path: str
    architecture: str
    parameters: int
    modules: tuple[str, ...]
    linear: tuple[str, ...]
    output_layer: str | None
    positions: int | None
    norms: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    sdpa: bool = True
    notes: tuple[str, ...] = ()
    own_tokenizer: bool = True
    shape: ModelDimensions | None = None
    owners: tuple[str, ...] = ()
    widths: Mapping[str, tuple[int, int]] = field(default_factory=lambda: MappingProxyType({}))
    hidden: int = 0
    head: tuple[str, ...] = ()
    reads_end: bool = False
    convolutions: bool = False
    statistics: bool = False
    checkpointing: bool = True
    divisible: bool = True
    not_flat: str = ""
