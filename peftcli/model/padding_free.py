"""Attention over the concatenated rows of a padding-free batch, in which each row attends only to itself.

No mask of tokens by tokens is built. A GPU whose kernels take row boundaries uses them; elsewhere rows of similar
length are laid side by side, and a causal attention never lets a row see what fills up the shorter ones. The result is
that of each row alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from peftcli.model.distributed import without_gradients
from peftcli.model.oom import is_out_of_memory
from peftcli.model.varlen_attention import attend, computed, kernel_for

NAME = "documents"
"""Under which transformers knows this attention."""
FLASH = "flash_attention_"
"""How the names of FlashAttention begin in transformers."""
STATE_LAYERS = ("linear_attention", "conv", "mamba", "hybrid", "recurrent")
"""In `layer_types` of a configuration: layers that carry something from token to token, and so from row to row."""
SIMILAR = 0.7
"""Rows of at least this share of the longest one's length are laid beside it."""
SMALL_TOKENS = 512
"""So few tokens are laid side by side whatever their lengths: another call would cost more than their filling."""

CHECKED_ROWS = (6, 9)
"""Tokens of the rows of `check_rows`."""
ROUNDED_LIMIT = 0.1
"""Of `RowCheck.difference` in 16 bits. A random Llama of 24 layers in bfloat16 whose products are summed in two rounded
halves differs by 0.024, and one whose second row sees the first by 0.57: the limit is four times from either. The
largest difference in place of the root mean square would reach 0.18 by rounding alone."""
EXACT_LIMIT = 1e-3
"""In float32 on a CPU, where rounding is 2**16 times finer."""


@dataclass(frozen=True)
class Group:
    """Rows laid side by side: `take` (rows x length,) are their places in the line, filled with the first of each."""

    rows: int
    length: int
    take: Tensor


@dataclass(frozen=True)
class SequenceLayout:
    """How a line of rows is laid out for attention.

    Attributes:
        lengths: of the rows, in their order in the batch.
        device: of the line.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @property
    def whole(self) -> bool:
        """All rows have one length, so that the line only needs another shape."""
        return len(set(self.lengths)) == 1

    @cached_property
    def edges(self) -> Tensor:
        """(rows + 1,), int32, where each row begins, and the end."""
        return torch.tensor([0, *self.lengths]).cumsum(0).int().to(self.device, non_blocking=True)

    def boundaries(self) -> dict[str, Any]:
        """The edges as arguments of a model: of FlashAttention, and of linear-attention layers and their convolutions.

        Source: `FlashAttentionKwargs` in transformers/modeling_flash_attention_utils.py; `seq_idx` is what
        `causal_conv1d_fn` takes, (1, tokens), the number of each token's row.
        """
        rows = torch.arange(len(self.lengths), dtype=torch.int32).repeat_interleave(torch.tensor(self.lengths))
        longest = max(self.lengths)
        return {
            "cu_seq_lens_q": self.edges,
            "cu_seq_lens_k": self.edges,
            "max_length_q": longest,
            "max_length_k": longest,
            "seq_idx": rows[None].to(self.device, non_blocking=True),
        }

    @cached_property
    def sides(self) -> tuple[tuple[Group, ...], Tensor]:
        """Groups of rows of similar length and, (tokens,), for each place of the line its place among all outputs."""
        return _side_by_side(self.lengths, self.device)


_now: list[SequenceLayout] = []
"""The layout of the forward pass at hand. Checkpointed layers run again in the threads of autograd, so it is no context
variable; one process runs one forward and backward at a time."""

kernels_used: set[str] = set()
"""What has computed attention over lines in this process: kernels that were proved, or `side by side`."""


def _side_by_side(lengths: Sequence[int], device: torch.device) -> tuple[tuple[Group, ...], Tensor]:
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1].tolist()
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups: list[Group] = []
    back = torch.empty(sum(lengths), dtype=torch.int64)
    offset = 0
    while order:
        longest = lengths[order[0]]
        if longest * len(order) <= SMALL_TOKENS:
            size = len(order)
        else:
            size = sum(lengths[row] >= SIMILAR * longest for row in order)
        chosen, order = order[:size], order[size:]
        steps = torch.arange(longest)
        first = torch.tensor([starts[row] for row in chosen])[:, None]
        inside = steps[None] < torch.tensor([lengths[row] for row in chosen])[:, None]
        take = torch.where(inside, first + steps[None], first)
        back[take[inside]] = (offset + torch.arange(size * longest).reshape(size, longest))[inside]
        groups.append(Group(size, longest, take.flatten().to(device, non_blocking=True)))
        offset += size * longest
    return tuple(groups), back.to(device, non_blocking=True)


@contextmanager
def use_layout(layout: SequenceLayout | None) -> Iterator[None]:
    """Read the rows of the forward and backward passes inside by a layout; without one, as any other model does."""
    if layout is None:
        yield
        return
    _now.append(layout)
    try:
        yield
    finally:
        _now.pop()


def has_flash_attention(model: PreTrainedModel) -> bool:
    """Whether a model computes attention by FlashAttention, which takes the boundaries of rows as arguments."""
    return str(model.config._attn_implementation).startswith(FLASH)


def takes_boundaries(model: PreTrainedModel) -> bool:
    """Whether layers of a model may read the boundaries of rows from its arguments: FlashAttention, linear attention.

    transformers refuses the arguments where the package is missing that could keep the rows apart, so that a leak which
    is too small to measure is found too.
    """
    return has_flash_attention(model) or bool(state_layers(model.config))


def state_layers(config: PreTrainedConfig) -> tuple[str, ...]:
    """The kinds of layers of a model that carry a state from token to token, as its configuration names them."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    return tuple(kind for kind in STATE_LAYERS if kind in kinds)


