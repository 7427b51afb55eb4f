"""Flat lines against padded micro-batches and against plain SFTTrainer, at equal loss.

`python scripts/bench/batching.py [--steps 40] [--rounds 3]` trains the same rows of skewed, uniform and very short
lengths with LoRA on a random Llama of 3.8 M parameters: with peftcli (flat, padded), with SFTTrainer as it comes, and
with SFTTrainer tuned by its documentation (no checkpointing; padding-free). Tools take turns, each in a process of its
own on all cores; medians of the rounds go to scripts/bench/results/batching-cpu.json, with the largest difference of
the per-step losses to the padded run.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "scripts" / "bench" / "results" / "batching-cpu.json"
MAX_LENGTH = 512
LEARNING_RATE = 2e-3
REGIMES = {"skewed": (40, 0.65, 4, 2), "uniform": (80, 0.0, 4, 2), "short": (4, 0.2, 32, 1)}
"""Median words of a row, width of the log-normal, rows of a micro-batch, accumulation."""
TOOLS = ("flat", "padded", "trl", "trl_tuned")


def write_rows(path: Path, regime: str, rows: int) -> None:
    """Texts whose lengths are drawn for a regime."""
    median, width, _, _ = REGIMES[regime]
    drawn = random.Random(1)
    words = sorted({word for word in (ROOT / "peftcli/assets/corpus.txt").read_text().split() if word.isalpha()})
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            count = max(2, min(round(median * math.exp(width * drawn.gauss(0, 1))), 180))
            file.write(json.dumps({"text": " ".join(drawn.choices(words, k=count))}) + "\n")


def make_model(folder: Path) -> None:
    """A random Llama with the tokenizer of tiny:llama."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from peftcli.tiny.build import tiny_model

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("tiny:llama"))
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ours(batching: str, place: Path, regime: str, steps: int) -> dict[str, Any]:
    """One `peftcli train`; its own counts and log."""
    _, _, rows, accumulation = REGIMES[regime]
    run = place / f"run-{batching}"
    recipe = place / f"{batching}.yaml"
    recipe.write_text(
        f"model: {{name: {place / 'model'}}}\n"
        "adapter: {r: 16, alpha: 32}\n"
        f"dataset: {{path: {regime}.jsonl, max_length: {MAX_LENGTH}, split: {{test_size: 4}}, limits: {{leaked: 1}}}}\n"
        f"trainer: {{max_steps: {steps}, per_device_train_batch_size: {rows}, "
        f"gradient_accumulation_steps: {accumulation}, learning_rate: {LEARNING_RATE}, lr_scheduler_type: linear, "
        "logging_steps: 1}\n"
        f"performance: {{batching: {batching}}}\n"
        "evaluation: {baseline: false, samples: 0, rows: 1, max_new_tokens: 1}\n"
    )
    words = [sys.executable, "-m", "peftcli", "train", str(recipe), "--output-dir", str(run), "--overwrite"]
    ended = subprocess.run(words, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(ended.stderr)
    facts = json.loads((run / "train.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {
        "seconds": facts["seconds"],
        "peak_resident_mib": round(facts["peak_memory_bytes"] / 2**20),
        "losses": [row["loss"] for row in log if "loss" in row],
        "tokens": facts["tokens"],
    }


def plain(tuned: bool, place: Path, regime: str, steps: int) -> None:
    """SFTTrainer on the same training rows, in this process; prints JSON."""
    import resource
    import time

    import numpy as np
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from peftcli.data.split import split_indices

    _, _, rows, accumulation = REGIMES[regime]
    texts = load_dataset("json", data_files=str(place / f"{regime}.jsonl"), split="train")
    train = texts.select(np.asarray(split_indices(len(texts), 4, 42)[0]))
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    more: dict[str, Any] = {"max_length": MAX_LENGTH}
    if tuned:  # its documentation: no checkpointing where memory allows it, and no padding
        longest = max(len(ids) for ids in tokenizer(list(train["text"]))["input_ids"])
        assert longest < MAX_LENGTH  # padding_free takes no max_length
        more = {"max_length": None, "padding_free": True, "activation_checkpointing": False}
    arguments = SFTConfig(
        output_dir=str(place / "plain"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **more,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(place / "model"),
        args=arguments,
        train_dataset=train,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"seconds": seconds, "peak_resident_mib": peak, "losses": losses}))


def measure(tool: str, place: Path, regime: str, steps: int) -> dict[str, Any]:
    """One run of one tool."""
    if tool in ("flat", "padded"):
        return ours(tool, place, regime, steps)
    words = [sys.executable, __file__, "--one", tool, str(place), regime, "--steps", str(steps)]
    # Idle threads that spin would cost the plain script more than anything else on a shared machine.
    settings = {"GOMP_SPINCOUNT": "2000", **os.environ}
    ended = subprocess.run(words, capture_output=True, text=True, env=settings)
    if ended.returncode:
        raise SystemExit(ended.stderr)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def compare(regime: str, place: Path, steps: int, rounds: int) -> dict[str, Any]:
    """All tools on one regime, taking turns."""
    _, _, rows, accumulation = REGIMES[regime]
    write_rows(place / f"{regime}.jsonl", regime, steps * rows * accumulation + 4)
    runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in TOOLS}
    for _ in range(rounds):
        for tool in TOOLS:
            runs[tool].append(measure(tool, place, regime, steps))
    reference = runs["padded"][0]["losses"]
    found: dict[str, Any] = {"regime": regime, "steps": steps, "rows_a_step": rows * accumulation}
    for tool, made in runs.items():
        seconds = [run["seconds"] for run in made]
        differences = [abs(a - b) for a, b in zip(made[0]["losses"], reference, strict=True)]
        found[tool] = {
            "seconds_median": round(statistics.median(seconds), 2),
            "seconds_min": round(min(seconds), 2),
            "seconds_max": round(max(seconds), 2),
            "peak_resident_mib": made[0]["peak_resident_mib"],
            "largest_loss_difference_to_padded": max(differences),
        }
    flat = found["flat"]["seconds_median"]
    found["flat_is_faster_by"] = {
        tool: round(found[tool]["seconds_median"] / flat, 2) for tool in TOOLS if tool != "flat"
    }
    return found


def main() -> None:
    """Measure the regimes that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--regime", choices=list(REGIMES), action="append")
    words = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if words.one:
        tool, place, regime = words.one
        plain(tool == "trl_tuned", Path(place), regime, words.steps)
        return
    results = []
    with tempfile.TemporaryDirectory() as place:
        make_model(Path(place) / "model")
        for regime in words.regime or REGIMES:
            results.append(compare(regime, Path(place), words.steps, words.rounds))
            print(json.dumps(results[-1], indent=1))
    RESULT.write_text(json.dumps({"cores": os.cpu_count(), "regimes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
