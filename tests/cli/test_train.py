"""Training through the command line: what is learned, what is written, and what stopping and going on costs."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import assert_close_logits
from helpers import trainer_of

from peftcli.cli.pipeline import plan_recipe
from peftcli.data.tokenize import IGNORED
from peftcli.model.load import load_base
from peftcli.recipe.load import load_recipe
from peftcli.run_dir import RunDir, read_json, read_log
from peftcli.train.resume import changes
from peftcli.train.run import adapter_off
from peftcli.train.trainers import Trainer

Cli = Callable[..., int]
Write = Callable[..., Path]


def digest(run: Path) -> str:
    """SHA-256 of a run's adapter."""
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_log(run / "log.jsonl")]


def wait_for_steps(run: Path) -> bool:
    """Wait until a run has logged some steps; False where it has not after two minutes."""
    deadline = time.monotonic() + 120
    while not ((run / "log.jsonl").is_file() and len(read_log(run / "log.jsonl")) > 3):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_run_learns_and_writes_all_that_the_contract_names(write_recipe: Write, run_cli: Cli, tmp_path: Path) -> None:
    recipe = write_recipe(trainer={"max_steps": 40, "per_device_train_batch_size": 8})
    assert run_cli("train", recipe) == 0
    run = tmp_path / "runs" / "things"
    names = "recipe.yaml plan.json environment.json data.json log.jsonl train.json eval.json metrics.json"
    for name in [*names.split(), "report.md", "report.html", "adapter/adapter_model.safetensors", "log.txt"]:
        assert (run / name).is_file(), name
    metrics = read_json(run / "metrics.json")
    assert metrics["status"] == "finished" and metrics["schema"] == 1 and metrics["merged"] is None
    assert metrics["adapter"]["loss"] < 0.5 * metrics["base"]["loss"]
    assert metrics["adapter"]["exact_match"] > metrics["base"]["exact_match"]
    assert metrics["data"] == {
        "train_rows": 36,
        "test_rows": 12,
        "dropped_rows": 0,
        "truncated_rows": 0,
        "leaked_rows": 0,
    }
    assert metrics["train"]["rows"] == 8 * 36 and metrics["train"]["epochs"] == 8.0
    assert metrics["train"]["steps"] == 40 and metrics["train"]["trained_tokens"] < metrics["train"]["tokens"]
    assert metrics["bytes"]["adapter"] == (run / "adapter" / "adapter_model.safetensors").stat().st_size
    card = (run / "adapter" / "README.md").read_text()
    assert "| Exact match ↑ |" in card and "None" not in card and str(tmp_path) not in card
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.numeric
def test_the_collated_batch_trains_the_completion_with_its_end_and_no_prompt(
    write_recipe: Write, tmp_path: Path
) -> None:
    trainer = trainer_of(write_recipe(), tmp_path / "run")
    tokenizer = trainer.processing_class
    for batch in list(trainer.get_train_dataloader())[:3]:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            text = tokenizer.decode(ids[labels == IGNORED], skip_special_tokens=True)
            trained = tokenizer.decode(ids[labels != IGNORED])
            assert text.endswith(" ->:")
            assert trained.endswith(tokenizer.eos_token) and "->" not in trained
            assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])


