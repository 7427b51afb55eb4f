"""What makes a step cheaper: the values and gradients of the libraries, each lever alone, and where none is used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.kernels.chunked_logprob
import trl.trainer.utils
from comparisons import without_repacking
from helpers import UNEVEN, assert_same_result, write_chats
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    Qwen3Config,
)
from trl.trainer.utils import add_fused_lm_head

from peftcli.model.fused_lora import disable_fused_lora, enable_fused_lora
from peftcli.model.fused_loss import score_targets
from peftcli.run_dir import read_json

Write = Callable[..., Path]
Cli = Callable[..., int]

SMALL = {
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    "phi": PhiConfig(**SMALL, num_key_value_heads=4, resid_pdrop=0.0),  # its head has a bias
    "gpt2": GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
}
OTHERWISE = {
    "softcapped": Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=16, final_logit_softcapping=30.0),
    "scaled": CohereConfig(**SMALL, num_key_value_heads=2, logit_scale=0.0625),
    "balanced": MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, output_router_logits=True),
}


def fused(config: Any, **settings: Any) -> Any:
    """A model with LoRA and TRL's head, as its trainer makes it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": "all-linear", **settings})
    wrapped = get_peft_model(model, adapter)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        if name.endswith("lm_head.bias"):
            torch.nn.init.normal_(parameter.data)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return wrapped.train()


def rows() -> dict[str, Tensor]:
    """Three rows: most of one is a prompt, one is all prompt, one ends early."""
    ids = torch.randint(3, 200, (3, 17), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[2, 9:] = 0
    labels[0, :12] = labels[1] = labels[2, 9:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def learned(model: Any, *, autocast: bool = False) -> tuple[Any, dict[str, Tensor]]:
    """What a fused forward gives, and the gradients of its loss."""
    model.zero_grad()
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = model(**rows(), fused_lm_head=True)
    found.loss.backward()
    return found, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], share: float) -> None:
    assert found.keys() == expected.keys() and len(found) > 4
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= share * gradient.abs().max(), name


@pytest.mark.numeric
@pytest.mark.parametrize("tile", [None, 3], ids=["one tile", "tiles of 3"])
@pytest.mark.parametrize("family", PLAIN)
def test_the_head_gives_the_values_and_gradients_of_trl(
    family: str, tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tile is not None:
        monkeypatch.setattr("peftcli.model.fused_loss.tile_rows", lambda vocabulary: tile)
    model = fused(PLAIN[family])
    expected, gradients = learned(model)
    assert score_targets(model.get_base_model())
    found, mine = learned(model)
    for name in ("loss", "log_probs", "entropy"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), atol=1e-5), name
    assert torch.equal(found.is_top1, expected.is_top1) and torch.equal(found.label_mask, expected.label_mask)
    same_gradients(mine, gradients, 1e-4)


def test_under_autocast_the_head_is_as_exact_as_that_of_trl() -> None:
    exact = learned(fused(PLAIN["llama"]))[1]
    model = fused(PLAIN["llama"])
    off = []
    for ours in (False, True):
        assert not ours or score_targets(model.get_base_model())
        found = learned(model, autocast=True)[1]
        off.append(max((found[name] - exact[name]).norm() / exact[name].norm() for name in exact))
    assert off[1] <= 1.2 * off[0] and 0 < off[1] < 0.1


def test_of_rows_without_a_target_the_loss_is_zero_and_so_are_the_gradients() -> None:
    model = fused(PLAIN["llama"])
    assert score_targets(model.get_base_model())
    inputs = rows()
    inputs["labels"][:] = -100
    loss = model(**inputs, fused_lm_head=True).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_two_likeliest_tokens_are_one_hit() -> None:
    # A model that says nothing, of which all logits are equal, must not look as if it knew everything.
    model = fused(PLAIN["llama"])
    assert score_targets(model.get_base_model())
    model.get_base_model().lm_head.weight.data.zero_()
    assert not model(**rows(), fused_lm_head=True).is_top1.any()


@pytest.mark.parametrize("family", OTHERWISE)
def test_a_head_that_is_more_than_a_product_is_left_to_trl(family: str) -> None:
    model = fused(OTHERWISE[family])
    before = model.get_base_model().forward
    assert not score_targets(model.get_base_model()) and model.get_base_model().forward == before


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_head_that_is_trained_is_left_to_trl(settings: dict[str, Any]) -> None:
    assert not score_targets(fused(PLAIN["llama"], **settings).get_base_model())


@pytest.mark.numeric
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}, {"use_rslora": True}], ids=["lora", "dropout", "rs"])
def test_the_joined_sum_gives_the_values_and_gradients_of_peft(settings: dict[str, Any]) -> None:
    model = fused(PLAIN["llama"], **settings)
    expected, gradients = learned(model)
    assert enable_fused_lora(model) == 14
    found, mine = learned(model)
    assert torch.allclose(found.log_probs, expected.log_probs, atol=1e-5)
    same_gradients(mine, gradients, 1e-4)
    disable_fused_lora(model)
    assert torch.equal(learned(model)[0].log_probs, expected.log_probs)  # PEFT's own again, to the bit


