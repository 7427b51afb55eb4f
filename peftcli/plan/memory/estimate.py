"""Peak memory of a training step by component, computed from the dimensions of a model."""

from dataclasses import dataclass, replace

from peftcli.plan.memory.activations import backward_bytes, end_bytes, saved_activation_bytes, stream_bytes
from peftcli.plan.memory.model_shape import ModelDimensions
from peftcli.plan.memory.training_setup import TrainingSetup

NF4_BITS = {True: 4.127, False: 4.5}
"""Bits per weight with and without double quantization: 4 + 8/64 + 32/(64 * 256), or 4 + 32/64.

Source: Dettmers et al. 2023, arXiv:2305.14314, section 3.
"""
CODE_BITS = 4
"""Bits of a 4-bit weight without the constants of its block."""
INT8_BITS = 8.0
"""Bits per 8-bit weight; each row also has a float32 scale."""
CONTEXT_BYTES = 2**29
"""A CUDA context with the kernels of all libraries, which torch's memory statistics do not include; an assumption."""
FRAGMENTATION = 0.05
"""Share of temporary memory that the allocator cannot reuse; an assumption."""
PROCESS_BYTES, PACKING_BYTES = 510 * 2**20, 50 * 2**20
"""A process with all libraries, and bitsandbytes with its dependencies; measured on Linux, CPU build of torch."""
TILE_COPIES_BYTES = 28
"""Per logit of a tile without Triton: seven float32 copies (`_backward_tile` of trl's chunked head)."""
MOST_TOKENS = 2**21
GATHERED_BLOCKS = 3
"""Blocks of a sharded base that are unsharded on a GPU at once; from torch's source, not measured on GPUs."""
OFFLOADED_BLOCKS = 2
"""Blocks whose tensors are on the GPU while the others are offloaded to CPU memory."""


@dataclass(frozen=True)
class MicroBatchMemory:
    """Memory of one micro-batch of a model with a training setup.

    Attributes:
        tokens: of the micro-batch, padding included.
        longest: tokens of its longest row.
    """

    shape: ModelDimensions
    setting: TrainingSetup
    tokens: int
    longest: int

    def parts(self) -> dict[str, int]:
        """Bytes of each component at the peak of a step."""
        setting = self.setting
        activations = self.activations()
        working = self.working()
        found = {
            "weights": own_bytes(self.shape, setting),
            **({"gathered": gathered_bytes(self.shape, setting)} if setting.shards > 1 else {}),
            # Autocast caches a 16-bit copy of each float32 trainable weight until the backward pass ends.
            "adapter": setting.trainable * (setting.adapter_bytes + (2 if setting.copies_trained else 0)),
            # DDP sums gradients in buckets of the same total size; with a sharded base, they are reduced one by one.
            "gradients": setting.trainable * setting.adapter_bytes * (2 if setting.processes > setting.shards else 1),
            "optimizer": setting.trainable * setting.state_bytes,
            "activations": activations,
            "working": working,
        }
        if setting.on_gpu:
            found["fragmentation"] = FRAGMENTATION * (activations + working)
            found["context"] = CONTEXT_BYTES
        else:
            found["process"] = PROCESS_BYTES + (0 if setting.weight_bits is None else PACKING_BYTES)
        return {name: round(value) for name, value in found.items()}

    @property
    def total(self) -> int:
        """Bytes of all components."""
        return sum(self.parts().values())

    @property
    def counted(self) -> int:
        """Bytes that a run measures as its peak: of torch's allocator on a GPU, of the process on a CPU."""
        return sum(value for name, value in self.parts().items() if name not in ("fragmentation", "context"))

    def activations(self) -> float:
        """Bytes saved for the backward pass when it starts."""
        shape, setting = self.shape, self.setting
        waiting = setting.checkpointing * stream_bytes(shape, setting, self.tokens)
        if setting.checkpointing < 1:
            waiting += (1 - setting.checkpointing) * saved_activation_bytes(shape, setting, self.tokens, self.longest)
        return waiting * min(1.0, OFFLOADED_BLOCKS / shape.layers) if setting.offloading else waiting

    def working(self) -> float:
        """Temporary bytes on top of that: at the output layer, or during the backward pass of one block."""
        shape, setting = self.shape, self.setting
        block = backward_bytes(shape, setting, self.tokens) + unpacked_bytes(shape, setting)
        if setting.checkpointing:
            block += saved_activation_bytes(shape, setting, self.tokens, self.longest) / shape.layers
        return max(block, end_bytes(shape, setting, self.tokens) + head_bytes(shape, setting, self.tokens))

    def with_tokens(self, tokens: int) -> "MicroBatchMemory":
        """The same micro-batch with another number of tokens."""
        return replace(self, tokens=tokens)

    def largest(self, memory_bytes: int) -> int:
        """Tokens of the largest micro-batch that fits in a memory; 0 if none does."""
        low, high = 0, MOST_TOKENS
        while low < high:
            middle = (low + high + 1) // 2
            if self.with_tokens(middle).total <= memory_bytes:
                low = middle
            else:
                high = middle - 1
        return low


