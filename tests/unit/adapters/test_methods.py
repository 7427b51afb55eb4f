"""Every method of the table on a tiny model: trains, leaves the base alone, reloads, merges or says why not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NF4, RATE, ROWS, base_of, learn, logits_of
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig

from peftcli.adapters.build import peft_config
from peftcli.errors import MachineError, RecipeError
from peftcli.merge.fold import bare_base, fold, refuse_unmergeable
from peftcli.methods.registry import METHODS
from peftcli.model.files import loaded_weights
from peftcli.model.heads import auto_class
from peftcli.model.inspect import inspect_model, trainable_counter
from peftcli.model.load import load_adapter, load_base
from peftcli.plan.adapter import resolve_adapter
from peftcli.plan.heads import with_head
from peftcli.plan.plan import Base
from peftcli.recipe.load import load_recipe
from peftcli.recipe.schema import AdapterSection

SETTINGS: dict[str, dict[str, Any]] = {
    "trainable_tokens": {"arguments": {"token_indices": list(range(5, 60))}},
    "fourierft": {"arguments": {"scaling": 20.0}},
}
RATES = {"vera": 0.1, "pvera": 0.1, "unilora": 0.1, "c3a": 0.3, "ia3": 0.1, "prompt": 0.3, "prefix": 0.1, "boft": 0.1}
"""Learning rates where the common one is far off."""


INT8 = {"bits": 8}
KINDS = {4: NF4, 8: INT8, 16: None}
"""Quantization by the bits of a weight."""


def settled(path: Path, name: str) -> AdapterSection:
    facts = inspect_model(str(path), AutoConfig.from_pretrained(path))
    return resolve_adapter(AdapterSection(method=name, **SETTINGS.get(name, {})), facts)[0]


def wrapped(base: Base, adapter: AdapterSection) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(load_base(base), peft_config(adapter, "causal-lm"))


@pytest.mark.numeric
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "bits"),
    [(name, bits) for bits in KINDS for name, method in METHODS.items() if bits == 16 or not method.on_bits(bits)],
)
def test_a_method_trains_reloads_and_merges(tiny_llama: Path, tmp_path: Path, name: str, bits: int) -> None:
    base = base_of(tiny_llama, KINDS[bits])
    adapter = settled(tiny_llama, name)
    before = logits_of(load_base(base))
    model = wrapped(base, adapter)
    config = AutoConfig.from_pretrained(tiny_llama)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable_counter(str(tiny_llama), config, "causal-lm")(adapter).parameters == trainable > 0

    losses = learn(model, RATES.get(name, RATE))
    assert min(losses[-3:]) < 0.98 * losses[0], losses
    tuned = logits_of(model)
    assert (tuned - before).abs().max() > 1e-2
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model), before, atol=1e-5, rtol=1e-5)

    model.save_pretrained(str(tmp_path))
    again = load_adapter(load_base(base), tmp_path)
    torch.testing.assert_close(logits_of(again), tuned, atol=1e-4, rtol=1e-4)

    if METHODS[name].merge:
        with pytest.raises(MachineError, match="cannot be merged"):
            refuse_unmergeable(tmp_path)
        return
    refuse_unmergeable(tmp_path)
    bare = bare_base(again)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    folded = fold(bare, tmp_path, loaded_weights(bare))
    missing = plain.load_state_dict(dict(folded.tensors()), strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    torch.testing.assert_close(logits_of(plain), tuned, atol=2e-3, rtol=2e-3)


RECIPE = """
model: {name: "tiny:llama"}
dataset: {path: rows.jsonl}
"""


@pytest.mark.parametrize(
    ("name", "bits"), [(name, bits) for bits in (4, 8) for name, method in METHODS.items() if method.on_bits(bits)]
)
def test_a_method_that_dies_on_quantized_weights_is_refused_at_validate(tmp_path: Path, name: str, bits: int) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{RECIPE}adapter: {{method: {name}}}\nquantization: {{bits: {bits}}}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=f"adapter.method {name} does not work on {bits}-bit weights: "):
        load_recipe(path)


def test_a_quantized_method_is_settled_on_the_same_modules_as_a_float_one(tiny_llama: Path) -> None:
    ia3 = settled(tiny_llama, "ia3")
    assert ia3.target_modules == ("k_proj", "v_proj", "down_proj")
    assert ia3.arguments["feedforward_modules"] == ["down_proj"]
    assert set(settled(tiny_llama, "ln_tuning").target_modules or ()) == {
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }


TASKS = {"sequence-classification": torch.tensor([0, 1, 1]), "token-classification": ROWS % 3}


@pytest.mark.numeric
@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_trains_an_encoder_with_a_head_or_is_refused(tmp_path: Path, name: str, task: str) -> None:
    if task not in METHODS[name].tasks:
        path = tmp_path / "recipe.yaml"
        recipe = RECIPE.replace('"tiny:llama"}', f'"tiny:llama", task: {task}}}')
        path.write_text(f"{recipe}adapter: {{method: {name}}}\n", encoding="utf-8")
        with pytest.raises(RecipeError, match=f"is not supported by adapter.method {name}"):
            load_recipe(path)
        return
    labels = ("a", "b", "c")
    config = BertConfig(
        vocab_size=64,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    facts = inspect_model("tiny-bert", config, task, labels=labels)
    adapter, _ = resolve_adapter(AdapterSection(method=name, **SETTINGS.get(name, {})), facts)
    adapter = with_head(adapter, facts, task)
    torch.manual_seed(0)
    base = auto_class(task).from_config(config).eval()
    with torch.no_grad():
        before = base(input_ids=ROWS).logits
    model = get_peft_model(base, peft_config(adapter, task))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    counted = trainable_counter("tiny-bert", config, task, labels=labels)(adapter).parameters
    assert counted == trainable

    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=0.005)
    losses = []
    model.train()
    for _ in range(10):
        loss = model(input_ids=ROWS, labels=TASKS[task]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert min(losses[-3:]) < losses[0]
    model.eval()
    with torch.no_grad():
        tuned = model(input_ids=ROWS).logits
        assert (tuned - before).abs().max() > 1e-3
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=ROWS).logits, before, atol=1e-5, rtol=1e-5)
        model.save_pretrained(str(tmp_path))
        torch.manual_seed(0)
        fresh = auto_class(task).from_config(config).eval()
        again = load_adapter(fresh, tmp_path)
        torch.testing.assert_close(again(input_ids=ROWS).logits, tuned, atol=1e-5, rtol=1e-4)
