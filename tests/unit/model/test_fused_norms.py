"""RMSNorm by torch's operator: the values and gradients of the model's own, or the model's own."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from peftcli.model.fused_norms import disable_fused_norms, enable_fused_norms, norm_problem
from peftcli.train.callbacks import ForwardCallback

pytestmark = pytest.mark.skipif(torch.__version__ < (2, 9), reason="the operator takes these arguments from 2.9 on")

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
REPLACED = {
    "llama": (LlamaConfig(**SMALL), 5),
    "mistral": (MistralConfig(**SMALL), 5),
    "qwen2": (Qwen2Config(**SMALL), 5),
    "qwen3": (Qwen3Config(**SMALL, head_dim=16), 9),  # and one for queries and keys each
}
IDS = torch.arange(34).reshape(2, 17) * 5 % 200


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model.train()


def learned(model: Any) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.numeric
@pytest.mark.parametrize("family", REPLACED)
def test_a_model_with_fused_norms_gives_its_own_values_and_gradients(family: str) -> None:
    config, norms = REPLACED[family]
    model = model_of(config)
    expected, gradients = learned(model)
    found = enable_fused_norms(model, CPU)
    assert (found.modules, found.left) == (norms, {})
    values, ours = learned(model)
    # In float32 both round sums over 32 numbers in another order: 1e-6 a norm, and there are at most nine in a row.
    assert torch.allclose(values, expected, atol=1e-5)
    for one, other in zip(ours, gradients, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()
    disable_fused_norms(model)
    assert torch.equal(learned(model)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("epsilon", [1e-5, 1e-6, 1e-12])
def test_the_check_accepts_the_norm_of_llama_in_every_format(dtype: torch.dtype, epsilon: float) -> None:
    assert norm_problem(LlamaRMSNorm(128, epsilon), dtype, CPU) is None


class OneMoreRMSNorm(LlamaRMSNorm):  # type: ignore[misc]  # transformers' modules are untyped
    """Gemma's: the weight is what is added to 1."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        own = hidden_states.float()
        own = own * torch.rsqrt(own.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (own * (1.0 + self.weight.float())).to(hidden_states.dtype)


class FixedEpsilonRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    """Its epsilon is not the one that it names."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        own = hidden_states.float()
        own = own * torch.rsqrt(own.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * own.to(hidden_states.dtype)


class CenteredRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    """A LayerNorm by another name."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))  # type: ignore[no-any-return]


class DetachedRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    """The values are the same and the gradients are not."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        own = hidden_states.float()
        scale = torch.rsqrt(own.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach()
        return self.weight * (own * scale).to(hidden_states.dtype)


class WiderRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    """Its output is float32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).float()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (OneMoreRMSNorm, "values"),
        (FixedEpsilonRMSNorm, "values"),
        (CenteredRMSNorm, "values"),
        (WiderRMSNorm, "values"),
        (DetachedRMSNorm, "gradients"),
        (Qwen3NextRMSNormGated, "missing 1 required positional argument: 'gate'"),
    ],
)
def test_the_check_refuses_what_computes_something_else(kind: Any, problem: str) -> None:
    found = norm_problem(kind(128, 1e-6), torch.bfloat16, CPU)
    assert found is not None and problem in found


def test_a_weight_of_ones_does_not_hide_another_formula() -> None:
    module = OneMoreRMSNorm(128)
    nn.init.zeros_(module.weight)  # as Gemma begins: its norm multiplies by one
    assert norm_problem(module, torch.float32, CPU) is not None
    assert not module.weight.any()  # the check leaves the module as it was


def test_beside_narrow_inputs_a_wider_weight_computes_what_the_module_computes() -> None:
    module = LlamaRMSNorm(32)
    nn.init.uniform_(module.weight, 0.5, 1.5)
    inputs = torch.randn(3, 32).bfloat16()
    expected = module(inputs)
    holder = nn.ModuleList([module])
    assert enable_fused_norms(holder, CPU).modules == 1
    assert expected.dtype == torch.float32 and torch.equal(module(inputs), expected)
    assert not torch.equal(module(inputs.float()).bfloat16(), expected)  # nor is it what the operator computes


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_training_replaces_the_norms_and_gives_them_back(family: str) -> None:
    config = REPLACED["llama"][0] if family == "llama" else GemmaConfig(**SMALL, head_dim=8)
    model, said = model_of(config), []
    callback = ForwardCallback(None, frozenset({"fused_norms"}), said.append)
    norms = [module for module in model.modules() if "RMSNorm" in type(module).__name__]
    arguments: Any = SimpleNamespace(bf16=False, fp16=False, device=CPU)
    callback.on_train_begin(arguments, None, None, model=model)  # type: ignore[arg-type]  # it reads neither
    used = [module for module in norms if "forward" in module.__dict__]
    assert used == (norms if family == "llama" else [])
    assert callback.optimizations == ({"fused_norms"} if family == "llama" else set())
    assert [("GemmaRMSNorm is left as it is" in line) for line in said] == ([] if family == "llama" else [True])
    callback.on_train_end(arguments, None, None, model=model)  # type: ignore[arg-type]
    assert not any("forward" in module.__dict__ for module in norms)


def test_autocast_on_cuda_leaves_the_operator_in_16_bit() -> None:
    known = torch._C._dispatch_has_kernel_for_dispatch_key
    assert not known("aten::_fused_rms_norm", "AutocastCUDA")
