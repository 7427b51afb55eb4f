"""The attention kernels of this GPU against float32: values, gradients, and their first use in a training."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from gpu.conftest import Gpu
from gpu.substitutes import rows_alone
from peftcli.model import padding_free, varlen_attention
from peftcli.model.padding_free import check_rows, enable_padding_free
from peftcli.model.varlen_attention import Kernel, KernelShape, attend, kernel_problem
from peftcli.train.micro_batch import flatten_rows

pytestmark = pytest.mark.gpu
Record = Callable[[Mapping[str, Any]], None]

PROOF_ROWS = (3, 70, 1, 129)
ROUNDOFFS = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "float32": 2.0**-12}
"""Largest relative error of one rounding; the products of float32 may be those of TF32, which has 11 bits."""
ROUNDINGS = 16
"""Of a value and of a gradient, together. Probabilities, their gradient, the output and what arrives for it are each
rounded once; their errors are independent, so that the root mean square of all is a few units. A token that sees a row
that is not its own differs by about its whole size."""
CASES = {
    "8B": ((32, 8, 128), None),
    "sliding window": ((8, 4, 256), 9),
    "3B": ((24, 8, 128), None),
    "one key for each query": ((16, 16, 64), None),
}
SMALL_CASES = {"8B": ((4, 1, 16), None), "sliding window": ((4, 2, 32), 9), "3B": ((6, 2, 16), None)}


def cases(gpu: Gpu) -> dict[str, tuple[tuple[int, int, int], int | None]]:
    return SMALL_CASES if gpu.rehearsal else CASES


def distances(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Root mean square of the difference, as a share of that of what is wanted."""
    return [
        float((one.float() - other.float()).square().mean().sqrt() / other.float().square().mean().sqrt())
        for one, other in zip(found, wanted, strict=True)
    ]


def compare(kernel: Kernel, gpu: Gpu, shape: KernelShape, lengths: tuple[int, ...], window: int | None) -> list[float]:
    """Distances of the output and of the gradients of query, key and value from those in float32."""
    drawn = torch.Generator().manual_seed(0)
    parts = [
        torch.randn((1, heads, sum(lengths), shape.size), generator=drawn).to(gpu.name, shape.dtype).requires_grad_()
        for heads in (shape.heads, shape.key_heads, shape.key_heads)
    ]
    wide = [part.detach().float().requires_grad_() for part in parts]
    flat = [part[0].transpose(0, 1) for part in wide]
    wanted = rows_alone(flat[0], flat[1], flat[2], list(lengths), scale=None, window=window)
    edges = torch.tensor([0, *lengths]).cumsum(0).to(gpu.name, torch.int32)
    found = attend(kernel, parts[0], parts[1], parts[2], edges, max(lengths), scale=None, window=window)[0]
    weights = torch.randn(wanted.shape, generator=drawn).to(gpu.name)
    torch.autograd.backward((found.float() * weights).sum())
    torch.autograd.backward((wanted * weights).sum())
    gradients = ([part.grad for part in one] for one in (parts, wide))
    of_found, of_wanted = ([one for one in part if one is not None] for part in gradients)
    return distances([found.detach(), *of_found], [wanted.detach(), *of_wanted])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", ["short", "long"])
def test_flash_gives_the_values_and_gradients_of_float32(
    gpu: Gpu, kernels: None, record: Record, case: str, rows: str, dtype: str
) -> None:
    if case not in cases(gpu):
        pytest.skip("one of the cases is enough for a rehearsal")
    if not gpu.rehearsal and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("FlashAttention begins with sm_80")
    (heads, key_heads, size), window = cases(gpu)[case]
    shape = KernelShape(getattr(torch, dtype), heads, key_heads, size)
    lengths = PROOF_ROWS if rows == "short" else gpu.scale.long_rows
    found = compare("flash", gpu, shape, lengths, window)
    record({"output": found[0], "gradients": found[1:]})
    assert max(found) <= ROUNDINGS * ROUNDOFFS[dtype]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("case", ["8B", "3B", "one key for each query"])
