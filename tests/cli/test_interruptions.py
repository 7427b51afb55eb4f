"""What goes wrong in the middle of a run: memory, numbers, stops outside the loop, and what changed since."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from comparisons import assert_same_adapter, assert_same_losses
from safetensors.torch import load_file

from peftcli.errors import MemoryExhausted, RecipeError
from peftcli.model import scoring
from peftcli.model.oom import ShrinkingBatches
from peftcli.progress import Silent
from peftcli.run_dir import read_json, read_log, write_json
from peftcli.train import checkpoint
from peftcli.train.micro_batch import MicroBatches, split_batch
from peftcli.train.resume import refuse_changes
from peftcli.train.step import MOST_FLAT_STEPS
from peftcli.train.trainers import Trainer

Write = Callable[..., Path]
Cli = Callable[..., int]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(run / "adapter" / "adapter_model.safetensors"))


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_log(run / "log.jsonl") if "loss" in row]


def small_memory(monkeypatch: pytest.MonkeyPatch, tokens: int, first_step: int = 0) -> None:
    """Let every training forward of more tokens run out of memory, half of its gradients added already."""
    whole = Trainer.compute_loss

    def limited(self: Trainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = whole(self, model, inputs, *args, **kwargs)
        if model.training and inputs["input_ids"].numel() > tokens and self.state.global_step >= first_step:
            loss.backward()  # what a backward that dies half-way leaves in the gradients
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss

    monkeypatch.setattr(Trainer, "compute_loss", limited)


# Memory


@pytest.mark.numeric
@pytest.mark.parametrize("batching", ["padded", "padding_free"])
def test_when_memory_runs_out_the_step_is_repeated_in_pieces_with_the_same_result(
    write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batching: str
) -> None:
    recipe = write_recipe(
        trainer={"max_steps": 5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "save_steps": 4},
        performance={"batching": batching},
    )
    assert run_cli("train", recipe, "--output-dir", "whole") == 0
    small_memory(monkeypatch, tokens=60, first_step=2)
    capfd.readouterr()
    assert run_cli("train", recipe, "--output-dir", "small") == 0
    assert "step 3: out of memory; its rows are now split into" in capfd.readouterr().err
    whole, small = (tmp_path / name for name in ("whole", "small"))
    assert_same_losses(losses(small), losses(whole))
    assert_same_adapter(adapter(small), adapter(whole))
    facts, expected = read_json(small / "train.json"), read_json(whole / "train.json")
    assert [event["step"] for event in facts["out_of_memory"]] and not expected["out_of_memory"]
    assert all(event["step"] == 3 for event in facts["out_of_memory"])
    for key in ("tokens", "trained_tokens", "rows", "steps"):
        assert facts[key] == expected[key], key
    manifest = read_json(small / "checkpoints" / "checkpoint-4" / "manifest.json")
    assert manifest["counters"]["shrunk"] == len(facts["out_of_memory"])  # the next session does not run into it again


def test_what_does_not_fit_in_small_pieces_either_ends_with_5_and_says_what_did(
    write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_memory(monkeypatch, tokens=0, first_step=2)
    recipe = write_recipe(trainer={"max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 2})
    assert run_cli("train", recipe, "--output-dir", "run") == 5
    said = capfd.readouterr().err
    assert "step 3: its 4 rows in 4 micro-batches do not fit" in said and "tokens at once fitted" in said
    assert "dataset.max_length" in said and "Traceback" not in said
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-2" / "manifest.json").is_file()


def batch_of(rows: int, tokens: int) -> dict[str, Any]:
    full = torch.ones(rows, tokens, dtype=torch.int64)
    return {"input_ids": full, "labels": full.clone(), "attention_mask": full.clone()}


@pytest.mark.parametrize("tokens", [None, 320])
def test_at_most_three_halvings(tokens: int | None) -> None:
    pieces = MicroBatches(tokens=tokens)
    sizes = []

    def one(piece: dict[str, Any]) -> torch.Tensor:
        sizes.append(piece["input_ids"].numel())
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(MemoryExhausted, match="step 7: its 64 rows in 8 micro-batches do not fit"):
        pieces.run([batch_of(64, 5)], one, lambda: None, nullcontext, 7)
    assert sizes == [320, 160, 80, 40] and [step for step, _ in pieces.events] == [7, 7, 7]
    with pytest.raises(MemoryExhausted, match="with several processes, they cannot"):
        MicroBatches(tokens=tokens, agree=lambda n: [n, n]).run([batch_of(4, 5)], one, lambda: None, nullcontext, 7)


@pytest.mark.parametrize(
    "text",
    [
        "Triton Error [CUDA]: out of memory",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_what_the_driver_says_of_full_memory_makes_the_pieces_smaller(text: str) -> None:
    sizes = []

    def one(piece: dict[str, Any]) -> torch.Tensor:
        sizes.append(len(piece["labels"]))
        if sizes[-1] > 2:
            raise RuntimeError(text)
        return torch.zeros(())

    MicroBatches(tokens=None).run([batch_of(4, 5)], one, lambda: None, nullcontext, 1)
    assert sizes == [4, 2, 2]


def test_gradients_are_shared_again_after_a_piece_that_failed() -> None:
    trainer = object.__new__(Trainer)
    trainer.accelerator = Accelerator(cpu=True)
    with pytest.raises(torch.OutOfMemoryError), trainer._apart(torch.nn.Linear(1, 1)):
        assert not trainer.accelerator.gradient_state.sync_gradients
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert trainer.accelerator.gradient_state.sync_gradients


def test_an_error_that_is_no_lack_of_memory_is_not_swallowed() -> None:
    def one(piece: dict[str, Any]) -> torch.Tensor:
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        MicroBatches(tokens=None).run([batch_of(4, 5)], one, lambda: None, nullcontext, 1)


def test_pieces_hold_every_row_once_without_needless_padding() -> None:
    lengths = [7, 2, 3, 5, 1]
    mask = torch.tensor([[1] * length + [0] * (7 - length) for length in lengths])
    ids = torch.arange(35).reshape(5, 7) * mask
    pieces = split_batch({"input_ids": ids, "attention_mask": mask, "use_cache": False}, 2)
    assert [piece["input_ids"].shape for piece in pieces] == [(3, 7), (2, 5)]
    found = [
        row[keep.bool()].tolist()
        for piece in pieces
        for row, keep in zip(piece["input_ids"], piece["attention_mask"], strict=True)
    ]
    assert found == [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    assert all(piece["use_cache"] is False for piece in pieces)


@pytest.mark.numeric
def test_the_evaluation_takes_fewer_rows_when_memory_runs_out(
    write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(trainer={"max_steps": 1}, evaluation={"batch_size": 8})
    assert run_cli("train", recipe, "--output-dir", "whole") == 0
    whole = scoring._score_batch

    def limited(model: Any, inputs: torch.Tensor, *rest: Any) -> Any:
        if len(inputs) > 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return whole(model, inputs, *rest)

    monkeypatch.setattr(scoring, "_score_batch", limited)
    capfd.readouterr()
    assert run_cli("train", recipe, "--output-dir", "small") == 0
    assert "base: loss: out of memory; continuing with 2 rows at once" in capfd.readouterr().err
    metrics = [read_json(tmp_path / name / "metrics.json")["adapter"] for name in ("whole", "small")]
    assert metrics[0]["loss"] == pytest.approx(metrics[1]["loss"], abs=1e-6)
    assert metrics[0]["exact_match"] == metrics[1]["exact_match"]


def test_a_batch_that_other_limits_made_smaller_is_halved_from_what_it_was() -> None:
    fitting = ShrinkingBatches(128, "loss", Silent())

    def work() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for taken in (10, 5, 2):
        assert fitting.attempt(taken, torch.device("cpu"), work) is None and fitting.rows == taken // 2
    with pytest.raises(MemoryExhausted, match="loss: 1 rows at once do not fit"):
        fitting.attempt(1, torch.device("cpu"), work)


# Numbers


def test_a_gradient_that_is_not_finite_stops_before_the_weights_take_it(
    write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Trainer.training_step

    def poisoned(self: Trainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = whole(self, model, *args, **kwargs)
        if self.state.global_step == 3:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")
        return loss

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    recipe = write_recipe(trainer={"max_steps": 6, "save_steps": 3})
    assert run_cli("train", recipe, "--output-dir", "run") == 6
    assert "step 4: the gradient norm is" in capfd.readouterr().err
    weights = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-3" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_learning_rate_beyond_reason_ends_with_6(
    write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path
) -> None:
    recipe = write_recipe(trainer={"max_steps": 30, "learning_rate": 1e30, "max_grad_norm": 0.0})
    assert run_cli("train", recipe, "--output-dir", "run") == 6
    assert "trainer.learning_rate" in capfd.readouterr().err
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_run_that_learns_nothing_any_more_is_told(
    write_recipe: Write, run_cli: Cli, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Trainer.compute_loss
    monkeypatch.setattr(Trainer, "compute_loss", lambda self, *a, **k: whole(self, *a, **k) * 0.0 + 5.0)
    assert run_cli("train", write_recipe(trainer={"max_steps": 20}), "--output-dir", "run") == 6
    said = capfd.readouterr().err
    assert f"step {MOST_FLAT_STEPS}: the gradient has been 0 for {MOST_FLAT_STEPS} steps at a loss of" in said
    assert "random guessing among 1024 tokens has 6.931" in said


# Stops outside the loop


@pytest.mark.numeric
def test_a_stop_in_the_baseline_or_in_the_last_evaluation_loses_nothing(
    write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(trainer={"max_steps": 4})
    assert run_cli("train", recipe, "--output-dir", "whole") == 0
    whole = scoring._score_batch
    run = tmp_path / "run"
    calls: list[int] = []

    def stopping(model: Any, *rest: Any) -> Any:
        calls.append(1)
        (run / "STOP").touch()
        return whole(model, *rest)

    monkeypatch.setattr(scoring, "_score_batch", stopping)
    capfd.readouterr()
    assert run_cli("train", recipe, "--output-dir", "run") == 75
    assert "stopped by a file named STOP in the run folder before the first step" in capfd.readouterr().err
    assert not (run / "train.json").exists()
    monkeypatch.setattr(
        scoring, "_score_batch", lambda *a: stopping(*a) if (run / "train.json").exists() else whole(*a)
    )
    assert run_cli("train", recipe, "--output-dir", "run") == 75
    assert "during the final evaluation" in capfd.readouterr().err
    monkeypatch.setattr(scoring, "_score_batch", whole)
    before = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    assert "training is finished; running the evaluation now" in capfd.readouterr().err
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert before == (tmp_path / "whole" / "adapter" / "adapter_model.safetensors").read_bytes()
    metrics = [read_json(folder / "metrics.json") for folder in (run, tmp_path / "whole")]
    assert metrics[0]["status"] == "finished" and metrics[0]["train"]["steps"] == 4
    assert metrics[0]["adapter"] == metrics[1]["adapter"] and metrics[0]["base"] == metrics[1]["base"]


def test_sigterm_while_the_data_are_read_ends_with_75(write_recipe: Write, tmp_path: Path, tiny_llama: Path) -> None:
    rows = [{"text": f"row {number} of a long file"} for number in range(400_000)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = tmp_path / "long.yaml"
    recipe.write_text(f"model: {{name: {tiny_llama}}}\ndataset: {{path: long.jsonl}}\n")
    words = [sys.executable, "-m", "peftcli", "train", str(recipe), "--output-dir", str(tmp_path / "run")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=_own_cache(tmp_path))
    while not list((tmp_path / "cache").glob("data/.*stage*/examples.arrow")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    assert "stopped by SIGTERM before the first step" in said and "Traceback" not in said
    assert not list((tmp_path / "cache").glob("data/*[0-9a-f]"))


def _own_cache(folder: Path) -> dict[str, str]:
    import os

    return os.environ | {"PEFTCLI_CACHE": str(folder / "cache")}


# What changed since


same_beginning = pytest.mark.xdist_group("one run that was stopped")


@pytest.fixture(scope="module")
def begun(recipe_in: Write, cli_in: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its `run`, which was stopped."""
    folder = tmp_path_factory.mktemp("begun")
    recipe = recipe_in(folder, trainer={"max_steps": 6})
    assert cli_in(folder, "train", recipe, "--output-dir", "run", "--max-time", "1s") == 75
    return folder