def enable_padding_free(model: PreTrainedModel) -> bool:
    """Give a model this attention, which is that of `sdpa` outside of `documents`; False where it cannot take it.

    A model with FlashAttention keeps it.
    """
    if has_flash_attention(model):
        kernels_used.clear()
        kernels_used.add(model.config._attn_implementation)
        return True
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return False
    kernels_used.clear()
    AttentionInterface.register(NAME, padding_free_attention)
    AttentionMaskInterface.register(NAME, padding_free_mask)
    model.set_attn_implementation(NAME)
    return bool(model.config._attn_implementation == NAME)


@dataclass(frozen=True)
class RowCheck:
    """Whether the rows of a padding-free batch give what each gives alone.

    Attributes:
        problem: why they do not, or cannot be run; None where they do.
        difference: root mean square of the difference of the logits of a row over their standard deviation, of the row
            with the larger one; None where no logits could be compared.
        boundaries: the model is given the boundaries of the rows as arguments.
    """

    problem: str | None
    difference: float | None = None
    boundaries: bool = False


@without_gradients
def check_rows(model: PreTrainedModel) -> RowCheck:
    """Compare two short rows in a padding-free batch with each alone.

    A layer that carries a state from token to token, or a model that takes no positions, would mix them. On a GPU the
    two computations use other kernels, whose rounding differs too.
    """
    was_training = model.training
    model.eval()
    vocabulary = model.config.get_text_config().vocab_size
    device = model.get_input_embeddings().weight.device
    rows = [(torch.arange(length, device=device) * 7 + 3) % vocabulary for length in CHECKED_ROWS]
    alone = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows]).float()
    places = torch.cat([torch.arange(len(row), device=device) for row in rows])
    layout = SequenceLayout(CHECKED_ROWS, device)
    boundaries = takes_boundaries(model)
    given = layout.boundaries() if boundaries else {}
    try:
        with use_layout(layout):
            flat = model(input_ids=torch.cat(rows)[None], position_ids=places[None], use_cache=False, **given).logits[0]
    except (TypeError, ValueError, RuntimeError) as problem:  # no such argument, or an attention that wants a mask
        if is_out_of_memory(problem):
            raise
        return RowCheck(f"the model does not take rows in a padding-free batch ({type(problem).__name__}: {problem})")
    finally:
        model.train(was_training)
    if not alone.isfinite().all():
        return RowCheck("the logits of a few tokens are not finite")
    difference = _row_difference(flat.float(), alone)
    if difference <= _limit(model, device):  # false for NaN too
        return RowCheck(None, difference, boundaries)
    said = f"in a padding-free batch the logits of a row differ from those of the row alone by {difference:.2g} of"
    return RowCheck(f"{said} their standard deviation", difference)


