"""Print how long the forecast of a 70B model takes: its structure on the meta device, then the arithmetic."""

import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from peftcli.model.inspect import read_shape
from peftcli.plan.memory.estimate import NF4_BITS, MicroBatchMemory
from peftcli.plan.memory.training_setup import TrainingSetup

SIZES = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}


def main() -> None:
    """Time the structure and the forecast apart."""
    begun = time.perf_counter()
    config = LlamaConfig(**SIZES, num_attention_heads=64, num_key_value_heads=8)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = read_shape(model, config)
    assert shape is not None
    built = time.perf_counter()
    setting = TrainingSetup(
        on_gpu=True,
        base_bytes=2,
        weight_bits=NF4_BITS[True],
        autocast=True,
        state_bytes=8.0,
        targets=shape.linears,
        r=16,
        trainable=207_093_760,
        checkpointing=True,
    )
    load = MicroBatchMemory(shape, setting, 4096, 2048)
    largest = load.largest(79 * 2**30)
    ended = time.perf_counter()
    print(f"structure {built - begun:.2f} s, forecast {ended - built:.3f} s")
    print(f"{load.total / 2**30:.1f} GiB; at most {largest:,} tokens at once on 79 GiB")


if __name__ == "__main__":
    main()
