"""Merging: the merged model answers like the adapter, or nothing is left of it."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from peftcli.merge.drift import compare
from peftcli.merge.fold import fold
from peftcli.merge.save import write_weights
from peftcli.model.files import loaded_weights, original_weights
from peftcli.model.target import open_target
from peftcli.run_dir import read_json

Cli = Callable[..., int]
Write = Callable[..., Path]
LONGER = {"max_steps": 30, "per_device_train_batch_size": 8}

PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
for folder, answer in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    GenerationConfig.from_pretrained(folder)
    assert tokenizer.chat_template
    assert not hasattr(model.config, "quantization_config")
    with torch.no_grad():
        logits = model(**tokenizer("big apple 0 ->:", return_tensors="pt")).logits
    torch.save(logits, answer)
assert "peft" not in sys.modules and "bitsandbytes" not in sys.modules
"""

trained_once = pytest.mark.xdist_group("one training, merged several times")


@pytest.fixture(scope="module")
def runs(recipe_in: Write, cli_in: Cli, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A run on a quantized base, under True, and one on a base of full precision."""
    folder = tmp_path_factory.mktemp("merge")
    for quantized in (True, False):
        recipe = recipe_in(folder, trainer=LONGER, **({} if quantized else {"quantization": None}))
        assert cli_in(folder, "train", recipe, "--output-dir", str(quantized)) == 0
    return {quantized: folder / str(quantized) for quantized in (True, False)}


@pytest.fixture
def gated(runs: dict[bool, Path], tmp_path: Path) -> Callable[..., Path]:
    """A function that copies the run on a quantized base, with these gates in its recipe."""

    def copy(**gates: str) -> Path:
        run = Path(shutil.copytree(runs[True], tmp_path / "run"))
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"gates": gates}), encoding="utf-8")
        return run

    return copy


@pytest.fixture(scope="module")
def merged(runs: dict[bool, Path], cli_in: Cli) -> dict[bool, Path]:
    """The runs, merged; `plain.pt` in each is what plain transformers answer in a fresh process."""
    words = [sys.executable, "-c", PLAIN]
    copies = {}
    for quantized, run in runs.items():
        copies[quantized] = Path(shutil.copytree(run, run.with_name(f"merged-{quantized}")))
        assert cli_in(run.parent, "merge", copies[quantized]) == 0
        words += [str(copies[quantized] / "merged"), str(copies[quantized] / "plain.pt")]
    subprocess.run(words, check=True)
    return copies


def logits_of(target: Path) -> torch.Tensor:
    model, tokenizer = open_target(str(target)).load()
    with torch.no_grad():
        logits: torch.Tensor = model(**tokenizer("big apple 0 ->:", return_tensors="pt")).logits
    return logits


@pytest.mark.numeric
@trained_once
@pytest.mark.parametrize("quantized", [True, False])
def test_the_merged_model_loads_with_plain_transformers_and_answers_alike(
    merged: dict[bool, Path], quantized: bool
) -> None:
    answer = torch.load(merged[quantized] / "plain.pt")
    assert (answer - logits_of(merged[quantized])).abs().max() <= 0.01


@pytest.mark.numeric
@trained_once
@pytest.mark.parametrize("quantized", [True, False])
def test_the_drift_of_a_merge_is_measured_and_small(merged: dict[bool, Path], quantized: bool) -> None:
    run = merged[quantized]
    found = read_json(run / "merge.json")
    assert found["into"] == ("dequantized" if quantized else "original")
    assert found["top1_agreement"] >= 0.999 and found["max_abs_logit_difference"] <= 0.01
    metrics = read_json(run / "metrics.json")
    assert metrics["merged"]["loss"] == pytest.approx(metrics["adapter"]["loss"], abs=1e-3)
    assert metrics["merge"]["top1_agreement"] == found["top1_agreement"]


@pytest.mark.parametrize(
    "adapter", [{"r": 4}, {"method": "freeze", "last_layers": 1, "r": None}], ids=["lora", "freeze"]
)
def test_trained_rows_of_the_embedding_are_merged_too(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    recipe = write_recipe(
        adapter=adapter | {"trainable_token_indices": list(range(5, 60))},
        trainer=LONGER,
        evaluation={"baseline": False},
    )
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    assert run_cli("merge", "run") == 0
    found = read_json(tmp_path / "run" / "merge.json")
    assert found["top1_agreement"] == 1.0 and found["max_abs_logit_difference"] <= 0.01


@pytest.mark.numeric
@trained_once
def test_the_adapter_moved_the_model_so_that_agreement_means_something(runs: dict[bool, Path]) -> None:
    model, tokenizer = open_target(str(runs[True])).load()
    inputs = tokenizer("big apple 0 ->:", return_tensors="pt")
    with torch.no_grad():
        tuned = model(**inputs).logits
        with model.disable_adapter():
            base = model(**inputs).logits
    assert (tuned - base).abs().max() > 1


@trained_once
@pytest.mark.parametrize("into", ["original", "best"])
def test_other_bases_can_be_merged_into_and_are_measured(gated: Callable[..., Path], run_cli: Cli, into: str) -> None:
    run = gated(merge_top1_agreement=">= 0.5")
    assert run_cli("merge", "run", "--into", into) == 0
    found = read_json(run / "merge.json")
    kinds = [candidate["into"] for candidate in found["candidates"]]
    assert kinds == (["original"] if into == "original" else ["dequantized", "original"])
    best = min(found["candidates"], key=lambda candidate: candidate["loss"])
    assert found["into"] == best["into"] and found["metrics"]["loss"] == best["loss"]
    left = sorted(path.name for path in run.iterdir() if path.is_dir())
    assert left == ["adapter", "checkpoints", "merged"]


@trained_once
def test_above_the_tolerance_nothing_is_kept_and_the_exit_is_7(
    gated: Callable[..., Path], run_cli: Cli, capfd: Any
) -> None:
    run = gated(merge_max_abs_logit_difference="<= 1e-9")
    assert run_cli("merge", "run") == 7
    assert "max_abs_logit_difference is" in capfd.readouterr().err
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["adapter", "checkpoints"]
    assert read_json(run / "merge.json")["met"] is False
    assert read_json(run / "metrics.json")["gates"][0]["met"] is False


@pytest.mark.numeric
def test_many_small_shards_hold_the_same_weights_as_one(write_recipe: Write, run_cli: Cli, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert run_cli("train", write_recipe(trainer={"max_steps": 2}), "--output-dir", "run") == 0
    assert run_cli("merge", "run") == 0
    run = tmp_path / "run"
    target = open_target(str(run))
    bare = target.load()[0].unload()
    shards = tmp_path / "shards"
    shards.mkdir()
    write_weights(fold(bare, run / "adapter", loaded_weights(bare)), torch.float32, shards, shard_bytes=200_000)
    assert len(list(shards.glob("model-*.safetensors"))) > 3
    (shards / "config.json").write_bytes((run / "merged" / "config.json").read_bytes())
    one = AutoModelForCausalLM.from_pretrained(run / "merged").state_dict()
    many = AutoModelForCausalLM.from_pretrained(shards).state_dict()
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.numeric
def test_the_fold_equals_pefts_own_merge(write_recipe: Write, run_cli: Cli, tmp_path: Path) -> None:
    recipe = write_recipe(quantization=None, adapter={"use_dora": True}, trainer=LONGER)
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    target = open_target(str(tmp_path / "run"))
    assert target.adapter is not None
    model = target.load()[0]
    bare = target.load()[0].unload()
    folded = dict(fold(bare, target.adapter, original_weights(target.base, bare)).tensors())
    again = dict(fold(bare, target.adapter, loaded_weights(bare)).tensors())
    assert all(torch.equal(folded[name], again[name]) for name in folded)
    theirs = model.merge_and_unload(safe_merge=True).state_dict()
    for name, tensor in folded.items():
        assert torch.allclose(tensor, theirs[name], atol=1e-6), name


def test_a_trained_output_layer_is_merged_and_untied(write_recipe: Write, run_cli: Cli, tmp_path: Path) -> None:
    recipe = write_recipe(adapter={"modules_to_save": ["lm_head"]}, trainer=LONGER)
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    assert run_cli("merge", "run") == 0
    assert read_json(tmp_path / "run" / "merge.json")["max_abs_logit_difference"] <= 0.01


@pytest.mark.parametrize("family", ["gpt2", "Mixtral-8x7B", "gemma-2-9b"])
def test_other_architectures_merge(run_cli: Cli, tmp_path: Path, family: str) -> None:
    """GPT-2 keeps its weights turned round, Mixtral fuses its experts, Gemma caps its logits and ties its ends."""
    lines = (
        f"name: s\nmodel: {{name: org/{family}}}\nquantization: {{bits: 4}}\n",
        'dataset: {name: a/b, prompt: "{q} ->", completion: " {a}"}\n',
    )
    (tmp_path / "s.yaml").write_text("".join(lines))
    assert run_cli("train", "s.yaml", "--smoke") == 0
    assert run_cli("merge", "runs/s-smoke") == 0
    found = read_json(tmp_path / "runs" / "s-smoke" / "merge.json")
    assert found["kl_nats"] <= 1e-9
    if family.startswith("Mixtral"):  # its files store each expert by itself
        assert run_cli("merge", "runs/s-smoke", "--into", "original") == 0


@pytest.mark.parametrize("saved", ["[lm_head]", "[embed_tokens]", "[embed_tokens, lm_head]"])
def test_tied_ends_that_were_trained_are_written_apart(run_cli: Cli, tmp_path: Path, saved: str) -> None:
    lines = (
        "name: t\nmodel: {name: org/gemma-2-9b}\nquantization: {bits: 4}\n",
        f"adapter: {{modules_to_save: {saved}}}\ntrainer: {{learning_rate: 1e-2}}\n",
        'dataset: {name: a/b, prompt: "{q} ->", completion: " {a}"}\n',
    )
    (tmp_path / "t.yaml").write_text("".join(lines))
    assert run_cli("train", "t.yaml", "--smoke") == 0
    run = tmp_path / "runs" / "t-smoke"
    for into, limit in (("dequantized", 1e-4), ("original", 1.0)):
        assert run_cli("merge", "runs/t-smoke", "--into", into) == 0
        assert read_json(run / "merged" / "config.json")["tie_word_embeddings"] is False
        assert read_json(run / "merge.json")["max_abs_logit_difference"] <= limit


@pytest.mark.numeric
def test_drift_is_measured_by_hand_counts() -> None:
    before = [torch.tensor([[2.0, 0.0], [0.0, 1.0]])]
    after = [torch.tensor([[2.0, 0.5], [3.0, 1.0]])]
    drift = compare(before, after)
    assert (drift.rows, drift.positions, drift.top1_agreement) == (1, 2, 0.5)
    assert drift.max_abs_logit_difference == 3.0
    assert drift.mean_abs_logit_difference == pytest.approx(3.5 / 4)
    expected = torch.nn.functional.kl_div(
        after[0].log_softmax(-1), before[0].log_softmax(-1), log_target=True, reduction="sum"
    )
    assert drift.kl_nats == pytest.approx(float(expected) / 2, rel=1e-5)


def test_a_run_without_an_adapter_says_what_is_missing(
    write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path
) -> None:
    assert run_cli("merge", "nowhere") == 2
    assert "nowhere: no such folder" in capfd.readouterr().err
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "recipe.yaml").write_bytes(write_recipe().read_bytes())
    assert run_cli("merge", "half") == 4
    assert "has no adapter yet" in capfd.readouterr().err
    assert run_cli("merge", "half", "--into", "4bit") == 2
