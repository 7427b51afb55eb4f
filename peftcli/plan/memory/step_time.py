"""Time of a training step: its FLOPs and memory traffic, divided by the speed of a GPU.

Source: the FLOPs were counted by hand and compared with torch's FlopCounterMode (within 0.1 %); the bound is the
roofline of Williams et al. 2009, doi:10.1145/1498765.1498785, and the kernel launch time.
"""

from peftcli.plan.gpus import GPU
from peftcli.plan.memory.estimate import weight_bytes
from peftcli.plan.memory.model_shape import ModelDimensions
from peftcli.plan.memory.training_setup import TrainingSetup

WRITTEN_BYTES = 2
"""Bytes written per dequantized weight, after reading its 4 or 8 bits."""
LAUNCH_SECONDS = 0.002
"""Time for Python to launch the kernels of one layer, forward and backward; assumed: 240 kernels at 8 us."""


def token_flops(shape: ModelDimensions, setting: TrainingSetup, attended: float) -> float:
    """FLOPs per token of a training step, forward and backward.

    The base is frozen, so its backward pass needs one matmul per weight, and the adapter's needs two.

    Args:
        attended: mean number of tokens that a token attends to: half a row with causal attention.
    """
    attention = 4 * shape.layers * shape.queries * attended
    forward = 2 * (shape.active + setting.trainable) + attention
    backward = 2 * shape.active + 4 * setting.trainable + 2 * attention
    # The fused loss computes its logits twice.
    words = shape.vocabulary if setting.head.fused else setting.head.words or shape.vocabulary
    head = (6 if setting.head.fused else 4) * words * shape.hidden
    return forward + backward + head + forward * setting.checkpointing


def step_seconds(
    shape: ModelDimensions, setting: TrainingSetup, gpu: GPU, *, tokens: float, micro_batches: int, attended: float
) -> float:
    """Seconds per optimizer step on one GPU.

    Args:
        tokens: of all micro-batches of the step, padding included.
        micro_batches: number of micro-batches; each reads all weights once per pass.
        attended: mean number of tokens that a token attends to.
    """
    passes = (2 + setting.checkpointing) * micro_batches
    computing = tokens * token_flops(shape, setting, attended) / gpu.flops
    reading = passes * weight_bytes(shape, setting) / gpu.bandwidth
    unpacking = 0.0
    if setting.weight_bits is not None:
        unpacking = passes * shape.quantizable * (setting.weight_bits / 8 + WRITTEN_BYTES) / gpu.bandwidth
    launching = passes / 2 * shape.layers * LAUNCH_SECONDS
    return max(computing + unpacking, reading + unpacking, launching)