def test_under_autocast_the_joined_sum_is_as_exact_as_that_of_peft() -> None:
    model = fused(PLAIN["llama"])
    exact = learned(model)[0].log_probs
    apart = (learned(model, autocast=True)[0].log_probs - exact).norm()
    assert enable_fused_lora(model)
    joined = (learned(model, autocast=True)[0].log_probs - exact).norm()
    assert joined <= 1.2 * apart


@pytest.mark.numeric
def test_beside_a_narrow_base_the_sum_is_made_as_wide_as_by_peft() -> None:
    model = fused(PLAIN["llama"])
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    expected, _ = learned(model)
    assert enable_fused_lora(model)
    # Float32 sums in another order differ by 1e-6; a sum in bfloat16 would differ by 4e-3.
    assert torch.allclose(learned(model)[0].log_probs, expected.log_probs, atol=1e-5)


@pytest.mark.numeric
def test_in_4_bits_the_joined_sum_is_that_of_peft(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(PLAIN["llama"]).save_pretrained(tmp_path)
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = without_repacking(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantized))
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = rows()["input_ids"]
    expected = wrapped(input_ids=ids).logits
    assert enable_fused_lora(wrapped) == 14
    assert torch.allclose(wrapped(input_ids=ids).logits, expected, atol=1e-5)


@pytest.mark.numeric
def test_switched_off_merged_and_with_two_adapters_layers_do_what_peft_does() -> None:
    model = fused(PLAIN["llama"])
    assert enable_fused_lora(model)
    ids = rows()["input_ids"]

    def logits() -> Tensor:
        return model(input_ids=ids).logits.detach()

    tuned = logits()
    with model.disable_adapter():
        base = logits()
    model.merge_adapter()
    assert torch.allclose(logits(), tuned, atol=1e-4)
    model.unmerge_adapter()
    assert not torch.allclose(base, tuned, atol=1e-2)
    model.add_adapter(
        "second", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    model.base_model.set_adapter(["default", "second"])
    both = logits()
    disable_fused_lora(model)
    assert torch.equal(logits(), both) and not torch.allclose(both, tuned, atol=1e-3)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "bias"])
def test_layers_that_are_more_than_lora_are_left_to_peft(settings: dict[str, Any]) -> None:
    assert enable_fused_lora(fused(PLAIN["llama"], **settings)) == 0


def train_without(run_cli: Cli, recipe: Path, folder: Path, off: str, *words: str) -> Path:
    """A run without some optimizations."""
    run = folder / ("without-" + "-".join(filter(None, off.split(", "))))
    words = ("--output-dir", str(run), "--set", f"performance.disable=[{off}]", *words)
    assert run_cli("train", recipe, *words) == 0
    return run


@pytest.mark.numeric
@pytest.mark.parametrize("quantization", [{"bits": 4}, None], ids=["nf4", "whole"])
def test_each_lever_alone_and_all_together_learn_the_same(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, quantization: dict[str, Any] | None
) -> None:
    recipe = write_recipe(quantization=quantization, trainer=UNEVEN)
    plain = train_without(run_cli, recipe, tmp_path, "fused_loss, fused_lora, skip_adapter_casts, deferred_metrics")
    for off in ("", "fused_loss", "fused_lora", "deferred_metrics"):
        assert_same_result(train_without(run_cli, recipe, tmp_path, off), plain)


@pytest.mark.numeric
def test_the_turns_of_chats_learn_the_same_with_every_lever_and_with_none(
    run_cli: Cli, tmp_path: Path, tiny_llama: Path
) -> None:
    turns = [("user", "Say words"), ("assistant", "one two"), ("user", "And more"), ("assistant", "three")]
    chats = [
        {"messages": [{"role": role, "content": f"{text} {'so ' * (number % 5)}{number}"} for role, text in turns]}
        for number in range(24)
    ]
    recipe = write_chats(tmp_path, tiny_llama, chats, assistant_only_loss=True)
    plain = train_without(run_cli, recipe, tmp_path, "fused_loss, fused_lora, skip_adapter_casts, deferred_metrics")
    assert_same_result(train_without(run_cli, recipe, tmp_path, ""), plain)


@pytest.mark.numeric
def test_in_16_bit_the_casts_change_no_loss(write_recipe: Write, run_cli: Cli, tmp_path: Path) -> None:
    recipe = write_recipe(model={"dtype": "bfloat16"}, trainer={"max_steps": 4})
    assert_same_result(*(train_without(run_cli, recipe, tmp_path, off) for off in ("skip_adapter_casts", "")))


