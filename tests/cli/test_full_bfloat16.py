"""Whole weights trained in bfloat16: no float32 copy and no frozen base beside them, from the plan to the merge."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from peftcli.adapters.build import peft_config
from peftcli.errors import MachineError
from peftcli.model.inspect import inspect_model, trainable_counter
from peftcli.plan.gpus import find_gpu, machine_with
from peftcli.plan.memory.forecast import micro_batch_memory, rows_of
from peftcli.plan.plan import Plan
from peftcli.plan.planner import make_plan
from peftcli.recipe.load import load_recipe
from peftcli.recipe.schema import AdapterSection
from peftcli.train.precision import free_trained_base, upcast_trainable

GIB = 2**30
PURE = {"method": "full", "dtype": "bfloat16"}
"""The adapter section."""


def bytes_of(model: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_in_training_each_weight_is_there_once_in_two_bytes(tied: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    base = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    weights = base.num_parameters()
    words = torch.arange(12)[None]
    with torch.no_grad():
        before = base(input_ids=words).logits
        model = get_peft_model(base, peft_config(AdapterSection(method="full"), "causal-lm")).eval()
        upcast_trainable(model, "bfloat16")
        assert bytes_of(model) == 2 * 2 * weights
        free_trained_base(model)
        assert bytes_of(model) == 2 * weights
        assert torch.equal(model(input_ids=words).logits, before)


@pytest.fixture(scope="module")
def trained(
    recipe_in: Callable[..., Path], cli_in: Callable[..., int], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a recipe and its run: a tied model, 8-bit Adam, four steps, a checkpoint every second one."""
    folder = tmp_path_factory.mktemp("pure")
    recipe_in(
        folder,
        model={"name": "tiny:gpt2", "dtype": "bfloat16"},
        quantization=None,
        adapter=None,
        trainer={"max_steps": 4, "save_steps": 2, "optim": "adamw_8bit", "learning_rate": 1e-3},
    )
    with (folder / "recipe.yaml").open("a", encoding="utf-8") as file:
        file.write(f"adapter: {json.dumps(PURE)}\n")
    assert cli_in(folder, "train", "recipe.yaml", "--output-dir", "run") == 0
    return folder


