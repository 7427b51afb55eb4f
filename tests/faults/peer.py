"""`trl sft` on the same faults: a configuration as near to our recipe as its keys allow."""

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from fork_server import ZYGOTE
from table import Case, Row, Scenario
from workspace import Ended, Workspace

RENAME = "RENAME"
"""Pseudo key: the rows get one text column of this name."""


def run_peer(case: Case, ground: Workspace) -> tuple[int, float, int]:
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


def healthy(ground: Workspace) -> dict[str, Any]:
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


EVERY_STEP = {"max_steps": 24, "save_steps": 1, "save_total_limit": 2}
SEED = 26


def train(words: Sequence[str]) -> int:
    """What `trl sft --config FILE` runs in its second process, called in a fork."""
    from trl.scripts import sft  # slow to import, and only forks come here

    parsed = sft.make_parser().parse_args_and_config(["--config", words[0]], fail_with_unknown_args=False)
    sft.main(*parsed)  # type: ignore[no-untyped-call]  # trl ships no types
    return 0


def session(ground: Workspace, *, resume: bool, seconds: float | None = None) -> Ended:
    """One session of trl in a fork, killed after so many seconds."""
    keys = EVERY_STEP | ({"resume_from_checkpoint": True} if resume else {})
    path = ground.write("trl.yaml", yaml.safe_dump(healthy(ground) | keys))
    pid, begun = ZYGOTE.start(ground, str(path), command=train)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return ZYGOTE.end(ground, pid, begun)


def trl_ground(folder: Path, model: Path) -> Workspace:
    """A folder whose rows lie where trl looks for them."""
    ground = Workspace(folder, model)
    ground.write("data/train.jsonl", (folder / "rows.jsonl").read_bytes())
    return ground


def adapter(ground: Workspace) -> str:
    file = ground.folder / "trl" / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def random_kills(count: int, ground: Workspace) -> Iterator[Row]:
    """Kill trl's sessions as ours are killed, and resume those that have a checkpoint; told, not judged."""
    begun = time.perf_counter()
    whole = trl_ground(ground.folder / "unbroken", ground.model)
    length = session(whole, resume=False).seconds
    expected = adapter(whole)
    if not expected:
        raise RuntimeError(whole.said(whole.folder / ".err")[-300:])
    chance = random.Random(SEED)
    kills = same = died = most_lines = 0
    while kills < count:
        place = trl_ground(ground.folder / "killed", ground.model)
        if session(place, resume=False, seconds=length * chance.random()).code < 0:
            kills += 1
            end = session(place, resume=any((place.folder / "trl").glob("checkpoint-*")))
            died += end.code != 0
            same += end.code == 0 and adapter(place) == expected
            most_lines = max(most_lines, end.lines)
        shutil.rmtree(place.folder)
    said = f"{same} of {count} end with the bits of the unbroken run, {died} die when they are resumed"
    seconds = time.perf_counter() - begun
    yield Row("26", f"trl sft: kill -9 at {count} random moments", "-", f"{same} same", seconds, most_lines, None, said)


def drills(kills: int) -> list[Scenario]:
    """What trl is asked beside the single faults."""
    return [Scenario("26", "trl sft: random kills", partial(random_kills, kills))]
