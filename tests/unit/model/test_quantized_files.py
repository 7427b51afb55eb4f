"""Bases whose files are already quantized are dequantized while loading, or refused with the reason."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import base_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from peftcli.errors import RecipeError
from peftcli.model.inspect import inspect_model, load_config
from peftcli.model.load import load_base
from peftcli.recipe.load import load_recipe
from peftcli.recipe.local_config import check_local_config

SMALL = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of E2M1. Source: OCP Microscaling Formats v1.0, table 5."""


def saved(folder: Path, kind: str, **settings: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    return load_file(folder / "model.safetensors")


def write(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}), encoding="utf-8")


def test_an_fp8_base_is_loaded_with_dequantized_weights(tmp_path: Path) -> None:
    tensors = saved(tmp_path, "llama", hidden_size=128, intermediate_size=128)
    expected = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().max() / torch.finfo(torch.float8_e4m3fn).max
        codes = (tensors[name] / scale).to(torch.float8_e4m3fn)
        expected[name] = codes.float() * scale
        blocks = [-(-size // 128) for size in codes.shape]
        tensors |= {name: codes, f"{name}_scale_inv": scale.expand(blocks).contiguous().float()}
    write(tmp_path, tensors, FP8)
    facts = inspect_model(str(tmp_path), load_config(str(tmp_path), None))
    assert facts.stored == "FP8"
    model = load_base(base_of(tmp_path, None))
    state = model.state_dict()
    for name, weight in expected.items():
        assert torch.allclose(state[name].float(), weight, rtol=2**-8, atol=0), name  # at most one rounding to bfloat16
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert getattr(model.config, "quantization_config", None) is None


def test_an_mxfp4_base_is_loaded_with_dequantized_experts(tmp_path: Path) -> None:
    tensors = saved(tmp_path, "gpt_oss", hidden_size=64, intermediate_size=64, head_dim=16, num_local_experts=2)
    prefix = "model.layers.0.mlp.experts."
    generator = torch.Generator().manual_seed(1)
    expected = {}
    for leaf, rows in (("gate_up_proj", 128), ("down_proj", 64)):
        del tensors[prefix + leaf]
        codes = torch.randint(0, 16, (2, rows, 64), generator=generator)
        values = torch.tensor(FP4_VALUES)[codes % 8] * torch.where(codes >= 8, -1.0, 1.0)
        exponent = torch.randint(120, 124, (2, rows, 2), generator=generator)
        expected[leaf] = (values.view(2, rows, 2, 32) * 2.0 ** (exponent[..., None] - 127)).view(2, rows, 64)
        packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8).view(2, rows, 2, 16)
        tensors |= {f"{prefix}{leaf}_blocks": packed, f"{prefix}{leaf}_scales": exponent.to(torch.uint8)}
    write(tmp_path, tensors, {"quant_method": "mxfp4"})
    assert inspect_model(str(tmp_path), load_config(str(tmp_path), None)).stored == "MXFP4"
    state = load_base(replace(base_of(tmp_path, None), attention="eager")).state_dict()
    for leaf, weight in expected.items():  # gpt-oss stores (experts, inputs, outputs)
        assert torch.equal(state[prefix + leaf].float(), weight.transpose(1, 2)), leaf


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_a_base_that_transformers_cannot_dequantize_is_refused(method: str, tmp_path: Path) -> None:
    write(tmp_path, saved(tmp_path, "llama", hidden_size=32, intermediate_size=32), {"quant_method": method, "bits": 4})
    config = AutoConfig.from_pretrained(str(tmp_path))
    with pytest.raises(
        RecipeError, match=rf"\({method}\), and transformers cannot dequantize .*only MXFP4 and FP8.*use"
    ):
        inspect_model(str(tmp_path), config)
    file = tmp_path / "r.yaml"
    file.write_text(f"model: {{name: {tmp_path}}}\ndataset: {{path: a.csv, text: '{{a}}'}}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="transformers cannot dequantize"):
        check_local_config(load_recipe(file).recipe)
