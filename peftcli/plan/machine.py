"""The inputs of a plan besides the recipe: the machine and the structure of the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from peftcli.plan.memory.model_shape import ModelDimensions

SHARES_BATCH = "PEFTCLI_SHARES_BATCH"
"""Set if the number of processes was not requested explicitly: they then split the batch of one process."""


@dataclass(frozen=True)
class Machine:
    """What this machine supports; `model.hardware` probes it, tests construct it.

    Attributes:
        device: `cuda` or `cpu`.
        name: of the processor, or of the GPUs.
        capability: (major, minor) of the GPU, the lowest of several; None on a CPU.
        native_bf16: the GPU supports bfloat16 natively (emulation does not count).
        arch_list: architectures the installed torch wheel was built for, such as `sm_75` or `compute_90`.
        memory_bytes: of one GPU (the smallest of several), or the RAM on a CPU.
        count: number of visible GPUs, 1 on a CPU.
        processes: processes of this launch.
        shares_batch: the batch of the recipe is split across the processes, instead of each taking all of it.
        flash_attention: names of the installed FlashAttention implementations.
        fused_norms: the installed torch has a kernel for RMSNorm on its GPUs.
        liger: liger-kernel is installed beside a GPU.
        fsdp: accelerate is configured to use FSDP.
        fsdp_more: other settings of accelerate's configuration, by accelerate's names.
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
        """The name with the compute capability, for messages."""
        if self.capability is None:
            return self.name
        return f"{self.name} (sm_{self.capability[0]}{self.capability[1]})"


@dataclass(frozen=True)
class ModelFacts:
    """The structure of a base model, read from its configuration.

    Attributes:
        path: local folder, or the Hub id if it is not local.
        architecture: class name, such as LlamaForCausalLM.
        parameters: number of parameters.
        modules: names of all modules.
        linear: names of the modules that LoRA-like adapters can target, except the output layer.
        output_layer: name of the module that computes the logits; None if there is none.
        positions: maximum sequence length of the model; None if its configuration does not say.
        norms: names of the norms.
        embeddings: names of the token embeddings, the input embedding first.
        sdpa: the architecture supports torch's scaled dot product attention.
        notes: anything unusual about the source of the structure, normally empty.
        own_tokenizer: the tokenizer is the model's own; a smoke run may have to use another one.
        shape: the dimensions from which memory and time are computed; None if they cannot be read.
        owners: names of the modules that own parameters, in order; empty if they are not separate.
        widths: inputs and outputs of all linear layers by name, in order.
        hidden: width of the residual stream, 0 if unknown.
        head: names of the modules that a task adds and trains in full; empty for a language model.
        reads_end: texts are classified by their last token, as in decoder models.
        convolutions: only its head has linear layers, so `linear` has its convolutions.
        statistics: it has running statistics, as batch norms do.
        checkpointing: it supports activation checkpointing.
        not_flat: why it does not support padding-free batches; empty if it does, or if unknown.
        weights: names of the parameters.
        experts: names of the parameters that hold all experts of a block.
        fused: names of modules that PEFT turns into such a parameter, with the last part of its name.
        towers: names of the parts that rows of text do not pass, such as a vision tower.
        stored: how the weights of the files are quantized; they are dequantized when loaded. Empty if they are not.
        divisible: transformers knows its blocks, so that it can be sharded with FSDP.
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
    weights: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    fused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    towers: tuple[str, ...] = ()
    stored: str = ""