def weight_bytes(shape: ModelDimensions, setting: TrainingSetup) -> float:
    """Bytes of the base: quantized linear layers in 4 or 8 bits, everything else in the dtype of the base."""
    if setting.weight_bits is None:
        return shape.parameters * setting.base_bytes
    rows = sum(linear.outputs * linear.count for linear in shape.linears) if setting.weight_bits == INT8_BITS else 0
    packed = shape.quantizable * setting.weight_bits / 8 + 4 * rows
    return packed + (shape.parameters - shape.quantizable) * setting.base_bytes


def own_bytes(shape: ModelDimensions, setting: TrainingSetup) -> float:
    """Bytes of the part of the base that a process holds; the block constants of 4-bit weights are not sharded."""
    whole = weight_bytes(shape, setting) - setting.freed * setting.base_bytes
    bits = setting.weight_bits
    constants = 0.0 if bits is None or bits == INT8_BITS else shape.quantizable * (bits - CODE_BITS) / 8
    return constants + (whole - constants) / setting.shards


def gathered_bytes(shape: ModelDimensions, setting: TrainingSetup) -> float:
    """Bytes of gathered shards on a GPU: the current block, the next one twice, and the output layer.

    While a block is computed, the next one is gathered and then copied into the tensors of its layers.

    Source: `foreach_all_gather_copy_out` in torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py, torch 2.13.
    """
    experts = 0 if shape.experts is None else shape.experts.parameters
    bits = 8 * setting.base_bytes if setting.weight_bits is None else CODE_BITS
    block = (shape.quantizable * bits / 8 + experts * setting.base_bytes) / shape.layers
    return GATHERED_BLOCKS * block + shape.vocabulary * shape.hidden * setting.base_bytes


def head_bytes(shape: ModelDimensions, setting: TrainingSetup, tokens: int) -> float:
    """Bytes of the logits that exist at once, and of the gradient of the last hidden states."""
    head = setting.head
    rows = min(tokens, head.tokens or tokens)
    if setting.on_gpu or not head.fused:
        logits = rows * (head.words or shape.vocabulary) * (head.bytes or setting.width)
    else:
        # On a CPU, only the used part of a tile wider than the vocabulary takes memory.
        words = min(shape.vocabulary, head.words or shape.vocabulary)
        logits = rows * words * (setting.width + TILE_COPIES_BYTES)
    weight = 4 * shape.vocabulary * shape.hidden if setting.head_trained else 0
    return logits + (4 + setting.base_bytes) * shape.hidden * tokens + weight


def unpacked_bytes(shape: ModelDimensions, setting: TrainingSetup) -> float:
    """Bytes of the largest dequantized weight, and of what DoRA allocates to compute column norms."""
    largest = max((linear.inputs * linear.outputs for linear in shape.linears), default=0)
    unpacked = setting.width * largest if setting.weight_bits is not None else 0
    if not setting.dora:
        return unpacked
    adapted = max((linear.inputs * linear.outputs for linear in setting.targets), default=0)
    identity = max((linear.inputs**2 for linear in setting.targets), default=0)
    return unpacked + 3 * setting.adapter_bytes * adapted + setting.adapter_bytes * identity
