"""LoRA that begins as a part of the weights, of what quantization lost or of the data: the base stays what it was."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NF4, ROWS, base_of, logits_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from peftcli.adapters.build import peft_config
from peftcli.errors import DataError, RecipeError
from peftcli.model.files import original_weights
from peftcli.model.load import load_adapter, load_base
from peftcli.recipe.schema import AdapterSection
from peftcli.run_dir import read_json
from peftcli.train.adapter_init import (
    ResidualInit,
    _eva_batches,
    initialize_from_data,
    initialize_from_quantization_error,
    leading_part,
    lora_layers,
    principal,
)

Cli = Callable[..., int]
Write = Callable[..., Path]


def lora(path: Path, word: str, quantization: dict[str, Any] | None = None, *, r: int = 4) -> PeftModel:
    adapter = AdapterSection(
        r=r, alpha=8.0, target_modules=("q_proj", "down_proj"), arguments={"init_lora_weights": word}
    )
    torch.manual_seed(0)
    model = get_peft_model(load_base(base_of(path, quantization)), peft_config(adapter, "causal-lm"))
    return model


def descend(model: torch.nn.Module, steps: int = 4, rate: float = 0.5) -> list[float]:
    """Losses of plain gradient descent."""
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ROWS, labels=ROWS, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data -= rate * parameter.grad
                parameter.grad = None
    return losses


@pytest.mark.numeric
@pytest.mark.parametrize("word", ["pissa", "pissa_niter_8", "olora"])
@pytest.mark.parametrize("quantization", [None, NF4])
def test_a_principal_start_is_the_base_at_first_and_off_and_reloads_as_plain_lora(
    tiny_llama: Path, tmp_path: Path, word: str, quantization: dict[str, Any] | None
) -> None:
    before = logits_of(load_base(base_of(tiny_llama, quantization)))
    model = lora(tiny_llama, word, quantization)
    start = ResidualInit(model, leading_part(word), None)
    torch.testing.assert_close(logits_of(model), before, atol=1e-3, rtol=1e-3)
    losses = descend(model)
    assert losses[-1] < losses[0]
    tuned = logits_of(model)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), before)
    start.convert_to_plain_lora()
    torch.testing.assert_close(logits_of(model), tuned, atol=1e-3, rtol=1e-3)
    model.save_pretrained(str(tmp_path))
    again = load_adapter(load_base(base_of(tiny_llama, quantization)), tmp_path)
    torch.testing.assert_close(logits_of(again), tuned, atol=1e-3, rtol=1e-3)
    assert read_json(tmp_path / "adapter_config.json")["r"] == 8


@pytest.mark.numeric
@pytest.mark.parametrize("word", ["pissa", "olora"])
def test_a_principal_start_learns_as_peft_does_with_a_changed_base(tiny_llama: Path, word: str) -> None:
    ours = lora(tiny_llama, word)
    ResidualInit(ours, leading_part(word), None)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=word
    )
    theirs = get_peft_model(load_base(base_of(tiny_llama, None)), config)
    rate = 0.05
    torch.testing.assert_close(descend(ours, rate=rate), descend(theirs, rate=rate), atol=1e-3, rtol=1e-3)


@pytest.mark.numeric
@pytest.mark.parametrize("word", ["pissa", "olora"])
def test_a_full_rank_start_is_the_whole_weight(word: str) -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    down, up = principal(weight, 4, 2.0, word)
    taken = 2.0 * up @ down if word == "pissa" else up @ down
    torch.testing.assert_close(taken, weight, atol=1e-5, rtol=1e-5)


@pytest.mark.numeric
def test_loftq_begins_nearer_to_the_weights_before_quantization(tiny_llama: Path) -> None:
    exact = logits_of(load_base(base_of(tiny_llama, None)))
    base = base_of(tiny_llama, NF4)
    packed = logits_of(load_base(base))
    adapter = AdapterSection(r=32, alpha=16.0, arguments={"init_lora_weights": "loftq"})
    model = get_peft_model(load_base(base), peft_config(adapter, "causal-lm"))
    initialize_from_quantization_error(model, original_weights(base, model.get_base_model()))

    def distance(logits: Tensor) -> float:
        return (logits - exact).square().mean().item()

    assert distance(logits_of(model)) < 0.7 * distance(packed)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), packed)


@pytest.mark.parametrize(("rows", "pooled", "batches"), [(40, False, 5), (40, True, 2), (9, False, 1)])
def test_eva_gets_no_batch_that_peft_would_leave_out(rows: int, pooled: bool, batches: int) -> None:
    found = _eva_batches([[5] * 3] * rows, 16, pooled=pooled)
    assert len(found) == batches
    assert all(len(some) * (1 if pooled else 3) >= 16 for some in found)


def test_eva_says_what_it_lacks_in_place_of_waiting_for_ever(tiny_llama: Path) -> None:
    rows = [[5, 6, 7]] * 4  # 12 tokens, of which 16 directions are asked for
    with pytest.raises(DataError, match="needs 16 directions, but there are only 12 tokens"):
        initialize_from_data(lora(tiny_llama, "eva", r=8), rows, 0)
    with pytest.raises(DataError, match="needs 16 directions, but there are only 9 rows"):
        initialize_from_data(lora(tiny_llama, "eva", r=8), [[5, 6, 7]] * 9, 0, pooled=True)
    with pytest.raises(RecipeError, match=r"lower adapter\.r"):
        initialize_from_data(lora(tiny_llama, "eva", r=80), [list(range(5, 200))] * 9, 0)


def test_eva_that_never_settles_ends(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcli.train.adapter_init.MOST_BATCHES", 2)
    drawn = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 200, (20,), generator=drawn).tolist() for _ in range(40)]
    with pytest.raises(RecipeError, match="have not converged after 2 batches"):
        initialize_from_data(lora(tiny_llama, "eva"), rows, 0)


@pytest.mark.numeric
def test_eva_gives_more_rank_where_the_inputs_need_it_and_reloads(tiny_llama: Path, tmp_path: Path) -> None:
    before = logits_of(load_base(base_of(tiny_llama, None)))
    model = lora(tiny_llama, "eva")
    initialize_from_data(model, [list(range(number, number + 20 + number)) for number in range(5, 45)], 0)
    ranks = {layer.r["default"] for _, layer in lora_layers(model)}
    assert len(ranks) > 1
    torch.testing.assert_close(logits_of(model), before, atol=1e-4, rtol=1e-4)
    descend(model)
    tuned = logits_of(model)
    model.save_pretrained(str(tmp_path))
    again = load_adapter(load_base(base_of(tiny_llama, None)), tmp_path)
    torch.testing.assert_close(logits_of(again), tuned, atol=1e-4, rtol=1e-4)


@pytest.mark.numeric
@pytest.mark.parametrize("word", ["pissa", "eva"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, word: str
) -> None:
    trainer = {"max_steps": 6, "per_device_train_batch_size": 8, "save_steps": 3}
    recipe = write_recipe(adapter={"r": 4, "dropout": 0.1, "init_lora_weights": word}, trainer=trainer)
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    run, again = tmp_path / "run", tmp_path / "again"
    shutil.copytree(run, again)
    for name in ("train.json", "eval.json", "metrics.json"):
        (again / name).unlink()
    for name in ("adapter", "checkpoints/checkpoint-6"):
        shutil.rmtree(again / name, ignore_errors=True)
    assert run_cli("train", recipe, "--output-dir", "again", "--resume") == 0
    assert read_json(again / "train.json")["resumed_from_step"] == 3
    weights = [folder / "adapter" / "adapter_model.safetensors" for folder in (run, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert run_cli("eval", "again") == 0


def test_lora_plus_gives_the_second_matrix_its_own_learning_rate(
    write_recipe: Write, run_cli: Cli, tmp_path: Path
) -> None:
    trainer = {"max_steps": 3, "save_steps": 2, "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    recipe = write_recipe(adapter={"r": 4, "loraplus_lr_ratio": 16}, trainer=trainer)
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    stored = torch.load(tmp_path / "run" / "checkpoints" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    rates = {round(group["lr"], 6): len(group["params"]) for group in stored["param_groups"] if group["params"]}
    assert rates == {1e-3: 14, 1.6e-2: 14}


def test_a_run_does_not_go_on_with_another_argument_of_its_method(
    write_recipe: Write, run_cli: Cli, capfd: Any
) -> None:
    trainer = {"max_steps": 4, "save_steps": 2}
    recipe = write_recipe(adapter={"r": 4, "init_lora_weights": "olora"}, trainer=trainer)
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    (Path("run") / "train.json").unlink()
    (Path("run") / "metrics.json").unlink()
    words = ("train", recipe, "--output-dir", "run", "--resume", "--set", "adapter.init_lora_weights=pissa")
    assert run_cli(*words, "--force", "adapter.init_lora_weights") == 2
    assert 'adapter.init_lora_weights: "olora" -> "pissa"' in capfd.readouterr().err
