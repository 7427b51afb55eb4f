"""Bases in 8 bits: what they compute, that training on them is whole, and what does not go with them."""

import json
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import pytest
import torch
import yaml
from bitsandbytes.nn import Linear8bitLt
from comparisons import assert_close_logits
from helpers import (
    adapter,
    base_of,
    learn,
    logits,
    logits_of,
    lora,
    rows_of_reviews,
    same_training,
    train_twice,
    trainer_of,
)
from peft import LoraConfig, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig, PreTrainedModel

from peftcli.adapters.full import float_copy
from peftcli.adapters.quantized import dequantized_weight, is_quantized_layer
from peftcli.cli.main import main
from peftcli.doctor.quantization import check_8bit, try_8bit
from peftcli.errors import RecipeError
from peftcli.merge.fold import fold
from peftcli.model.files import loaded_weights
from peftcli.model.gradients import gradient_norms
from peftcli.model.inspect import inspect_model
from peftcli.model.int8_linear import Int8FloatLinear, compute_in_float
from peftcli.model.load import load_adapter, load_base, merge_previous_stages, unpack_layers
from peftcli.model.target import open_target
from peftcli.plan.memory.estimate import INT8_BITS, weight_bytes
from peftcli.plan.smoke import smoke_recipe
from peftcli.recipe.dump import changed_keys, dump_recipe
from peftcli.recipe.load import load_recipe
from peftcli.run_dir import read_json, read_log
from peftcli.train.run import adapter_off

Cli = Callable[..., int]
Write = Callable[..., Path]
INT8 = {"bits": 8}
ADAPTER = "adapter/adapter_model.safetensors"


def in_8_bit(path: Path) -> PreTrainedModel:
    return load_base(base_of(path, INT8))


def small(folder: Path, config: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(folder))
    return folder


GPT2 = GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)


# Products


