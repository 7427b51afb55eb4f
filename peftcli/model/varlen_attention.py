"""Attention over rows behind one another by the edges of the rows, with kernels that are checked on the GPU first.

Nothing is padded and nothing is copied, but only a GPU has such kernels. Before one is used, it computes a few rows of
the same shape on that GPU, and its outputs and gradients are compared with float32.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from peftcli.model.oom import free_memory, is_out_of_memory

Kernel = Literal["flash", "efficient"]
"""FlashAttention as torch ships it, and the memory-efficient kernel for GPUs before sm_80."""

DEVICE_TYPE = "cuda"
"""Of the devices that have such kernels."""
CAUSAL = 1
"""`custom_mask_type` of the memory-efficient kernel: each token sees those before it in its own row."""
LARGEST_HEAD = 256
"""Numbers of a head that FlashAttention takes; they are a multiple of 8."""
PROOF_ROWS = (3, 70, 1, 129)
"""Tokens of the rows of the proof: within one block of the kernel, and over its edge."""
PROOF_WINDOW = 9
"""Tokens that one sees in the proof of a sliding window, so that two of the rows are longer than it."""
PROOF_TOLERANCE = 0.05
"""Of the largest value; 16-bit numbers differ by a hundredth, a token that sees a wrong row by about the whole."""


CANNOT_RUN = (RuntimeError, TypeError, ValueError, AttributeError)
"""Raised by a wheel or a GPU without the kernel, and by a torch whose operator is missing or takes other arguments."""

rejected: dict[str, str] = {}
"""Kernels that failed their check in this process, with the number format and the window, and how they failed."""


class KernelShape(NamedTuple):
    """What a kernel is checked for."""

    dtype: torch.dtype
    heads: int
    key_heads: int
    size: int


def kernel_for(
    query: Tensor, key: Tensor, value: Tensor, *, dropout: float, window: int | None, longest: int
) -> Kernel | None:
    """The kernel for some inputs, or None where rows are to be laid side by side.

    Args:
        query, key, value: (1, heads, tokens, size) each.
        dropout: of the probabilities; no kernel by edges has it.
        window: tokens that one sees in this model, itself included; None for all before it.
        longest: tokens of the longest row; where it fits into the window, the kernel is used without one.
    """
    if query.device.type != DEVICE_TYPE or dropout or value.shape[-1] != query.shape[-1]:
        return None
    shape = KernelShape(computed(query).dtype, query.shape[1], key.shape[1], query.shape[-1])
    deterministic = torch.are_deterministic_algorithms_enabled()
    # The first rows are short, longer ones come in the middle of training: both uses are checked with the first.
    found = {used: _chosen(query.device, shape, used, deterministic) for used in {False, window is not None}}
    return found[window is not None and window < longest]


@lru_cache(maxsize=64)
def _chosen(device: torch.device, shape: KernelShape, windowed: bool, deterministic: bool) -> Kernel | None:
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    for kernel in kernels_to_try(capability, shape, windowed=windowed, deterministic=deterministic):
        problem = kernel_problem(kernel, device, shape, window=PROOF_WINDOW if windowed else None)
        if problem is None:
            return kernel
        use = f"{str(shape.dtype).removeprefix('torch.')}{', sliding window' if windowed else ''}"
        rejected[f"{kernel} ({use})"] = problem
    return None


def kernels_to_try(
    capability: tuple[int, int], shape: KernelShape, *, windowed: bool, deterministic: bool
) -> tuple[Kernel, ...]:
    """The kernels that a GPU should have, the fastest first.

    Args:
        capability: of the GPU, (major, minor).
        windowed: each token sees only so many before it.
        deterministic: torch is to use deterministic algorithms alone; the memory-efficient kernel's backward is none.
    """
    if shape.size % 8 or shape.size > LARGEST_HEAD:
        return ()
    plain = not windowed and not deterministic
    if capability >= (8, 0):
        narrow = shape.dtype in (torch.bfloat16, torch.float16)
        return (("flash", "efficient") if plain else ("flash",)) if narrow else ()
    return ("efficient",) if plain and shape.dtype in (torch.float16, torch.float32) else ()


def kernel_problem(kernel: Kernel, device: torch.device, shape: KernelShape, *, window: int | None) -> str | None:
    """How a kernel fails to give the outputs and gradients of each row alone in float32; None where it gives them.

    The check runs in a thread of its own, because the modes of torch belong to a thread. The caller may be inside of a
    checkpointed block, whose hooks would count the tensors of the check among those of the block, or in inference mode.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_kernel_problem, kernel, device, shape, window).result()


