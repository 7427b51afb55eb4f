"""The shape of a model, read from its own layers: names and configurations differ between families."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftcli.plan.memory.model_shape import Experts, Linear, Norm, Shape

ACTIVATIONS_KEPT = {"gelu_new": 4, "gelu_fast": 5, "quick_gelu": 3, "gelu_python": 3}
"""Tensors that an activation written out in Python keeps for its backward pass; torch's own keep one, their input."""
ATTENTION = re.compile(r"(^|\.)(self_)?att(n|ention)\b|_attn\b|_attention\b")
BLOCK = re.compile(r"^(?P<before>.*?\.)(?P<number>\d+)\.(?P<name>.+)$")


def read_shape(model: PreTrainedModel, config: PreTrainedConfig) -> Shape | None:
    """Read the widths of a model.

    Args:
        model: on any device, also the meta device.
        config: of its text part.

    Returns:
        None where the model is not built of blocks with linear layers.
    """
    inside = _blocks(model)
    linears = _linears(inside)
    hidden, heads = _number(config, "hidden_size", "n_embd"), _number(config, "num_attention_heads", "n_head")
    if not linears or not hidden or not heads or not _number(config, "vocab_size"):
        return None
    size = _head_size(linears, hidden, heads, config)
    queries, keys = heads * size, _key_heads(linears, size, heads, config) * size
    feed = [linear for linear in linears if not ATTENTION.search(linear.name) and ".experts." not in linear.name]
    mlp = max((linear.inputs for linear in feed if linear.outputs == hidden), default=0)
    layers = max(linear.count for linear in linears)
    norms = _norms(inside, size, heads, keys // size)
    return Shape(
        hidden=hidden,
        layers=layers,
        queries=queries,
        keys=keys,
        heads=heads,
        mlp=mlp,
        mlp_kept=_kept(feed, hidden, mlp, config),
        mlp_layers=max(
            (linear.count for linear in feed if linear.inputs == mlp and linear.outputs == hidden), default=0
        ),
        vocabulary=int(config.vocab_size),
        parameters=int(model.num_parameters()),
        linears=linears,
        norms=norms,
        final_norm=Norm(hidden, 1, all(norm.in_float32 for norm in norms)),
        rotary=any("Rotary" in type(module).__name__ for module in model.modules()),
        fused_qkv=any(linear.outputs == queries + 2 * keys and ATTENTION.search(linear.name) for linear in linears),
        parallel=sum(norm.count for norm in norms if norm.width == hidden) == layers,
        experts=_experts(model, config),
    )


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of the blocks under their names without the block's number."""
    found = [(BLOCK.match(name), module) for name, module in model.named_modules()]
    return [(match["name"], module) for match, module in found if match is not None]


def _linears(inside: Iterable[tuple[str, nn.Module]]) -> tuple[Linear, ...]:
    counts: dict[tuple[str, int, int], int] = {}
    for name, module in inside:
        if isinstance(module, nn.Linear):
            key = (name, module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            key = (name, int(module.weight.shape[0]), int(module.weight.shape[1]))
        else:
            continue
        counts[key] = counts.get(key, 0) + 1
    return tuple(Linear(*key, count) for key, count in counts.items())


def _norms(inside: Iterable[tuple[str, nn.Module]], size: int, heads: int, key_heads: int) -> tuple[Norm, ...]:
    counts: dict[tuple[str, int, bool], int] = {}
    for name, module in inside:
        weight = getattr(module, "weight", None)
        if "Norm" not in type(module).__name__ or not isinstance(weight, torch.Tensor):
            continue
        width, leaf = int(weight.shape[-1]), name.rsplit(".", 1)[-1]
        if width == size and leaf.startswith(("q_", "k_", "query_", "key_")):
            width *= heads if leaf.startswith("q") else key_heads
        key = (leaf, width, not isinstance(module, nn.LayerNorm))
        counts[key] = counts.get(key, 0) + 1
    return tuple(Norm(width, count, wide) for (_, width, wide), count in counts.items())


def _head_size(linears: Iterable[Linear], hidden: int, heads: int, config: Any) -> int:
    asked = getattr(config, "head_dim", None)
    if isinstance(asked, int):
        return asked
    wide = next((linear.outputs for linear in linears if linear.leaf == "q_proj"), hidden)
    return max(1, wide // heads)


def _key_heads(linears: Iterable[Linear], size: int, heads: int, config: Any) -> int:
    wide = next((linear.outputs for linear in linears if linear.leaf == "k_proj"), None)
    if wide is not None:
        return max(1, wide // size)
    return _number(config, "num_key_value_heads") or heads


def _kept(feed: Iterable[Linear], hidden: int, mlp: int, config: Any) -> int:
    """Tensors that stay between the first and the last linear layer of the feed-forward part."""
    names = ("hidden_activation", "hidden_act", "activation_function", "ffn_act_fn")
    name = next((value for value in (getattr(config, key, None) for key in names) if isinstance(value, str)), "")
    inner = {
        linear.name: linear.outputs for linear in feed if linear.inputs == hidden and linear.outputs in (mlp, 2 * mlp)
    }
    gated = sum(inner.values()) >= 2 * mlp
    # A gate keeps both of its factors; the activation keeps its input besides.
    return ACTIVATIONS_KEPT.get(name, 1) + (2 if gated else 0)


def _experts(model: nn.Module, config: Any) -> Experts | None:
    total = _number(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    stacked = [weight for weight in model.parameters() if weight.ndim == 3 and weight.shape[0] == total > 1]
    if not stacked:
        return None
    kinds = len({tuple(weight.shape) for weight in stacked})
    return Experts(
        parameters=sum(weight.numel() for weight in stacked),
        per_token=_number(config, "num_experts_per_tok", "moe_top_k") or 1,
        total=total,
        mlp=_number(config, "moe_intermediate_size", "intermediate_size"),
        layers=len(stacked) // kinds,
    )


def _number(config: Any, *names: str) -> int:
    """The first of some settings that is a number, 0 where none is."""
    return next((value for value in (getattr(config, name, None) for name in names) if isinstance(value, int)), 0)
