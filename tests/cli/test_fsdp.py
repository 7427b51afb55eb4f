"""A base in parts (FSDP): the losses, the adapter and the checkpoints of one process, and what is refused."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import assert_same_effect, assert_same_metrics
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peftcli.errors import MachineError, RecipeError
from peftcli.model.distributed import interleave, local_rows
from peftcli.plan.gpus import find_gpu, machine_with
from peftcli.plan.machine import Machine, ModelFacts
from peftcli.plan.memory.estimate import MicroBatchMemory, gathered_bytes, own_bytes, weight_bytes
from peftcli.plan.memory.model_shape import Linear, ModelDimensions, Norm
from peftcli.plan.memory.suggestions import suggest
from peftcli.plan.memory.training_setup import TrainingSetup
from peftcli.plan.optimizer import Trained
from peftcli.plan.plan import Plan
from peftcli.plan.planner import make_plan
from peftcli.recipe.load import load_recipe
from peftcli.recipe.schema import Recipe
from peftcli.run_dir import read_json, read_log

Cli = Callable[..., int]
Write = Callable[..., Path]
TWO = Machine("cpu", "a processor", None, native_bf16=False, arch_list=(), memory_bytes=16 * 2**30, processes=2)
L4 = machine_with(find_gpu("l4"))
LINEAR = tuple(f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qkvo")
FACTS = ModelFacts("m", "LlamaForCausalLM", 7_000_000, (*LINEAR, "model.norm", "lm_head"), LINEAR, "lm_head", 2048)
SHARDED = "performance: {sharding: full}\n"
SHAPE = ModelDimensions(
    hidden=4096,
    layers=32,
    queries=4096,
    keys=1024,
    heads=32,
    mlp=14336,
    mlp_kept=3,
    mlp_layers=32,
    vocabulary=128_256,
    parameters=8_030_261_248,
    linears=(Linear("self_attn.q_proj", 4096, 4096, 32), Linear("mlp.up_proj", 4096, 50_176, 32)),
    norms=(Norm(4096, 64, True),),
    final_norm=Norm(4096, 1, True),
)
SETTING = TrainingSetup(
    on_gpu=True,
    base_bytes=2,
    weight_bits=None,
    autocast=True,
    state_bytes=8,
    targets=(SHAPE.linears[0],),
    r=8,
    trainable=32 * 8 * 8192,
)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], Recipe]:
    """A function that loads a recipe with some lines added."""

    def load(more: str = "") -> Recipe:
        path = tmp_path / "r.yaml"
        path.write_text(f"model: {{name: org/m}}\ndataset: {{path: a.csv, text: '{{a}}'}}\n{more}", encoding="utf-8")
        return load_recipe(path).recipe

    return load


def plan_on(machine: Machine, recipe: Recipe, facts: ModelFacts = FACTS) -> Plan:
    return make_plan(recipe, machine, facts, lambda adapter: Trained(1000))


def logged(run: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in read_log(run / "log.jsonl")]


def words_for(recipe: Path) -> list[str]:
    """The command that trains with two processes into `two`."""
    return [sys.executable, "-m", "peftcli", "train", str(recipe), "--num-processes", "2", "--output-dir", "two"]


def train_in_two(recipe: Path, folder: Path) -> str:
    """Train with two processes; what was said."""
    done = subprocess.run(words_for(recipe), cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def logits_of(base: Path, adapter: Path | None) -> torch.Tensor:
    """The logits of an adapter as plain PEFT loads it, or of the base alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.arange(5, 37)[None]).logits
    return logits


