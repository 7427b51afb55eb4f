"""Time of a training step: the products it takes, and the bytes it moves, against what a card does in a second.

Source: the counts are those of the backward pass by hand, held against torch's FlopCounterMode (within 0.1 %);
the bound is the roofline of Williams et al. 2009, doi:10.1145/1498765.1498785, and the time to launch the kernels.
"""

from peftcli.plan.gpus import GPU
from peftcli.plan.memory.estimate import weight_bytes
from peftcli.plan.memory.model_shape import ModelDimensions
from peftcli.plan.memory.training_setup import TrainingSetup

WRITTEN_BYTES = 2
"""Of a weight that was unpacked; its 4 or 8 bits are read for that."""
LAUNCH_SECONDS = 0.002
"""For Python to launch the kernels of one layer, forward and backward; an assumption: 240 kernels of 8 us each."""


def token_flops(shape: ModelDimensions, setting: TrainingSetup, attended: float) -> float:
    """Products and sums for one token of a training step, forward and backward.

    The base is frozen, so its backward pass takes one product a weight where the adapter's takes two.

    Args:
        attended: tokens that a token sees, in the mean: half a row where attention is causal.
    """
    attention = 4 * shape.layers * shape.queries * attended
    forward = 2 * (shape.active + setting.trainable) + attention
    backward = 2 * shape.active + 4 * setting.trainable + 2 * attention
    # The fused output layer makes its logits twice.
    words = shape.vocabulary if setting.head.fused else setting.head.words or shape.vocabulary
    head = (6 if setting.head.fused else 4) * words * shape.hidden
    return forward + backward + head + forward * setting.checkpointing


def step_seconds(
    shape: ModelDimensions, setting: TrainingSetup, card: GPU, *, tokens: float, micro_batches: int, attended: float
) -> float:
    """Seconds of one optimizer step on one card.

    Args:
        tokens: of all micro-batches of the step, padding included.
        micro_batches: that the tokens are spread over; each reads all weights anew.
        attended: tokens that a token sees, in the mean.
    """
    passes = (2 + setting.checkpointing) * micro_batches
    products = tokens * token_flops(shape, setting, attended) / card.flops
    reading = passes * weight_bytes(shape, setting) / card.bandwidth
    unpacking = 0.0
    if setting.weight_bits is not None:
        unpacking = passes * shape.quantizable * (setting.weight_bits / 8 + WRITTEN_BYTES) / card.bandwidth
    launching = passes / 2 * shape.layers * LAUNCH_SECONDS
    return max(products + unpacking, reading + unpacking, launching)
