"""Run folders, secrets and networks: numbers 7, 8, 22, 24, 25, 34, 46, 49 and 50 of the matrix."""

import hashlib
import re
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fork_server import ZYGOTE, Moment, send
from kills import FEW_STEPS, wait_until
from stops import TRAINER, train, unbroken
from table import Case, Judge, Row, Scenario
from workspace import Workspace, as_lines, pairs

CANARY = "canary-4711-" + "q" * 12
SECRETS = {
    "HF_TOKEN": "hf_" + "Zq9" * 12,
    "WANDB_API_KEY": "f00dfeed" * 5,
    "SHOP": f"postgresql://me:{CANARY}@127.0.0.1:9/shop",
}
TIMES = re.compile(
    r'"(?:[a-z_]*seconds|tokens_per_second|memory_bytes|peak_memory_bytes|started|finished|time|date)": [^,\n}]+'
)
"""What may differ between two equal runs, as it stands in a JSON file."""
TIMED = {"log.txt", "report.html", "report.md", "README.md", "training_args.bin", "manifest.json"}
"""Files that tell of times in sentences, or hash or pickle what does."""
NO_NETWORK = ("unshare", "--net", "--map-root-user")
CASES = [
    Case(
        "8",
        "a token under a key of the trainer",
        2,
        {"trainer.hub_token": CANARY},
        words=("validate", "RECIPE"),
        says=("trainer.hub_token",),
        most_cpu_seconds=0.5,
    ),
    Case(
        "49",
        "push_to_hub in a recipe",
        2,
        {"trainer.push_to_hub": True},
        words=("validate", "RECIPE"),
        says=("trainer.push_to_hub",),
        most_cpu_seconds=0.5,
    ),
    Case(
        "50",
        "a Hub id without any network",
        4,
        {"model.name": "nobody/nothing"},
        within=NO_NETWORK,
        environment={"HF_HUB_OFFLINE": "0"},
        says=("model.name nobody/nothing",),
        most_seconds=60,
    ),
]


def secrets(ground: Workspace) -> Iterator[Row]:
    """Secrets of the environment are in no file and no stream, also after a crash."""
    judge = Judge("7", "secrets of the environment: no file and no stream holds them", "0")
    ground.environment |= SECRETS
    ground.recipe({"trainer.max_steps": 2, "trainer.save_steps": 1})
    ends = [judge.ended(ZYGOTE.run(ground, *words), 0) for words in (train(ground), ("merge", "run"))]
    ends.append(judge.ended(ZYGOTE.run(ground, "generate", "run", "thing 1 apple ->:"), 0))
    crash = partial(Moment(f"{TRAINER}.training_step", 2).arm, broken)
    ends.append(ZYGOTE.run(ground, *train(ground, "crashed"), "--traceback", hook=crash))
    judge.holds(ends[-1].code == 1 and "Traceback" in ends[-1].err, "the planted crash did not happen")
    shop = ground.recipe({"dataset.path": None, "dataset.url_env": "SHOP", "dataset.table": "t"}, "shop.yaml")
    ends.append(ZYGOTE.run(ground, "data", str(shop), "--traceback"))
    judge.holds(ends[-1].code in (3, 4), f"the database: {ends[-1].code} {ends[-1].err[-200:]}")
    needles = [*SECRETS.values(), CANARY]
    streams = "".join(end.out + end.err for end in ends)
    judge.holds(not any(needle in streams for needle in needles), "a stream holds a secret")
    searched = [path for path in ground.folder.rglob("*") if path.is_file()]
    for path in searched:
        content = path.read_bytes()
        judge.holds(not any(needle.encode() in content for needle in needles), f"{path.name} holds a secret")
    yield judge.row(f"{len(searched)} files searched")


def broken() -> None:
    """A bug of ours, for once on purpose."""
    raise RuntimeError("planted")