@pytest.mark.parametrize("rows", ["short", "long"])
def test_the_kernel_of_a_t4_gives_the_values_and_gradients_of_float32(
    gpu: Gpu, kernels: None, record: Record, case: str, rows: str, dtype: str
) -> None:
    """It runs on any GPU; on one of sm_80 or later peftcli never chooses it."""
    if case not in cases(gpu):
        pytest.skip("one of the cases is enough for a rehearsal")
    (heads, key_heads, size), _ = cases(gpu)[case]
    shape = KernelShape(getattr(torch, dtype), heads, key_heads, size)
    lengths = PROOF_ROWS if rows == "short" else gpu.scale.long_rows
    found = compare("efficient", gpu, shape, lengths, None)
    record({"output": found[0], "gradients": found[1:]})
    assert max(found) <= ROUNDINGS * ROUNDOFFS[dtype]


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_of_this_gpu_passes_its_check(gpu: Gpu, kernels: None, record: Record, case: str) -> None:
    (heads, key_heads, size), window = cases(gpu).get(case, ((4, 4, 16), None))
    kernel: Kernel = "flash" if torch.cuda.get_device_capability() >= (8, 0) else "efficient"
    if kernel == "efficient" and window is not None:
        pytest.skip("this GPU has no kernel for rows with a sliding window")
    found = {}
    for dtype in gpu.dtypes:
        shape = KernelShape(getattr(torch, dtype), heads, key_heads, size)
        found[dtype] = kernel_problem(kernel, torch.device(gpu.name), shape, window=window)
    record({"kernel": kernel, "problems": found})
    assert set(found.values()) == {None}, found


def windowed_model(gpu: Gpu) -> Any:
    """A model whose rows are longer than its window for the first time inside of the test."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=100,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=16,
        attn_implementation="sdpa",
    )
    return MistralForCausalLM(config).to(gpu.name, getattr(torch, gpu.dtypes[0]))


def step(model: Any, gpu: Gpu, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Gradients of the rows in one padding-free batch, by name."""
    model.zero_grad()
    rows = [{name: torch.arange(length) % 100 for name in ("input_ids", "labels")} for length in lengths]
    inputs, layout = flatten_rows([{name: ids.to(gpu.name) for name, ids in row.items()} for row in rows])
    with padding_free.use_layout(layout):
        model(**{**inputs, "use_cache": False}).logits.float().square().mean().backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def test_a_kernel_may_be_used_first_inside_of_a_checkpointed_block(gpu: Gpu, kernels: None, record: Record) -> None:
    model = windowed_model(gpu)
    assert enable_padding_free(model) and check_rows(model).problem is None
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    varlen_attention._chosen.cache_clear()  # as before the first use
    checkpointed = step(model, gpu, (40, 9, 30))
    assert varlen_attention._chosen.cache_info().misses  # it was checked within the block
    model.gradient_checkpointing_disable()
    plain = step(model, gpu, (40, 9, 30))
    used = sorted(padding_free.kernels_used)
    off = distances(list(checkpointed.values()), list(plain.values()))
    record({"used": used, "rejected": dict(varlen_attention.rejected), "largest": max(off)})
    assert not varlen_attention.rejected
    # The same kernels on the same values; sums of atomic additions differ by their order.
    assert max(off) <= ROUNDINGS * ROUNDOFFS[gpu.dtypes[0]]


def test_with_deterministic_algorithms_two_steps_have_the_same_bits(
    gpu: Gpu, kernels: None, deterministic: None, record: Record
) -> None:
    model = windowed_model(gpu)
    assert enable_padding_free(model) and check_rows(model).problem is None
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    first, second = (step(model, gpu, (40, 9, 30)) for _ in range(2))
    unlike = [name for name in first if not torch.equal(first[name], second[name])]
    record({"used": sorted(padding_free.kernels_used), "unlike": unlike})
    assert not unlike


def test_a_model_uses_the_kernel_of_this_gpu(gpu: Gpu, kernels: None) -> None:
    model = windowed_model(gpu)
    assert enable_padding_free(model) and check_rows(model).problem is None
    capability = torch.cuda.get_device_capability()
    assert padding_free.kernels_used == {"flash" if capability >= (8, 0) else "efficient"}