@pytest.fixture
def recipe_of_stopped(begun: Path, tmp_path: Path) -> Path:
    """The recipe of the run that was stopped, which lies in the test's folder as `run`."""
    shutil.copytree(begun / "run", tmp_path / "run")
    return begun / "recipe.yaml"


def test_other_data_under_the_same_name_are_refused_until_they_are_accepted(
    write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path, things: Path
) -> None:
    recipe = write_recipe(trainer={"max_steps": 6})
    assert run_cli("train", recipe, "--output-dir", "run", "--max-time", "1s") == 75
    things.write_text(things.read_text().replace("green leaf", "blue leaf"))
    capfd.readouterr()
    assert run_cli("train", recipe, "--output-dir", "run") == 2
    said = capfd.readouterr().err
    assert "data.train:" in said and "data.test:" in said and "--force data" in said
    assert run_cli("train", recipe, "--output-dir", "run", "--force", "data") == 0
    assert "changed and accepted: data.train" in capfd.readouterr().err
    assert read_json(tmp_path / "run" / "metrics.json")["train"]["resumed_from_step"] > 0


@same_beginning
def test_a_changed_recipe_key_is_accepted_by_its_name_only(
    recipe_of_stopped: Path, run_cli: Cli, capfd: Any, tmp_path: Path
) -> None:
    recipe = recipe_of_stopped
    changed = ("--set", "trainer.max_steps=7", "--set", "trainer.max_grad_norm=0.5")
    assert run_cli("train", recipe, "--output-dir", "run", *changed, "--force", "trainer.max_steps") == 2
    said = capfd.readouterr().err
    assert "trainer.max_grad_norm" in said and "trainer.max_steps" not in said.rsplit("another recipe", 1)[1]
    both = ("--force", "trainer.max_steps", "--force", "trainer.max_grad_norm")
    assert run_cli("train", recipe, "--output-dir", "run", *changed, *both) == 0
    assert read_json(tmp_path / "run" / "train.json")["steps"] == 7


