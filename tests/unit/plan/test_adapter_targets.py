"""Adapter targets by PEFT's rules: patterns, fused experts, and towers that rows of text do not pass."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from peftcli.adapters.build import peft_config
from peftcli.errors import RecipeError
from peftcli.model.gradients import missing_gradients
from peftcli.model.inspect import inspect_model, resolve_model, trainable_counter
from peftcli.plan.adapter import resolve_adapter
from peftcli.plan.adapter_targets import find_targets
from peftcli.plan.machine import Machine, ModelFacts
from peftcli.plan.memory.forecast import training_setup
from peftcli.plan.plan import Plan
from peftcli.plan.planner import make_plan
from peftcli.recipe.load import load_recipe
from peftcli.recipe.local_config import check_local_config
from peftcli.recipe.schema import AdapterSection

CPU = Machine("cpu", "a processor", None, native_bf16=False, arch_list=(), memory_bytes=16 * 2**30)
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen3_moe": {**SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "qwen2_moe": {
        **SMALL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "glm4_moe": {
        **SMALL,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3": {
        "text_config": {**SMALL, "sliding_window": 16},
        "vision_config": {**VISION, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
}


def config_of(kind: str) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.for_model(kind, **CONFIGS[kind])
    return config


def facts_of(kind: str) -> ModelFacts:
    return inspect_model("a model", config_of(kind), needs_weights=False)


def resolved(facts: ModelFacts, **section: Any) -> AdapterSection:
    return resolve_adapter(AdapterSection.model_validate(section), facts)[0]


def plan_of(kind: str, tmp_path: Path, adapter: str, more: str = "") -> Plan:
    file = tmp_path / "r.yaml"
    dataset = "{path: a.csv, text: '{a}', max_length: 64}"
    file.write_text(f"model: {{name: org/model}}\ndataset: {dataset}\nadapter: {adapter}\n{more}", encoding="utf-8")
    config = config_of(kind)
    return make_plan(load_recipe(file).recipe, CPU, facts_of(kind), trainable_counter("a model", config, "causal-lm"))


def decisions(plan: Plan) -> Mapping[str, str]:
    return {one.key: f"{one.value}; {one.reason}" for one in plan.decisions}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"rank_pattern": {"qproj": 64}}, r"no trained module .* matches adapter.rank_pattern \[qproj\]; .*q_proj"),
        ({"alpha_pattern": {"k_proj": 64}}, r"matches adapter.alpha_pattern \[k_proj\]; nearest names: q_proj"),
        ({"exclude_modules": ["qproj"]}, r"matches adapter.exclude_modules \[qproj\]; nearest names: q_proj"),
        ({"exclude_modules": [r"q_proj", "v_proj"]}, r"exclude_modules leaves no target"),
        ({"target_parameters": ["q_proj.weigth"]}, r"matches adapter.target_parameters .*q_proj.weight"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(section: dict[str, Any], words: str) -> None:
    facts = facts_of("llama")
    adapter = resolved(facts, target_modules=["q_proj", "v_proj"], arguments=section)
    with pytest.raises(RecipeError, match=words):
        find_targets(adapter, facts)


@pytest.mark.parametrize("key", ["q_proj", "layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", r".*\.q_.*"])
def test_a_pattern_that_peft_matches_is_accepted(key: str) -> None:
    facts = facts_of("llama")
    adapter = resolved(facts, target_modules=["q_proj"], arguments={"rank_pattern": {key: 64}})
    assert find_targets(adapter, facts).counts == {"q_proj": 2}


def test_a_regular_expression_selects_by_full_name_and_excluded_modules_are_shown(tmp_path: Path) -> None:
    plan = plan_of("llama", tmp_path, r"{target_modules: '.*layers\.1\..*_proj', exclude_modules: [o_proj]}")
    assert sum(plan.targets.values()) == 6
    assert "o_proj x 1" in decisions(plan)["excluded"]
    with pytest.raises(RecipeError, match=r"the regular expression \.\*_prj matches the full name of no module"):
        plan_of("llama", tmp_path, "{target_modules: .*_prj}")
    with pytest.raises(RecipeError, match=r"target_modules .*is not a regular expression"):
        plan_of("llama", tmp_path, "{target_modules: '(q_proj'}")
    with pytest.raises(RecipeError, match=r"rank_pattern .*\^q_proj matches no module.*write q_proj"):
        plan_of("llama", tmp_path, "{target_modules: [q_proj], rank_pattern: {^q_proj: 8}}")


@pytest.mark.parametrize("targets", ["all-linear", "[q_proj, gate_proj, up_proj, down_proj]"])
def test_the_usual_names_train_fused_experts_and_the_plan_says_so(targets: str, tmp_path: Path) -> None:
    plan = plan_of("qwen3_moe", tmp_path, f"{{target_modules: {targets}}}", "quantization: {bits: 4}")
    assert plan.targets["mlp.experts.gate_up_proj"] == plan.targets["mlp.experts.down_proj"] == 2
    shown = decisions(plan)["experts"]
    assert shown.startswith("trained, ") and "does not quantize fused experts" in shown


@pytest.mark.parametrize(
    ("kind", "adapter", "words"),
    [
        ("qwen3_moe", "{target_modules: [q_proj]}", "frozen, .*set adapter.target_parameters: .*gate_up_proj"),
        ("gpt_oss", "{target_modules: all-linear}", "frozen, .*set adapter.target_parameters: .*gate_up_proj"),
        ("qwen3_moe", "{method: loha}", "frozen, .*loha does not adapt parameters"),
    ],
)
def test_experts_that_are_frozen_are_said_to_be(kind: str, adapter: str, words: str, tmp_path: Path) -> None:
    assert re.match(words, decisions(plan_of(kind, tmp_path, adapter))["experts"])


def test_the_counts_of_a_plan_are_those_of_peft(tmp_path: Path) -> None:
    for kind in CONFIGS:
        plan = plan_of(kind, tmp_path, "{target_modules: all-linear, r: 2}")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_of(kind))
        tuner = get_peft_model(model, peft_config(plan.adapter, "causal-lm")).base_model
        targeted = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
        assert len(targeted) == sum(plan.targets.values()), kind


def test_modules_that_peft_mistakes_for_experts_are_said_to_be_frozen(tmp_path: Path) -> None:
    shown = decisions(plan_of("glm4_moe", tmp_path, "{target_modules: all-linear}"))
    # The dense first block and the shared expert of the second one.
    assert "gate_proj x 2, up_proj x 2, down_proj x 2" in shown["frozen beside experts"]


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ("{dropout: 0.1}", "adapter.dropout excludes adapters on parameters"),
        ("{use_dora: true}", "adapter.use_dora excludes adapters on parameters"),
        ("{init_lora_weights: pissa}", "adapter.init_lora_weights excludes adapters on parameters"),
        ("{method: loha, target_modules: [gate_proj]}", "its experts are fused parameters: .*target_parameters"),
    ],
)
def test_what_adapters_on_experts_do_not_support_is_refused(adapter: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        plan_of("qwen3_moe", tmp_path, adapter)


def trained_once(kind: str, adapter: AdapterSection) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_config(config_of(kind)), peft_config(adapter, "causal-lm"))
    ids = torch.randint(0, 64, (2, 8))
    model.train()(input_ids=ids, labels=ids, token_type_ids=torch.zeros_like(ids)).loss.backward()
    return model


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("method", ["lora", "vera"])
def test_a_multimodal_base_gets_no_adapter_without_a_gradient(targets: Any, method: str) -> None:
    facts = facts_of("gemma3")
    assert facts.towers == ("model.vision_tower", "model.multi_modal_projector")
    section = {"method": method, "target_modules": targets} | ({"r": 2} if method == "lora" else {})
    assert missing_gradients(trained_once("gemma3", resolved(facts, **section))) is None
    everywhere = AdapterSection.model_validate(section)
    if targets == "all-linear" and method == "lora":
        note = missing_gradients(trained_once("gemma3", everywhere))
        assert note is not None and "vision_tower" in note and "trained tensors had no gradient" in note


def test_targets_that_are_all_in_a_tower_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"all of its modules are in model.vision_tower"):
        resolved(facts_of("gemma3"), target_modules=["fc1"])


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder_is_refused_by_validate_and_by_what_loads_it(kind: str, tmp_path: Path) -> None:
    AutoConfig.for_model(kind).save_pretrained(str(tmp_path / kind))
    file = tmp_path / "r.yaml"
    file.write_text(f"model: {{name: ./{kind}}}\ndataset: {{path: a.csv, text: '{{a}}'}}\n", encoding="utf-8")
    recipe = load_recipe(file).recipe
    with pytest.raises(RecipeError, match=f"{kind} is an encoder-decoder model.*use a decoder-only model"):
        check_local_config(recipe)
    with pytest.raises(RecipeError, match=f"{kind} is an encoder-decoder model"):
        resolve_model(recipe.model, smoke=False)
    labelled = recipe.model.model_copy(update={"task": "sequence-classification"})
    check_local_config(recipe.model_copy(update={"model": labelled}))


def test_the_forecast_counts_the_copies_of_experts_only_where_they_have_adapters(tmp_path: Path) -> None:
    shape = facts_of("qwen3_moe").shape
    assert shape is not None
    trained, frozen = (
        training_setup(plan_of("qwen3_moe", tmp_path, targets), shape, CPU, one_row=True)
        for targets in ("{target_modules: all-linear}", "{target_modules: [q_proj], trainable_token_indices: [1, 2]}")
    )
    assert trained.expert_adapters and not frozen.expert_adapters
    assert frozen.head_trained and not trained.head_trained
