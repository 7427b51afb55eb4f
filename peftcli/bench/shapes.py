"""The models that are measured: real widths with random weights, so that nothing is downloaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftcli.plan.machine import Machine

GIB = 2**30


@dataclass(frozen=True)
class BenchShape:
    """One model.

    Attributes:
        key: for `--shape`.
        family: model type of transformers.
        widths: arguments of its configuration.
        dtype: of the weights on the disk.
        stretch: rows are so many times as long as those of the tiny model.
        learning_rate: at which random weights learn something within a few steps and do not diverge.
    """

    key: str
    family: str
    widths: Mapping[str, Any]
    dtype: str
    stretch: int
    learning_rate: float


def _llama(hidden: int, layers: int, heads: int, mlp: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": min(8, heads // 2),
        "head_dim": hidden // heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "max_position_embeddings": 16384,
    }


SHAPES = {
    shape.key: shape
    for shape in (
        BenchShape("tiny", "llama", _llama(256, 4, 8, 640, 2048), "float32", 1, 2e-3),
        BenchShape(
            "0.6b",
            "qwen3",
            _llama(1024, 28, 16, 3072, 151936) | {"head_dim": 128, "tie_word_embeddings": True},
            "bfloat16",
            4,
            2e-4,
        ),
        BenchShape(
            "3b", "llama", _llama(3072, 28, 24, 8192, 128256) | {"tie_word_embeddings": True}, "bfloat16", 4, 2e-4
        ),
        BenchShape("8b", "llama", _llama(4096, 32, 32, 14336, 128256), "bfloat16", 4, 2e-4),
    )
}
"""tiny has 3.8 million weights; the others the widths of Qwen3-0.6B, Llama-3.2-3B and Llama-3.1-8B."""
LEAST_GIB = {16: {"3b": 36, "0.6b": 6}, 4: {"3b": 14, "0.6b": 6}}
"""Memory of a card from which on a shape is chosen: SFTTrainer as it comes keeps its weights in float32."""


def choose_shape(asked: str, bits: int, machine: Machine) -> BenchShape:
    """The shape of `--shape`, or for `auto` the largest that a few minutes on this machine are enough for."""
    if asked != "auto":
        return SHAPES[asked]
    if machine.device != "cuda":
        return SHAPES["tiny"]
    memory = machine.memory_bytes / GIB
    return SHAPES[next((key for key, least in LEAST_GIB[bits].items() if memory >= least), "tiny")]
