"""Loads a base model whose weights are sharded across GPUs (FSDP)."""

from typing import Any

from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

PACKING = ("compress_statistics", "quant_type")
"""What PEFT asks of a 4-bit weight; a part of one is a plain tensor that does not know it."""


def load_sharded(path: str, arguments: dict[str, Any], shards: int) -> PreTrainedModel:
    """Load a language model of which each process holds a part, its own share of every block.

    Without quantization a process reads its part alone. In 4 bits each packs all weights in the machine's memory first
    and hands its part to its card block by block: transformers would cut a weight before packing it, and the codes of
    a part fit no layer.

    Args:
        arguments: of `from_pretrained`; the device is the process's own.
        shards: number of processes, all of this launch.
    """
    parts = DistributedConfig(fsdp_size=shards)
    given = {name: value for name, value in arguments.items() if name != "device_map"}
    packing = given.get("quantization_config")
    model: PreTrainedModel
    if packing is None:
        model = AutoModelForCausalLM.from_pretrained(path, distributed_config=parts, **given)
    else:
        # Codes in the format of all other weights are gathered with them in one go.
        packing.bnb_4bit_quant_storage = given["dtype"]
        model = _divide_packed(AutoModelForCausalLM.from_pretrained(path, device_map={"": "cpu"}, **given), parts)
    # Of a model with a size here, though it be 1, PEFT gathers all weights to save an adapter.
    model._tp_size = None
    # Before the first pass: what torch gathers there would have gradients for good, and they would be clipped by.
    model.requires_grad_(False)
    return model


def _divide_packed(model: PreTrainedModel, parts: DistributedConfig) -> PreTrainedModel:
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    known = [{name: getattr(layer.weight, name) for name in PACKING} for layer in layers]
    kind = type(model)
    config, _, mesh = kind.prepare_distribute_model(parts)
    model = kind.maybe_distribute_model(model, config, mesh)
    for layer, facts in zip(layers, known, strict=True):
        vars(layer.weight).update(facts)
    return model
