"""The properties of a plan that determine the memory and time of a step.

The activation memory of an adapter is a polynomial of the widths of its layer, fitted by `model/activation_fit.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from peftcli.plan.memory.model_shape import Linear

TILE_BYTES, LEAST_ROWS = 4 * 2**20, 256
"""Bytes of float32 logits that the CPU loss computes at once, and the minimum number of tokens; matmuls with fewer
tokens are slower."""

OF_TOKENS = 4
"""Number of terms that grow with the tokens; they come first."""


@dataclass(frozen=True)
class LogitsHead:
    """The logits that exist at once, and the memory of each.

    TRL's fused loss uses tiles of 4096 tokens by 32768 vocabulary entries in the compute dtype, and a gradient of the
    last hidden states in float32 that is cast once (trl/kernels/chunked_logprob.py). Without it, there are all logits,
    a float32 copy, their log-probabilities and a gradient.

    Attributes:
        tokens: at once, None for all.
        words: vocabulary entries at once, None for all; a tile has its full width even if the vocabulary is smaller.
        bytes: per logit, all copies together; None for TRL's fused loss, whose tile is in the compute dtype.
    """

    tokens: int | None = 4096
    words: int | None = 32768
    bytes: int | None = None

    @property
    def fused(self) -> bool:
        """Whether it is TRL's fused loss, which computes each tile twice."""
        return self.bytes is None


def tile_rows(vocabulary: int) -> int:
    """Number of tokens whose logits the CPU loss computes at once.

    >>> tile_rows(2048), tile_rows(151_936)
    (512, 256)
    """
    return max(LEAST_ROWS, TILE_BYTES // (4 * vocabulary))


FULL_LOGITS_HEAD = LogitsHead(None, None, 10)
"""All logits: 2 bytes, 4 for their float32 copy and then its gradient, 4 for the log-probabilities."""


@dataclass(frozen=True)
class ActivationFit:
    """Bytes that the adapter of one linear layer saves besides its input and its own weights.

    Most methods other than LoRA build a matrix of the size of the weight in each forward pass, or rotate the input
    block by block, so their tensors differ from LoRA's.

    Attributes:
        reads_input: the layer's input is saved too, which other layers may share.
        coefficients: of the terms of `terms`.
    """

    reads_input: bool
    coefficients: tuple[float, ...]

    def token_bytes(self, inputs: int, outputs: int) -> float:
        """Bytes per token."""
        return self._sum(terms(1, inputs, outputs)[:OF_TOKENS], self.coefficients[:OF_TOKENS])

    def layer_bytes(self, inputs: int, outputs: int) -> float:
        """Bytes per layer, independent of the number of tokens."""
        return self._sum(terms(1, inputs, outputs)[OF_TOKENS:], self.coefficients[OF_TOKENS:])

    @staticmethod
    def _sum(values: Sequence[float], factors: Sequence[float]) -> float:
        return max(0.0, sum(value * factor for value, factor in zip(values, factors, strict=True)))


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained.

    Attributes:
        on_gpu: the step runs on a GPU.
        base_bytes: per unquantized weight, and per feature of the residual stream.
        weight_bits: per quantized weight, or None.
        autocast: matmuls run in 16 bit regardless of their input dtype.
        adapter_bytes: per trainable weight, and per element of its gradient.
        state_bytes: of optimizer state per trainable weight.
        targets: linear layers with an adapter.
        r: rank of the adapter.
        trainable: number of trainable weights.
        dropout: of the adapter's inputs, 0..1.
        dora: DoRA's column magnitudes are trained.
        expert_adapters: the stacked weights of the experts have adapters.
        checkpointing: share of checkpointed blocks, which save only their input, 0..1.
        casts: adapter inputs are cast even if the matmul would cast them anyway.
        offloading: saved activations are moved to CPU memory.
        attention: `flash` (nothing of size tokens x tokens), `masked` (a mask of that size, and keys and values
            repeated for all query heads), `math` and `eager` (probabilities of that size).
        filling: padded positions per token in attention, 1 if all rows have the same length.
        head: the logits that exist at once.
        head_trained: the output layer is trained, or rows of it, for which PEFT computes the gradient of the whole.
        processes: number of processes that average the gradients.
        shards: number of processes across which the base is sharded.
        activation_fit: memory of adapters of methods other than LoRA, by the last part of the layer name, "" for all
            others. first_block: the first block with trainable weights; earlier ones save nothing.
        norms_trained: the weights of the norms are trained.
        norms_fused: fusible norms are computed by torch's fused RMSNorm.
        freed: base weights that are not in memory because trained copies replace them.
    """

    on_gpu: bool
    base_bytes: int
    weight_bits: float | None
    autocast: bool
    state_bytes: float
    targets: tuple[Linear, ...]
    r: int
    trainable: int
    adapter_bytes: int = 4
    dropout: float = 0.0
    dora: bool = False
    expert_adapters: bool = False
    checkpointing: float = 0.0
    casts: bool = True
    offloading: bool = False
    attention: str = "flash"
    filling: float = 1.0
    head: LogitsHead = LogitsHead()
    head_trained: bool = False
    processes: int = 1
    shards: int = 1
    activation_fit: Mapping[str, ActivationFit] = field(default_factory=dict)
    first_block: int = 0
    norms_trained: bool = False
    norms_fused: bool = False
    freed: int = 0

    @property
    def width(self) -> int:
        """Bytes per feature within a block."""
        return 2 if self.autocast else self.base_bytes

    @property
    def copies_trained(self) -> bool:
        """Whether autocast makes a 16-bit copy of each trainable weight; 16-bit weights are used directly."""
        return self.autocast and self.adapter_bytes != 2

    @property
    def casts_inputs(self) -> bool:
        """Whether PEFT casts adapter inputs to the adapter's dtype; its quantized layers do not under CUDA autocast.

        Source: `_cast_input_dtype` in peft/tuners/tuners_utils.py, and the forward of peft/tuners/lora/bnb.py.
        """
        if self.autocast and (not self.casts or (self.weight_bits is not None and self.on_gpu)):
            return False
        return self.adapter_bytes != self.base_bytes


def terms(tokens: int, inputs: int, outputs: int) -> tuple[float, ...]:
    """The terms of the bytes of an adapter.

    >>> terms(2, 3, 5)
    (6, 10, 6, 2, 15, 9, 25, 9, 3, 5, 3, 1)
    """
    less = min(inputs, outputs)
    of_tokens = (tokens * inputs, tokens * outputs, tokens * less, tokens)
    return (*of_tokens, inputs * outputs, inputs**2, outputs**2, less**2, inputs, outputs, less, 1)
