"""Attention over rows behind one another by the edges of the rows, with kernels that a card has to prove first.

Nothing is filled up and nothing is copied, but only a card has such kernels. Before one is used, it computes a few rows
of the same shape on that very card, whose outputs and gradients are held against float32.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

Kernel = Literal["varlen_attn", "efficient"]
"""torch's `varlen_attn`, which is FlashAttention, and the memory-efficient kernel for cards before sm_80."""

CAUSAL = 1
"""`custom_mask_type` of the memory-efficient kernel: each token sees those before it in its own row."""
LARGEST_HEAD = 256
"""Numbers of a head that FlashAttention takes; they are a multiple of 8."""
PROOF_ROWS = (3, 70, 1, 129)
"""Tokens of the rows of the proof: within one block of the kernel, and over its edge."""
PROOF_TOLERANCE = 0.05
"""Of the largest value; 16-bit numbers differ by a hundredth, a token that sees a wrong row by about the whole."""


class Shape(NamedTuple):
    """What a kernel is proved for."""

    dtype: torch.dtype
    heads: int
    key_heads: int
    size: int


def kernel_for(query: Tensor, key: Tensor, value: Tensor, *, dropout: float, window: int | None) -> Kernel | None:
    """The kernel for some inputs, or None where rows are to be laid side by side.

    Args:
        query, key, value: (1, heads, tokens, size) each.
        dropout: of the probabilities; no kernel by edges has it.
        window: tokens that one sees, itself included; None for all before it.
    """
    if query.device.type != "cuda" or dropout or value.shape[-1] != query.shape[-1]:
        return None
    shape = Shape(computed(query).dtype, query.shape[1], key.shape[1], query.shape[-1])
    return _chosen(query.device, shape, window is not None, torch.are_deterministic_algorithms_enabled())


@lru_cache(maxsize=64)
def _chosen(device: torch.device, shape: Shape, windowed: bool, deterministic: bool) -> Kernel | None:
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    kernel = choose_kernel(capability, shape, windowed=windowed, deterministic=deterministic)
    return kernel if kernel is not None and proved(kernel, device, shape) else None


def choose_kernel(capability: tuple[int, int], shape: Shape, *, windowed: bool, deterministic: bool) -> Kernel | None:
    """The kernel that a card should have.

    Args:
        capability: of the card, (major, minor).
        windowed: each token sees only so many before it.
        deterministic: torch is to use deterministic algorithms alone; the memory-efficient kernel's backward is none.
    """
    if shape.size % 8 or shape.size > LARGEST_HEAD:
        return None
    if capability >= (8, 0):
        return "varlen_attn" if varlen_attn is not None and shape.dtype in (torch.bfloat16, torch.float16) else None
    plain = not windowed and not deterministic and shape.dtype in (torch.float16, torch.float32)
    return "efficient" if plain else None


def proved(kernel: Kernel, device: torch.device, shape: Shape) -> bool:
    """Whether a kernel gives the outputs and gradients of each row alone in float32."""
    drawn = torch.Generator().manual_seed(0)
    tokens = sum(PROOF_ROWS)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        parts = [
            torch.randn((1, heads, tokens, shape.size), generator=drawn).to(device, shape.dtype).requires_grad_()
            for heads in (shape.heads, shape.key_heads, shape.key_heads)
        ]
        whole = [part.detach().float().requires_grad_() for part in parts]
        edges = torch.tensor([0, *PROOF_ROWS]).cumsum(0).to(device, torch.int32)
        wanted = _rows_alone(whole, PROOF_ROWS)
        try:
            query, key, value = parts
            found = attend(kernel, query, key, value, edges, max(PROOF_ROWS), scale=None, window=None)
            weights = torch.randn(wanted.shape, generator=drawn).to(device)
            torch.autograd.backward((found.float() * weights).sum())
        except RuntimeError:  # the wheel or the card has no such kernel
            return False
        torch.autograd.backward((wanted * weights).sum())
        pairs = [(found, wanted), *((part.grad, other.grad) for part, other in zip(parts, whole, strict=True))]
        return all(_is_near(one, other) for one, other in pairs)


def _rows_alone(parts: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    times = parts[0].shape[1] // parts[1].shape[1]
    query, (key, value) = parts[0], (part.repeat_interleave(times, 1) for part in parts[1:])
    found, begin = [], 0
    for length in lengths:
        row = slice(begin, begin + length)
        found.append(scaled_dot_product_attention(query[:, :, row], key[:, :, row], value[:, :, row], is_causal=True))
        begin += length
    return torch.cat(found, 2).transpose(1, 2)


def _is_near(found: Tensor | None, wanted: Tensor | None) -> bool:
    if found is None or wanted is None:
        return False
    return bool((found.float() - wanted).abs().max() <= PROOF_TOLERANCE * wanted.abs().max())


def computed(part: Tensor) -> Tensor:
    """A tensor in the number format of the surrounding autocast, as torch's own attention takes it."""
    kind = part.device.type
    return part.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else part


def attend(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edges: Tensor,
    longest: int,
    *,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Causal attention of each row with itself.

    Args:
        query: (1, heads, tokens, size), the rows behind one another.
        key, value: (1, key heads, tokens, size).
        edges: (rows + 1,), int32, where each row begins, and the end.
        longest: tokens of the longest row.
        window: tokens that one sees, itself included; None for all before it.

    Returns:
        (1, tokens, heads, size).
    """
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    if kernel == "varlen_attn":
        assert varlen_attn is not None  # chosen where it is there
        behind = -1 if window is None else window - 1
        made: Tensor = varlen_attn(
            query[0],
            key[0],
            value[0],
            edges,
            edges,
            longest,
            longest,
            scale=scale,
            window_size=(behind, 0),
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return made[None]
    times = query.shape[2] // key.shape[2]
    key, value = (part.repeat_interleave(times, 2) for part in (key, value))
    given = (query, key, value, None, edges, edges, longest, longest, 0.0, CAUSAL, True)
    found: Tensor = torch.ops.aten._efficient_attention_forward(*given, scale=scale)[0]
    return found
