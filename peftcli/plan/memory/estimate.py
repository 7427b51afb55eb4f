"""Peak memory of a training step, part by part, from the dimensions of a model. Pure arithmetic."""

from dataclasses import dataclass, replace

from peftcli.plan.memory.activations import backward_bytes, end_bytes, saved_activation_bytes, stream_bytes
from peftcli.plan.memory.model_shape import ModelDimensions
from peftcli.plan.memory.training_setup import TrainingSetup

NF4_BITS = {True: 4.127, False: 4.5}
"""Bits of a weight with and without double quantization: 4 + 8/64 + 32/(64 * 256), or 4 + 32/64.

Source: Dettmers et al. 2023, arXiv:2305.14314, section 3.
"""
CODE_BITS = 4
"""Bits of a 4-bit weight without the constants of its block."""
INT8_BITS = 8.0
"""Bits of a weight in 8 bits; a float32 for each row stands beside them."""
CONTEXT_BYTES = 2**29
"""Of a CUDA context with the kernels of all libraries, which torch's own count leaves out; an assumption."""
FRAGMENTATION = 0.05
"""Share of what comes and goes that the allocator cannot use again; an assumption."""
PROCESS_BYTES, PACKING_BYTES = 510 * 2**20, 50 * 2**20
"""Of a process with all libraries, and of bitsandbytes with what it brings; measured on Linux, CPU build of torch."""
TILE_COPIES_BYTES = 28
"""For each logit of a tile where there is no Triton: seven float32 copies (`_backward_tile` of trl's chunked head)."""
MOST_TOKENS = 2**21
GATHERED_BLOCKS = 3
"""Of a divided base that are whole on a card at once; from torch's source, not measured on cards."""
OFFLOADED_BLOCKS = 2
"""Blocks whose tensors are on the card while the others wait in the machine's memory."""


@dataclass(frozen=True)
class MicroBatchMemory:
    """One micro-batch of a model in a setting.

    Attributes:
        tokens: of the micro-batch, padding included.
        longest: tokens of its longest row.
    """

    shape: ModelDimensions
    setting: TrainingSetup
    tokens: int
    longest: int

    def parts(self) -> dict[str, int]:
        """Bytes of each part at the peak of a step."""
        setting = self.setting
        activations = self.activations()
        working = self.working()
        found = {
            "weights": own_bytes(self.shape, setting),
            **({"gathered": gathered_bytes(self.shape, setting)} if setting.shards > 1 else {}),
            # Autocast keeps a 16-bit copy of each wider trainable weight until the backward pass is over.
            "adapter": setting.trainable * (setting.adapter_bytes + (2 if setting.copies_trained else 0)),
            # Several processes sum their gradients in buckets of the same size; beside a divided base, one by one.
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
        """Bytes of all parts."""
        return sum(self.parts().values())

    @property
    def counted(self) -> int:
        """Bytes that a run measures as its peak: of torch's allocator on a card, of the process on a CPU."""
        return sum(value for name, value in self.parts().items() if name not in ("fragmentation", "context"))

    def activations(self) -> float:
        """Bytes that wait for the backward pass when it begins."""
        shape, setting = self.shape, self.setting
        waiting = setting.checkpointing * stream_bytes(shape, setting, self.tokens)
        if setting.checkpointing < 1:
            waiting += (1 - setting.checkpointing) * saved_activation_bytes(shape, setting, self.tokens, self.longest)
        return waiting * min(1.0, OFFLOADED_BLOCKS / shape.layers) if setting.offloading else waiting

    def working(self) -> float:
        """Bytes that come and go on top of that: at the output layer, or while one block goes backward."""
        shape, setting = self.shape, self.setting
        block = backward_bytes(shape, setting, self.tokens) + unpacked_bytes(shape, setting)
        if setting.checkpointing:
            block += saved_activation_bytes(shape, setting, self.tokens, self.longest) / shape.layers
        return max(block, end_bytes(shape, setting, self.tokens) + head_bytes(shape, setting, self.tokens))

    def with_tokens(self, tokens: int) -> "MicroBatchMemory":
        """The same with another number of tokens at once."""
        return replace(self, tokens=tokens)

    def largest(self, memory_bytes: int) -> int:
        """Tokens of the largest micro-batch that fits into a memory; 0 where none does."""
        low, high = 0, MOST_TOKENS
        while low < high:
            middle = (low + high + 1) // 2
            if self.with_tokens(middle).total <= memory_bytes:
                low = middle
            else:
                high = middle - 1
        return low


def weight_bytes(shape: ModelDimensions, setting: TrainingSetup) -> float:
    """Bytes of the base: its linear layers in 4 or 8 bits where it is quantized, all else as wide as the base."""
    if setting.weight_bits is None:
        return shape.parameters * setting.base_bytes
    rows = sum(linear.outputs * linear.count for linear in shape.linears) if setting.weight_bits == INT8_BITS else 0
    packed = shape.quantizable * setting.weight_bits / 8 + 4 * rows
    return packed + (shape.parameters - shape.quantizable) * setting.base_bytes


def own_bytes(shape: ModelDimensions, setting: TrainingSetup) -> float:
    """Bytes of the part of the base that a process keeps; of 4-bit weights the block constants are whole in each."""
    whole = weight_bytes(shape, setting) - setting.freed * setting.base_bytes
    bits = setting.weight_bits
    constants = 0.0 if bits is None or bits == INT8_BITS else shape.quantizable * (bits - CODE_BITS) / 8
    return constants + (whole - constants) / setting.shards


def gathered_bytes(shape: ModelDimensions, setting: TrainingSetup) -> float:
    """Bytes of what a card holds of other cards' parts: the block at work, the next one twice, the output layer.

    While a block is computed the next one arrives, and is then copied into the tensors of its layers.

    Source: `foreach_all_gather_copy_out` in torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py, torch 2.13.
    """
    experts = 0 if shape.experts is None else shape.experts.parameters
    bits = 8 * setting.base_bytes if setting.weight_bits is None else CODE_BITS
    block = (shape.quantizable * bits / 8 + experts * setting.base_bytes) / shape.layers
    return GATHERED_BLOCKS * block + shape.vocabulary * shape.hidden * setting.base_bytes


def head_bytes(shape: ModelDimensions, setting: TrainingSetup, tokens: int) -> float:
    """Bytes of the logits that are there at once, and of the gradient of the last hidden states."""
    head = setting.head
    rows = min(tokens, head.tokens or tokens)
    if setting.on_gpu or not head.fused:
        logits = rows * (head.words or shape.vocabulary) * (head.bytes or setting.width)
    else:
        # Of a tile wider than the vocabulary a CPU gives memory to what is written alone.
        words = min(shape.vocabulary, head.words or shape.vocabulary)
        logits = rows * words * (setting.width + TILE_COPIES_BYTES)
    weight = 4 * shape.vocabulary * shape.hidden if setting.head_trained else 0
    return logits + (4 + setting.base_bytes) * shape.hidden * tokens + weight


def unpacked_bytes(shape: ModelDimensions, setting: TrainingSetup) -> float:
    """Bytes of the largest weight that is unpacked, and of what DoRA builds to measure its columns."""
    largest = max((linear.inputs * linear.outputs for linear in shape.linears), default=0)
    unpacked = setting.width * largest if setting.weight_bits is not None else 0
    if not setting.dora:
        return unpacked
    adapted = max((linear.inputs * linear.outputs for linear in setting.targets), default=0)
    identity = max((linear.inputs**2 for linear in setting.targets), default=0)
    return unpacked + 3 * setting.adapter_bytes * adapted + setting.adapter_bytes * identity