def other_files(ground: Workspace) -> Iterator[Row]:
    """Files of the user survive, whatever flag is given."""
    judge = Judge("22", "files that are not ours survive train, --overwrite and --resume", "2")
    ground.recipe()
    thesis = ground.write("mine/thesis.txt", "years of work")
    for flags in ((), ("--overwrite",), ("--resume",)):
        judge.ended(ZYGOTE.run(ground, *train(ground, "mine"), *flags), 2, "thesis.txt", "output_dir")
    judge.holds(thesis.read_text() == "years of work" and len(list(thesis.parent.iterdir())) == 1, "changed")
    yield judge.row()
    judge = Judge("22", "--overwrite removes our files and leaves a file of the user in the run", "0")
    judge.ended(ZYGOTE.run(ground, *train(ground)), 0)
    note = ground.write("run/notes.txt", "mine")
    judge.ended(ZYGOTE.run(ground, *train(ground), "--overwrite"), 0)
    judge.holds(note.read_text() == "mine", "the note is gone")
    yield judge.row()


def links(ground: Workspace) -> Iterator[Row]:
    """What a link in the run folder leads to is not removed."""
    judge = Judge("24", "links in a run folder are not followed when files are removed", "-9 0")
    ground.recipe(FEW_STEPS)
    killed = Moment("peftcli.train.checkpoint:promote", 2, after=True)
    ZYGOTE.run(ground, *train(ground), hook=partial(killed.arm, send(signal.SIGKILL)))
    checkpoints, outside = ground.folder / "run" / "checkpoints", ground.folder / "outside"
    shutil.move(checkpoints / "checkpoint-2", outside)
    (checkpoints / "checkpoint-2").symlink_to(outside)
    judge.ended(ZYGOTE.run(ground, *train(ground)), 0)
    judge.holds((outside / "manifest.json").is_file(), "the rotation removed files outside of the run")
    shutil.rmtree(outside)
    shutil.move(checkpoints, outside)
    checkpoints.symlink_to(outside)
    judge.ended(ZYGOTE.run(ground, *train(ground), "--overwrite"), 0)
    judge.holds(any(outside.glob("checkpoint-*")), "--overwrite removed files outside of the run")
    yield judge.row()


def two_at_once(ground: Workspace) -> Iterator[Row]:
    """A second process is told who trains; after a kill the folder is free again."""
    judge = Judge("25", "two processes in one run folder", "4 0")
    ground.recipe({"trainer.max_steps": 3000})
    log = ground.folder / "run" / "log.jsonl"
    first = ground.start(*train(ground))
    wait_until(log.is_file, first.poll)
    second = judge.ended(ground.run(*train(ground)), 4, f"is being trained by process {first.pid}", lines=1)
    judge.holds(first.poll() is None, "the first one ended")
    first.kill()
    first.wait()
    judge.ended(ZYGOTE.run(ground, *train(ground), "--max-time", "1s"), 75, lines=None)
    yield judge.row(f"told after {second.seconds:.2f} s")


CHANGES: dict[str, tuple[dict[str, Any], int, str]] = {
    "the learning rate": ({"trainer.learning_rate": 1e-3}, 2, "trainer.learning_rate: 0.005 -> 0.001"),
    "the accumulation": ({"trainer.gradient_accumulation_steps": 2}, 2, "trainer.gradient_accumulation_steps"),
    "the batch": ({"trainer.per_device_train_batch_size": 2}, 2, "trainer.per_device_train_batch_size: 4 -> 2"),
    "adapter.r": ({"adapter.r": 4}, 2, "adapter.r: 8 -> 4"),
    "the seed": ({"seed": 7}, 2, "seed"),
    "the split": ({"dataset.split": {"test_size": 0.5, "seed": 1}}, 2, "dataset.split"),
    "max_steps below the checkpoint": ({"trainer.max_steps": 2}, 2, "trainer.max_steps: 6 -> 2"),
    "a budget, the logging and the saving": (
        {"budget.wall_clock": "1h", "trainer.logging_steps": 2, "trainer.save_steps": 5},
        0,
        "resuming from step 4",
    ),
}


