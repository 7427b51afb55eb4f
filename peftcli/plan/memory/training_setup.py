"""What of a plan determines the memory and time of a step.

An adapter's own share is a polynomial of the widths of its layer, fitted by `model/activation_fit.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from peftcli.plan.memory.model_shape import Linear

TILE_BYTES, LEAST_ROWS = 4 * 2**20, 256
"""Of the float32 logits that our head on a CPU computes at once, and tokens that they are of at least: a product of
fewer is slower."""

OF_TOKENS = 4
"""Terms that grow with the tokens; they stand first."""


@dataclass(frozen=True)
class LogitsHead:
    """The logits that are there at once, and what is kept for each.

    TRL's fused output layer makes tiles of 4096 tokens by 32768 words in the width of the computation, and a
    gradient of the last hidden states in float32 that is cast once (trl/kernels/chunked_logprob.py). Without it, all
    logits are there, and a float32 copy, their log-probabilities and a gradient beside them.

    Attributes:
        tokens: at once, None for all.
        words: at once, None for all; a tile has its full width even where the vocabulary is smaller.
        bytes: of each logit, all its copies together; None for the fused layer, whose tile is as wide as the
            computation.
    """

    tokens: int | None = 4096
    words: int | None = 32768
    bytes: int | None = None

    @property
    def fused(self) -> bool:
        """It is TRL's, which makes each tile twice."""
        return self.bytes is None


def tile_rows(vocabulary: int) -> int:
    """Tokens whose logits our head computes at once.

    >>> tile_rows(2048), tile_rows(151_936)
    (512, 256)
    """
    return max(LEAST_ROWS, TILE_BYTES // (4 * vocabulary))


FULL_LOGITS_HEAD = LogitsHead(None, None, 10)
"""All logits: 2 bytes, their float32 copy and gradient in turns 4, the log-probabilities 4."""


@dataclass(frozen=True)
class ActivationFit:
    """Bytes that the adapter of one linear layer keeps beside its input and its own weights.

    Most methods other than LoRA build a matrix of the size of the weight in each forward pass, or turn the input block
    by block, so that LoRA's tensors say little of them.

    Attributes:
        reads_input: the layer's own input is kept as well, which other layers may share.
        coefficients: of the terms of `terms`.
    """

    reads_input: bool
    coefficients: tuple[float, ...]

    def token_bytes(self, inputs: int, outputs: int) -> float:
        """Bytes for each token."""
        return self._sum(terms(1, inputs, outputs)[:OF_TOKENS], self.coefficients[:OF_TOKENS])

    def layer_bytes(self, inputs: int, outputs: int) -> float:
        """Bytes for the layer, however many tokens there are."""
        return self._sum(terms(1, inputs, outputs)[OF_TOKENS:], self.coefficients[OF_TOKENS:])

    @staticmethod
    def _sum(values: Sequence[float], factors: Sequence[float]) -> float:
        return max(0.0, sum(value * factor for value, factor in zip(values, factors, strict=True)))


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained.

    Attributes:
        on_gpu: the step runs on a card.
        base_bytes: of a weight that is not quantized, and of a feature of the stream between the blocks.
        weight_bits: of a quantized weight, or None.
        autocast: products are computed in 16 bit whatever their inputs are.
        adapter_bytes: of a trainable weight, and of its gradient.
        state_bytes: of optimizer state for a trainable weight.
        targets: linear layers with an adapter.
        r: rank of the adapter.
        trainable: number of trainable weights.
        dropout: of the adapter's inputs, 0..1.
        dora: the magnitudes of the columns are learned apart.
        expert_adapters: the stacked weights of the experts have adapters.
        checkpointing: share of the blocks that keep their input alone and run again in the backward pass, 0..1.
        casts: inputs of adapters are cast where products would cast them anyway.
        offloading: what is kept for the backward pass waits in the memory of the machine.
        attention: `flash` (nothing of the size of tokens by tokens), `masked` (a mask of that size, and keys and
            values repeated for all query heads), `math` and `eager` (probabilities of that size).
        filling: places of attention for each token, 1 where all rows have one length.
        head: the logits that are there at once.
        head_trained: the output layer is trained whole.
        processes: that share the gradients.
        shards: processes that each hold a part of the base.
        activation_fit: what adapters of a method other than LoRA keep, by the last name of their layer, "" for all
        others. first_block: before which nothing is trained, so that nothing is kept.
        norms_trained: the factors of the norms are trained.
        norms_fused: those that are fusible are computed by torch's fused RMSNorm.
        freed: weights of the base that are not in memory while their trained copies are.
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
        """Bytes of a feature within a block."""
        return 2 if self.autocast else self.base_bytes

    @property
    def copies_trained(self) -> bool:
        """Autocast makes a copy of each trainable weight in 16 bit; those that are as narrow are used as they are."""
        return self.autocast and self.adapter_bytes != 2

    @property
    def casts_inputs(self) -> bool:
        """PEFT casts the input of each adapter to the adapter's dtype; its quantized ones do not under CUDA autocast.

        Source: `_cast_input_dtype` in peft/tuners/tuners_utils.py, and the forward of peft/tuners/lora/bnb.py.
        """
        if self.autocast and (not self.casts or (self.weight_bits is not None and self.on_gpu)):
            return False
        return self.adapter_bytes != self.base_bytes


def terms(tokens: int, inputs: int, outputs: int) -> tuple[float, ...]:
    """What the bytes of an adapter are made of.

    >>> terms(2, 3, 5)
    (6, 10, 6, 2, 15, 9, 25, 9, 3, 5, 3, 1)
    """
    less = min(inputs, outputs)
    of_tokens = (tokens * inputs, tokens * outputs, tokens * less, tokens)
    return (*of_tokens, inputs * outputs, inputs**2, outputs**2, less**2, inputs, outputs, less, 1)
