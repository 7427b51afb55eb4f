"""The disks that a run writes to: the working folder and the caches."""

import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from peftcli.cache import cache_root
from peftcli.doctor.verdict import FAIL, OK, WARN, Verdict, refused
from peftcli.errors import PeftcliError
from peftcli.report.format import size
from peftcli.train.disk import check_writable, probe_room

SMALL_RUN_BYTES = 2 * 2**30
"""A run of a 7B model with rank 64 on two projections keeps about so much: three checkpoints and an adapter."""
SMALL_CACHE_BYTES = 2**30


@dataclass(frozen=True)
class Place:
    """A folder that is written to.

    Attributes:
        free_bytes: what may still be written there.
        quota: what a quota allows there, in words, empty where none counts.
        problem: why nothing can be written there, None where it can.
    """

    free_bytes: int
    quota: str = ""
    problem: PeftcliError | None = None

    @property
    def text(self) -> str:
        free = "of unknown size" if self.free_bytes == sys.maxsize else f"{size(self.free_bytes)} free"
        return f"{free} under a quota of {self.quota}" if self.quota else free


def probe_place(folder: Path) -> Place:
    """Ask what is free in a folder, and write a small file there.

    Raises:
        RecipeError: PEFTCLI_QUOTA is set to something else than a folder and a size.
    """
    room = probe_room(folder)
    quota = room.place.partition(" with its quota of ")[2]
    try:
        check_writable(folder)
    except PeftcliError as problem:
        return Place(room.free, quota, problem)
    return Place(room.free, quota)


def disk_verdicts() -> list[Verdict]:
    """The disks under the working folder and under both caches."""
    asked = (
        ("disk", Path.cwd(), judge_disk),
        ("data cache", cache_root(None), judge_cache),
        ("model cache", Path(constants.HF_HUB_CACHE), judge_models),
    )
    found = []
    for name, folder, judge in asked:
        try:
            found.append(judge(probe_place(folder)))
        except PeftcliError as problem:
            found.append(refused(name, problem))
    return found


def judge_disk(place: Place) -> Verdict:
    """Whether runs can be written here."""
    if place.problem is not None:
        found = refused("disk", place.problem)
        return Verdict("disk", FAIL, found.there, "go to another folder, or name another output_dir")
    if place.free_bytes < SMALL_RUN_BYTES:
        mend = "free some space; `peftcli doctor RECIPE` says what a run needs"
        return Verdict("disk", WARN, f"{place.text} in the working folder", mend)
    return Verdict("disk", OK, f"{place.text} in the working folder, where runs are written")


def judge_cache(place: Place) -> Verdict:
    """Whether tokenized rows can be kept."""
    mend = "name another folder in the environment variable PEFTCLI_CACHE"
    if place.problem is not None:
        return Verdict("data cache", FAIL, refused("", place.problem).there, mend)
    if place.free_bytes < SMALL_CACHE_BYTES:
        return Verdict("data cache", WARN, f"{place.text} for tokenized rows", f"free some space, or {mend}")
    return Verdict("data cache", OK, f"{place.text} for tokenized rows")


def judge_models(place: Place) -> Verdict:
    """Whether models can be downloaded; those that are there can be read in any case."""
    if place.problem is not None:
        there = "it may only be read, so no other model can be downloaded"
        return Verdict("model cache", WARN, there, "name another folder in the environment variable HF_HOME")
    if place.free_bytes < SMALL_CACHE_BYTES:
        return Verdict("model cache", WARN, f"{place.text} for downloads", "free some space, or set HF_HOME")
    return Verdict("model cache", OK, f"{place.text} for downloads")
