"""Adapters on fused experts (`target_parameters`) are merged in full."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from peftcli.errors import MachineError
from peftcli.merge import fold as folding
from peftcli.merge.drift import compare, rounding_limit
from peftcli.merge.fold import fold
from peftcli.model.files import loaded_weights

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16},
}
NAMES = {"qwen3_moe": ["gate_proj", "up_proj", "down_proj"], "mixtral": ["w1", "w2", "w3"]}


def build(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=64, **SMALL, **FAMILIES[family]))


def logits(model: Any) -> Tensor:
    rows = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.eval()(input_ids=rows).logits[:, :-1].flatten(0, 1)


def trained(family: str, folder: Path, **arguments: Any) -> Tensor:
    """Save an adapter with random weights; returns the logits of the adapted model."""
    model = get_peft_model(build(family), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **arguments))
    generator = torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.05, generator=generator)
    model.save_pretrained(str(folder))
    return logits(model)


def merged(family: str, folder: Path) -> Any:
    base = build(family)
    weights = dict(fold(base, folder, loaded_weights(base)).tensors())
    whole = build(family)
    whole.load_state_dict(weights)
    return whole


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", "names"])
def test_adapters_on_fused_experts_are_merged_exactly(family: str, targets: str, tmp_path: Path) -> None:
    wanted = targets if targets == "all-linear" else ["q_proj", *NAMES[family]]
    before = trained(family, tmp_path, target_modules=wanted)
    assert (before - logits(build(family))).abs().max() > 1e-3  # the adapter matters
    assert (before - logits(merged(family, tmp_path))).abs().max() <= 1e-5


def test_several_parameters_of_one_module_beside_its_router_are_merged(tmp_path: Path) -> None:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    before = trained("qwen3_moe", tmp_path, target_modules=["q_proj"], target_parameters=parameters)
    assert (before - logits(merged("qwen3_moe", tmp_path))).abs().max() <= 1e-5


def test_a_merge_that_leaves_out_a_wrapped_parameter_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained("mixtral", tmp_path, target_modules=NAMES["mixtral"])
    monkeypatch.setattr(folding, "_nested", lambda layer: iter([layer]))
    with pytest.raises(MachineError, match=r"4 tensors of the adapter did not take part in the merge, such as"):
        merged("mixtral", tmp_path)


def test_the_rounding_limit_of_float32_lets_a_merge_pass_and_catches_a_dropped_delta(tmp_path: Path) -> None:
    before = trained("qwen3_moe", tmp_path, target_modules=NAMES["qwen3_moe"])
    limit = rounding_limit(build("qwen3_moe"), torch.float32, [before])
    assert compare([before], [logits(merged("qwen3_moe", tmp_path))]).mean_abs_logit_difference <= limit
    part = PeftModel.from_pretrained(build("qwen3_moe"), str(tmp_path))
    for name, weight in part.named_parameters():
        if "experts.base_layer.lora_B" in name:  # the wrapper inside, of gate_up_proj
            weight.data.zero_()
    assert compare([before], [logits(part)]).mean_abs_logit_difference > 10 * limit


def test_the_rounding_limit_grows_with_the_dtype_and_the_scale_of_the_logits() -> None:
    model, ones = build("mixtral"), [torch.ones(3, 64)]
    narrow, wide = (rounding_limit(model, dtype, ones) for dtype in (torch.bfloat16, torch.float32))
    assert narrow > 1000 * wide
    assert rounding_limit(model, torch.float32, [2 * one for one in ones]) == pytest.approx(2 * wide)