def test_the_plan_says_which_optimizations_it_uses(write_recipe: Write, run_cli: Cli, capfd: Any) -> None:
    recipe = write_recipe()

    def said(*words: str) -> dict[str, list[str]]:
        assert run_cli("plan", recipe, "--json", *words) == 0
        decisions = json.loads(capfd.readouterr().out)["decisions"]
        return {one["key"]: [one["value"], one["reason"]] for one in decisions}

    usual = said()
    assert usual["output layer"][0] == "only trained tokens, logits computed once"
    assert usual["LoRA"][0] == "added in one pass"
    less = said("--set", "performance.disable=[fused_loss]")
    assert less["output layer"] == ["library default", "performance.disable"]
    assert less["LoRA"] == usual["LoRA"]
    assert "output layer" not in said("--gpu", "a100-40")  # TRL's kernels do it there
    assert run_cli("plan", recipe, "--set", "performance.disable=[fused_los]") == 2
    assert "fused_loss" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changed", "layer", "used"),
    [
        ({}, "only trained tokens, logits computed once", ["deferred_metrics", "fused_lora", "fused_loss"]),
        (
            {"adapter": {"r": 4, "modules_to_save": ["lm_head"]}},
            "the output layer is trained",
            ["deferred_metrics", "fused_lora"],
        ),
        ({"adapter": {"method": "full", "r": None}}, "the output layer is trained", ["deferred_metrics"]),
        (
            {"trainer": {"max_steps": 2, "label_smoothing_factor": 0.1}},
            "label smoothing",
            ["deferred_metrics", "fused_lora"],
        ),
        (
            {"quantization": {"bits": 8}},
            "only trained tokens, logits computed once",
            ["deferred_metrics", "fused_loss"],
        ),
        (
            {"adapter": {"r": 4, "lora_bias": True}},
            "only trained tokens, logits computed once",
            ["deferred_metrics", "fused_loss"],
        ),
    ],
    ids=["usual", "saved head", "full", "smoothing", "8 bit", "bias"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's word on what smoothing costs
def test_plan_and_run_say_the_optimizations_that_are_used(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, changed: dict[str, Any], layer: str, used: list[str]
) -> None:
    recipe = write_recipe(**{"quantization": None, "trainer": {"max_steps": 2}, **changed})
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    assert read_json(tmp_path / "run" / "train.json")["optimizations"] == used
    said = {one["key"]: one for one in read_json(tmp_path / "run" / "plan.json")["decisions"]}
    assert layer in said["output layer"]["value"] + said["output layer"]["reason"]
    if "LoRA" in said:
        assert (said["LoRA"]["value"] == "added in one pass") == ("fused_lora" in used)


def test_an_optimizer_without_its_package_is_refused_before_anything_is_loaded(
    write_recipe: Write, run_cli: Cli, capfd: Any
) -> None:
    recipe = write_recipe(trainer={"optim": "galore_adamw", "optim_target_modules": ["q_proj"]})
    assert run_cli("plan", recipe) == 4
    assert "galore_adamw needs the package galore_torch" in capfd.readouterr().err
    assert run_cli("train", recipe) == 4
    assert run_cli("plan", recipe, "--gpu", "t4") == 0  # where it may be installed


def test_a_template_in_the_place_of_its_file_is_refused(write_recipe: Write, run_cli: Cli, capfd: Any) -> None:
    recipe = write_recipe(model={"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"})
    assert run_cli("validate", recipe) == 2
    assert "model.chat_template is a template; it must be the path of a" in capfd.readouterr().err


@pytest.mark.parametrize("trains_head", [False, True])
def test_a_run_goes_on_where_the_triton_kernels_of_the_loss_fail(
    write_recipe: Write,
    run_cli: Cli,
    tmp_path: Path,
    capfd: Any,
    monkeypatch: pytest.MonkeyPatch,
    trains_head: bool,
) -> None:
    """A CPU has no Triton, so TRL's kernels fail where TRL is told that it has."""
    monkeypatch.setattr("peftcli.model.fused_loss.TRITON_DEVICE", "cpu")
    for module in (trl.kernels.chunked_logprob, trl.trainer.utils):
        monkeypatch.setattr(module, "_use_triton", lambda device: True)
    monkeypatch.setattr(trl.trainer.utils, "_supports_trl_loss_kernel", trl.trainer.utils._supports_trl_loss_kernel)
    adapter = {"modules_to_save": ["lm_head"]} if trains_head else {}
    recipe = write_recipe(
        adapter=adapter, quantization=None, trainer={"max_steps": 2}, performance={"disable": ["fused_loss"]}
    )
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    instead = "TRL's loss without Triton, which is slower," if trains_head else "peftcli's fused loss"
    said = capfd.readouterr().err
    assert "TRL's Triton kernels for the loss failed their check: " in said and f"; {instead} is used instead" in said
    assert ("fused_loss" in read_json(tmp_path / "run" / "train.json")["optimizations"]) is not trains_head
