"""Kernels that read rows by their edges: which GPU has which, what they are given, and the check before their use.

No kernel runs here; a substitute computes what torch's documentation says of it, and the arguments are given to the
real operators on the meta device.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from attention_kernels import flash, rows_alone
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from peftcli.model import padding_free, varlen_attention
from peftcli.model.padding_free import SequenceLayout, check_rows, enable_padding_free, padding_free_attention
from peftcli.model.varlen_attention import KernelShape, attend, kernel_for, kernel_problem, kernels_to_try
from peftcli.train.micro_batch import flatten_rows

LENGTHS = (5, 1, 64, 17)
WIDE = KernelShape(torch.bfloat16, 4, 2, 16)


def efficient(*given: Any, scale: float | None) -> tuple[Tensor, ...]:
    """What the memory-efficient kernel computes, (1, tokens, heads, size), with keys for every query head."""
    query, key, value, bias, edges, edges_of_keys, longest, longest_key, dropout, mask, keeps = given
    assert bias is None and dropout == 0.0 and mask == 1 and keeps and query.shape == key.shape == value.shape
    assert torch.equal(edges, edges_of_keys) and longest == longest_key
    return (rows_alone(query[0], key[0], value[0], edges, longest, scale=scale, behind=-1)[None],)


@pytest.fixture(autouse=True)
def forget_checks() -> Iterator[None]:
    """Let each test check its kernels itself."""
    yield
    varlen_attention._chosen.cache_clear()
    varlen_attention.rejected.clear()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", efficient)


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the CPU for a GPU of sm_80 when kernels are chosen."""
    monkeypatch.setattr(varlen_attention, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)


SMALL = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "sdpa",
}


def small_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).to(torch.bfloat16)


def line(requires_grad: bool = False, **kwargs: Any) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), 16) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=drawn).to(**kwargs).requires_grad_(requires_grad) for shape in shapes]


@pytest.mark.parametrize(
    ("capability", "shape", "windowed", "deterministic", "kernels"),
    [
        ((9, 0), WIDE, True, True, ("flash",)),
        ((9, 0), WIDE, False, False, ("flash", "efficient")),
        ((8, 0), WIDE._replace(dtype=torch.float16), False, True, ("flash",)),
        ((8, 9), WIDE._replace(dtype=torch.float32), False, False, ()),  # FlashAttention computes in 16 bit
        ((8, 0), WIDE._replace(size=12), False, False, ()),
        ((8, 0), WIDE._replace(size=264), False, False, ()),
        ((7, 5), WIDE._replace(dtype=torch.float16), False, False, ("efficient",)),
        ((7, 5), WIDE._replace(dtype=torch.float32), False, False, ("efficient",)),
        ((7, 5), WIDE, False, False, ()),  # no bfloat16 before sm_80
        ((7, 5), WIDE._replace(dtype=torch.float16), True, False, ()),
        ((7, 5), WIDE._replace(dtype=torch.float16), False, True, ()),
        ((6, 0), WIDE._replace(dtype=torch.float16), False, False, ("efficient",)),
    ],
)
def test_each_gpu_has_its_kernels(
    capability: Any, shape: KernelShape, windowed: bool, deterministic: bool, kernels: tuple[str, ...]
) -> None:
    assert kernels_to_try(capability, shape, windowed=windowed, deterministic=deterministic) == kernels


def test_on_a_processor_rows_are_laid_side_by_side() -> None:
    assert kernel_for(*line(), dropout=0.0, window=None, longest=max(LENGTHS)) is None


