"""What a GPU's kernel computes that reads rows by their edges, as torch's documentation says it, on any device."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def rows_alone(
    query: Tensor, key: Tensor, value: Tensor, edges: Tensor, longest: int, *, scale: float | None, behind: int
) -> Tensor:
    """(tokens, heads, size): causal attention of each row with itself, over `behind` tokens before, -1 for all."""
    assert edges.dtype == torch.int32 and longest == int(edges.diff().max())
    found = []
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        places = torch.arange(end - begin)
        back = places[:, None] - places[None]
        seen = (back >= 0) & ((behind < 0) | (back <= behind))
        row = [part[begin:end].transpose(0, 1)[None] for part in (query, key, value)]
        made = scaled_dot_product_attention(
            *row, attn_mask=seen, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        found.append(made[0].transpose(0, 1))
    return torch.cat(found)


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edges: Tensor,
    edges_of_keys: Tensor,
    longest: int,
    longest_key: int,
    dropout: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, ...]:
    """What FlashAttention computes, with its arguments in every torch from 2.6 on."""
    assert torch.equal(edges, edges_of_keys) and longest == longest_key and dropout == 0.0 and not return_debug_mask
    assert window_size_right == 0 and is_causal == (window_size_left < 0)
    return (rows_alone(query, key, value, edges, longest, scale=scale, behind=window_size_left),)
