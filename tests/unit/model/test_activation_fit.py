"""What adapters of every method keep for the backward pass, foretold from small layers and counted on a whole model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import kept_bytes
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peftcli.adapters.build import peft_config
from peftcli.cli.pipeline import plan_recipe
from peftcli.methods.registry import METHODS
from peftcli.model.activation_fit import fit_activation_memory
from peftcli.model.inspect import inspect_model, trainable_counter
from peftcli.plan.gpus import find_gpu, machine_with
from peftcli.plan.memory.activations import norm_bytes, saved_activation_bytes
from peftcli.plan.memory.forecast import training_setup
from peftcli.plan.planner import make_plan
from peftcli.recipe.load import load_recipe
from peftcli.train.callbacks import cast_inputs
from peftcli.train.precision import upcast_trainable

TOKENS = (2, 64)  # as many as are counted
MORE = {"freeze": "last_layers: 1", "trainable_tokens": "token_indices: [3, 4]"}
LOOSE = {"randlora": 0.2, "full": 0.2, "bottleneck": 0.12}
"""RandLoRA's number of matrices is rounded up, which no polynomial says; full training widens the whole stream."""
LATE = ("shira",)
"""Its mask is a sparse matrix, whose bytes torch does not tell."""
COUNTED = [name for name, method in METHODS.items() if method.counted]
FITTED = [
    name
    for name, method in METHODS.items()
    if method.targets in ("linear", "scaled") and not method.counted and name not in LATE
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    place = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(place)
    return place


def ratio(folder: Path, recipe: Path, method: str, dtype: str) -> float:
    """Bytes that are foretold over bytes that are counted."""
    more = f", {MORE[method]}" if method in MORE else ""
    recipe.write_text(
        f"model: {{name: {folder}, dtype: {dtype}}}\n"
        "dataset: {path: a.csv, text: '{a}', max_length: 128}\n"
        "trainer: {activation_checkpointing: false}\n"
        f"adapter: {{method: {method}{more}}}\n",
        encoding="utf-8",
    )
    config, machine = AutoConfig.from_pretrained(folder), machine_with(find_gpu("a100-80"))
    facts = inspect_model(str(folder), config, "causal-lm")
    counter = trainable_counter(str(folder), config, "causal-lm")
    plan = make_plan(load_recipe(recipe).recipe, machine, facts, counter, fit_activations=fit_activation_memory)
    assert facts.shape is not None
    setting = training_setup(plan, facts.shape, machine, one_row=True)
    setting = replace(setting, on_gpu=False, attention="flash", filling=1.0, norms_fused=False)  # as on this CPU
    tokens = TOKENS[0] * TOKENS[1]
    found = (
        saved_activation_bytes(facts.shape, setting, tokens, TOKENS[1])
        + norm_bytes(facts.shape.final_norm, setting) * tokens
    )
    found += 2 * setting.trainable if setting.autocast else 0
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    adapted = get_peft_model(model, peft_config(plan.adapter, plan.task))
    upcast_trainable(adapted, plan.adapter_dtype)
    cast_inputs(adapted, not setting.autocast)
    adapted.config.use_cache = False
    return found / kept_bytes(adapted.train(), autocast=setting.autocast, padded=False)


@pytest.mark.parametrize("method", [*FITTED, *COUNTED, "ln_tuning", "trainable_tokens"])
def test_what_an_adapter_keeps_is_foretold_under_autocast(folder: Path, tmp_path: Path, method: str) -> None:
    found = ratio(folder, tmp_path / "r.yaml", method, "bfloat16")
    assert found == pytest.approx(1.0, abs=LOOSE.get(method, 0.1))


@pytest.mark.parametrize("method", ["ia3", "oft", "loha", "vera", "randlora", "freeze", "full"])
def test_and_in_float32(folder: Path, tmp_path: Path, method: str) -> None:
    found = ratio(folder, tmp_path / "r.yaml", method, "float32")
    assert found == pytest.approx(1.0, abs=LOOSE.get(method, 0.1))


def test_without_the_fit_methods_that_build_whole_matrices_would_look_like_lora(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.fit_activation_memory", lambda plan: {})
    assert ratio(folder, tmp_path / "r.yaml", "boft", "bfloat16") < 0.5


def test_a_method_that_does_not_run_on_small_layers_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: object, **more: object) -> None:
        raise RuntimeError("not implemented for 'Half'")

    path = tmp_path / "r.yaml"
    path.write_text(
        f"model: {{name: {folder}}}\ndataset: {{path: a.csv, text: '{{a}}'}}\nadapter: {{method: oft}}\n",
        encoding="utf-8",
    )
    assert not plan_recipe(load_recipe(path)).plan.notices
    monkeypatch.setattr("peftcli.model.activation_fit._saved_bytes", fails)
    plan = plan_recipe(load_recipe(path)).plan
    assert plan.activation_fit == {} and any("memory of oft cannot be estimated" in one for one in plan.notices)