@pytest.mark.numeric
@pytest.mark.parametrize(("kernel", "window"), [("flash", None), ("flash", 9), ("efficient", None)])
def test_a_kernel_gives_the_outputs_and_gradients_of_rows_side_by_side(
    kernels: None, kernel: Any, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]  # as transformers' attention has it
    weights = torch.randn((1, sum(LENGTHS), 4, 16), generator=torch.Generator().manual_seed(1))
    found = []
    for name in (None, kernel):
        monkeypatch.setattr(padding_free, "kernel_for", lambda *given, name=name, **more: name)
        parts = line(requires_grad=True)
        with padding_free.use_layout(SequenceLayout(LENGTHS, torch.device("cpu"))):
            made, _ = padding_free_attention(module, *parts, None, scaling=0.3, sliding_window=window)
        (made * weights).sum().backward()
        found.append([made.detach(), *(part.grad for part in parts)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("kernel", "window"), [("flash", None), ("flash", 9), ("efficient", None)])
def test_the_real_operators_take_what_they_are_given_and_have_a_derivative(kernel: Any, window: int | None) -> None:
    parts = line(requires_grad=True, device="meta", dtype=torch.float16)
    edges = SequenceLayout(LENGTHS, torch.device("cpu")).edges.to("meta")
    made = attend(kernel, *parts, edges, max(LENGTHS), scale=0.3, window=window)
    assert made.shape == (1, sum(LENGTHS), 4, 16) and made.dtype == torch.float16
    assert made.grad_fn is not None
    if kernel == "flash":  # on the meta device torch gives the backward of the other one its scale twice
        made.sum().backward()
        assert [part.grad is not None and part.grad.shape == part.shape for part in parts] == [True] * 3


def test_edges_are_where_rows_begin_and_end() -> None:
    edges = SequenceLayout(LENGTHS, torch.device("cpu")).edges
    assert edges.tolist() == [0, 5, 6, 70, 87] and edges.dtype == torch.int32


@pytest.mark.parametrize(("kernel", "window"), [("flash", None), ("flash", 9), ("efficient", None)])
def test_a_kernel_that_computes_rightly_passes_its_check(kernels: None, kernel: Any, window: int | None) -> None:
    for dtype in (torch.float16, torch.float32):
        assert kernel_problem(kernel, torch.device("cpu"), WIDE._replace(dtype=dtype), window=window) is None
    with torch.inference_mode():  # in which the first forward pass of a training asks
        assert kernel_problem(kernel, torch.device("cpu"), WIDE, window=window) is None


def mixes_rows(query: Tensor, key: Tensor, value: Tensor, edges: Tensor, *given: Any, **more: Any) -> Any:
    whole = torch.stack([edges[0], edges[-1]])
    return flash(query, key, value, whole, whole, int(whole[-1]), int(whole[-1]), *given[3:], **more)


def ignores_the_window(*given: Any, **more: Any) -> Any:
    return flash(*given[:8], True, *given[9:], **(more | {"window_size_left": -1}))


def has_a_wrong_gradient(*given: Any, **more: Any) -> Any:
    made = flash(*given, **more)[0]
    return (made.detach() + 0.5 * (made - made.detach()),)


def is_not_in_the_wheel(*given: Any, **more: Any) -> Any:
    raise RuntimeError("no kernel image is available for execution on the device")


def takes_other_arguments(query: Tensor, key: Tensor, value: Tensor, edges: Tensor, *, causal: bool) -> Any:
    raise AssertionError("never called")


@pytest.mark.parametrize(
    ("kernel", "window", "problem"),
    [
        (mixes_rows, None, "its outputs differ"),
        (ignores_the_window, 9, "its outputs differ"),
        (has_a_wrong_gradient, None, "its gradients differ"),
        (is_not_in_the_wheel, None, "RuntimeError: no kernel image is available"),
        (takes_other_arguments, None, "TypeError: takes_other_arguments() "),
    ],
)
def test_a_kernel_that_is_wrong_or_cannot_run_says_what_failed(
    kernel: Callable[..., Any], window: int | None, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", kernel)
    found = kernel_problem("flash", torch.device("cpu"), WIDE, window=window)
    assert found is not None and found.startswith(problem)


@pytest.mark.parametrize("kernel", [takes_other_arguments, is_not_in_the_wheel, mixes_rows])
def test_without_a_sound_kernel_rows_are_laid_side_by_side(
    ampere: None, kernel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", kernel)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", is_not_in_the_wheel)
    model = small_llama()
    assert enable_padding_free(model) and check_rows(model).problem is None
    assert padding_free.kernels_used == {"side by side"}
    assert list(varlen_attention.rejected) == ["flash (bfloat16)", "efficient (bfloat16)"]


def test_with_a_sound_kernel_rows_in_a_line_use_it(ampere: None, kernels: None) -> None:
    model = small_llama()
    assert enable_padding_free(model) and check_rows(model).problem is None
    assert padding_free.kernels_used == {"flash"} and not varlen_attention.rejected


def test_where_flash_attention_fails_the_memory_efficient_kernel_is_next(
    ampere: None, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", is_not_in_the_wheel)
    model = small_llama()
    assert enable_padding_free(model) and check_rows(model).problem is None
    assert padding_free.kernels_used == {"efficient"} and list(varlen_attention.rejected) == ["flash (bfloat16)"]


@pytest.mark.parametrize(("failures", "problem"), [(1, None), (2, "OutOfMemoryError: CUDA out of memory. Tried")])
def test_a_check_that_runs_out_of_memory_is_made_once_more_after_memory_was_freed(
    failures: int, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def short_of_memory(*given: Any, **more: Any) -> Any:
        if calls.count("kernel") < failures:
            calls.append("kernel")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return flash(*given, **more)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", short_of_memory)
    monkeypatch.setattr(varlen_attention, "free_memory", lambda: calls.append("freed"))
    found = kernel_problem("flash", torch.device("cpu"), WIDE, window=None)
    assert found == problem if problem is None else str(found).startswith(problem)
    assert calls == ["kernel", "freed"] * failures


def test_each_number_format_has_a_verdict_of_its_own(ampere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_in_float16(query: Tensor, *given: Any, **more: Any) -> Any:
        return flash(query, *given, **more) if query.dtype == torch.float16 else is_not_in_the_wheel()

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", only_in_float16)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", is_not_in_the_wheel)
    used = [
        kernel_for(*line(dtype=dtype), dropout=0.0, window=None, longest=max(LENGTHS))
        for dtype in (torch.bfloat16, torch.float16)
    ]
    assert used == [None, "flash"]


def windowed_mistral() -> PreTrainedModel:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=16)).to(torch.bfloat16)


def long_rows() -> tuple[dict[str, Any], SequenceLayout]:
    """Rows of which some are longer than the window of `windowed_mistral`."""
    return flatten_rows(
        [{"input_ids": torch.arange(length) % 100, "labels": torch.arange(length) % 100} for length in (40, 9, 30)]
    )


def test_a_model_with_a_window_has_its_kernel_checked_with_and_without_one_before_training(
    ampere: None, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int | None] = []
    check = varlen_attention.kernel_problem

    def record(*given: Any, window: int | None) -> str | None:
        checked.append(window)
        return check(*given, window=window)

    monkeypatch.setattr(varlen_attention, "kernel_problem", record)
    model = windowed_mistral()
    assert enable_padding_free(model) and check_rows(model).problem is None
    assert sorted(checked, key=str) == [varlen_attention.PROOF_WINDOW, None]
    inputs, layout = long_rows()
    with padding_free.use_layout(layout):
        model(**{**inputs, "use_cache": False}).logits.float().mean().backward()
    assert len(checked) == 2 and padding_free.kernels_used == {"flash"}


def test_a_kernel_that_fails_with_a_window_still_serves_rows_that_fit_into_it(
    ampere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", ignores_the_window)
    model = windowed_mistral()
    assert enable_padding_free(model) and check_rows(model).problem is None
    assert padding_free.kernels_used == {"flash"}
    assert list(varlen_attention.rejected) == ["flash (bfloat16, sliding window)"]
    inputs, layout = long_rows()
    with padding_free.use_layout(layout):
        model(**{**inputs, "use_cache": False})
    assert padding_free.kernels_used == {"flash", "side by side"}


def test_a_first_check_inside_a_checkpointed_block_leaves_its_tensors_alone(ampere: None, kernels: None) -> None:
    """Nothing was checked before here, as where training computes in another number format than loading did."""
    model = windowed_mistral()
    assert enable_padding_free(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    inputs, layout = long_rows()
    assert varlen_attention._chosen.cache_info().currsize == 0
    with padding_free.use_layout(layout):
        model(**{**inputs, "use_cache": False}).logits.float().mean().backward()
    assert varlen_attention._chosen.cache_info().currsize == 2
    assert padding_free.kernels_used == {"flash"}


def llama_of(layers: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8000,
        initializer_range=0.05,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def test_rounding_of_other_products_is_no_leak_between_rows() -> None:
    """Products of 15 tokens are summed in two halves that are rounded, those of 6 and 9 at once, as GPUs do it."""
    model = llama_of(32)

    def in_halves(module: torch.nn.Module, given: tuple[Tensor, ...], made: Tensor) -> Tensor:
        (x,), weight = given, module.weight
        if x.shape[1] != sum(padding_free.CHECKED_ROWS):
            return made
        assert isinstance(weight, Tensor)
        half = x.shape[-1] // 2
        parts = [
            (x[..., part].float() @ weight[:, part].float().T).bfloat16() for part in (slice(half), slice(half, None))
        ]
        return parts[0] + parts[1]

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(in_halves)
    assert enable_padding_free(model)
    found = check_rows(model)
    assert found.problem is None and found.difference is not None and found.difference > 0.0


def test_a_leak_between_rows_of_a_deep_model_in_16_bits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama_of(32)

    def leaks(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
        return padding_free.sdpa_attention_forward(module, query, key, value, None, **(more | {"is_causal": True}))

    monkeypatch.setattr(padding_free, "padding_free_attention", leaks)
    assert enable_padding_free(model)
    found = check_rows(model)
    assert found.difference is not None and found.difference > 2 * padding_free.ROUNDED_LIMIT
    assert found.problem is not None and "differ from those of the row alone" in found.problem


def test_under_autocast_the_kernel_gets_its_number_format() -> None:
    parts = line()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert varlen_attention.computed(parts[0]).dtype == torch.bfloat16
    assert varlen_attention.computed(parts[0]).dtype == torch.float32