@pytest.mark.numeric
def test_batch_by_accumulation_and_batch_alone_give_the_same_losses(
    write_recipe: Write, run_cli: Cli, tmp_path: Path
) -> None:
    found = []
    for batch, accumulation in ((1, 8), (8, 1)):
        recipe = write_recipe(
            trainer={"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 4},
            evaluation={"baseline": False, "rows": 1, "samples": 0, "max_new_tokens": 2},
        )
        run = tmp_path / f"run{batch}"
        assert run_cli("train", recipe, "--output-dir", run) == 0
        found.append(losses(run))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_another_number_of_processes_is_refused_where_a_step_would_have_other_rows(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe()
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    (tmp_path / "run" / "metrics.json").unlink()
    loaded = load_recipe(recipe).recipe
    run = RunDir(tmp_path / "run")
    assert changes(run, loaded) == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert changes(run, loaded) == ["processes: 1 -> 2, so a step would have 8 rows instead of 4"]
    halved = loaded.model_copy(update={"trainer": {**loaded.trainer, "per_device_train_batch_size": 2}})
    assert changes(run, halved) == []


def test_sigterm_to_the_parent_stops_all_processes_with_a_checkpoint(write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe(trainer={"max_steps": 2000}, evaluation={"baseline": False})
    words = [sys.executable, "-m", "peftcli", "train", str(recipe), "--num-processes", "2", "--output-dir", "run"]
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for_steps(tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=90)[1]
    assert process.returncode == 75, said
    steps = read_json(tmp_path / "run" / "train.json")["steps"]
    assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{steps}" / "manifest.json").is_file()


def test_an_evaluation_leaves_the_gradients_of_4bit_as_they_were(write_recipe: Write, tmp_path: Path) -> None:
    def gradients(*, evaluate: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        split = {"split": {"test_size": 0.25, "validation_size": 0.25, "seed": 1}}
        trainer = trainer_of(write_recipe(dataset=split), tmp_path / "run")
        torch.manual_seed(1)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide every gradient of A
                parameter.data.normal_(std=0.02)
        if evaluate:
            with adapter_off(trainer.model):
                trainer.evaluate()
        torch.manual_seed(2)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        return {name: p.grad.flatten() for name, p in trainer.model.named_parameters() if p.grad is not None}

    before, after = gradients(evaluate=False), gradients(evaluate=True)
    assert before and before.keys() == after.keys()
    for name, gradient in before.items():
        assert torch.nn.functional.cosine_similarity(gradient, after[name], dim=0) > 0.99999, name


def test_the_fast_cpu_path_without_gradients_is_off(write_recipe: Write) -> None:
    from peftcli.model.load import FAST_CPU_PATH

    plan = plan_recipe(load_recipe(write_recipe())).plan
    found = [
        getattr(module, FAST_CPU_PATH) for module in load_base(plan.base).modules() if hasattr(module, FAST_CPU_PATH)
    ]
    assert found and not any(found)


def test_trainable_weights_are_float32_and_counted_right(write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe()
    trainer = trainer_of(recipe, tmp_path / "run")
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    planned = plan_recipe(load_recipe(recipe)).plan.trainable_parameters
    assert sum(parameter.numel() for parameter in trainable) == planned


@pytest.mark.numeric
def test_the_adapter_alone_loads_with_plain_peft_and_gives_the_same_logits(
    write_recipe: Write, run_cli: Cli, tmp_path: Path
) -> None:
    assert run_cli("train", write_recipe(), "--output-dir", "run") == 0
    script = """
import sys, torch
sys.path.insert(0, sys.argv[3])
from comparisons import without_repacking
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, BitsAndBytesConfig
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                            bnb_4bit_compute_dtype=torch.float32)
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
without_repacking(model).eval()
with torch.no_grad():
    logits = model(**tokenizer("big apple 0 ->:", return_tensors="pt")).logits
assert "peftcli" not in sys.modules
torch.save(logits, sys.argv[2])
"""
    adapter = tmp_path / "run" / "adapter"
    words = [sys.executable, "-c", script, adapter, tmp_path / "logits.pt", Path(__file__).parents[1]]
    subprocess.run(words, check=True, capture_output=True)
    from peftcli.model.target import open_target

    model, tokenizer = open_target(str(tmp_path / "run")).load()
    with torch.no_grad():
        ours = model(**tokenizer("big apple 0 ->:", return_tensors="pt")).logits
    assert_close_logits(ours, torch.load(tmp_path / "logits.pt"))


def test_a_module_trained_whole_on_a_16_bit_base_is_evaluated_and_saved(
    write_recipe: Write, run_cli: Cli, tmp_path: Path
) -> None:
    recipe = write_recipe(quantization=None, adapter={"modules_to_save": ["lm_head"]}, trainer={"max_steps": 2})
    assert run_cli("train", recipe, "--output-dir", "run", "--set", "model.dtype=bfloat16") == 0
    assert read_json(tmp_path / "run" / "metrics.json")["adapter"]["loss"] > 0


def test_a_base_that_is_quantized_already_is_refused(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, tiny_llama: Path, capfd: Any
) -> None:
    import shutil

    folder = tmp_path / "packed"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert run_cli("train", write_recipe(model={"name": str(folder)}), "--output-dir", "run") == 2
    assert "already quantized (bitsandbytes)" in capfd.readouterr().err


def test_rows_are_counted_to_the_row() -> None:
    from types import SimpleNamespace

    from peftcli.train.run import rows_seen

    arguments = SimpleNamespace(train_batch_size=32, gradient_accumulation_steps=1, world_size=1)
    assert rows_seen(600 / 1243, 39_750, arguments) == 600 * 32  # type: ignore[arg-type]
    assert rows_seen(1.0, 39_750, arguments) == 39_750  # type: ignore[arg-type]
    assert rows_seen(1 + 2 / 1243, 39_750, arguments) == 39_750 + 64  # type: ignore[arg-type]


@pytest.mark.numeric
def test_a_stopped_run_goes_on_to_the_bits_of_an_unbroken_one(
    write_recipe: Write, run_cli: Cli, tmp_path: Path
) -> None:
    recipe = write_recipe(adapter={"dropout": 0.1}, trainer={"max_steps": 8, "gradient_accumulation_steps": 2})
    assert run_cli("train", recipe, "--output-dir", "whole") == 0
    assert run_cli("train", recipe, "--output-dir", "cut", "--max-time", "1s") == 75
    cut = tmp_path / "cut"
    first = read_json(cut / "metrics.json")
    assert first["status"] == "stopped" and 0 < first["train"]["steps"] < 8
    assert (cut / "adapter" / "adapter_model.safetensors").is_file() and first["adapter"]["loss"] is not None
    assert run_cli("train", recipe, "--output-dir", "cut") == 0
    last = read_json(cut / "metrics.json")
    assert (last["status"], last["train"]["resumed_from_step"]) == ("finished", first["train"]["steps"])
    assert digest(cut) == digest(tmp_path / "whole")
    assert losses(cut) == losses(tmp_path / "whole")
    for name in ("tokens", "trained_tokens", "rows"):
        assert last["train"][name] == read_json(tmp_path / "whole" / "metrics.json")["train"][name]
    assert last["base"] == first["base"]


@pytest.mark.numeric
def test_the_same_command_after_the_end_says_so_and_changes_nothing(
    write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path
) -> None:
    recipe = write_recipe(trainer={"max_steps": 2})
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    before = digest(tmp_path / "run")
    capfd.readouterr()
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    assert "already finished" in capfd.readouterr().err
    assert digest(tmp_path / "run") == before
    assert run_cli("train", recipe, "--output-dir", "run", "--set", "adapter.r=4") == 2
    assert "adapter.r: 8 -> 4" in capfd.readouterr().err
    assert digest(tmp_path / "run") == before
    assert run_cli("train", recipe, "--output-dir", "run", "--set", "adapter.r=4", "--overwrite") == 0
    assert digest(tmp_path / "run") != before


@pytest.mark.numeric
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_taken(
    write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path
) -> None:
    recipe = write_recipe(trainer={"max_steps": 8, "save_steps": 2})
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    run = tmp_path / "run"
    whole = digest(run)
    (run / "metrics.json").unlink()  # as if the session had died in its last step
    (run / "train.json").unlink()
    newest = run / "checkpoints" / "checkpoint-8" / "optimizer.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    capfd.readouterr()
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    said = capfd.readouterr().err
    assert "checkpoint-8 is damaged (the hash of optimizer.pt differs); renamed to checkpoint-8.bad" in said
    assert "2 steps are repeated" in said
    assert "resuming from step 6" in said
    assert digest(run) == whole


def test_a_folder_with_other_files_is_left_alone(write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for flags in ([], ["--overwrite"]):
        assert run_cli("train", write_recipe(), "--output-dir", "mine", *flags) == 2
        assert "files that are not a peftcli run (thesis.txt)" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_sigterm_ends_the_step_writes_a_checkpoint_and_exits_75(
    write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path
) -> None:
    def stop() -> None:
        if wait_for_steps(tmp_path / "run"):
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = write_recipe(trainer={"max_steps": 400}, evaluation={"baseline": False})
    stopper = threading.Thread(target=stop)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so that one that comes too late does not end the tests
    try:
        stopper.start()
        assert run_cli("train", recipe, "--output-dir", "run") == 75
    finally:
        stopper.join()
        signal.signal(signal.SIGTERM, before)
    said = capfd.readouterr().err
    assert "stopped at step" in said and "by SIGTERM" in said and "run the same command again to resume" in said
    steps = read_json(tmp_path / "run" / "train.json")["steps"]
    assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{steps}" / "manifest.json").is_file()
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_loss_that_is_no_number_stops_with_6_and_keeps_the_checkpoint(
    write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.compute_loss
    calls = []

    def poisoned(self: Trainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, model, inputs, *args, **kwargs)
        if model.training:
            calls.append(1)
        return loss * float("nan") if len(calls) > 5 else loss

    monkeypatch.setattr(Trainer, "compute_loss", poisoned)
    recipe = write_recipe(trainer={"max_steps": 10, "save_steps": 2})
    assert run_cli("train", recipe, "--output-dir", "run") == 6
    assert "step 6: the loss is nan" in capfd.readouterr().err
    run = tmp_path / "run"
    assert (run / "checkpoints" / "checkpoint-4" / "manifest.json").is_file()
    assert not (run / "adapter").exists()


def test_a_gate_that_is_not_met_exits_7_with_all_written(
    write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path
) -> None:
    recipe = write_recipe(gates={"exact_match": ">= 1.0", "loss": "<= 0.0001"}, trainer={"max_steps": 1})
    assert run_cli("train", recipe, "--output-dir", "run") == 7
    assert "but the recipe requires <= 0.0001" in capfd.readouterr().err
    assert read_json(tmp_path / "run" / "metrics.json")["status"] == "finished"
    assert (tmp_path / "run" / "report.html").is_file()


def test_no_secret_is_in_any_file_of_a_run(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {"HF_TOKEN": "hf_" + "Zq9" * 12, "WANDB_API_KEY": "f00dfeed" * 5}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    assert run_cli("train", write_recipe(trainer={"max_steps": 2, "save_steps": 1}), "--output-dir", "run") == 0
    assert run_cli("merge", "run") == 0
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".bin" for path in files), "the pickle of a checkpoint is searched too"
    for path in files:
        content = path.read_bytes()
        assert not any(value.encode() in content for value in secrets.values()), path


def test_the_libraries_write_into_the_log_and_we_say_little(write_recipe: Write, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "peftcli", "train", str(write_recipe(trainer={"max_steps": 2})), "--json"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["status"] == "finished"
    assert len(done.stdout.splitlines()) == 1
    assert len(done.stderr.splitlines()) <= 12, done.stderr
    assert "Warning" not in done.stderr and "it/s" not in done.stderr


def test_on_a_terminal_there_is_one_live_line_and_no_chatter_of_the_libraries(
    write_recipe: Write, tmp_path: Path
) -> None:
    import pty

    leader, follower = pty.openpty()
    words = [sys.executable, "-m", "peftcli", "train", str(write_recipe(trainer={"max_steps": 3}))]
    process = subprocess.Popen(words, cwd=tmp_path, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    seen = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(leader)
    assert process.wait(timeout=60) == 0
    text = seen.decode(errors="replace")
    assert "training" in text and "Exact match" in text and "Loss" in text
    assert "train_runtime" not in text and "grad_norm" not in text and "Warning" not in text


def test_messages_and_text_are_trained_from_end_to_end(write_recipe: Write, run_cli: Cli, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]}
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(chat) for _ in range(12)))
    (tmp_path / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": f"The cat sat on mat {n}."}) for n in range(12))
    )
    for name in ("chats", "texts"):
        # Twelve times the same chat: that it stands on both sides is what the limit is there for.
        dataset = {
            "path": str(tmp_path / f"{name}.jsonl"),
            "prompt": None,
            "completion": None,
            "limits": {"max_leaked": 1},
        }
        recipe = write_recipe(trainer={"max_steps": 2})
        import yaml

        value = yaml.safe_load(recipe.read_text())
        value["dataset"] = {key: v for key, v in (value["dataset"] | dataset).items() if v is not None}
        recipe.write_text(yaml.safe_dump(value))
        assert run_cli("train", recipe, "--output-dir", name) == 0
        metrics = read_json(tmp_path / name / "metrics.json")
        assert metrics["adapter"]["loss"] < metrics["base"]["loss"]
        assert (metrics["adapter"]["exact_match"] is None) is (name == "texts")
    assert read_json(tmp_path / "chats" / "eval.json")["samples"][0]["reference"] == "Good day"