def rows_of(count: int) -> torch.Tensor:
    return torch.randint(5, 120, (count, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def answers(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=rows, use_cache=False).logits
    return found


@pytest.mark.numeric
def test_an_answer_depends_neither_on_the_rows_beside_it_nor_on_the_mode(tiny_llama: Path) -> None:
    model, rows = in_8_bit(tiny_llama), rows_of(8)
    assert {type(part) for part in model.modules() if is_quantized_layer(part)} == {Int8FloatLinear}
    evaluated = answers(model.eval(), rows)
    for size in (1, 3):
        torch.testing.assert_close(
            torch.cat([answers(model, part) for part in rows.split(size)]), evaluated, atol=1e-5, rtol=1e-5
        )
    assert torch.equal(answers(model.train(), rows), evaluated)


@pytest.mark.numeric
def test_the_products_of_bitsandbytes_itself_measure_another_model_than_they_train(tiny_llama: Path) -> None:
    """Why the layers compute in another way; once this fails, bitsandbytes may do it alone."""
    packing = BitsAndBytesConfig(load_in_8bit=True)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, quantization_config=packing)
    rows = rows_of(8)
    trained, evaluated = answers(theirs.train(), rows), answers(theirs.eval(), rows)
    assert_close_logits(answers(in_8_bit(tiny_llama), rows), trained)
    assert (trained - evaluated).abs().max() > 1e-2


@pytest.mark.numeric
@pytest.mark.parametrize("autocast", [False, True])
def test_values_and_gradients_are_those_of_a_linear_layer_of_the_unpacked_weights(autocast: bool) -> None:
    torch.manual_seed(0)
    packed = Linear8bitLt(48, 32, has_fp16_weights=False)
    whole = nn.Linear(48, 32)
    packed.load_state_dict(whole.state_dict())
    packed = packed.to("cpu")
    compute_in_float(packed)
    assert (dequantized_weight(packed) - whole.weight).norm() < 0.01 * whole.weight.norm()
    whole.weight.data = dequantized_weight(packed)
    packed.bias.requires_grad_(True)
    inputs = [torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    for layer, x in zip((packed, whole), inputs, strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = layer(x)
        assert result.dtype == (torch.bfloat16 if autocast else torch.float32)
        result.float().square().sum().backward()
    tolerance = {"atol": 0.5, "rtol": 0.02} if autocast else {"atol": 1e-4, "rtol": 1e-5}
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **tolerance)
    torch.testing.assert_close(packed.bias.grad, whole.bias.grad, **tolerance)


@pytest.mark.numeric
def test_a_moved_copied_or_unpacked_layer_keeps_its_scale(tiny_llama: Path) -> None:
    """bitsandbytes forgets it where a weight is moved after a first forward, as PEFT does to unpack one."""
    model, rows = in_8_bit(tiny_llama), rows_of(2)
    before = answers(model, rows)
    layer = next(part for part in model.modules() if is_quantized_layer(part))
    torch.testing.assert_close(dequantize_module_weight(layer), dequantized_weight(layer))
    assert torch.equal(answers(model, rows), before)
    assert torch.equal(answers(deepcopy(model).to("cpu"), rows), before)


@pytest.mark.numeric
def test_gradients_are_measured_as_on_the_unpacked_base(tiny_llama: Path) -> None:
    packed, rows = in_8_bit(tiny_llama), rows_of(2)
    names = [name for name, part in packed.named_modules() if is_quantized_layer(part)]
    whole = deepcopy(packed)
    unpack_layers(whole, names)

    def loss(model: Any, batch: Any) -> torch.Tensor:
        found: torch.Tensor = model(**batch, use_cache=False).loss
        return found

    batches = [{"input_ids": rows, "labels": rows}]
    found = gradient_norms(packed, names, batches, loss)
    assert len(found) == 14 and found == pytest.approx(gradient_norms(whole, names, batches, loss), rel=1e-4)


@pytest.mark.numeric
def test_layers_that_are_stored_turned_round_train_reload_and_merge(tmp_path: Path) -> None:
    base = small(tmp_path / "gpt2", GPT2)
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = in_8_bit(base)
    assert (logits_of(model) - logits_of(whole)).abs().max() < 0.05
    layer = model.get_submodule("transformer.h.0.mlp.c_fc")
    assert float_copy(layer).weight.shape == whole.get_submodule("transformer.h.0.mlp.c_fc").weight.shape
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn", "c_fc", "c_proj"]))
    losses = learn(tuned, 0.03)
    assert losses[-1] < 0.95 * losses[0]
    after = logits_of(tuned)
    tuned.save_pretrained(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(load_adapter(in_8_bit(base), tmp_path / "adapter")), after)
    bare = in_8_bit(base)
    whole.load_state_dict(dict(fold(bare, tmp_path / "adapter", loaded_weights(bare)).tensors()), strict=False)
    torch.testing.assert_close(logits_of(whole), after, atol=1e-4, rtol=1e-4)


@pytest.mark.numeric
def test_adapters_of_stages_are_folded_and_what_they_leave_alone_stays_in_8_bits(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    base = small(tmp_path / "base", config)
    adapter(in_8_bit(base), tmp_path / "1", "q_proj", "down_proj")
    second = adapter(merge_previous_stages(in_8_bit(base), [str(tmp_path / "1")]), tmp_path / "2", "q_proj", "up_proj")
    both = merge_previous_stages(in_8_bit(base), [str(tmp_path / "1"), str(tmp_path / "2")])
    torch.testing.assert_close(logits(both), second, atol=1e-5, rtol=1e-4)
    assert sum(is_quantized_layer(part) for part in both.modules()) == 8 and both.is_loaded_in_8bit


# Runs


RECIPE: dict[str, Any] = {
    "name": "things",
    "model": {"name": "tiny:llama"},
    "quantization": INT8,
    "adapter": {"r": 8, "dropout": 0.1},
    "dataset": {
        "path": "things.jsonl",
        "prompt": "{thing} ->:",
        "completion": " {kind}",
        "split": {"test_size": 0.25, "seed": 1},
    },
    "trainer": {
        "per_device_train_batch_size": 8,
        "max_steps": 24,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_steps": 12,
    },
    "evaluation": {"max_new_tokens": 6, "samples": 2},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with a run that was trained and merged."""
    folder = tmp_path_factory.mktemp("eight")
    kinds = {"apple": "red fruit", "carrot": "orange root"}
    rows = [{"thing": f"{name} {number}", "kind": kind} for number in range(24) for name, kind in kinds.items()]
    (folder / "things.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"model": {"name": str(tiny_llama)}}), encoding="utf-8")
    for words in (["train", folder / "recipe.yaml", "--output-dir", folder / "run"], ["merge", folder / "run"]):
        assert main([str(word) for word in words]) == 0
    return folder


@pytest.mark.numeric
def test_a_run_learns_and_leaves_the_base_alone(place: Path, tiny_llama: Path) -> None:
    losses = [row["loss"] for row in read_log(place / "run" / "log.jsonl") if "loss" in row]
    assert losses[-1] < 0.3 * losses[0]
    metrics = read_json(place / "run" / "metrics.json")
    assert metrics["adapter"]["loss"] < 0.3 * metrics["base"]["loss"]
    model, _ = open_target(str(place / "run")).load()
    fresh = in_8_bit(tiny_llama)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(fresh))
    assert (logits_of(model) - logits_of(fresh)).abs().max() > 1


def test_a_run_says_8_bit_in_its_plan_and_its_card(place: Path) -> None:
    decisions = {one["key"]: one for one in read_json(place / "run" / "plan.json")["decisions"]}
    assert decisions["quantization"]["value"] == "8 bit" and "quantization.compute_dtype" not in decisions
    assert "base in float32 quantized to 8 bit" in (place / "run" / "adapter" / "README.md").read_text()


PLAIN = """
import sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, BitsAndBytesConfig
packing = BitsAndBytesConfig(load_in_8bit=True)
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=packing, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("apple 3 ->:", return_tensors="pt")
for module in model.modules():  # on a CPU the mode decides how bitsandbytes computes
    module.train(type(module).__module__.startswith("bitsandbytes"))
with torch.no_grad():
    floats = model(**inputs).logits
    rounded = model.eval()(**inputs).logits
assert "peftcli" not in sys.modules
torch.save((floats, rounded), sys.argv[2])
"""


@pytest.mark.numeric
def test_the_adapter_alone_loads_with_plain_peft_and_gives_the_same_logits(place: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", PLAIN, place / "run" / "adapter", tmp_path / "logits.pt"]
    subprocess.run(words, check=True, capture_output=True)
    floats, rounded = torch.load(tmp_path / "logits.pt")
    model, tokenizer = open_target(str(place / "run")).load()
    with torch.no_grad():
        ours = model(**tokenizer("apple 3 ->:", return_tensors="pt")).logits
    assert_close_logits(ours, floats)
    assert torch.equal(ours[0, -1].argmax(), rounded[0, -1].argmax())  # inputs of 8 bits move it, but not that far


@pytest.mark.numeric
def test_the_merge_is_faithful_and_holds_floats_alone(place: Path) -> None:
    found = read_json(place / "run" / "merge.json")
    assert found["into"] == "dequantized" and found["top1_agreement"] == 1.0
    assert found["max_abs_logit_difference"] < 1e-3
    merged = AutoModelForCausalLM.from_pretrained(place / "run" / "merged", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config") and not any(map(is_quantized_layer, merged.modules()))
    tuned, _ = open_target(str(place / "run")).load()
    torch.testing.assert_close(logits_of(merged), logits_of(tuned), atol=1e-3, rtol=1e-3)


@pytest.mark.numeric
def test_a_stopped_run_goes_on_to_the_same_bits(place: Path) -> None:
    again = place / "again"
    copytree(place / "run", again)
    for name in ("train.json", "eval.json", "metrics.json"):
        (again / name).unlink()
    for name in ("adapter", "merged", "checkpoints/checkpoint-24"):
        rmtree(again / name, ignore_errors=True)
    assert main(["train", str(place / "recipe.yaml"), "--output-dir", str(again), "--resume"]) == 0
    assert read_json(again / "train.json")["resumed_from_step"] == 12
    assert (again / ADAPTER).read_bytes() == (place / "run" / ADAPTER).read_bytes()


@pytest.mark.numeric
def test_rows_learn_the_same_in_lines_and_padded(write_recipe: Write, run_cli: Cli, tmp_path: Path) -> None:
    trainer = {"max_steps": 5, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
    same_training(*train_twice(run_cli, write_recipe(quantization=INT8, trainer=trainer), tmp_path))


@pytest.mark.numeric
def test_an_evaluation_leaves_the_gradients_as_they_were(write_recipe: Write, tmp_path: Path) -> None:
    split = {"split": {"test_size": 0.25, "validation_size": 0.25, "seed": 1}}
    trainer = trainer_of(write_recipe(quantization=INT8, dataset=split), tmp_path / "run")
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide every gradient of A
            nn.init.normal_(parameter, std=0.02)
    batch = next(iter(trainer.get_train_dataloader()))

    def gradients() -> dict[str, torch.Tensor]:
        trainer.model.train()
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}

    before = gradients()
    with adapter_off(trainer.model):
        trainer.evaluate()
    after = gradients()
    assert before and all(torch.equal(gradient, after[name]) for name, gradient in before.items())


@pytest.mark.parametrize(
    "adapter",
    [
        {"init_lora_weights": "pissa", "r": 4},
        {"init_lora_weights": "loftq", "r": 4},
        {"init_lora_weights": "eva", "r": 4},
        {"init_lora_weights": "lora_ga", "r": 4},
        {"use_dora": True, "r": 4},
        {"method": "freeze", "last_layers": 1, "r": None},
    ],
    ids=lambda adapter: str(adapter.get("init_lora_weights") or adapter.get("method") or "dora"),
)
def test_options_of_lora_and_methods_beside_it_train_and_merge(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    quick = {"baseline": False, "rows": 1, "max_new_tokens": 1}
    recipe = write_recipe(quantization=INT8, adapter=adapter, trainer={"max_steps": 2}, evaluation=quick)
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    assert run_cli("merge", "run") == 0
    found = read_json(tmp_path / "run" / "merge.json")
    assert found["top1_agreement"] == 1.0 and found["max_abs_logit_difference"] < 1e-3


@pytest.mark.parametrize(
    ("model", "task", "names"),
    [
        ("tiny:bert", "sequence-classification", ("classifier", "bert.pooler")),
        ("tiny:llama", "token-classification", ("score",)),
    ],
)
def test_a_head_stays_float_and_is_trained(
    run_cli: Cli, tmp_path: Path, model: str, task: str, names: tuple[str, ...]
) -> None:
    (tmp_path / "reviews.jsonl").write_text("\n".join(map(json.dumps, rows_of_reviews())), encoding="utf-8")
    pair = {"text": "text", "label": "label"} if task.startswith("seq") else {"tokens": "tokens", "tags": "tags"}
    recipe = {
        "name": "reviews",
        "model": {"name": model, "task": task},
        "quantization": INT8,
        "dataset": {
            "path": "reviews.jsonl",
            "columns": pair,
            "split": {"test_size": 0.25},
            "limits": {"max_leaked": 1.0},
        },
        "trainer": {"max_steps": 2, "learning_rate": 1e-2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert run_cli("train", "recipe.yaml") == 0
    run = tmp_path / "runs" / "reviews"
    tensors = read_json(run / "adapter" / "peftcli.json")["tensors"]
    assert all(any(f".{name}." in tensor for tensor in tensors) for name in names)
    tuned, _ = open_target(str(run)).load()
    packed = [name for name, part in tuned.get_base_model().named_modules() if is_quantized_layer(part)]
    assert packed and not any(name in one for one in packed for name in names)
    assert run_cli("merge", "runs/reviews") == 0
    assert read_json(run / "merge.json")["max_abs_logit_difference"] < 0.01


# Recipes and plans


def recipe_text(more: str) -> str:
    return f"name: x\nmodel: {{name: 'tiny:llama'}}\ndataset: {{path: a.csv, text: '{{a}}'}}\n{more}\n"


def read(tmp_path: Path, more: str) -> Any:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(more), encoding="utf-8")
    return load_recipe(path).recipe


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            "quantization: {bits: 8, type: nf4}",
            ":4: quantization.type is for 4 bits, but quantization.bits is 8; re",
        ),
        ("quantization: {bits: 8, double_quant: false}", "quantization.double_quant is for 4 bits"),
        ("quantization: {bits: 8, compute_dtype: auto}", "quantization.compute_dtype is for 4 bits"),
        ("quantization: {bits: 5}", "quantization.bits = 5: must be 4 or 8"),
        ("load_in_8bit: true", "did you mean quantization.bits: 8?"),
        (
            "quantization: {bits: 8}\nadapter: {method: hra}",
            "does not work on 8-bit weights: it computes with the weight values",
        ),
        ("quantization: {bits: 8}\nadapter: {method: full}", "does not work on 8-bit weights: it trains all"),
        ("quantization: {bits: 4}\nadapter: {method: deft}", "set quantization.bits: 8 or remove `quantization`"),
        ("quantization: {bits: 8}\nadapter: {init_lora_weights: mica}", "mica does not work on 8-bit weights: it is"),
        ("quantization: {bits: 4}\nadapter: {init_lora_weights: orthogonal}", "orthogonal does not work on 4-bit"),
    ],
)
def test_what_does_not_go_with_8_bits_is_refused_with_the_mend(tmp_path: Path, more: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, more)
    assert said in str(caught.value)


def test_a_recipe_comes_back_from_its_own_text_also_of_a_smoke_run(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a\n1\n")
    recipe = read(tmp_path, "quantization: {bits: 8}")
    for one in (recipe, smoke_recipe(recipe)):
        again = tmp_path / "again.yaml"
        again.write_text(dump_recipe(one, again), encoding="utf-8")
        assert yaml.safe_load(again.read_text())["quantization"] == {"bits": 8}
        assert changed_keys(one, load_recipe(again).recipe) == []
    assert changed_keys(read(tmp_path, "quantization: {}"), recipe) == ["quantization.bits: 4 -> 8"]


def test_the_forecast_of_the_weights_is_what_a_loaded_base_takes(tiny_llama: Path) -> None:
    model = in_8_bit(tiny_llama)
    stored = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    scales = sum(part.weight.SCB.numel() * 4 for part in model.modules() if is_quantized_layer(part))
    shape = inspect_model(str(tiny_llama), AutoConfig.from_pretrained(tiny_llama)).shape
    assert shape is not None and scales > 0
    setting = lora(shape, 8, weight_bits=INT8_BITS, base_bytes=4)
    assert weight_bytes(shape, setting) == stored + scales


def test_the_doctor_tries_an_8_bit_layer() -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        trial = try_8bit("cpu", dtype)
        verdict = check_8bit(trial)
        assert verdict.result == "ok" and "dequantized weights" in verdict.found and 1e-3 < trial.loss < 0.01
