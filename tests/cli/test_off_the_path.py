"""Damaged files, odd bytes and tight memory: one clear error, the right exit code, and nothing lost."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from peftcli.cache import SUMS

Write = Callable[..., Path]
Cli = Callable[..., int]
Rows = [{"text": f"row number {number}", "label": "ab"[number % 2]} for number in range(24)]


@pytest.fixture
def own_base(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns(SUMS))
    return folder


def write_run_mark(folder: Path) -> None:
    """A folder that passes for a run until its files are read."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text("")


def test_a_cut_off_weights_file_is_named(
    own_base: Path, write_recipe: Write, run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = own_base / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    recipe = write_recipe(model={"name": str(own_base)})
    assert run_cli("train", recipe) == 4
    err = capfd.readouterr().err
    assert f"error: {weights}: this file is cut off or damaged" in err and "download or copy it again" in err
    assert run_cli("doctor", recipe) == 4
    shown = capfd.readouterr()
    assert "cut off or damaged" in shown.out + shown.err


@pytest.mark.parametrize("wrong", ["a folder, not a file", "no such file"])
def test_doctor_names_weights_that_are_no_file(
    own_base: Path, write_recipe: Write, run_cli: Cli, capfd: pytest.CaptureFixture[str], wrong: str
) -> None:
    weights = own_base / "model.safetensors"
    weights.unlink()
    if wrong == "no such file":
        weights = own_base / "model-00001-of-00001.safetensors"
        (own_base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": weights.name}}))
    else:
        weights.mkdir()
    assert run_cli("doctor", write_recipe(model={"name": str(own_base)})) == 4
    shown = capfd.readouterr()
    assert f"{weights.name}: {wrong}; download or copy it again" in " ".join((shown.out + shown.err).split())


def test_a_token_without_a_row_in_the_embedding_is_refused(
    own_base: Path, write_recipe: Write, run_cli: Cli, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(own_base)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(50)])
    tokenizer.save_pretrained(own_base)
    (tmp_path / "rows.csv").write_text("text\n" + "".join(f"row {n} <extra{n}>\n" for n in range(20)))
    dataset = {"path": "rows.csv", "prompt": None, "completion": None, "text": "{text}", "split": {"test_size": 4}}
    recipe = write_recipe(model={"name": str(own_base)}, dataset=dataset)
    assert run_cli("train", recipe) == 3
    assert "the text holds token id 1,0" in capfd.readouterr().err


def test_an_alpha_that_overflows_is_refused(write_recipe: Write, run_cli: Cli, capfd: Any) -> None:
    assert run_cli("validate", write_recipe(adapter={"alpha": 1e300})) == 2
    assert "adapter.alpha" in capfd.readouterr().err


@pytest.mark.parametrize("where", ["argument", "stdin", "file"])
def test_a_prompt_that_is_not_utf_8_is_refused(where: str, tmp_path: Path) -> None:
    latin = b"caf\xe9"
    (tmp_path / "p.txt").write_bytes(latin)
    write_run_mark(tmp_path / "run")
    words: list[Any] = [sys.executable, "-m", "peftcli", "generate", "run"]
    words += {"argument": [latin], "file": ["--file", str(tmp_path / "p.txt")]}.get(where, [])
    given = latin if where == "stdin" else b""
    done = subprocess.run(words, cwd=tmp_path, input=given, capture_output=True, check=False)
    assert done.returncode == 3 and b"is not UTF-8" in done.stderr and b"Traceback" not in done.stderr


def test_too_little_memory_for_the_libraries_is_no_bug(tmp_path: Path) -> None:
    write_run_mark(tmp_path / "run")
    command = f"ulimit -v 1000000; exec {sys.executable} -m peftcli generate run hello"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 4 and "memory" in done.stderr and "bug of peftcli" not in done.stderr


def test_paths_with_a_tilde_or_a_variable_are_resolved_once(
    write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RUNS", str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(output_dir="~/runs/a", trainer={"max_steps": 2, "save_steps": 1})
    assert run_cli("train", recipe) == 0
    assert (tmp_path / "home/runs/a/checkpoints/checkpoint-2").is_dir() and not (tmp_path / "~").exists()
    assert run_cli("train", recipe) == 0 and "already finished" in "".join(capfd.readouterr())
    assert run_cli("validate", write_recipe(output_dir="$RUNS/a")) == 0
    assert run_cli("validate", write_recipe(output_dir="$NO_SUCH_VARIABLE/a")) == 2
    assert "the environment variable NO_SUCH_VARIABLE is not set" in capfd.readouterr().err
    assert run_cli("validate", write_recipe(dataset={"path": "$NO_SUCH_VARIABLE/a.csv"})) == 2
    assert "dataset.path" in capfd.readouterr().err


def test_the_files_of_a_run_can_be_read_by_others_where_the_umask_allows(
    write_recipe: Write, run_cli: Cli, tmp_path: Path
) -> None:
    before = os.umask(0o022)
    try:
        assert run_cli("train", write_recipe(trainer={"max_steps": 2}), "--output-dir", tmp_path / "open") == 0
        os.umask(0o077)
        assert run_cli("train", write_recipe(trainer={"max_steps": 2}), "--output-dir", tmp_path / "closed") == 0
    finally:
        os.umask(before)
    for run, mode in (("open", 0o644), ("closed", 0o600)):
        files = [path for path in (tmp_path / run).rglob("*") if path.is_file() and path.suffix != ".lock"]
        assert {(path.name, oct(stat.S_IMODE(path.stat().st_mode))) for path in files} == {
            (path.name, oct(mode)) for path in files
        }


CHAT = [{"role": "user", "content": "How do I reset it?"}, {"role": "assistant", "content": "Hold the button."}]
CHATS = [[{**CHAT[0], "content": f"How do I reset number {number % 10}?"}, CHAT[1]] for number in range(30)]


def test_a_missing_template_and_leaks_are_reported_together(
    own_base: Path, write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path
) -> None:
    (own_base / "chat_template.jinja").unlink()
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    dataset = {"path": "chats.jsonl", "prompt": None, "completion": None, "split": {"test_size": 10}}
    recipe = write_recipe(model={"name": str(own_base)}, dataset=dataset)
    assert run_cli("data", recipe) == 3
    said = capfd.readouterr().err
    assert "error: the data has 2 problems" in said and "the tokenizer has no chat template" in said
    assert "test rows are also in the training split" in said and "dataset.limits.max_leaked" in said


def test_a_template_with_a_syntax_error_names_its_line(
    own_base: Path, write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}\n{{ m.content }}\n{% endfor\n")
    recipe = write_recipe(model={"name": str(own_base), "chat_template": "own.jinja"})
    assert run_cli("data", recipe) == 2
    said = capfd.readouterr().err
    assert (
        f"error: {template}:" in said and "the chat template is not valid Jinja" in said and len(said.splitlines()) == 1
    )