@pytest.mark.numeric
def test_a_base_in_two_parts_that_is_stopped_and_goes_on_is_trained_as_a_whole_one(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, tiny_llama: Path
) -> None:
    # 13 test rows: one process measures one row more than the other.
    (tmp_path / "other.txt").write_text("A text of some words, on which forgetting is measured.\n" * 30)
    sections: dict[str, Any] = {
        "quantization": None,
        "dataset": {"split": {"test_size": 13, "seed": 1}, "max_train_samples": 32},
        "evaluation": {"rows": 3, "forgetting_text": str(tmp_path / "other.txt"), "forgetting_tokens": 300},
    }
    recipe = write_recipe(
        trainer={"max_steps": 24, "learning_rate": 1e-3}, performance={"sharding": "full"}, **sections
    )
    two = tmp_path / "two"
    process = subprocess.Popen(words_for(recipe), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (two / "log.jsonl").is_file() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=90)[1]
    assert process.returncode == 75 and "sharding full, over 2 processes" in said, said
    step = read_json(two / "train.json")["steps"]
    assert 0 < step < 24
    kept = {file.name for file in (two / "checkpoints" / f"checkpoint-{step}").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"} <= kept
    train_in_two(recipe, tmp_path)
    assert run_cli("train", recipe, "--output-dir", "one", "--set", "trainer.per_device_train_batch_size=8") == 0
    one = tmp_path / "one"
    assert logged(two) == pytest.approx(logged(one), abs=1e-5) and len(logged(one)) == 24
    assert logged(two, "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=1e-4)
    found, whole = (read_json(run / "metrics.json") for run in (two, one))
    assert_same_metrics(found["base"], whole["base"])
    assert found["adapter"]["loss"] == pytest.approx(whole["adapter"]["loss"], abs=1e-5)
    retained = [read_json(run / "eval.json")["retention"] for run in (two, one)]
    assert retained[0]["base_loss"] == pytest.approx(retained[1]["base_loss"], abs=1e-5)
    assert retained[0]["adapter_loss"] == pytest.approx(retained[1]["adapter_loss"], abs=1e-5)
    assert read_json(two / "plan.json")["batch"]["shards"] == 2
    ours, theirs = (logits_of(tiny_llama, run / "adapter") for run in (two, one))
    assert_same_effect(ours, theirs, logits_of(tiny_llama, None))
    assert run_cli("merge", two) == 0
    assert read_json(two / "metrics.json")["merge"]["top1_agreement"] == 1.0


@pytest.mark.numeric
def test_4bit_parts_asked_for_by_accelerate_give_the_losses_of_one_process(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(
        trainer={"max_steps": 2, "gradient_accumulation_steps": 2, "activation_checkpointing": True},
        performance={"batching": "padded"},
        evaluation={"rows": 3},
        dataset={"split": {"test_size": 16, "seed": 1}},
    )
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert "accelerate is configured to use FSDP" in train_in_two(recipe, tmp_path)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.delenv("FSDP_CPU_RAM_EFFICIENT_LOADING")
    assert run_cli("train", recipe, "--output-dir", "one", "--set", "trainer.per_device_train_batch_size=8") == 0
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), abs=1e-5)
    two, one = (read_json(tmp_path / name / "metrics.json") for name in ("two", "one"))
    assert_same_metrics(two["base"], one["base"])
    assert two["adapter"]["loss"] == pytest.approx(one["adapter"]["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ("adapter: {use_dora: true}\n", "adapter.use_dora"),
        ("adapter: {method: adalora}\n", "adapter.method"),
        ("adapter: {method: full}\n", "adapter.method"),
        ("adapter: {modules_to_save: [lm_head]}\n", "adapter.modules_to_save"),
        ("adapter: {init_lora_weights: pissa}\n", "adapter.init_lora_weights"),
        ("quantization: {bits: 8}\n", "quantization.bits"),
        ("trainer: {torch_compile: true}\n", "trainer.torch_compile"),
        ("stages: [{name: a}, {name: b}]\n", "stages"),
    ],
)
def test_what_needs_whole_weights_is_refused_with_its_line(tmp_path: Path, more: str, key: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {{name: org/m}}\ndataset: {{path: a.csv, text: '{{a}}'}}\n{SHARDED}{more}")
    with pytest.raises(RecipeError, match=rf"r.yaml:4: {key} excludes performance.sharding: full") as said:
        load_recipe(path)
    assert "keep one of the two" in str(said.value)


def test_plain_lora_can_be_divided(recipe: Any) -> None:
    asked = SHARDED + "adapter: {r: 8, use_rslora: true, target_modules: [q_proj]}\nquantization: {bits: 4}\n"
    plan = plan_on(TWO, recipe(asked))
    assert (plan.shards, plan.possible_shards) == (2, 2)
    decision = next(one for one in plan.decisions if one.key == "sharding")
    assert decision.value == "full, over 2 processes"


def test_one_process_holds_the_whole_base_and_is_told_how_to_divide_it(recipe: Any) -> None:
    plan = plan_on(replace(L4, count=2), recipe(SHARDED))
    decision = next(one for one in plan.decisions if one.key == "sharding")
    assert plan.shards == 1 and "--num-processes 2" in decision.reason


def test_on_cards_the_plan_says_that_it_was_tried_on_a_cpu_alone(recipe: Any) -> None:
    plan = plan_on(replace(L4, processes=2, count=2), recipe(SHARDED))
    assert plan.shards == 2 and any("not yet on GPUs" in notice for notice in plan.notices)
    assert not any("not yet on GPUs" in notice for notice in plan_on(TWO, recipe(SHARDED)).notices)


def test_accelerates_own_wish_for_fsdp_is_heeded_or_refused_and_never_passed_over(recipe: Any) -> None:
    wishes = replace(TWO, fsdp=True)
    assert plan_on(wishes, recipe("")).shards == 2
    assert plan_on(TWO, recipe("")).shards == 1
    with pytest.raises(RecipeError, match=r"performance\.sharding is none"):
        plan_on(wishes, recipe("performance: {sharding: none}\n"))
    with pytest.raises(RecipeError, match=r"accelerate is configured to use FSDP: adapter\.use_dora"):
        plan_on(wishes, recipe("adapter: {use_dora: true}\n"))
    with pytest.raises(RecipeError, match="fsdp_offload_params of accelerate's configuration"):
        plan_on(replace(wishes, fsdp_more=("fsdp_offload_params",)), recipe(""))


def test_a_model_whose_blocks_transformers_does_not_know_is_not_divided(recipe: Any) -> None:
    with pytest.raises(RecipeError, match="cannot shard LlamaForCausalLM"):
        plan_on(TWO, recipe(SHARDED), replace(FACTS, divisible=False))


def test_gpt2_has_no_parts_and_llama_has(run_cli: Cli, write_recipe: Write, capfd: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = write_recipe(performance={"sharding": "full"})
    assert run_cli("plan", recipe) == 0
    assert "full, over 2 processes" in capfd.readouterr().out
    assert run_cli("plan", recipe, "--set", "model.name=tiny:gpt2") == 2
    assert "cannot shard GPT2LMHeadModel" in capfd.readouterr().err


def test_weights_that_only_all_cards_hold_together_name_the_key(recipe: Any) -> None:
    facts = replace(FACTS, parameters=15_000_000_000)
    two = replace(L4, count=2)
    with pytest.raises(MachineError, match=r"performance: \{sharding: full\} and --num-processes 2"):
        plan_on(two, recipe(""), facts)
    assert plan_on(replace(two, processes=2), recipe(SHARDED), facts).shards == 2
    with pytest.raises(MachineError, match="quantization"):
        plan_on(two, recipe("adapter: {use_dora: true}\n"), facts)


@pytest.mark.numeric
def test_a_divided_base_takes_its_part_and_some_whole_blocks() -> None:
    two = replace(SETTING, shards=2, processes=2)
    assert own_bytes(SHAPE, SETTING) == weight_bytes(SHAPE, SETTING)
    assert own_bytes(SHAPE, two) == weight_bytes(SHAPE, SETTING) / 2
    packed = replace(two, weight_bits=4.5)
    constants = SHAPE.quantizable * 0.5 / 8
    assert own_bytes(SHAPE, packed) - constants == pytest.approx((weight_bytes(SHAPE, packed) - constants) / 2)
    block = 2 * SHAPE.quantizable / SHAPE.layers
    assert gathered_bytes(SHAPE, two) == 3 * block + 2 * SHAPE.vocabulary * SHAPE.hidden
    whole, divided = MicroBatchMemory(SHAPE, SETTING, 1024, 1024), MicroBatchMemory(SHAPE, two, 1024, 1024)
    assert "gathered" not in whole.parts() and divided.total < whole.total
    assert divided.parts()["optimizer"] == whole.parts()["optimizer"]


def test_cards_that_stand_idle_are_among_the_changes_that_make_it_fit(recipe: Any) -> None:
    card = find_gpu("t4x2")
    machine: Machine = machine_with(card)
    plan = plan_on(machine, recipe(""))
    assert plan.possible_shards == 2
    load = MicroBatchMemory(SHAPE, SETTING, 1024, 1024)
    fixes = suggest(load, plan, machine.memory_bytes)
    keys = {fix.keys: fix.load.total for fix in fixes}
    assert "performance: {sharding: full}\n--num-processes 2" in keys
    alone = plan_on(replace(machine, count=1), recipe(""))
    assert not any("sharding" in fix.keys for fix in suggest(load, alone, machine.memory_bytes))


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 6])
def test_shares_in_step_are_equally_long_and_give_back_every_row_once(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []
    for rank in range(3):
        monkeypatch.setattr("peftcli.model.distributed.rank_and_world_size", lambda rank=rank: (rank, 3))
        shares.append(local_rows(rows, in_step=True))
    assert len({len(share) for share in shares}) == 1
    assert interleave(shares)[:rows] == list(range(rows))


def test_trainer_fsdp_is_written_as_sharding(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {name: org/m}\ndataset: {path: a.csv, text: '{a}'}\ntrainer: {fsdp: true}\n")
    with pytest.raises(RecipeError, match=r"trainer.fsdp cannot be set here: set performance.sharding: full"):
        load_recipe(path)


def test_stages_under_accelerates_fsdp_are_refused_before_the_first(
    write_recipe: Write, run_cli: Cli, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(stages=[{"name": "a"}, {"name": "b"}])
    assert run_cli("plan", recipe) == 0
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert run_cli("plan", recipe) == 2
    assert "needs unsharded weights" in capfd.readouterr().err