@same_beginning
@pytest.mark.parametrize("change", ["trainer.learning_rate=0.5", "trainer.weight_decay=0.1", "adapter.r=4"])
def test_what_a_checkpoint_holds_cannot_be_forced_since_it_would_be_ignored(
    recipe_of_stopped: Path, run_cli: Cli, capfd: Any, change: str
) -> None:
    recipe = recipe_of_stopped
    assert run_cli("train", recipe, "--output-dir", "run", "--set", change, "--force", change.split("=")[0]) == 2
    said = capfd.readouterr().err
    assert "these keys are stored in its checkpoints" in said and change.split("=")[0] in said and "--overwrite" in said
    assert run_cli("train", recipe, "--output-dir", "run") == 0


def test_another_version_of_a_library_is_listed() -> None:
    before = {"data.train": "a" * 64, "base": None, "versions.torch": "2.13.0", "versions.trl": "1.16.0"}
    now = before | {"base": "b", "versions.torch": "2.14.0", "data.train": "c" * 64}
    with pytest.raises(RecipeError) as caught:
        refuse_changes(before, now, ["data"])
    assert "  versions.torch: 2.13.0 -> 2.14.0\n" in str(caught.value) and "data.train" not in str(caught.value)
    assert "--force versions" in str(caught.value)
    assert refuse_changes(before, now, ["data", "versions"]) == [
        "changed and accepted: data.train: aaaaaaaaaaaa -> cccccccccccc",
        "changed and accepted: versions.torch: 2.13.0 -> 2.14.0",
    ]
    assert refuse_changes({}, now, []) == []  # a run of a version that wrote no stamp


