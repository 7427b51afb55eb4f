"""What an optimizer keeps for the weights that it trains."""

from dataclasses import dataclass

FLOAT32_BYTES = 4
SMALL = 4096
"""Weights from which on a tensor has a state of 8 or 4 bits; below, it stays in float32.

Source: `min_8bit_size` of bitsandbytes/optim/adamw.py, 0.50, and `_new_buffer` of torchao/optim/adam.py.
"""
SCALE_BYTES = 4 / 256
"""Of a state of 8 or 4 bits, for each weight: one float32 for each block of 256."""
FACTORED = ("adafactor", "adalomo")
"""Optimizers that keep the sums of the rows and columns of a matrix, in float32, by a part of their name."""
STATES = {
    "lomo": 0,
    "ademamix": 3,
    "lion": 1,
    "rmsprop": 1,
    "adagrad": 1,
    "schedule_free_sgd": 1,
    "sgd": 1,  # with momentum, which trainer.optim_args may ask for
    "adamw": 2,
}
"""Numbers that an optimizer keeps for a weight, by a part of its name; the first that fits counts."""
NARROW_BYTES = {"8bit": 1 + SCALE_BYTES, "4bit": 0.5 + SCALE_BYTES}
BITSANDBYTES = ("bnb", "paged", "ademamix", "lion")
"""Parts of the names of bitsandbytes' optimizers, whose wide state is in float32 whatever the weights are; torch's own
have the dtype of the weights."""


@dataclass(frozen=True)
class Trained:
    """The trained weights, as an optimizer tells them apart.

    Attributes:
        parameters: all of them, each stored one once.
        embeddings: of `nn.Embedding` modules, and of what shares its weight with one.
        small: in other tensors, of fewer than `SMALL` weights each.
        factors: sums of rows and columns of the matrices, and the weights of the vectors; None where not counted.
        repeated: of those that several modules share, the copies that a file holds beside the first.
    """

    parameters: int
    embeddings: int = 0
    small: int = 0
    factors: int | None = None
    repeated: int = 0

    def resized(self, parameters: int) -> "Trained":
        """As many weights as given, of the same kinds in the same shares."""
        share = parameters / self.parameters if self.parameters else 0.0
        return Trained(
            parameters,
            round(self.embeddings * share),
            round(self.small * share),
            None if self.factors is None else round(self.factors * share),
            round(self.repeated * share),
        )


def is_bitsandbytes(optimizer: str) -> bool:
    """Whether an optimizer of `trainer.optim` is one of bitsandbytes.

    >>> is_bitsandbytes("adamw_8bit"), is_bitsandbytes("adamw_torch_8bit")
    (True, False)
    """
    return optimizer == "adamw_8bit" or any(part in optimizer for part in BITSANDBYTES)


def optimizer_bytes(optimizer: str, trained: Trained, width: int = FLOAT32_BYTES) -> int:
    """Bytes of the state of an optimizer, in memory and in a checkpoint.

    transformers leaves the state of embeddings in float32 with the 8-bit optimizers of bitsandbytes.

    Args:
        optimizer: `trainer.optim`, a name of transformers; an unknown one counts as AdamW.
        width: bytes of a trained weight.

    Source: `create_optimizer` of transformers/trainer.py, 5.23.

    >>> whole = Trained(1_000_000)
    >>> optimizer_bytes("adamw_torch", whole), optimizer_bytes("adamw_torch", whole, 2), optimizer_bytes("lomo", whole)
    (8000000, 4000000, 0)
    >>> optimizer_bytes("paged_adamw_8bit", whole), optimizer_bytes("paged_adamw_8bit", Trained(1_000_000, 500_000))
    (2031250, 5015625)
    """
    if any(part in optimizer for part in FACTORED):
        # Two vectors for a matrix: a quarter of it at rank 4, and less for all that is wider.
        return FLOAT32_BYTES * (trained.parameters // 4 if trained.factors is None else trained.factors)
    states = next((count for part, count in STATES.items() if part in optimizer), STATES["adamw"])
    from_bitsandbytes = is_bitsandbytes(optimizer)
    wide = FLOAT32_BYTES if from_bitsandbytes else width
    narrow = next((count for part, count in NARROW_BYTES.items() if part in optimizer), None)
    if narrow is None:
        return states * wide * trained.parameters
    kept_wide = trained.small + (trained.embeddings if from_bitsandbytes else 0)
    return round(states * (narrow * (trained.parameters - kept_wide) + wide * kept_wide))
