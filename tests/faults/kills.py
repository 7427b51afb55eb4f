"""`kill -9` at random and at exact moments, and damage to what is on the disk: numbers 26 to 28, 31 and 39."""

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
from fork_server import ZYGOTE, Moment, send
from stops import TRAINER, train, unbroken
from table import Judge, Row, Scenario
from workspace import Workspace

EVERY_STEP = {"trainer.max_steps": 24, "trainer.save_steps": 1}
FEW_STEPS = {"trainer.max_steps": 6, "trainer.save_steps": 2}
SEED = 26
PLACED = {
    "half-way through the adapter file": Moment(f"{TRAINER}._save_optimizer_and_scheduler", 2),
    "before the optimizer's state": Moment(f"{TRAINER}._save_optimizer_and_scheduler", 2),
    "half-way through the optimizer's state": Moment(f"{TRAINER}._save_optimizer_and_scheduler", 2, after=True),
    "before the random states": Moment(f"{TRAINER}._save_rng_state", 2),
    "half-way through the trainer's state": Moment("peftcli.train.checkpoint:seal", 2),
    "before the manifest": Moment("peftcli.train.checkpoint:seal", 2),
    "before the checkpoint gets its name": Moment("peftcli.train.checkpoint:promote", 2),
    "after the checkpoint got its name": Moment("peftcli.train.checkpoint:promote", 2, after=True),
}
PARENT_SECONDS = 10.0
"""After which no child of a killed parent may be there."""


