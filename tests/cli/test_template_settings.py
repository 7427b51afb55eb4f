"""Settings of the chat template hold in every command: data, train, resume, eval, generate, predict and merge."""

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from template_parity import FOLDER

from peftcli.run_dir import read_json
from tests.helpers import write_chats

Cli = Callable[..., int]
REASONED = [
    {"role": "user", "content": "One plus {n}?"},
    {"role": "assistant", "content": "<think>\nCount {n} up.\n</think>\n\nSum {n}."},
    {"role": "user", "content": "Again?"},
    {"role": "assistant", "content": "<think>\nCount {n} more.\n</think>\n\nTotal {n}."},
]
PLAIN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One plus {n}?"},
    {"role": "assistant", "content": "Sum {n}."},
]


def rows(chat: list[dict[str, str]], count: int = 24) -> list[dict[str, Any]]:
    return [
        {"messages": [turn | {"content": turn["content"].replace("{n}", f"{n}{n}")} for turn in chat]}
        for n in range(count)
    ]


def write_template(folder: Path, name: str) -> None:
    """A template of trl with the end token of tiny:llama."""
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    for end in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>"):
        text = text.replace(end, "</s>")
    (folder / "template.jinja").write_text(text, encoding="utf-8")


def set_keys(*keys: str) -> list[str]:
    return [
        word
        for key in ("model.chat_template=template.jinja", "dataset.max_length=512", *keys)
        for word in ("--set", key)
    ]


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path) -> Callable[..., Path]:
    def write(chat: list[dict[str, str]], template: str, **trainer: Any) -> Path:
        write_template(tmp_path, template)
        return write_chats(tmp_path, tiny_llama, rows(chat), **trainer)

    return write


def test_the_settings_of_a_run_hold_in_every_later_command(
    recipe: Callable[..., Path], run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = recipe(PLAIN, "qwen3")
    words = set_keys("model.template.enable_thinking=false", "dataset.system=fold")
    assert run_cli("train", path, "--output-dir", "run", *words) == 0
    stated = {"variables": {"enable_thinking": False}, "system": "fold"}
    data = read_json(tmp_path / "run" / "data.json")
    assert data["template"] == stated and data["template_mismatch_rows"] == 0 and data["context_only_rows"] == 0
    assert read_json(tmp_path / "run" / "adapter" / "peftcli.json")["template"] == stated
    assert run_cli("eval", "run") == 0 and run_cli("merge", "run") == 0
    for target in ("run", "run/merged"):
        capfd.readouterr()
        assert run_cli("generate", target, "Hello", "--max-new-tokens", 1, "--json") == 0
        assert json.loads(capfd.readouterr().out)["prompt"].endswith("assistant\n<think>\n\n</think>\n\n")
    template = (tmp_path / "run" / "merged" / "chat_template.jinja").read_text(encoding="utf-8")
    sample = read_json(tmp_path / "run" / "eval.json")["samples"][0]["prompt"]
    assert "Be brief.\n\nOne plus" in sample and sample.endswith("</think>\n\n")
    from transformers.utils.chat_template_utils import render_jinja_template

    served = render_jinja_template(
        conversations=[[PLAIN[0], {"role": "user", "content": "Hi"}]],
        chat_template=template,
        add_generation_prompt=True,
        eos_token="</s>",
        bos_token="<s>",
    )[0][0]
    assert "user\nBe brief.\n\nHi" in served and served.endswith("</think>\n\n")
    (tmp_path / "asked.jsonl").write_text(json.dumps({"messages": rows(PLAIN)[0]["messages"][:2]}))
    assert run_cli("predict", "run", "asked.jsonl", "--output", "answers.jsonl", "--max-new-tokens", 1) == 0


def test_earlier_answers_without_their_reasoning_are_context_and_named(
    recipe: Callable[..., Path], run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    path = recipe(REASONED, "qwen3")
    assert run_cli("data", path, "--json", *set_keys()) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["context_only_rows"] == found["train_rows"] + found["test_rows"]
    assert found["template_mismatch_rows"] == 0
    trained = ["".join(part["text"] for part in row["parts"] if part["kind"] == "trained") for row in found["preview"]]
    assert all("more." in text and "up." not in text and "Sum" not in text for text in trained)
    assert any("to train them too, set dataset.thinking: drop" in warning for warning in found["warnings"])


def test_a_prompt_that_does_not_fit_the_answers_stops_with_the_key(
    recipe: Callable[..., Path], run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    path = recipe(PLAIN, "qwen3_5_think")
    assert run_cli("data", path, *set_keys()) == 3
    said = " ".join(capfd.readouterr().err.split())
    assert "24 of 24 chats are trained with another text than evaluation and inference ask" in said
    assert "dataset.limits.max_template_mismatch: 0" in said and "chats.jsonl:" in said
    assert "set model.template: {enable_thinking: false}" in said
    assert run_cli("data", path, *set_keys("model.template.enable_thinking=false")) == 0
    capfd.readouterr()
    assert run_cli("data", path, *set_keys("model.template.thinking=false")) == 2
    assert "model.template.thinking" in capfd.readouterr().err


def test_a_template_that_refuses_a_system_role_names_the_key(
    recipe: Callable[..., Path], run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    path = recipe(PLAIN, "gemma")
    assert run_cli("data", path, *set_keys()) == 3
    assert "set dataset.system: fold" in " ".join(capfd.readouterr().err.split())
    assert run_cli("data", path, "--json", *set_keys("dataset.system=fold")) == 0
    found = json.loads(capfd.readouterr().out)
    assert "Be brief." in found["preview"][0]["parts"][0]["text"] and not found["dropped"]


def test_a_resumed_run_keeps_its_date(
    recipe: Callable[..., Path], run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(PLAIN, "llama3_2", max_steps=4, save_steps=2)
    name = "peftcli.data.template_settings.today"
    monkeypatch.setattr(name, lambda: datetime.date(2026, 11, 28))
    assert run_cli("train", path, "--output-dir", "run", *set_keys()) == 0
    run, again = tmp_path / "run", tmp_path / "again"
    shutil.copytree(run, again)
    for part in ("train.json", "eval.json", "metrics.json"):
        (again / part).unlink()
    for folder in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(again / folder)
    monkeypatch.setattr(name, lambda: datetime.date(2026, 11, 29))
    assert run_cli("train", path, "--output-dir", "again", "--resume", *set_keys()) == 0
    assert read_json(again / "data.json")["template"] == {"date": "2026-11-28"}
    assert read_json(again / "train.json")["resumed_from_step"] == 2
    templates = [(folder / "adapter" / "chat_template.jinja").read_text(encoding="utf-8") for folder in (run, again)]
    assert templates[0] == templates[1] and "28 Nov 2026" in templates[0]
    assert run_cli("eval", "again") == 0
    assert "28 Nov 2026" in read_json(again / "eval.json")["samples"][0]["prompt"]
