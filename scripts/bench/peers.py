"""Unsloth, Axolotl and LLaMA-Factory on the rows, the model and the first adapter that peftcli is measured on.

Each runs in the Python that `--peer NAME=PYTHON` of batching.py names, since their requirements exclude each other.
Unproven: no GPU was at hand; the settings follow their documentation (2026-06), the drivers were never run.
"""

import json
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from peftcli.bench.measure import Measurement, run_process
from peftcli.bench.workload import ALPHA, RANK, Job, Tool, write_spec

LOSS = re.compile(r"['\"]loss['\"]: ['\"]?([0-9.eE+-]+)")
RUNTIME = re.compile(r"['\"]train_runtime['\"]: ['\"]?([0-9.eE+-]+)")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def axolotl(job: Job, run: Path, python: str) -> list[str]:
    """Its LoRA kernels, and no sample packing, which would change the steps."""
    config = {
        "base_model": str(job.model),
        "adapter": "qlora" if job.bits == 4 else "lora",
        "load_in_4bit": job.bits == 4,
        "lora_model_dir": str(job.adapter),
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        "lora_qkv_kernel": True,
        "lora_o_kernel": True,
        "lora_mlp_kernel": True,
        "datasets": [{"path": str(masked_rows(job)), "ds_type": "json"}],
        "dataset_prepared_path": str(run / "prepared"),
        "output_dir": str(run / "adapter"),
        "sequence_len": job.regime.max_length,
        "sample_packing": False,
        "attn_implementation": "flash_attention_2",
        "bf16": "auto",
        "micro_batch_size": job.regime.rows,
        "gradient_accumulation_steps": 1,
        "max_steps": job.steps,
        "learning_rate": job.shape.learning_rate,
        "lr_scheduler": "linear",
        "optimizer": "adamw_torch_fused",
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": job.seed,
    }
    return [python, "-m", "axolotl.cli.train", str(write_spec(run / "axolotl.yaml", config))]


def llamafactory(job: Job, run: Path, python: str) -> list[str]:
    """As its examples for LoRA are, on a data set that is tokenized already."""
    config = {
        "model_name_or_path": str(job.model),
        "adapter_name_or_path": str(job.adapter),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "template": "default",
        "tokenized_path": str(stored_rows(job, run / "tokenized")),
        "cutoff_len": job.regime.max_length,
        "output_dir": str(run / "adapter"),
        "bf16": True,
        "per_device_train_batch_size": job.regime.rows,
        "gradient_accumulation_steps": 1,
        "max_steps": job.steps,
        "learning_rate": job.shape.learning_rate,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": job.seed,
    } | ({"quantization_bit": 4} if job.bits == 4 else {})
    return [python, "-m", "llamafactory.cli", "train", str(write_spec(run / "llamafactory.yaml", config))]


def unsloth(job: Job, run: Path, python: str) -> list[str]:
    """Its own script: the patched model in SFTTrainer, its checkpointing and its automatic batching without padding."""
    spec = {
        "model": str(job.model),
        "bits": job.bits,
        "adapter": str(job.adapter),
        "rows": str(job.folder / "rows-ids.jsonl"),
        "run": str(run),
        "max_length": job.regime.max_length,
        "linears": LINEARS,
        "r": RANK,
        "alpha": ALPHA,
        "arguments": {**job.arguments, "seed": job.seed},
    }
    script = Path(__file__).with_name("unsloth_run.py")
    return [python, str(script), str(write_spec(run / "unsloth.json", spec))]


PEERS: dict[str, tuple[str, Callable[[Job, Path, str], list[str]]]] = {
    "unsloth": ("Unsloth", unsloth),
    "axolotl": ("Axolotl", axolotl),
    "llamafactory": ("LLaMA-Factory", llamafactory),
}


def peer_tools(pythons: dict[str, str]) -> list[Tool]:
    """The peers as tools; one without a separate Python runs in this one."""
    return [Tool(name, title, False, {"peer": True}) for name, (title, _) in PEERS.items() if name in pythons]


def peer_runner(
    pythons: dict[str, str], otherwise: Callable[[Tool, Job], Measurement | str]
) -> Callable[[Tool, Job], Measurement | str]:
    """Runs a peer with its own command, and other tools with `otherwise`."""
    return partial(_run, pythons, otherwise)


def _run(
    pythons: dict[str, str], otherwise: Callable[[Tool, Job], Measurement | str], tool: Tool, job: Job
) -> Measurement | str:
    if tool.name not in PEERS:
        return otherwise(tool, job)
    run = job.folder / f"run-{tool.name}"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    words = PEERS[tool.name][1](job, run, pythons[tool.name] or sys.executable)
    log = job.folder / f"{tool.name}.log"
    steps: list[float] = []
    begun = time.monotonic()

    def look() -> None:
        # The losses are printed as they are logged, one a step; this is how fast they come.
        seen = len(LOSS.findall(log.read_text(encoding="utf-8", errors="replace")))
        steps.extend([time.monotonic()] * (seen - len(steps)))

    try:
        ended = run_process(words, log, look, {"PYTHONUNBUFFERED": "1", "AXOLOTL_DO_NOT_TRACK": "1"})
    except OSError as problem:
        return f"{words[0]}: {problem.strerror}"
    if ended.error is not None:
        return ended.error
    output = log.read_text(encoding="utf-8", errors="replace")
    losses, runtime = [float(loss) for loss in LOSS.findall(output)], RUNTIME.findall(output)
    if not losses or not runtime or not steps:
        return "finished, but printed no losses or no training time"
    return Measurement(
        seconds=float(runtime[-1]),
        first_step_seconds=steps[0] - begun,
        process_seconds=ended.seconds,
        step_seconds=tuple(after - before for before, after in pairwise(steps))
        or (statistics.mean([float(runtime[-1])]),),
        losses=tuple(losses),
        peak_bytes=None,
        above_bytes=None,
        gpu_bytes=ended.gpu_bytes,
        recomputed=1.0,
        adapter=run / "adapter",
        details={},
    )


def masked_rows(job: Job) -> Path:
    """The ids and labels with a mask of ones, which Axolotl requires."""
    path = job.folder / "rows-masked.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in _rows(job):
            file.write(json.dumps({**row, "attention_mask": [1] * len(row["input_ids"])}) + "\n")
    return path


def stored_rows(job: Job, folder: Path) -> Path:
    """The same as a data set on disk, in LLaMA-Factory's tokenized format."""
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in _rows(job)]
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(str(folder))
    return folder


def _rows(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.folder / "rows-ids.jsonl").read_text(encoding="utf-8").splitlines()]
