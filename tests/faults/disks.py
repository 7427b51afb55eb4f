"""Disks that are small, full or filling up: numbers 23 and 38 of the matrix."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from fork_server import ZYGOTE, Moment
from kills import FEW_STEPS
from stops import TRAINER, train, unbroken
from table import Case, Judge, Row, Scenario, skipped
from workspace import Workspace

ON_TMPFS = (
    "unshare",
    "--mount",
    "--map-root-user",
    "sh",
    "-c",
    'mkdir -p FOLDER/small && mount -t tmpfs -o size=700k tmpfs FOLDER/small && exec "$@"',
    "-",
)
DISK_BYTES = 280 * 2**20
"""Room for what a run asks for in advance, and not for much more."""
CASES = [
    Case(
        "23",
        "a disk of 700 kB",
        4,
        words=("train", "RECIPE", "--output-dir", "small/run"),
        within=ON_TMPFS,
        says=("small/run needs", "free some space"),
    ),
    Case(
        "23",
        "a quota of 20 MB",
        4,
        environment={"PEFTCLI_QUOTA": "/tmp=20MB"},
        says=("its quota of", "free some space"),
    ),
]


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[bool]:
    """A small disk in memory, where mounting is allowed."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    allowed = subprocess.run(words, capture_output=True).returncode == 0
    try:
        yield allowed
    finally:
        if allowed:
            subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Fill a disk to its last kilobytes."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (2**20, 2**14):
            while True:
                try:
                    file.write(b"x" * size)
                except OSError:
                    break


FULL = {
    "before a checkpoint": Moment(f"{TRAINER}._save_checkpoint", 2),
    "in the middle of a checkpoint": Moment(f"{TRAINER}._save_optimizer_and_scheduler", 2),
    "before the manifest of a checkpoint": Moment("peftcli.train.checkpoint:seal", 2),
    "before the adapter": Moment("peftcli.train.run:save_adapter"),
}


def full_disk(ground: Workspace) -> Iterator[Row]:
    """The disk fills up in the middle of a run; with room again the same command goes on to the same bits."""
    expected = unbroken(ground, FEW_STEPS)
    ground.recipe(FEW_STEPS)
    for name, moment in FULL.items():
        small = ground.folder / name.replace(" ", "-")
        with mounted(small, DISK_BYTES) as allowed:
            if not allowed:
                yield skipped("38", f"the disk fills up {name}", "mounting is not allowed here")
                continue
            judge = Judge("38", f"the disk fills up {name}", "4 0")
            words = train(ground, str(small / "run"))
            judge.ended(ZYGOTE.run(ground, *words, hook=partial(moment.arm, partial(fill, small))), 4, lines=None)
            (small / "filler").unlink()
            judge.ended(ZYGOTE.run(ground, *words), 0)
            judge.holds(ground.digest(str(small / "run")) == expected, "other bits")
            yield judge.row()


DRILLS = [Scenario("38", "full disk", full_disk)]