def changed(ground: Workspace) -> Iterator[Row]:
    """What changed between two sessions is listed and refused, or harmless."""
    ground.recipe(FEW_STEPS)
    expected = unbroken(ground, FEW_STEPS)
    killed = Moment("peftcli.train.checkpoint:promote", 2, after=True)
    ZYGOTE.run(ground, *train(ground, "half"), hook=partial(killed.arm, send(signal.SIGKILL)))
    for name, (keys, code, says) in CHANGES.items():
        judge = Judge("34", f"changed between sessions: {name}", str(code))
        again(ground)
        ground.recipe(FEW_STEPS | keys)
        judge.ended(ZYGOTE.run(ground, *train(ground)), code, says, lines=6)
        judge.holds(code != 0 or ground.digest() == expected, "other bits")
        yield judge.row()
    judge = Judge("34", "changed between sessions: the rows", "2")
    again(ground)
    ground.recipe(FEW_STEPS)
    ground.write("rows.jsonl", as_lines(pairs(48, first=1)))
    judge.ended(ZYGOTE.run(ground, *train(ground)), 2, "data.train:", "--force data", lines=None)
    yield judge.row()


def again(ground: Workspace) -> None:
    """Put the half-done run in its place."""
    shutil.rmtree(ground.folder / "run", ignore_errors=True)
    shutil.copytree(ground.folder / "half", ground.folder / "run")


def twice(ground: Workspace) -> Iterator[Row]:
    """Two runs of one recipe give the same folder, times apart."""
    judge = Judge("46", "two runs give the same folder, times apart", "0")
    ground.recipe(FEW_STEPS)
    found = []
    for _ in range(2):
        judge.ended(ZYGOTE.run(ground, *train(ground)), 0)
        found.append(folder_hashes(ground.folder / "run"))
        shutil.rmtree(ground.folder / "run")
        shutil.rmtree(ground.folder / "cache", ignore_errors=True)
    differ = sorted(name for name in found[0].keys() | found[1].keys() if found[0].get(name) != found[1].get(name))
    judge.holds(not differ, f"these differ: {', '.join(differ)}")
    judge.holds(len(found[0]) > 20, "hardly any files")
    yield judge.row(f"{len(found[0])} files equal, {len(TIMED)} names that tell of times not compared")


def folder_hashes(run: Path) -> dict[str, str]:
    """Hash of each file of a run, times left out."""
    hashes = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file() and path.name not in TIMED):
        content = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            content = TIMES.sub("", content.decode()).encode()
        hashes[str(path.relative_to(run))] = hashlib.sha256(content).hexdigest()
    return hashes


def cached_base(ground: Workspace) -> Iterator[Row]:
    """A Hub model in the local cache trains without a network, and nothing is waited for."""
    judge = Judge("50", "a cached Hub model without a network, HF_HUB_OFFLINE not set", "0")
    commit = "a" * 40
    cached = ground.folder / "hub" / "models--somebody--tiny"
    shutil.copytree(ground.model, cached / "snapshots" / commit)
    ground.write("hub/models--somebody--tiny/refs/main", commit)
    recipe = ground.recipe({"model.name": "somebody/tiny", "trainer.max_steps": 2})
    environment = {"HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(cached.parent)}
    end = judge.ended(ground.run("train", str(recipe), within=NO_NETWORK, environment=environment), 0)
    waited = end.seconds - end.cpu_seconds
    judge.holds(waited < 15, f"{waited:.0f} s of {end.seconds:.0f} s were waiting")
    yield judge.row(f"{end.seconds:.1f} s, {end.cpu_seconds:.1f} s of them computing")


def offline(ground: Workspace) -> Iterator[Row]:
    """A whole run asks no network: a guard on every connection hears nothing."""
    judge = Judge("50", "train and merge make no connection", "0")
    ground.recipe({"trainer.max_steps": 2})
    marker = ground.folder / "connected"
    hook = partial(Moment("socket:socket.connect").arm, marker.touch)
    for words in (train(ground), ("merge", "run"), ("eval", "run")):
        judge.ended(ZYGOTE.run(ground, *words, hook=hook), 0)
    judge.holds(not marker.exists(), "something connected")
    yield judge.row()


DRILLS = [
    Scenario("7+8", "secrets", secrets),
    Scenario("22", "other files", other_files),
    Scenario("24", "links", links),
    Scenario("25", "two at once", two_at_once),
    Scenario("34", "changes", changed),
    Scenario("46", "twice", twice),
    Scenario("50", "offline", offline),
    Scenario("50", "a cached base", cached_base),
]
