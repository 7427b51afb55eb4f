"""Saves a merged model shard by shard, with all files that transformers needs to load it."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from peftcli.merge.fold import FoldedWeights

SHARD_BYTES = 2**30
"""Maximum size of a file; writing it takes twice as much memory, since safetensors makes a copy."""


def write_weights(folded: FoldedWeights, dtype: torch.dtype, folder: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Write the tensors to files of at most `shard_bytes`, with only one file's tensors in memory.

    Args:
        folded: the merged tensors.
        dtype: of the saved floating-point tensors.
        folder: an existing folder without weights.

    Returns:
        Total bytes of the tensors.
    """
    width = torch.empty((), dtype=dtype).element_size()
    shards = plan_shards({name: count * width for name, count in folded.sizes.items()}, shard_bytes)
    names = shard_names(len(shards))
    index: dict[str, str] = {}
    total = 0
    tensors = folded.tensors()
    for shard, file in zip(shards, names, strict=True):
        content = {}
        for expected in shard:
            name, tensor = next(tensors)
            assert name == expected
            stored = tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
            content[name] = stored
            total += stored.numel() * stored.element_size()
            index[name] = file
        save_file(content, folder / file, metadata={"format": "pt"})
    if len(names) > 1:
        value = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(value, indent=2), encoding="utf-8")
    return total


def folding_bytes(folded: FoldedWeights, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> int:
    """RAM that `write_weights` takes at its peak.

    That is one file's tensors and the copy that safetensors makes of them, and in float32 the layer at hand: its
    weights, their copy, the one that PEFT checks (`safe_merge`) and the update.
    """
    width = torch.empty((), dtype=dtype).element_size()
    sizes = {name: count * width for name, count in folded.sizes.items()}
    largest = max(sum(sizes[name] for name in shard) for shard in plan_shards(sizes, shard_bytes))
    return 2 * largest + 4 * 4 * folded.largest_layer


def plan_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Group tensors in order so that no group exceeds the limit, unless a single tensor does.

    >>> plan_shards({"a": 3, "b": 3, "c": 5}, limit=6)
    [['a', 'b'], ['c']]
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def shard_names(count: int) -> list[str]:
    """File names in the format of transformers.

    >>> shard_names(2)
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_config(model: PreTrainedModel, dtype: torch.dtype, unties: bool, folder: Path) -> None:
    """Write `config.json` of the merged model: that of the base model, without quantization."""
    config = type(model.config).from_dict(model.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    if unties:
        config.tie_word_embeddings = False
    config.save_pretrained(str(folder))