def _row_difference(flat: Tensor, alone: Tensor) -> float:
    """See `RowCheck.difference`, of logits (tokens, vocabulary)."""
    by_row = torch.split_with_sizes((flat - alone).square(), CHECKED_ROWS)
    return float(torch.stack([part.mean().sqrt() for part in by_row]).max() / alone.std())


def _limit(model: PreTrainedModel, device: torch.device) -> float:
    exact = next(model.parameters()).dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    return rounding_limit(torch.float32 if exact else torch.bfloat16, device)


def rounding_limit(dtype: torch.dtype, device: torch.device) -> float:
    """How much two ways to compute the logits of a model may differ, as `RowCheck.difference`.

    Args:
        dtype: of the computation.
    """
    # On a GPU products of float32 may be rounded to TF32, which is as coarse as float16.
    return EXACT_LIMIT if dtype == torch.float32 and device.type == "cpu" else ROUNDED_LIMIT


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch
def padding_free_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask inside of `documents`; that of `sdpa` elsewhere."""
    return None if _now else sdpa_mask(*args, **kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch
def padding_free_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each row with itself.

    It stays out of compiled code, which would be compiled again for the lengths of each batch. What is around it is
    compiled for the first batches alone, the second time for any number of tokens.

    Args:
        query: (1, heads, tokens, size), the rows behind one another.
        key, value: (1, key heads, tokens, size).
        attention_mask: taken outside of `documents` only.
        kwargs: of transformers: dropout, scaling, sliding_window and others.

    Returns:
        (1, tokens, heads, size), and None for the weights.
    """
    if not _now:
        return sdpa_attention(module, query, key, value, attention_mask, **kwargs)
    layout, window = _now[-1], kwargs.get("sliding_window")
    longest = max(layout.lengths)
    dropout: float = kwargs.get("dropout") or 0.0
    kernel = kernel_for(query, key, value, dropout=dropout, window=window, longest=longest)
    kernels_used.add(kernel or "side by side")
    if kernel is not None:
        query, key, value = computed(query), computed(key), computed(value)
        seen = None if window is None or window >= longest else window
        return attend(kernel, query, key, value, layout.edges, longest, scale=kwargs.get("scaling"), window=seen), None
    outputs = []
    groups, back = layout.sides
    for group in groups:
        row_query, row_key, row_value = (_beside(part, group, whole=layout.whole) for part in (query, key, value))
        mask = _window(group.length, window, query.device)
        found, _ = sdpa_attention(module, row_query, row_key, row_value, mask, **{**kwargs, "is_causal": True})
        outputs.append(found.flatten(0, 1))
    if layout.whole:
        return outputs[0][None], None
    return torch.cat(outputs).index_select(0, back)[None], None


def repeats_heads(device: torch.device) -> bool:
    """Whether a GPU has no kernel that shares keys and values among query heads without making all probabilities.

    Source: torch's documentation of `scaled_dot_product_attention`: `enable_gqa` is for the flash kernel, which begins
    with sm_80, and the math kernel.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


def sdpa_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention by `sdpa`, with keys and values repeated where a GPU shares them in no fused kernel.

    transformers leaves the sharing to torch wherever there is no mask. The math kernel, which is then the only one,
    holds the probabilities of all tokens by all tokens: 13 GB for a row of 8,192 tokens with 32 heads.

    Returns:
        (rows, length, heads, size), and None for the weights.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    if attention_mask is None and groups > 1 and query.shape[2] > 1 and repeats_heads(query.device):
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        module = SimpleNamespace(is_causal=getattr(module, "is_causal", True))  # type: ignore[assignment]  # all it reads
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]


def use_fused_attention(device: torch.device) -> None:
    """Let all models of this process that compute attention by `sdpa` do it by `sdpa_attention`, where that differs."""
    if repeats_heads(device):
        AttentionInterface.register("sdpa", sdpa_attention)


def _beside(line: Tensor, group: Group, *, whole: bool) -> Tensor:
    """(rows, heads, length, size) of a group out of (1, heads, tokens, size)."""
    taken = line[0] if whole else line[0].index_select(1, group.take)
    return taken.reshape(taken.shape[0], group.rows, group.length, taken.shape[2]).transpose(0, 1)


def _window(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """(1, 1, length, length), what a row sees of itself through a sliding window; None where it sees all before."""
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=device)
    behind = places[:, None] - places[None, :]
    return ((behind >= 0) & (behind < window))[None, None]