def _kernel_problem(kernel: Kernel, device: torch.device, shape: KernelShape, window: int | None) -> str | None:
    said = ""
    for _ in range(2):
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                return _difference(kernel, device, shape, window)
        except CANNOT_RUN as problem:
            said = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
            if not is_out_of_memory(problem):
                return said
        # What fills the GPU may be garbage; outside the handler, which keeps the tensors of the attempt alive.
        free_memory()
    return said


def _difference(kernel: Kernel, device: torch.device, shape: KernelShape, window: int | None) -> str | None:
    """What differs between a kernel and each row alone in float32; None where nothing does."""
    drawn = torch.Generator().manual_seed(0)
    tokens = sum(PROOF_ROWS)
    parts = [
        torch.randn((1, heads, tokens, shape.size), generator=drawn).to(device, shape.dtype).requires_grad_()
        for heads in (shape.heads, shape.key_heads, shape.key_heads)
    ]
    whole = [part.detach().float().requires_grad_() for part in parts]
    edges = torch.tensor([0, *PROOF_ROWS]).cumsum(0).to(device, torch.int32)
    wanted = _rows_alone(whole, PROOF_ROWS, window)
    weights = torch.randn(wanted.shape, generator=drawn).to(device)
    query, key, value = parts
    found = attend(kernel, query, key, value, edges, max(PROOF_ROWS), scale=None, window=window)
    torch.autograd.backward((found.float() * weights).sum())
    torch.autograd.backward((wanted * weights).sum())
    if not _is_near(found, wanted):
        return "its outputs differ from those of each row alone in float32"
    if not all(_is_near(part.grad, other.grad) for part, other in zip(parts, whole, strict=True)):
        return "its gradients differ from those of each row alone in float32"
    return None


def _rows_alone(parts: Sequence[Tensor], lengths: Sequence[int], window: int | None) -> Tensor:
    times = parts[0].shape[1] // parts[1].shape[1]
    query, (key, value) = parts[0], (part.repeat_interleave(times, 1) for part in parts[1:])
    found, begin = [], 0
    for length in lengths:
        row = slice(begin, begin + length)
        places = torch.arange(length, device=query.device)
        behind = places[:, None] - places[None]
        seen = (behind >= 0) & (behind < (window or length))
        found.append(scaled_dot_product_attention(query[:, :, row], key[:, :, row], value[:, :, row], attn_mask=seen))
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
    if kernel == "flash":
        # Not by torch.nn.attention.varlen, which takes no window or grouped heads before torch 2.12.
        given = (query[0], key[0], value[0], edges, edges, longest, longest, 0.0, window is None, False)
        behind = -1 if window is None else window - 1
        flat: Tensor = torch.ops.aten._flash_attention_forward(
            *given, scale=scale, window_size_left=behind, window_size_right=0
        )[0]
        return flat[None]
    times = query.shape[2] // key.shape[2]
    key, value = (part.repeat_interleave(times, 2) for part in (key, value))
    found: Tensor = torch.ops.aten._efficient_attention_forward(
        query, key, value, None, edges, edges, longest, longest, 0.0, CAUSAL, True, scale=scale
    )[0]
    return found
