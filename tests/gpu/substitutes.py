"""What the attention kernels of torch compute, written out for a CPU: for rehearsals only."""

from typing import Any

import pytest
import torch
from torch import Tensor

from peftcli.model import varlen_attention
from peftcli.model.varlen_attention import CAUSAL


def rows_alone(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], *, scale: float | None, window: int | None
) -> Tensor:
    """Causal attention of each row with itself, with all probabilities, one key head after the other.

    Args:
        query: (tokens, heads, size).
        key, value: (tokens, key heads, size).
        lengths: of the rows.
        window: tokens that one sees, itself included; None for all before it.

    Returns:
        (tokens, heads, size), in the dtype of the query.
    """
    times = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows, begin = [], 0
    for length in lengths:
        row = slice(begin, begin + length)
        places = torch.arange(length, device=query.device)
        behind = places[:, None] - places[None]
        hidden = (behind < 0) | (behind >= (window or length))
        heads = []
        for head in range(key.shape[1]):
            asked = query[row, head * times : (head + 1) * times].transpose(0, 1)
            scores = (asked @ key[row, head].T) * scale
            heads.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value[row, head])
        rows.append(torch.cat(heads).transpose(0, 1))
        begin += length
    return torch.cat(rows)


def flash(query: Tensor, key: Tensor, value: Tensor, edges: Tensor, *given: Any, **more: Any) -> tuple[Tensor, ...]:
    """`_flash_attention_forward` over rows by their edges."""
    left = more["window_size_left"]
    window = None if left < 0 else left + 1
    return (rows_alone(query, key, value, edges.diff().tolist(), scale=more["scale"], window=window),)


def efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: None, edges: Tensor, *given: Any, **more: Any
) -> tuple[Tensor, ...]:
    """`_efficient_attention_forward` over rows by their edges."""
    assert given[4] == CAUSAL
    found = rows_alone(query[0], key[0], value[0], edges.diff().tolist(), scale=more["scale"], window=None)
    return (found[None],)


def substitute_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put them in the place of torch's operators, and let kernels be chosen as on a GPU of sm_80."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", efficient)
    monkeypatch.setattr(varlen_attention, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)
