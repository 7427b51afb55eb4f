"""Kernels that read rows by their edges: which card has which, what they are given, and the proof before their use.

No kernel runs here; a stand-in computes what torch's documentation says of it, and the shapes are held against the real
operators on the meta device.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from peftcli.model import documents, varlen
from peftcli.model.documents import Layout, documents_attention
from peftcli.model.varlen import Shape, attend, choose_kernel, kernel_for, proved

LENGTHS = (5, 1, 64, 17)
WIDE = Shape(torch.bfloat16, 4, 2, 16)


def stand_in(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edges: Tensor,
    edges_of_keys: Tensor,
    longest: int,
    longest_key: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What `varlen_attn` computes: (tokens, heads, size) of each row with itself."""
    assert edges.dtype == torch.int32 and torch.equal(edges, edges_of_keys)
    assert longest == longest_key == int(edges.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    found = []
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        places = torch.arange(end - begin)
        behind = places[:, None] - places[None]
        seen = (behind >= -window_size[1]) & ((window_size[0] < 0) | (behind <= window_size[0]))
        row = [part[begin:end].transpose(0, 1)[None] for part in (query, key, value)]
        made = scaled_dot_product_attention(*row, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        found.append(made[0].transpose(0, 1))
    return torch.cat(found)


def efficient_stand_in(*given: Any, scale: float | None) -> tuple[Tensor, ...]:
    """What the memory-efficient kernel computes, (1, tokens, heads, size), with keys for every query head."""
    query, key, value, bias, edges, edges_of_keys, longest, longest_key, dropout, mask, keeps = given
    assert bias is None and dropout == 0.0 and mask == 1 and keeps and query.shape == key.shape == value.shape
    line = (query[0], key[0], value[0], edges, edges_of_keys, longest, longest_key)
    return (stand_in(*line, scale=scale, window_size=(-1, 0), enable_gqa=False)[None],)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", efficient_stand_in)


def line(requires_grad: bool = False, **kwargs: Any) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), 16) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=drawn).to(**kwargs).requires_grad_(requires_grad) for shape in shapes]


@pytest.mark.parametrize(
    ("capability", "shape", "windowed", "deterministic", "kernel"),
    [
        ((9, 0), WIDE, True, True, "varlen_attn"),
        ((8, 0), WIDE._replace(dtype=torch.float16), False, False, "varlen_attn"),
        ((8, 9), WIDE._replace(dtype=torch.float32), False, False, None),  # FlashAttention computes in 16 bit
        ((8, 0), WIDE._replace(size=12), False, False, None),
        ((8, 0), WIDE._replace(size=264), False, False, None),
        ((7, 5), WIDE._replace(dtype=torch.float16), False, False, "efficient"),
        ((7, 5), WIDE._replace(dtype=torch.float32), False, False, "efficient"),
        ((7, 5), WIDE, False, False, None),  # no bfloat16 before sm_80
        ((7, 5), WIDE._replace(dtype=torch.float16), True, False, None),
        ((7, 5), WIDE._replace(dtype=torch.float16), False, True, None),
        ((6, 0), WIDE._replace(dtype=torch.float16), False, False, "efficient"),
    ],
)
def test_each_card_has_its_kernel(
    kernels: None, capability: Any, shape: Shape, windowed: bool, deterministic: bool, kernel: str | None
) -> None:
    assert choose_kernel(capability, shape, windowed=windowed, deterministic=deterministic) == kernel


def test_an_older_torch_has_no_kernel_for_newer_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", None)
    assert choose_kernel((9, 0), WIDE, windowed=False, deterministic=False) is None


def test_on_a_processor_rows_are_laid_side_by_side() -> None:
    assert kernel_for(*line(), dropout=0.0, window=None) is None


@pytest.mark.numeric
@pytest.mark.parametrize(("kernel", "window"), [("varlen_attn", None), ("varlen_attn", 9), ("efficient", None)])
def test_a_kernel_gives_the_outputs_and_gradients_of_rows_side_by_side(
    kernels: None, kernel: Any, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]  # as transformers' attention has it
    weights = torch.randn((1, sum(LENGTHS), 4, 16), generator=torch.Generator().manual_seed(1))
    found = []
    for name in (None, kernel):
        monkeypatch.setattr(documents, "kernel_for", lambda *given, name=name, **more: name)
        parts = line(requires_grad=True)
        with documents.documents(Layout(LENGTHS, torch.device("cpu"))):
            made, _ = documents_attention(module, *parts, None, scaling=0.3, sliding_window=window)
        (made * weights).sum().backward()
        found.append([made.detach(), *(part.grad for part in parts)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("kernel", ["varlen_attn", "efficient"])
def test_the_real_operators_take_what_they_are_given(kernel: Any) -> None:
    parts = line(device="meta", dtype=torch.float16)
    edges = Layout(LENGTHS, torch.device("cpu")).edges.to("meta")
    made = attend(kernel, *parts, edges, max(LENGTHS), scale=0.3, window=None)
    assert made.shape == (1, sum(LENGTHS), 4, 16) and made.dtype == torch.float16


def test_edges_are_where_rows_begin_and_end() -> None:
    edges = Layout(LENGTHS, torch.device("cpu")).edges
    assert edges.tolist() == [0, 5, 6, 70, 87] and edges.dtype == torch.int32


@pytest.mark.parametrize("kernel", ["varlen_attn", "efficient"])
def test_a_kernel_that_computes_rightly_is_proved(kernels: None, kernel: Any) -> None:
    for dtype in (torch.float16, torch.float32):
        assert proved(kernel, torch.device("cpu"), WIDE._replace(dtype=dtype))
    with torch.inference_mode():  # in which the first forward pass of a training asks
        assert proved(kernel, torch.device("cpu"), WIDE)


def test_a_kernel_that_mixes_rows_or_cannot_run_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixes(query: Tensor, key: Tensor, value: Tensor, edges: Tensor, *given: Any, **more: Any) -> Tensor:
        whole = torch.stack([edges[0], edges[-1]])
        return stand_in(query, key, value, whole, whole, int(whole[-1]), int(whole[-1]), **more)

    def wrong_gradient(*given: Any, **more: Any) -> Tensor:
        made = stand_in(*given, **more)
        return made.detach() + 0.5 * (made - made.detach())

    def missing(*given: Any, **more: Any) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")

    for kernel in (mixes, wrong_gradient, missing):
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        assert not proved("varlen_attn", torch.device("cpu"), WIDE), kernel.__name__


def test_under_autocast_the_kernel_gets_its_number_format() -> None:
    parts = line()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert varlen.computed(parts[0]).dtype == torch.bfloat16
    assert varlen.computed(parts[0]).dtype == torch.float32
