"""Tokens added to the vocabulary: their rows are trained, saved with the adapter and merged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from peftcli.errors import RecipeError
from peftcli.model.target import open_target
from peftcli.recipe.load import load_recipe
from peftcli.run_dir import read_json

Cli = Callable[..., int]
Write = Callable[..., Path]
TOKENS = ["<tool>", "<result>"]
ROWS = {"prompt": "<tool>{thing} ->:", "completion": "<result>{kind}"}


def base(source: Path, folder: Path, *, tied: bool) -> str:
    """A base with the tokenizer of another one; its output layer may share the weights of the embedding."""
    tokenizer = AutoTokenizer.from_pretrained(str(source))
    config = AutoConfig.from_pretrained(str(source))
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return str(folder)


@pytest.mark.parametrize(
    ("tied", "bits"),
    [pytest.param(True, None, id="tied", marks=pytest.mark.slow), pytest.param(False, 4, id="separate-4bit")],
)
def test_new_tokens_are_trained_saved_merged_and_opened(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, tiny_llama: Path, capfd: Any, tied: bool, bits: int | None
) -> None:
    recipe = write_recipe(
        model={"name": base(tiny_llama, tmp_path / "base", tied=tied), "add_tokens": TOKENS},
        quantization=None if bits is None else {"bits": bits},
        dataset=ROWS,
    )
    assert run_cli("plan", recipe, "--json") == 0
    shown = {one["key"]: one["reason"] for one in json.loads(capfd.readouterr().out)["decisions"]}["new tokens"]
    assert ("lm_head" in shown) is not tied and "only their rows" in shown
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    rows = AutoTokenizer.from_pretrained(str(tiny_llama)).vocab_size
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    trained = {name: tensor for name, tensor in tensors.items() if "trainable_tokens_delta" in name}
    assert len(trained) == (1 if tied else 2) and {tensor.shape[0] for tensor in trained.values()} == {len(TOKENS)}
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "run" / "adapter"))
    ids = [tokenizer.convert_tokens_to_ids(token) for token in TOKENS]
    assert ids == sorted(ids) and min(ids) >= rows
    one, other = (open_target(str(tmp_path / "run")).load()[0] for _ in range(2))
    text = tokenizer("<tool>apple", return_tensors="pt")
    assert text.input_ids[0, 0] == ids[0] or text.input_ids[0, 1] == ids[0]
    with torch.inference_mode(), one.disable_adapter(), other.disable_adapter():
        assert torch.equal(one(**text).logits, other(**text).logits)  # the base has the same new rows each time
    assert run_cli("merge", "run", *(() if bits is None else ("--into", "best"))) == 0
    found = read_json(tmp_path / "run" / "merge.json")
    closest = min(one["max_abs_logit_difference"] for one in found["candidates"])
    assert closest <= 1e-3  # float32 products of weights of the same values; 4-bit kernels round elsewhere
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "run" / "merged"))
    assert merged.get_input_embeddings().weight.shape[0] > max(ids)
    weight = merged.get_input_embeddings().weight[ids]
    name = next(name for name in trained if "embed_tokens" in name)
    assert torch.allclose(weight, trained[name].to(weight.dtype), atol=1e-6)
    for place in ("run", "run/merged"):
        assert run_cli("generate", place, "<tool>apple", "--max-new-tokens", "2", "--json") == 0


def test_a_token_that_the_tokenizer_has_is_refused(
    write_recipe: Write, run_cli: Cli, capfd: Any, tiny_llama: Path
) -> None:
    known = AutoTokenizer.from_pretrained(str(tiny_llama)).eos_token
    assert run_cli("plan", write_recipe(model={"add_tokens": [known]})) == 2
    assert "the tokenizer already has them" in capfd.readouterr().err


def test_a_method_that_cannot_train_the_new_rows_is_refused(write_recipe: Write) -> None:
    recipe = write_recipe(model={"add_tokens": TOKENS}, adapter={"method": "loha"}, quantization=None)
    with pytest.raises(RecipeError, match=r"model.add_tokens: .* cannot train the embedding rows of new tokens"):
        load_recipe(recipe)
