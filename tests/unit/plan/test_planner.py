"""Plans: every auto decided from the machine, and what cannot be done refused with its reason."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peftcli.errors import MachineError, RecipeError
from peftcli.plan.choices import check_wheel, processes_that_share
from peftcli.plan.machine import Machine, ModelFacts
from peftcli.plan.memory.model_shape import Experts, ModelDimensions, Norm
from peftcli.plan.optimizer import Trained
from peftcli.plan.plan import Plan
from peftcli.plan.planner import make_plan
from peftcli.plan.smoke import check_schedules, smoke_notices, smoke_recipe
from peftcli.plan.targets import match_targets
from peftcli.recipe.load import load_recipe
from peftcli.recipe.schema import Recipe

CPU = Machine("cpu", "a processor", None, native_bf16=False, arch_list=(), memory_bytes=16 * 2**30)
T4 = Machine(
    "cuda", "Tesla T4", (7, 5), native_bf16=False, arch_list=("sm_75", "sm_80", "sm_90"), memory_bytes=15 * 2**30
)
L4 = replace(T4, name="NVIDIA L4", capability=(8, 9), native_bf16=True)
P100 = replace(T4, name="Tesla P100", capability=(6, 0))
LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
LINEAR = tuple(f"model.layers.{layer}.{leaf}" for layer in range(2) for leaf in LEAVES)
FACTS = ModelFacts("m", "LlamaForCausalLM", 7_000_000, (*LINEAR, "model.norm", "lm_head"), LINEAR, "lm_head", 2048)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], Recipe]:
    """A function that loads a recipe with some lines added."""

    def load(more: str = "") -> Recipe:
        path = tmp_path / "r.yaml"
        dataset = "" if "dataset:" in more else "dataset: {path: a.csv, text: '{a}'}\n"
        model = "" if "model:" in more else "model: {name: org/model}\n"
        path.write_text(model + dataset + more, encoding="utf-8")
        return load_recipe(path).recipe

    return load


def plan_on(machine: Machine, recipe: Recipe, facts: ModelFacts = FACTS) -> Plan:
    return make_plan(recipe, machine, facts, lambda adapter: Trained(1000))


@pytest.mark.parametrize(
    ("machine", "dtype", "fp16", "bf16"),
    [(CPU, "float32", False, False), (T4, "float16", True, False), (L4, "bfloat16", False, True)],
)
def test_the_dtype_follows_what_the_card_computes_itself(
    recipe: Any, machine: Machine, dtype: str, fp16: bool, bf16: bool
) -> None:
    plan = plan_on(machine, recipe("quantization: {bits: 4}"))
    assert plan.base.dtype == dtype
    assert plan.base.quantization is not None and plan.base.quantization["compute_dtype"] == dtype
    assert (plan.trainer["fp16"], plan.trainer["bf16"]) == (fp16, bf16)
    assert plan.adapter_dtype == "float32"
    assert plan.trainer["use_cpu"] is (machine is CPU)


@pytest.mark.parametrize("architecture", ["Gemma2ForCausalLM", "Gemma3ForCausalLM", "T5ForTokenClassification"])
def test_a_model_that_overflows_float16_is_computed_in_float32_where_there_is_no_bfloat16(
    recipe: Any, architecture: str
) -> None:
    facts = replace(FACTS, architecture=architecture)
    plan = plan_on(T4, recipe("quantization: {bits: 4}"), facts)
    assert plan.base.dtype == "float32" and not plan.trainer["fp16"] and not plan.trainer["bf16"]
    assert plan.base.quantization is not None and plan.base.quantization["compute_dtype"] == "float32"
    why = next(one.reason for one in plan.decisions if one.key == "model.dtype")
    assert "no native bfloat16" in why and f"{architecture} overflows float16" in why
    assert plan_on(L4, recipe(), facts).base.dtype == "bfloat16"
    assert plan_on(T4, recipe("model: {name: m, dtype: float16}"), facts).base.dtype == "float16"


def test_nothing_in_a_plan_is_auto(recipe: Any) -> None:
    for machine in (CPU, T4, L4):
        plan = plan_on(machine, recipe("quantization: {bits: 4}"))
        assert "auto" not in {plan.base.dtype, plan.base.attention, plan.base.device}
        assert all(decision.value != "auto" and decision.reason for decision in plan.decisions)


def test_bfloat16_on_a_card_that_emulates_it_is_refused(recipe: Any) -> None:
    with pytest.raises(
        MachineError, match=r"needs bfloat16, but Tesla T4 \(sm_75\) does not support it natively.*float16"
    ):
        plan_on(T4, recipe("model: {name: m, dtype: bfloat16}"))


@pytest.mark.parametrize("model", ["{name: m, dtype: float16}", "{name: m, attention: flash_attention_2}"])
def test_what_needs_a_gpu_is_refused_without_one(recipe: Any, model: str) -> None:
    with pytest.raises(MachineError, match="GPU"):
        plan_on(CPU, recipe(f"model: {model}"))


def test_attention_follows_what_the_architecture_supports(recipe: Any) -> None:
    without = replace(FACTS, sdpa=False)
    assert plan_on(CPU, recipe(), without).base.attention == "eager"
    with pytest.raises(MachineError, match="sdpa is not supported by LlamaForCausalLM"):
        plan_on(CPU, recipe("model: {name: m, attention: sdpa}"), without)


def test_flash_attention_is_refused_on_old_cards_and_where_it_is_missing(recipe: Any) -> None:
    asked = recipe("model: {name: m, attention: flash_attention_2}")
    with pytest.raises(MachineError, match="sm_80 or later"):
        plan_on(T4, asked)
    with pytest.raises(MachineError, match="not installed"):
        plan_on(L4, asked)
    assert plan_on(replace(L4, flash_attention=("flash_attention_2",)), asked).base.attention == "flash_attention_2"


def test_a_wheel_without_kernels_for_the_card_is_refused() -> None:
    with pytest.raises(MachineError, match=r"no kernels for Tesla P100 \(sm_60\)"):
        check_wheel(P100)
    check_wheel(L4)  # sm_89 runs what was built for sm_80
    check_wheel(replace(P100, arch_list=("sm_75", "compute_60")))
    check_wheel(replace(T4, capability=(9, 0), arch_list=("sm_90a",)))
    check_wheel(CPU)


def test_use_cpu_is_obeyed_on_a_gpu_machine(recipe: Any) -> None:
    plan = plan_on(L4, recipe("trainer: {use_cpu: true}"))
    assert (plan.base.device, plan.base.dtype) == ("cpu", "float32")


def test_a_target_that_matches_nothing_is_an_error_even_beside_one_that_does() -> None:
    assert match_targets(["q_proj", "self_attn.k_proj"], FACTS) == {"q_proj": 2, "self_attn.k_proj": 2}
    with pytest.raises(RecipeError, match=r"matches adapter.target_modules \[q_prj\]; nearest names: .*q_proj"):
        match_targets(["q_prj", "v_proj"], FACTS)


def test_all_linear_leaves_the_output_layer_out() -> None:
    assert match_targets("all-linear", FACTS) == dict.fromkeys([leaf.split(".")[1] for leaf in LEAVES], 2)


def test_an_adapter_on_the_output_layer_is_refused(recipe: Any) -> None:
    with pytest.raises(RecipeError, match="contains the output layer"):
        plan_on(CPU, recipe("adapter: {target_modules: [q_proj, lm_head]}"))
    with pytest.raises(RecipeError, match=r"modules_to_save \[lm_hed\]; nearest names: lm_head"):
        plan_on(CPU, recipe("adapter: {modules_to_save: [lm_hed]}"))


def test_weights_that_cannot_fit_are_refused_before_they_load(recipe: Any) -> None:
    large = replace(FACTS, parameters=70_000_000_000)
    with pytest.raises(MachineError, match=r"need .* GiB, more than the 15.0 GiB.*add `quantization"):
        plan_on(T4, recipe(), large)
    with pytest.raises(MachineError, match="use a larger GPU"):
        plan_on(T4, recipe("quantization: {bits: 4}"), large)
    with pytest.raises(MachineError, match=r"need 65.2 GiB.* set quantization.bits: 4, or"):
        plan_on(T4, recipe("quantization: {bits: 8}"), large)
    # Fewer bits than a method works on are no mend.
    with pytest.raises(MachineError, match=r"add `quantization: \{bits: 8\}`, or"):
        plan_on(T4, recipe("adapter: {method: loha}"), large)
    for more in ("quantization: {bits: 8}\nadapter: {method: loha}", "adapter: {method: hra}"):
        with pytest.raises(MachineError, match="use a larger GPU"):
            plan_on(T4, recipe(more), large)


def test_a_row_longer_than_the_model_is_refused_and_a_default_is_lowered(recipe: Any) -> None:
    with pytest.raises(RecipeError, match="supports at most 2048 tokens"):
        plan_on(CPU, recipe("dataset: {path: a.csv, text: '{a}', max_length: 4096}"))
    assert plan_on(CPU, recipe(), replace(FACTS, positions=512)).labels.max_length == 512


def test_several_cards_without_a_launcher_are_told(recipe: Any) -> None:
    plan = plan_on(replace(T4, count=2), recipe())
    assert any("2 GPUs are available, but one is used" in notice for notice in plan.notices)


@pytest.mark.parametrize(
    ("rows", "processes", "shared"),
    [
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}, 2, (4, 2, 2)),
        ({"per_device_train_batch_size": 8}, 2, (4, 1, 2)),
        ({"per_device_train_batch_size": 6, "gradient_accumulation_steps": 3}, 4, (6, 3, 4)),
    ],
)
def test_processes_that_nobody_asked_for_share_the_rows_of_a_step(
    recipe: Any, rows: dict[str, int], processes: int, shared: tuple[int, int, int]
) -> None:
    loaded = recipe(f"trainer: {json.dumps(rows)}")
    plan = plan_on(replace(T4, count=processes, processes=processes, shares_batch=True), loaded)
    assert (plan.batch.per_device, plan.batch.accumulation, plan.batch.processes) == shared
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    assert tuple(plan.trainer[name] for name in names) == shared[:2]
    effective = rows["per_device_train_batch_size"] * rows.get("gradient_accumulation_steps", 1)
    divides = effective % processes == 0
    assert (plan.batch.effective == effective) is divides
    assert (processes_that_share([rows], processes) == processes) is divides
    asked = plan_on(replace(T4, count=processes, processes=processes), loaded)
    assert asked.batch.effective == effective * processes  # asked for by number they take as many each


def test_a_smoke_recipe_is_small_and_goes_the_same_way(recipe: Any) -> None:
    asked = recipe(
        "quantization: {bits: 4, compute_dtype: bfloat16}\n"
        "trainer: {max_steps: 9000, per_device_train_batch_size: 64, learning_rate: 1e-3, save_steps: 10}\n"
        "gates: {exact_match: '>= 0.9'}\nreport: {trackers: [wandb]}\nbudget: {wall_clock: 8h}\n"
    )
    smoke = smoke_recipe(asked)
    assert smoke.name == "r-smoke"
    assert smoke.trainer["max_steps"] <= 10 and smoke.trainer["learning_rate"] == 1e-3
    assert "save_steps" not in smoke.trainer and smoke.trainer["use_cpu"] is True
    assert smoke.quantization is not None and smoke.quantization.compute_dtype == "auto"
    assert smoke.gates == () and smoke.report.trackers == () and smoke.budget.wall_clock is None
    left_out = "smoke: ignored: gates, budget.wall_clock, report.trackers, quantization.compute_dtype"
    assert smoke_notices(asked) == (left_out,)
    assert smoke_recipe(smoke).trainer == smoke.trainer


def test_the_schedule_of_adalora_is_checked_for_the_real_steps_and_left_out_of_a_rehearsal(recipe: Any) -> None:
    text = "adapter: {{method: adalora, r: 4, tinit: 200, tfinal: 500}}\ntrainer: {{max_steps: {}}}\n"
    assert not {"tinit", "tfinal"} & smoke_recipe(recipe(text.format(1000))).adapter.arguments.keys()
    with pytest.raises(RecipeError, match="leave none of the 600 steps"):
        check_schedules(recipe(text.format(600)))


def test_evaluations_and_checkpoints_come_within_the_few_steps_of_a_rehearsal(recipe: Any) -> None:
    asked = "trainer: {load_best_model_at_end: true, eval_strategy: steps, eval_steps: 100, save_steps: 200}\n"
    dataset = "dataset: {path: a.csv, text: '{a}', split: {validation_size: 0.1}}\n"
    trainer = smoke_recipe(recipe(dataset + asked)).trainer
    assert trainer["eval_steps"] == trainer["save_steps"] < trainer["max_steps"]


DENSE = ModelDimensions(
    hidden=64,
    layers=2,
    queries=64,
    keys=64,
    heads=4,
    mlp=128,
    mlp_kept=3,
    mlp_layers=2,
    vocabulary=100,
    parameters=7_000_000,
    linears=(),
    norms=(),
    final_norm=Norm(64, 1, in_float32=True),
)
MIXTURE = replace(DENSE, experts=Experts(parameters=1000, per_token=1, total=4, mlp=64, layers=2))


@pytest.mark.parametrize(
    ("processes", "more", "facts", "expected"),
    [
        (2, "", replace(FACTS, shape=DENSE), False),
        (1, "", replace(FACTS, shape=DENSE), None),
        (2, "trainer: {ddp_find_unused_parameters: true}", replace(FACTS, shape=DENSE), True),
        (2, "adapter: {method: adalora, r: 4}", replace(FACTS, shape=DENSE), None),
        (2, "", replace(FACTS, shape=MIXTURE), None),  # an expert that no token was sent to has no gradient
        (2, "", FACTS, None),  # nobody knows what it is made of
    ],
)
def test_processes_that_train_lora_look_for_no_unused_parameters(
    recipe: Any, processes: int, more: str, facts: ModelFacts, expected: bool | None
) -> None:
    plan = plan_on(replace(T4, processes=processes), recipe(more), facts)
    assert plan.trainer.get("ddp_find_unused_parameters") is expected


LLAMA_SHAPE = ModelDimensions(
    hidden=64,
    layers=2,
    queries=64,
    keys=32,
    heads=4,
    mlp=128,
    mlp_kept=3,
    mlp_layers=2,
    vocabulary=256,
    parameters=7_000_000,
    linears=(),
    norms=(Norm(64, 4, in_float32=True, fusible=True),),
    final_norm=Norm(64, 1, in_float32=True, fusible=True),
)
GEMMA_NORM = Norm(64, 4, in_float32=True)
LAYER_NORM = Norm(64, 4, in_float32=False)
TORCH_29 = replace(L4, fused_norms=True)


def said_of(plan: Plan, key: str) -> str:
    """Value and reason of a decision, empty where there is none of that key."""
    return "".join(f"{one.value}: {one.reason}" for one in plan.decisions if one.key == key)


@pytest.mark.parametrize(
    ("machine", "norm", "more", "said"),
    [
        (TORCH_29, None, "", "torch's fused kernel"),
        (TORCH_29, None, "performance: {disable: [fused_norms]}", "performance.disable"),
        (TORCH_29, None, "trainer: {torch_compile: true}", "torch.compile fuses"),
        (TORCH_29, None, "trainer: {torch_compile_mode: max-autotune}", "torch.compile fuses"),
        (TORCH_29, None, "trainer: {use_liger_kernel: true}", "use_liger_kernel brings its own"),
        (TORCH_29, None, "adapter: {method: ln_tuning}", "trains the norms"),
        (TORCH_29, GEMMA_NORM, "", "the norm of LlamaForCausalLM uses a different formula"),
        (TORCH_29, LAYER_NORM, "", ""),
        (L4, None, "", "torch 2.9 and later have one"),
        (CPU, None, "", ""),
    ],
)
def test_the_plan_says_whether_the_norms_are_fused(
    recipe: Any, machine: Machine, norm: Norm | None, more: str, said: str
) -> None:
    shape = LLAMA_SHAPE if norm is None else replace(LLAMA_SHAPE, norms=(norm,))
    plan = plan_on(machine, recipe(more), replace(FACTS, shape=shape, norms=("model.norm",)))
    found = said_of(plan, "norms")
    assert said in found and bool(said) == bool(found)
    assert ("fused_norms" in plan.optimizations) == ("torch's fused kernel" in found)


@pytest.mark.parametrize(("attention", "kind"), [("flash_attention_2", "padding_free"), ("eager", "padded")])
def test_flash_attention_keeps_padding_free_batches_and_eager_attention_does_not(
    recipe: Any, attention: str, kind: str
) -> None:
    machine = replace(L4, flash_attention=("flash_attention_2",))
    plan = plan_on(machine, recipe(f"model: {{name: org/model, attention: {attention}}}"))
    assert plan.batching.kind == kind and plan.base.attention == attention
    if kind == "padded":
        assert "eager attention does not support row boundaries" in said_of(plan, "batching")


@pytest.mark.parametrize(
    ("machine", "more", "said"),
    [
        (L4, "", "not saved for each layer"),
        (L4, "adapter: {dropout: 0.1}", "adapter.dropout 0.1 uses random numbers"),
        (L4, "performance: {disable: [skip_rng_state]}", "performance.disable"),
        (L4, "trainer: {activation_checkpointing: false}", ""),
        (CPU, "", ""),
        (CPU, "trainer: {activation_checkpointing: true}", "not saved for each layer"),
    ],
)
def test_the_plan_says_whether_checkpointed_layers_save_random_states(
    recipe: Any, machine: Machine, more: str, said: str
) -> None:
    plan = plan_on(machine, recipe(more))
    found = said_of(plan, "random state")
    assert said in found and bool(said) == bool(found)
    assert ("skip_rng_state" in plan.optimizations) == ("not saved" in found)


def test_where_no_layer_is_checkpointed_in_the_end_nothing_is_said_of_random_states(recipe: Any) -> None:
    roomy = replace(L4, memory_bytes=80 * 2**30)
    plan = plan_on(roomy, recipe(), replace(FACTS, shape=LLAMA_SHAPE))
    assert not plan.trainer["activation_checkpointing"] and said_of(plan, "random state") == ""
    assert "skip_rng_state" not in plan.optimizations


LIGER = replace(L4, liger=True)


@pytest.mark.parametrize(
    ("machine", "more", "said"),
    [
        (LIGER, "", "Liger's: rotary embeddings"),
        (L4, "", "liger-kernel is not installed"),
        (replace(T4, liger=True), "", "sm_80 and later"),
        (LIGER, "performance: {disable: [liger_layers]}", "performance.disable"),
        (LIGER, "trainer: {use_liger_kernel: true}", "use_liger_kernel already brings them"),
        (LIGER, "trainer: {torch_compile: true}", "torch.compile fuses"),
        (LIGER, "adapter: {method: ia3}", "only LoRA on unsharded weights"),
        (CPU, "", ""),
    ],
)
def test_the_plan_says_whether_liger_computes_the_layers(recipe: Any, machine: Machine, more: str, said: str) -> None:
    plan = plan_on(machine, recipe(more))
    found = said_of(plan, "layer kernels")
    assert said in found and bool(said) == bool(found)
    assert ("liger_layers" in plan.optimizations) == found.startswith("Liger's")


@pytest.mark.parametrize("argument", ["torch_compile: true", "torch_compile_backend: inductor"])
def test_compiled_code_keeps_padding_free_batches_and_leaves_the_layers_to_the_compiler(
    recipe: Any, argument: str
) -> None:
    plan = plan_on(replace(LIGER, fused_norms=True), recipe(f"trainer: {{{argument}}}"))
    assert plan.batching.kind == "padding_free"
    assert plan.optimizations.isdisjoint({"fused_lora", "fused_norms", "liger_layers", "skip_rng_state"})
