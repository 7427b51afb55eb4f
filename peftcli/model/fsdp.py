"""Loads a base model whose weights are sharded across GPUs (FSDP)."""

from typing import Any

from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

PACKING = ("compress_statistics", "quant_type")
"""Attributes that PEFT reads from a 4-bit weight; a shard is a plain tensor without them."""


def load_sharded(path: str, arguments: dict[str, Any], shards: int) -> PreTrainedModel:
    """Load a language model sharded across processes: each holds a part of every block.

    Without quantization, a process reads only its shards. In 4 bits, each process quantizes all weights in CPU memory
    first and moves its shards to its GPU block by block: transformers would shard a weight before quantizing it, and
    the codes of a shard fit no layer.

    Args:
        arguments: for `from_pretrained`; the device is that of the process.
        shards: number of processes in this launch.
    """
    parts = DistributedConfig(fsdp_size=shards)
    given = {name: value for name, value in arguments.items() if name != "device_map"}
    packing = given.get("quantization_config")
    model: PreTrainedModel
    if packing is None:
        model = AutoModelForCausalLM.from_pretrained(path, distributed_config=parts, **given)
    else:
        # Codes viewed in the dtype of the other weights are gathered together with them.
        packing.bnb_4bit_quant_storage = given["dtype"]
        model = _divide_packed(AutoModelForCausalLM.from_pretrained(path, device_map={"": "cpu"}, **given), parts)
    # With a tensor parallel size, even 1, PEFT would gather all weights to save an adapter.
    model._tp_size = None
    # Before the first pass: otherwise gathered parameters would permanently require gradients, which would be clipped.
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
