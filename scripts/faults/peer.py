"""`trl sft` on the same faults: a configuration as near to our recipe as its keys allow."""

import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from ground import Ground
from table import Case

RENAME = "RENAME"
"""Pseudo key: the rows get one text column of this name."""


def run_peer(case: Case, ground: Ground) -> tuple[int, float, int]:
    """Exit code, seconds and lines on stderr of `trl sft` on the fault of a case."""
    keys = dict(case.peer or {})
    if case.rows is not None:
        ground.write("rows.jsonl", case.rows)
    if case.prepare is not None:
        case.prepare(ground)
    text = (ground.folder / "rows.jsonl").read_bytes()
    ground.write("data/train.jsonl", text.replace(b'"completion"', b'"text"') if keys.pop(RENAME, None) else text)
    config = yaml.safe_dump(healthy(ground) | keys, sort_keys=False)
    path = ground.write("trl.yaml", case.peer_edit(config) if case.peer_edit is not None else config)
    within = [word.replace("FOLDER", str(ground.folder)) for word in case.within]
    trl = shutil.which("trl", path=str(Path(sys.executable).parent)) or "trl"
    end = ground.call([*within, trl, "sft", "--config", str(path)], {"TRL_EXPERIMENTAL_SILENCE": "1"})
    return end.code, end.seconds, end.lines


def healthy(ground: Ground) -> dict[str, Any]:
    """The configuration of trl that trains what the healthy recipe trains, without 4 bit."""
    return {
        "model_name_or_path": str(ground.model),
        "dataset_name": "./data",
        "output_dir": "trl",
        "use_peft": True,
        "lora_r": 8,
        "lora_dropout": 0.1,
        "lora_target_modules": ["q_proj", "v_proj"],
        "max_length": 64,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 0.005,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
