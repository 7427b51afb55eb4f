"""Liger's kernels for layers: used where they compute what the model does, and put back afterwards.

liger-kernel needs a GPU, so a package of its shape stands in for it, which replaces the same functions and methods.
"""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig
from transformers.models.llama import modeling_llama

from peftcli.model.fused_norms import enable_fused_norms
from peftcli.model.liger_layers import PATCHES, enable_liger_layers
from peftcli.train.callbacks import ForwardCallback

SMALL = {
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
IDS = torch.arange(34).reshape(2, 17) * 5 % 200


class Kernels:
    """What the package computes by; `scale` other than 1 is a broken kernel."""

    def __init__(self) -> None:
        self.scale = 1.0
        self.asked: list[dict[str, Any]] = []
        self.calls = 0
        self.replaces_loss = False

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        self.calls += 1
        cos, sin = (part.unsqueeze(unsqueeze_dim) for part in (cos, sin))
        half = q.shape[-1] // 2
        turned = [torch.cat([-part[..., half:], part[..., :half]], -1) for part in (q, k)]
        return q * cos + turned[0] * sin * self.scale, k * cos + turned[1] * sin

    def mlp(self, module: Any, x: Tensor) -> Tensor:
        self.calls += 1
        gate = module.gate_proj(x)
        return module.down_proj(gate * torch.sigmoid(gate) * module.up_proj(x) * self.scale)  # type: ignore[no-any-return]

    def apply_to_llama(
        self,
        rope: bool = True,
        cross_entropy: bool = False,
        fused_linear_cross_entropy: bool = True,
        rms_norm: bool = True,
        swiglu: bool = True,
        model: Any = None,
    ) -> None:
        assert rope and swiglu and not cross_entropy
        self.asked.append({"loss": fused_linear_cross_entropy, "norms": rms_norm})
        vars(modeling_llama)["apply_rotary_pos_emb"] = self.rotary
        if self.replaces_loss:
            model.forward = lambda *given, **named: None
        for layer in model.model.layers:
            layer.mlp.forward = lambda x, module=layer.mlp: self.mlp(module, x)
            if rms_norm:
                layer.input_layernorm.offset = 0.0


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """liger-kernel as `_apply_liger_kernel_to_instance` of its version 0.8 works."""
    made, patches = Kernels(), ModuleType(PATCHES)
    table = {"llama": made.apply_to_llama}

    def apply_to_instance(model: Any, **given: Any) -> None:
        known = ("rope", "cross_entropy", "fused_linear_cross_entropy", "rms_norm", "swiglu")
        table[model.config.model_type](model=model, **{name: given[name] for name in known})

    vars(patches).update(MODEL_TYPE_TO_APPLY_LIGER_FN=table, _apply_liger_kernel_to_instance=apply_to_instance)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, PATCHES, patches)
    return made


def adapted(config: Any) -> Any:
    torch.manual_seed(0)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_config(config), adapter)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def learned(model: Any) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    found = model(input_ids=IDS, labels=IDS, use_cache=False)
    found.loss.backward()
    return found.logits.detach(), [part.grad.clone() for part in model.parameters() if part.grad is not None]


def names_of(model: Any) -> list[set[str]]:
    return [set(module.__dict__) for module in model.modules()]


@pytest.mark.numeric
@pytest.mark.parametrize("norms", [False, True])
def test_the_layers_are_replaced_give_the_same_and_are_put_back(norms: bool, kernels: Kernels) -> None:
    model, rotary = adapted(LlamaConfig(**SMALL)), modeling_llama.apply_rotary_pos_emb
    names = names_of(model)
    expected, gradients = learned(model)
    layers = enable_liger_layers(model.get_base_model(), torch.float32, norms=norms)
    assert layers.problem is None and kernels.asked == [{"loss": False, "norms": norms}]
    assert model.training and all(part.grad is not None for part in model.parameters() if part.requires_grad)
    before = kernels.calls
    found, ours = learned(model)
    assert kernels.calls == before + 4  # two layers, each with a rotation and a gate
    # Two layers in float32, a product or two in another order.
    assert torch.allclose(found, expected, atol=1e-5)
    for one, other in zip(ours, gradients, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()
    layers.restore()
    assert modeling_llama.apply_rotary_pos_emb is rotary and names_of(model) == names
    assert torch.equal(learned(model)[0], expected)


@pytest.mark.parametrize("breaks", ["scale", "replaces_loss", "mlp"])
def test_kernels_that_fail_the_comparison_are_put_back(breaks: str, kernels: Kernels) -> None:
    def fails(*given: Any) -> Tensor:
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    setattr(kernels, breaks, {"scale": 1.5, "replaces_loss": True, "mlp": fails}[breaks])
    model, rotary = adapted(LlamaConfig(**SMALL)), modeling_llama.apply_rotary_pos_emb
    expected, _ = learned(model)
    layers = enable_liger_layers(model.get_base_model(), torch.float32, norms=False)
    said = {"scale": "its logits differ", "replaces_loss": "replaces its loss", "mlp": "RuntimeError: 0 active drivers"}
    assert layers.problem is not None and said[breaks] in layers.problem
    assert modeling_llama.apply_rotary_pos_emb is rotary and torch.equal(learned(model)[0], expected)


def test_a_model_that_liger_does_not_know_is_left_as_it_is(kernels: Kernels) -> None:
    layers = enable_liger_layers(adapted(PhiConfig(**SMALL)).get_base_model(), torch.float32, norms=True)
    assert layers.problem == "liger-kernel has none for the model type phi" and not kernels.asked


@pytest.mark.parametrize(("scale", "used"), [(1.0, {"fused_norms", "liger_layers"}), (2.0, {"fused_norms"})])
def test_training_leaves_the_norms_to_torch_where_it_has_a_kernel_and_says_what_fails(
    scale: float, used: set[str], kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels.scale = scale
    model, said = adapted(LlamaConfig(**SMALL)), []
    note: Callable[[str], None] = said.append
    if not enable_fused_norms(adapted(LlamaConfig(**SMALL)), torch.device("cpu")).modules:
        used = used - {"fused_norms"}  # torch before 2.9
    callback = ForwardCallback(None, frozenset({"fused_norms", "liger_layers"}), note)
    arguments: Any = SimpleNamespace(bf16=False, fp16=False, device=torch.device("cpu"))
    callback.on_train_begin(arguments, None, None, model=model)  # type: ignore[arg-type]  # it reads neither
    assert callback.optimizations == used
    assert kernels.asked == [{"loss": False, "norms": "fused_norms" not in used}]
    assert any("Liger's layer kernels are not used: with Liger's kernels its logits differ" in one for one in said) == (
        scale != 1.0
    )
    callback.on_train_end(arguments, None, None, model=model)  # type: ignore[arg-type]
    assert not any("forward" in part.__dict__ for part in model.modules())