# Damage


NAMES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors")


def sealed(folder: Path, step: int) -> Path:
    """A checkpoint of made-up files, sealed as a real one is."""
    staged = folder / checkpoint.STAGING / f"checkpoint-{step}"
    staged.mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (staged / name).write_bytes(np.random.default_rng(number).bytes(500 + step))
    checkpoint.seal(staged, step, {"tokens": 1.0}, {"base": "b"})
    checkpoint.promote(staged, folder / staged.name)
    return folder / staged.name


@pytest.mark.parametrize("name", [*NAMES, checkpoint.MANIFEST])
@pytest.mark.parametrize("harm", ["cut", "flip", "remove", "empty"])
def test_any_harm_to_any_file_is_noticed_and_the_checkpoint_before_taken(tmp_path: Path, name: str, harm: str) -> None:
    sealed(tmp_path, 8)
    file = sealed(tmp_path, 16) / name
    data = bytearray(file.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
    file.write_bytes(b"" if harm == "empty" else data[: len(data) // 2] if harm == "cut" else data)
    if harm == "remove":
        file.unlink()
    found = checkpoint.newest_valid(tmp_path)
    assert found.step == 8 and [damaged for damaged, _ in found.damaged] == ["checkpoint-16"]
    assert (tmp_path / "checkpoint-16.bad").is_dir() and not (tmp_path / "checkpoint-16").exists()


def test_a_file_that_was_never_saved_is_no_silent_reset(tmp_path: Path) -> None:
    whole = sealed(tmp_path, 8)
    for name in NAMES:
        manifest = read_json(whole / checkpoint.MANIFEST)
        lacking = manifest | {"files": {key: value for key, value in manifest["files"].items() if key != name}}
        del lacking["sha256"]
        write_json(whole / checkpoint.MANIFEST, lacking | {"sha256": checkpoint._own_hash(lacking)})
        reason = checkpoint.damage(whole)
        assert reason is not None and "is not listed" in reason
        write_json(whole / checkpoint.MANIFEST, manifest)
    assert checkpoint.damage(whole) is None


def test_rotation_keeps_two_and_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        sealed(tmp_path, step)
    checkpoint.rotate(tmp_path, 1, best=str(tmp_path / "checkpoint-2"))
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [2, 6, 8]
