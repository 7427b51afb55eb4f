"""TRL's fused loss is checked before it is used; a loss that fails is replaced.

Without a GPU TRL folds its tiles by torch, in functions that stand for the kernels of Triton here.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import trl.kernels.chunked_logprob as kernels
import trl.trainer.utils
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from peftcli.doctor.check import OK, WARN
from peftcli.doctor.gpu import check_trl_loss
from peftcli.model import fused_loss
from peftcli.model.fused_loss import TRL_OUTPUTS, replace_broken_loss, trl_loss_problem

CPU = torch.device("cpu")


def raises(*given: Any, **more: Any) -> None:
    raise RuntimeError("PassManager::run failed")


def has_no_compiler(*given: Any, **more: Any) -> None:
    raise FileNotFoundError("[Errno 2] No such file or directory: 'gcc'")


def loses_a_part(*given: Any, **more: Any) -> None:
    forward(*given, **more)
    given[3].mul_(3)  # sums of exponentials


def turns_gradients(*given: Any, **more: Any) -> None:
    backward(*given, **more)
    given[0].neg_()


forward, backward = kernels._forward_tile, kernels._backward_tile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loss_that_is_right_passes_its_check(dtype: torch.dtype) -> None:
    assert trl_loss_problem(CPU, dtype) is None


@pytest.mark.parametrize(
    ("name", "kernel", "problem"),
    [
        ("_forward_tile", raises, "RuntimeError: PassManager::run failed"),
        ("_forward_tile", has_no_compiler, "FileNotFoundError: "),
        ("_backward_tile", raises, "RuntimeError: PassManager::run failed"),
        ("_forward_tile", loses_a_part, "its log-probabilities differ"),
        ("_backward_tile", turns_gradients, "its gradients differ"),
    ],
)
def test_a_loss_that_is_wrong_or_cannot_run_says_what_failed(
    name: str, kernel: Callable[..., None], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, name, kernel)
    found = trl_loss_problem(CPU, torch.bfloat16)
    assert found is not None and found.startswith(problem)


def test_a_check_that_runs_out_of_memory_is_made_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def short_of_memory(*given: Any, **more: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        forward(*given, **more)

    monkeypatch.setattr(kernels, "_forward_tile", short_of_memory)
    assert trl_loss_problem(CPU, torch.float32) is None


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=100
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    add_fused_lm_head(model, outputs=TRL_OUTPUTS)
    return model


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let TRL ask Triton for its kernels on a CPU, which has none, so that its loss raises there."""
    monkeypatch.setattr(fused_loss, "TRITON_DEVICE", "cpu")
    for module in (kernels, trl.trainer.utils):
        monkeypatch.setattr(module, "_use_triton", lambda device: True)
    monkeypatch.setattr(trl.trainer.utils, "_supports_trl_loss_kernel", lambda *given: True)


@pytest.mark.parametrize("ours", [True, False])
def test_a_loss_whose_kernels_fail_is_replaced(triton: None, ours: bool) -> None:
    model, ids = llama(), torch.arange(3, 15)[None]
    if not ours:
        model.lm_head.weight.requires_grad = True  # which ours has no gradient for
    with pytest.raises((TypeError, RuntimeError)):
        model(input_ids=ids, labels=ids, fused_lm_head=True)
    found = replace_broken_loss(model, CPU, torch.float32)
    assert found is not None and found[1] is ours
    loss = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
    wanted = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(loss, wanted)


def test_a_loss_that_works_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_loss, "TRITON_DEVICE", "cpu")
    model = llama()
    before = model.forward
    assert replace_broken_loss(model, CPU, torch.float32) is None and model.forward == before


def test_doctor_says_what_is_used_where_the_kernels_fail() -> None:
    assert check_trl_loss(0, None).result == OK
    found = check_trl_loss(1, "RuntimeError: PassManager::run failed")
    assert found.result == WARN and "GPU 1 fails (RuntimeError: PassManager::run failed)" in found.found