def harmed(data: bytes, harm: str) -> bytes | None:
    """The bytes of a file after some harm; None for no file."""
    if harm == "flip":
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else b"x"
    return {"cut": data[: len(data) // 2], "empty": b"", "remove": None}[harm]


HARMS = ("flip", "cut", "remove", "empty")


def random_kills(count: int, ground: Workspace) -> Iterator[Row]:
    """Kill sessions that save at every step, at moments drawn from all of their seconds; each goes on to the same bits.

    A session that ended before its moment came counts nothing.
    """
    from peftcli.train.checkpoint import damage, list_checkpoints  # needs torch's room, which light cases do not

    judge = Judge("26", f"kill -9 at {count} random moments", f"{count} same")
    whole_run = Workspace(ground.folder / "unbroken", ground.model)
    whole_run.recipe(EVERY_STEP)
    length = judge.ended(ZYGOTE.run(whole_run, *train(whole_run)), 0).seconds
    expected = whole_run.digest()
    chance = random.Random(SEED)
    phases: Counter[str] = Counter()
    same = whole = 0
    while phases.total() < count:
        place = Workspace(ground.folder / "killed", ground.model)
        place.recipe(EVERY_STEP)
        if not killed(place, chance.random() * length):
            shutil.rmtree(place.folder)
            continue
        phases[ZYGOTE.phase()] += 1
        there = list_checkpoints(place.folder / "run" / "checkpoints")
        whole += not there or damage(there[-1][1]) is None
        end = judge.ended(ZYGOTE.run(place, *train(place)), 0)
        judge.holds("is damaged" not in end.err, f"kill {phases.total()}: {end.err[:200]}")
        same += place.digest() == expected
        shutil.rmtree(place.folder)
    judge.holds(same == count and whole == count, f"{same} of {count} same bits, {whole} newest checkpoints whole")
    said = ", ".join(f"{number} {phase}" for phase, number in phases.most_common())
    yield judge.row(f"{same}/{count} same bits, {whole}/{count} newest checkpoints whole; {said}")


def killed(place: Workspace, seconds: float) -> bool:
    """Kill a session after so many seconds; whether it was still there."""
    pid, begun = ZYGOTE.start(place, *train(place))
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return ZYGOTE.end(place, pid, begun).code < 0


def cut_newest(staging: Path) -> None:
    """Cut the file that was written last to its half, as a kill in the middle of the writing leaves it."""
    newest = max((path for path in staging.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
    os.truncate(newest, newest.stat().st_size // 2)


def placed_kills(ground: Workspace) -> Iterator[Row]:
    """Kill at each part of a save."""
    expected = unbroken(ground, FEW_STEPS)
    for name, moment in PLACED.items():
        place = Workspace(ground.folder / name.replace(" ", "-"), ground.model)
        staging = place.folder / "run" / "checkpoints" / ".staging"

        def act(half: bool = name.startswith("half-way"), staging: Path = staging) -> None:
            if half:
                cut_newest(staging)
            send(signal.SIGKILL)()

        yield killed_at(place, f"kill -9 {name}", partial(moment.arm, act), expected)
    place = Workspace(ground.folder / "rotating", ground.model)
    # The third checkpoint pushes the first one out; two of its files are gone already.
    first_gone = Moment("peftcli.train.checkpoint:rotate", 3)
    half_removed = partial(first_gone.arm, partial(Moment("os:unlink", 3).arm, send(signal.SIGKILL)))
    yield killed_at(place, "kill -9 while an old checkpoint is removed", half_removed, expected)


def killed_at(place: Workspace, name: str, hook: Callable[[], None], expected: str) -> Row:
    """Kill a session by a hook in it, and go on."""
    judge = Judge("26", name, "-9 0")
    place.recipe(FEW_STEPS)
    judge.ended(ZYGOTE.run(place, *train(place), hook=hook), -9, lines=None)
    end = judge.ended(ZYGOTE.run(place, *train(place)), 0)
    judge.holds("is damaged" not in end.err, end.err[:200])
    judge.holds(place.digest() == expected, "other bits")
    judge.holds(not list((place.folder / "run").rglob(".staging")), "the staging folder is left")
    return judge.row()


def every_rename(count: int, ground: Workspace) -> Iterator[Row]:
    """Kill before each file of the run folder gets its name: no file may be torn, and the run goes on."""
    expected = unbroken(ground, FEW_STEPS)
    judge = Judge("39", "kill -9 before each file gets its name", "0")
    renames = same = 0
    while renames < count:
        place = Workspace(ground.folder / f"rename-{renames}", ground.model)
        place.recipe(FEW_STEPS)
        moment = Moment("os:replace", renames + 1)
        killed = ZYGOTE.run(place, *train(place), hook=partial(moment.arm, send(signal.SIGKILL)))
        if killed.code == 0:  # there are no more
            break
        renames += 1
        judge.ended(ZYGOTE.run(place, *train(place)), 0)
        judge.holds(place.digest() == expected, f"other bits after rename {renames}")
        same += place.digest() == expected
        litter = [path.name for path in (place.folder / "run").glob(".*")]
        judge.holds(not litter, f"left behind: {litter}")
        shutil.rmtree(place.folder)
    row = judge.row(f"{same}/{renames} same bits")
    yield replace(row, fault=f"kill -9 before each of {renames} files gets its name")


def damage_drill(everything: bool, ground: Workspace) -> Iterator[Row]:
    """Harm each file of the newest checkpoint: the one before is taken, a note says so, and the bits are the same."""
    expected = unbroken(ground, FEW_STEPS)
    ground.recipe(FEW_STEPS)
    killed = Moment("peftcli.train.checkpoint:promote", 2, after=True)
    ZYGOTE.run(ground, *train(ground, "half"), hook=partial(killed.arm, send(signal.SIGKILL)))
    half = ground.folder / "half"
    names = sorted(path.name for path in (half / "checkpoints" / "checkpoint-4").iterdir())
    for number, name in enumerate(names):
        for harm in HARMS if everything else [HARMS[number % len(HARMS)]]:
            yield after_harm(ground, half, name, harm, expected)
    yield both_gone(ground, half, expected)


def after_harm(ground: Workspace, half: Path, name: str, harm: str, expected: str) -> Row:
    judge = Judge("28" if harm == "remove" else "27", f"{harm} {name} of the newest checkpoint", "0")
    run = ground.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(half, run)
    file = run / "checkpoints" / "checkpoint-4" / name
    data = harmed(file.read_bytes(), harm)
    if data is None:
        file.unlink()
    else:
        file.write_bytes(data)
    says = ("checkpoint-4 is damaged", "kept as checkpoint-4.bad", "2 steps are repeated", "from step 2")
    judge.ended(ZYGOTE.run(ground, *train(ground)), 0, *says)
    judge.holds(ground.digest() == expected, "other bits")
    return judge.row()


def both_gone(ground: Workspace, half: Path, expected: str) -> Row:
    """With every checkpoint damaged, training begins anew and says so."""
    judge = Judge("27", "every checkpoint damaged", "0")
    run = ground.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(half, run)
    for folder in (run / "checkpoints").glob("checkpoint-*"):
        (folder / "optimizer.pt").unlink()
    judge.ended(ZYGOTE.run(ground, *train(ground)), 0, "no checkpoint to resume from, so training starts at step 0")
    judge.holds(ground.digest() == expected, "other bits")
    return judge.row()


def real_command(ground: Workspace) -> Iterator[Row]:
    """Three sessions of the real command, two of them killed, give the bits of the forked ones."""
    judge = Judge("26", "three sessions of the real command, two of them killed", "-9 -9 0")
    expected = unbroken(ground, EVERY_STEP)
    ground.recipe(EVERY_STEP)
    run = ground.folder / "run"
    for step in (2, 5):
        process = ground.start(*train(ground))
        wait_until((run / "checkpoints" / f"checkpoint-{step}").exists, process.poll)
        process.kill()
        process.wait()
    end = judge.ended(ground.run(*train(ground)), 0, "resuming from step")
    judge.holds(ground.digest() == expected, f"other bits: {ground.digest()}, not {expected}")
    yield judge.row(next((line for line in end.err.splitlines() if "going on" in line), ""))


def orphans(ground: Workspace) -> Iterator[Row]:
    """No child goes on training once its parent was killed."""
    judge = Judge("31", "kill -9 the parent of two processes", "0 left")
    ground.recipe({"trainer.max_steps": 5000})
    parent = ground.start(*train(ground), "--num-processes", "2")
    log = ground.folder / "run" / "log.jsonl"
    wait_until(lambda: log.is_file() and log.read_text().count("\n") > 3, parent.poll)
    children = psutil.Process(parent.pid).children(recursive=True)
    judge.holds(len(children) >= 3, f"only {len(children)} children")
    parent.kill()
    parent.wait()
    begun = time.monotonic()
    left = psutil.wait_procs(children, timeout=PARENT_SECONDS)[1]
    names = [" ".join(process.cmdline()[1:5]) for process in left if process.is_running()]
    judge.holds(not left, f"{len(left)} of {len(children)} children are left: {names}")
    late = psutil.wait_procs(left, timeout=60)[1]
    seconds = time.monotonic() - begun
    for process in late:
        process.kill()
    judge.holds(not late, f"{len(late)} are there after a minute")
    yield judge.row(f"{len(children)} children gone after {seconds:.1f} s")


def wait_until(true: Callable[[], bool], ended: Callable[[], int | None], seconds: float = 120.0) -> None:
    """Wait for something that a running command does."""
    until = time.monotonic() + seconds
    while not true():
        if ended() is not None or time.monotonic() > until:
            raise TimeoutError("the command ended or hung before the moment came")
        time.sleep(0.02)


def drills(kills: int) -> list[Scenario]:
    """The drills with so many random kills; from 40 on, also every harm to every file."""
    return [
        Scenario("26", "random kills", partial(random_kills, kills)),
        Scenario("26", "placed kills", placed_kills),
        Scenario("26", "the real command", real_command),
        Scenario("27+28", "damage", partial(damage_drill, kills >= 40)),
        Scenario("31", "orphans", orphans),
        Scenario("39", "renames", partial(every_rename, kills)),
    ]
