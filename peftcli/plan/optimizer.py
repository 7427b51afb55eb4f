"""The state that an optimizer stores for the trained weights."""

from dataclasses import dataclass

FLOAT32_BYTES = 4
SMALL = 4096
"""Minimum number of weights of a tensor with 8-bit or 4-bit state; smaller tensors use float32.

Source: `min_8bit_size` of bitsandbytes/optim/adamw.py, 0.50, and `_new_buffer` of torchao/optim/adam.py.
"""
SCALE_BYTES = 4 / 256
"""Bytes per weight for the scales of an 8-bit or 4-bit state: one float32 per block of 256."""
FACTORED = ("adafactor", "adalomo")
"""Optimizers with factored state (row and column sums in float32), by a part of their name."""
STATES = {
    "lomo": 0,
    "ademamix": 3,
    "lion": 1,
    "rmsprop": 1,
    "adagrad": 1,
    "schedule_free_sgd": 1,
    "sgd": 1,  # with momentum, which trainer.optim_args may set
    "adamw": 2,
}
"""Number of states per weight, by a part of the optimizer's name; the first match counts."""
NARROW_BYTES = {"8bit": 1 + SCALE_BYTES, "4bit": 0.5 + SCALE_BYTES}
BITSANDBYTES = ("bnb", "paged", "ademamix", "lion")
"""Parts of the names of bitsandbytes' optimizers, whose unquantized state is float32 whatever the dtype of the weights;
in torch's optimizers it has the dtype of the weights."""


@dataclass(frozen=True)
class Trained:
    """The trained weights, grouped as optimizers treat them.

    Attributes:
        parameters: all of them; shared ones count once.
        embeddings: weights of `nn.Embedding` modules, and of modules tied to one.
        small: weights in other tensors with fewer than `SMALL` weights each.
        factors: row and column sums of the matrices, and the weights of the vectors; None if not counted.
        repeated: extra copies of shared weights that a file contains.
    """

    parameters: int
    embeddings: int = 0
    small: int = 0
    factors: int | None = None
    repeated: int = 0

    def resized(self, parameters: int) -> "Trained":
        """A given number of weights, with the same proportions of kinds."""
        share = parameters / self.parameters if self.parameters else 0.0
        return Trained(
            parameters,
            round(self.embeddings * share),
            round(self.small * share),
            None if self.factors is None else round(self.factors * share),
            round(self.repeated * share),
        )


def is_bitsandbytes(optimizer: str) -> bool:
    """Whether a value of `trainer.optim` is an optimizer of bitsandbytes.

    >>> is_bitsandbytes("adamw_8bit"), is_bitsandbytes("adamw_torch_8bit")
    (True, False)
    """
    return optimizer == "adamw_8bit" or any(part in optimizer for part in BITSANDBYTES)


def optimizer_bytes(optimizer: str, trained: Trained, width: int = FLOAT32_BYTES) -> int:
    """Bytes of optimizer state, in memory and in a checkpoint.

    With the 8-bit optimizers of bitsandbytes, transformers keeps the state of embeddings in float32.

    Args:
        optimizer: `trainer.optim`, a name of transformers; an unknown one counts as AdamW.
        width: bytes per trained weight.

    Source: `create_optimizer` of transformers/trainer.py, 5.23.

    >>> whole = Trained(1_000_000)
    >>> optimizer_bytes("adamw_torch", whole), optimizer_bytes("adamw_torch", whole, 2), optimizer_bytes("lomo", whole)
    (8000000, 4000000, 0)
    >>> optimizer_bytes("paged_adamw_8bit", whole), optimizer_bytes("paged_adamw_8bit", Trained(1_000_000, 500_000))
    (2031250, 5015625)
    """
    if any(part in optimizer for part in FACTORED):
        # Two vectors per matrix: a quarter of its size at rank 4, and less for larger ones.
        return FLOAT32_BYTES * (trained.parameters // 4 if trained.factors is None else trained.factors)
    states = next((count for part, count in STATES.items() if part in optimizer), STATES["adamw"])
    from_bitsandbytes = is_bitsandbytes(optimizer)
    wide = FLOAT32_BYTES if from_bitsandbytes else width
    narrow = next((count for part, count in NARROW_BYTES.items() if part in optimizer), None)
    if narrow is None:
        return states * wide * trained.parameters
    in_float32 = trained.small + (trained.embeddings if from_bitsandbytes else 0)
    return round(states * (narrow * (trained.parameters - in_float32) + wide * in_float32))
