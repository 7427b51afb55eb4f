"""Forgetting: the loss of base and adapter on a text of the user's choice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from peftcli.data.retention import read_retention
from peftcli.errors import DataError, RecipeError
from peftcli.recipe.dump import dump_recipe
from peftcli.recipe.load import load_recipe

Write = Callable[..., Path]
Cli = Callable[..., int]
STORY = "The old man had a small boat. He went to the sea and took his net with him."
TINYSTORIES = Path(__file__).parents[3] / "shared" / "data" / "tinystories" / "tinystories_clean.jsonl"


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


def stories(folder: Path, *more: str) -> Path:
    """Six stories as JSON lines, and further lines behind them."""
    path = folder / "stories.jsonl"
    lines = [json.dumps({"text": f"{STORY} It was day {number}."}) for number in range(6)]
    path.write_text("\n".join([*lines, *more]) + "\n", encoding="utf-8")
    return path


def test_windows_lie_end_to_end_and_all_tokens_but_the_first_of_each_count(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = read_retention(stories(tmp_path), tokenizer, length=8, tokens=10_000)
    rows = [json.loads(line)["text"] for line in (tmp_path / "stories.jsonl").read_text().splitlines()]
    expected = [ids[at : at + 8] for ids in tokenizer(rows)["input_ids"] for at in range(0, len(ids), 8)]
    assert found.windows == [window for window in expected if len(window) > 1]
    assert found.tokens == sum(len(window) - 1 for window in found.windows)
    assert found.table().column("labels").to_pylist() == found.windows


@pytest.mark.parametrize("tokens", [1, 7, 8, 30])
def test_the_bound_is_met_to_the_token(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
    found = read_retention(stories(tmp_path), tokenizer, length=8, tokens=tokens)
    assert found.tokens == tokens == sum(len(window) - 1 for window in found.windows)


def test_a_long_text_file_begins_once_however_many_pieces_it_is_read_in(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "sea.txt").write_text(f"{STORY}\n" * 2000, encoding="utf-8")
    found = read_retention(tmp_path / "sea.txt", tokenizer, length=64, tokens=10**7)
    assert len(f"{STORY}\n" * 2000) > 2 * 64 * 1024  # several pieces
    first = tokenizer("a")["input_ids"][0]
    begins_itself = first not in tokenizer("a", add_special_tokens=False)["input_ids"]
    assert sum(window.count(first) for window in found.windows) == (1 if begins_itself else 0)


def test_rows_without_text_are_counted_with_their_place(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = stories(tmp_path, json.dumps({"text": "  "}), json.dumps({"text": None}), json.dumps({"text": 3}))
    found = read_retention(path, tokenizer, length=64, tokens=10_000)
    assert found.dropped.counts == {"without text": 3}
    assert found.dropped.places == {"without text": ["stories.jsonl:7", "stories.jsonl:8", "stories.jsonl:9"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"question": "a", "answer": "b"}\n', r"a\.jsonl: its columns are question, answer; .*column text"),
        (
            "a.dat",
            "words\n",
            r"a\.dat: the ending is not known; evaluation\.forgetting_text takes a text with the ending",
        ),
        ("a.jsonl", '{"text": ""}\n', r"a\.jsonl: no text that could be predicted; name another text"),
    ],
)
def test_a_text_that_cannot_serve_says_what_can(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_retention(tmp_path / name, tokenizer, length=64, tokens=100)


def plain_loss(model: Any, tokenizer: PreTrainedTokenizerBase, path: Path, length: int) -> float:
    """Nats per token, one window at a time, with the loss that transformers computes."""
    nats, tokens = 0.0, 0
    for line in path.read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"])["input_ids"]
        for at in range(0, len(ids), length):
            window = torch.tensor([ids[at : at + length]])
            if window.shape[1] > 1:
                with torch.no_grad():
                    nats += model(input_ids=window, labels=window).loss.item() * (window.shape[1] - 1)
                tokens += window.shape[1] - 1
    return nats / tokens


@pytest.mark.numeric
def test_both_losses_are_those_of_the_base_alone_and_of_the_adapter(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, tiny_llama: Path, tokenizer: PreTrainedTokenizerBase, capfd: Any
) -> None:
    text = stories(tmp_path, json.dumps({"text": ""}))
    recipe = write_recipe(
        quantization=None,
        dataset={"max_length": 24},
        evaluation={"max_new_tokens": 2, "samples": 1, "forgetting_text": text.name},
        gates={"forgetting_loss": "< 100", "forgetting_change": "< -50"},
    )
    assert run_cli("train", recipe, "--output-dir", "run") == 7
    said = capfd.readouterr()
    assert "Forgetting: loss on another text" in said.out and "forgetting_change is" in said.err
    run = tmp_path / "run"
    found = json.loads((run / "metrics.json").read_text())["retention"]
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    assert found["base_loss"] == pytest.approx(plain_loss(base, tokenizer, text, 24), rel=1e-5)
    tuned = PeftModel.from_pretrained(base, run / "adapter").eval()
    assert found["adapter_loss"] == pytest.approx(plain_loss(tuned, tokenizer, text, 24), rel=1e-5)
    assert found["change"] == pytest.approx(found["adapter_loss"] - found["base_loss"])
    assert abs(found["change"]) > 1e-4 and found["path"] == "stories.jsonl"
    gates = {gate["name"]: gate["met"] for gate in json.loads((run / "metrics.json").read_text())["gates"]}
    assert gates == {"forgetting_loss": True, "forgetting_change": False}
    report = (run / "report.md").read_text(encoding="utf-8")
    assert "| Forgetting: loss on another text" in report and "left out there: 1 row without text" in report
    assert run_cli("eval", "run") == 0
    assert json.loads((run / "metrics.json").read_text())["retention"] == found


def test_without_a_baseline_the_base_is_still_measured_on_the_text(
    write_recipe: Write, run_cli: Cli, tmp_path: Path
) -> None:
    stories(tmp_path)
    asked = {"max_new_tokens": 2, "baseline": False, "forgetting_text": "stories.jsonl", "forgetting_tokens": 100}
    recipe = write_recipe(quantization=None, evaluation=asked, trainer={"max_steps": 1})
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["base"] is None and metrics["adapter"] is not None
    assert metrics["retention"]["base_loss"] > 0 and metrics["retention"]["tokens"] == 100


def test_a_text_that_is_missing_is_said_before_the_weights_are_loaded(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, capfd: Any
) -> None:
    recipe = write_recipe(evaluation={"forgetting_text": "none.txt"})
    assert run_cli("train", recipe, "--output-dir", "run") == 3
    assert "none.txt: no such file" in capfd.readouterr().err
    assert not (tmp_path / "run" / "eval.json").exists()


def test_the_path_is_relative_to_the_recipe_and_stays_so_when_written(write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe(evaluation={"forgetting_text": "stories.jsonl"})
    loaded = load_recipe(recipe).recipe
    assert loaded.evaluation.forgetting_text == str(tmp_path / "stories.jsonl")
    assert "forgetting_text: ../stories.jsonl" in dump_recipe(loaded, tmp_path / "run" / "recipe.yaml")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": {"name": "x", "task": "sequence-classification"}, "evaluation": {"forgetting_text": "a.txt"}},
            r"recipe\.yaml:\d+: evaluation\.forgetting_text needs model\.task: causal-lm",
        ),
        ({"evaluation": {"forgetting_tokens": 500}}, r"evaluation\.forgetting_tokens stands alone; name the text"),
        ({"gates": {"forgetting_change": "< 1"}}, r"gates\.forgetting_change watches a text; name it in evaluation"),
    ],
)
def test_what_cannot_stand_together_is_refused(write_recipe: Write, sections: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write_recipe(**sections))


@pytest.mark.skipif(not TINYSTORIES.is_file(), reason="the shared data are not here")
def test_a_real_text_is_read_up_to_the_bound(tokenizer: PreTrainedTokenizerBase) -> None:
    found = read_retention(TINYSTORIES, tokenizer, length=512, tokens=5000)
    assert found.tokens == 5000 and not found.dropped.counts