def test_the_weights_of_a_run_are_bfloat16_and_have_moved(trained: Path) -> None:
    last = load_file(str(trained / "run" / "adapter" / "adapter_model.safetensors"))
    first = load_file(str(trained / "run" / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors"))
    assert {tensor.dtype for tensor in (*last.values(), *first.values())} == {torch.bfloat16}
    assert any(not torch.equal(last[name], first[name]) for name in last)


def test_plan_metrics_and_files_count_each_weight_of_a_tied_model_once(trained: Path) -> None:
    run = trained / "run"
    plan = json.loads((run / "plan.json").read_text())
    metrics = json.loads((run / "metrics.json").read_text())
    state = torch.load(run / "checkpoints" / "checkpoint-4" / "optimizer.pt", weights_only=False)["state"]
    stepped = sum(one["__bnb_optimizer_quant_state__"]["state1"].numel() for one in state.values())
    assert plan["parameters"]["trainable"] == metrics["parameters"]["trainable"] == stepped
    share = next(one for one in plan["decisions"] if one["key"] == "trainable")["reason"]
    assert share.startswith("100.00% of the ")
    memory = plan["forecast"]["memory_bytes"]
    assert (memory["weights"], memory["adapter"], memory["gradients"]) == (0, 2 * stepped, 2 * stepped)


def test_the_disk_forecast_holds_the_files_and_is_no_larger_than_the_small_ones_make_it(trained: Path) -> None:
    run = trained / "run"
    disk = json.loads((run / "plan.json").read_text())["forecast"]["disk_bytes"]
    checkpoint = run / "checkpoints" / "checkpoint-4"
    adapter, state = (checkpoint / name for name in ("adapter_model.safetensors", "optimizer.pt"))
    optimizer = json.loads((run / "plan.json").read_text())["forecast"]["memory_bytes"]["optimizer"]
    # Each of the 29 tensors of the state has a header of less than 2 KiB in the file, as the two shared tables do.
    assert 0 <= state.stat().st_size - optimizer < 29 * 2048
    assert adapter.stat().st_size < disk["adapter"]
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) < disk["checkpoint"]


def test_a_run_that_goes_on_comes_to_the_same_bits(trained: Path, cli_in: Callable[..., int]) -> None:
    again = trained / "again"
    shutil.copytree(trained / "run", again)
    for name in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(again / name)
    for name in ("train.json", "metrics.json"):
        (again / name).unlink()
    assert cli_in(trained, "train", "recipe.yaml", "--output-dir", again) == 0
    assert json.loads((again / "train.json").read_text())["resumed_from_step"] == 2
    name = Path("adapter") / "adapter_model.safetensors"
    assert (again / name).read_bytes() == (trained / "run" / name).read_bytes()


def test_the_merged_model_is_the_trained_one(trained: Path, cli_in: Callable[..., int]) -> None:
    assert cli_in(trained, "merge", "run", "--output-dir", trained / "merged") == 0
    merge = json.loads((trained / "run" / "merge.json").read_text())
    assert (merge["dtype"], merge["top1_agreement"], merge["max_abs_logit_difference"]) == ("bfloat16", 1.0, 0.0)
    tensors = load_file(str(trained / "merged" / "model.safetensors"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def plan_7b(tmp_path: Path, text: str, card: str) -> tuple[Plan, Any, Any]:
    """The plan of a recipe for Llama-2-7B on a card; the model is built on the meta device."""
    config = LlamaConfig(intermediate_size=11008, max_position_embeddings=4096)  # the other defaults are Llama-2-7B's
    path = tmp_path / "r.yaml"
    data = "dataset: {path: a.csv, text: '{a}', max_length: 1024}\n"
    batch = "trainer: {optim: adamw_8bit, per_device_train_batch_size: 1}\n"
    path.write_text("model: {name: org/llama}\n" + data + batch + text, encoding="utf-8")
    facts = inspect_model("org/llama", config)
    machine = machine_with(find_gpu(card))
    counter = trainable_counter("org/llama", config, "causal-lm")
    return make_plan(load_recipe(path).recipe, machine, facts, counter), facts.shape, machine


def test_a_7b_model_takes_five_to_six_bytes_a_weight_in_bfloat16_with_8_bit_adam(tmp_path: Path) -> None:
    plan, shape, machine = plan_7b(tmp_path, "adapter: {method: full, dtype: bfloat16}\n", "a100-80")
    parts = micro_batch_memory(plan, shape, machine, rows_of(plan, None)).parts()
    weights = shape.parameters
    assert (parts["weights"], parts["adapter"], parts["gradients"]) == (0, 2 * weights, 2 * weights)
    # Two states of a byte and the scale of their block; those of the embedding are float32.
    narrow = 2 * (1 + 4 / 256)
    assert parts["optimizer"] == pytest.approx(narrow * (weights - 32_000 * 4096) + 8 * 32_000 * 4096, rel=1e-6)
    in_float32, _, _ = plan_7b(tmp_path, "adapter: {method: full}\n", "a100-80")
    wide_parts = micro_batch_memory(in_float32, shape, machine, rows_of(in_float32, None)).parts()
    assert (wide_parts["weights"], wide_parts["adapter"], wide_parts["gradients"]) == (0, 6 * weights, 4 * weights)
    assert any("rounded away" in notice for notice in plan.notices)
    assert not any("rounded away" in notice for notice in in_float32.notices)


def test_a_base_that_is_not_bfloat16_cannot_be_trained_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"here they are float16 .*set adapter.dtype: float32"):
        plan_7b(tmp_path, "adapter: {method: full, dtype: bfloat16}\n", "t4")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"adapter": {"method": "full", "dtype": "float16"}}, "float16 weights cannot be trained"),
        ({"adapter": {"method": "lora", "dtype": "bfloat16"}}, "few weights of lora are cheap"),
        ({"adapter": PURE, "model": {"dtype": "float32"}}, "model.dtype is float32; set it to bfloat16"),
        ({"adapter": {"method": "freeze", "dtype": "bfloat16"}, "quantization": {"bits": 4}}, "round the dequantized"),
        ({"adapter": {"method": "full", "dtype": "bf16"}}, "bfloat16"),
    ],
    ids=["float16", "lora", "float32 base", "4 bit", "another tool's word"],
)
def test_what_cannot_be_trained_in_16_bit_is_refused_with_the_reason(
    write_recipe: Callable[..., Path],
    run_cli: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
    sections: dict[str, Any],
    said: str,
) -> None:
    recipe = write_recipe(**({"quantization": None} | sections | {"adapter": None}))
    with recipe.open("a", encoding="utf-8") as file:
        file.write(f"adapter: {json.dumps(sections['adapter'])}\n")
    assert run_cli("validate", recipe) == 2
    assert said in capfd.readouterr().err


def test_a_processor_that_would_take_float32_is_told_what_to_set(
    write_recipe: Callable[..., Path], run_cli: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(quantization=None, adapter=None)
    with recipe.open("a", encoding="utf-8") as file:
        file.write(f"adapter: {json.dumps(PURE)}\n")
    assert run_cli("plan", recipe) == 4
    assert "set model.dtype: bfloat16" in capfd.readouterr().err


def test_a_quantized_or_divided_base_stays_in_memory(tmp_path: Path) -> None:
    plan, _, _ = plan_7b(tmp_path, "adapter: {method: freeze, last_layers: 1}\nquantization: {bits: 4}\n", "a100-80")
    assert not plan.frees_base
    whole, _, _ = plan_7b(tmp_path, "adapter: {method: freeze, last_layers: 1}\n", "a100-80")
    assert whole.frees_base and not replace(whole, shards=2).frees_base
