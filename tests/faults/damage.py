"""Damage to every file that a command reads: of a run folder, of the base and of the cache.

The files are those that the commands open in fact, as the kernel reports them, so that a new file of a run is covered
without being listed here.
"""

import ctypes
import json
import os
import shutil
import signal
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fork_server import ZYGOTE, Moment, send
from workspace import Ended, Workspace, pairs

KEYS = {
    "model.name": "./base",
    "quantization": None,
    "adapter.dropout": 0.0,
    "trainer.max_steps": 4,
    "trainer.save_steps": 2,
    "evaluation.max_new_tokens": 2,
}
HARMS = ("flip", "cut", "empty", "remove", "folder", "unreadable")
GOOD_CODES = {0, 2, 3, 4, 5, 6, 7, 75}
"""Exit codes of product.md, without 1 and without signals."""
NEVER_READ_BACK = {"README.md", "report.md", "report.html", "log.txt", ".lock"}
"""Files for people, which are written again."""
INPUTS = ("base/", "rows.jsonl", "recipe.yaml", "next.yaml")
"""What the user gives a command; another content gives another result."""
IN_OPEN, IN_NONBLOCK = 0x20, 0o4000
CAP_VERSION = 0x20080522
READS_ANY_FILE = (1 << 1) | (1 << 2)
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""


@dataclass(frozen=True)
class Reader:
    """A command that reads files, and what it must produce.

    Attributes:
        words: of the command line.
        results: files whose content must be the same as without damage, relative to the workspace.
    """

    words: tuple[str, ...]
    results: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join(self.words[:2])


ADAPTER = "adapter/adapter_model.safetensors"
READERS = (
    Reader(("train", "recipe.yaml", "--output-dir", "run"), (f"run/{ADAPTER}", "run/eval.json", "run/report.md")),
    Reader(("train", "recipe.yaml", "--output-dir", "stopped"), (f"stopped/{ADAPTER}", "stopped/eval.json")),
    Reader(("train", "recipe.yaml", "--output-dir", "unmeasured"), (f"unmeasured/{ADAPTER}", "unmeasured/eval.json")),
    Reader(("train", "next.yaml", "--output-dir", "next"), (f"next/{ADAPTER}",)),
    Reader(("eval", "run"), ("run/eval.json",)),
    Reader(("merge", "run"), ("run/merged/model.safetensors", "run/merge.json")),
    Reader(("generate", "run", "thing 1 apple ->:", "thing 2 banana ->:")),
    Reader(("generate", "run/merged", "thing 1 apple ->:", "thing 2 banana ->:")),
    Reader(("eval", "run/merged", "--recipe", "recipe.yaml")),
    Reader(("report", "run"), ("run/report.md",)),
    Reader(("compare", "run", "other", "--output-dir", "compared"), ("compared/compare.json",)),
    Reader(("doctor", "recipe.yaml")),
    Reader(("data", "recipe.yaml")),
    Reader(("plan", "recipe.yaml")),
    Reader(("validate", "recipe.yaml")),
)


class Opened:
    """Records which files below some folders are opened, by any process and any library."""

    def __init__(self, root: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(IN_NONBLOCK)
        self._root = root
        self._folders = {
            self._libc.inotify_add_watch(self._descriptor, os.fsencode(folder), IN_OPEN): folder
            for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]
        }

    def files(self) -> list[str]:
        """Files that were opened since the beginning, relative to the root."""
        found = set()
        while True:
            try:
                data = os.read(self._descriptor, 2**20)
            except BlockingIOError:
                break
            at = 0
            while at < len(data):
                watch, _, _, length = struct.unpack_from("iIII", data, at)
                name = os.fsdecode(data[at + 16 : at + 16 + length].rstrip(b"\0"))
                if name and watch in self._folders:
                    found.add(str((self._folders[watch] / name).relative_to(self._root)))
                at += 16 + length
        os.close(self._descriptor)
        return sorted(found)


def obey_modes() -> None:
    """Let the modes of files hold for this process too if it is root's."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("Ii", CAP_VERSION, 0)
    words = ctypes.create_string_buffer(24)
    assert libc.capget(header, words) == 0
    effective, permitted, inherited, *others = struct.unpack("6I", words.raw)
    kept = struct.pack("6I", effective & ~READS_ANY_FILE, permitted, inherited, *others)
    assert libc.capset(header, kept) == 0


def damage(file: Path, harm: str, at: float = 0.5) -> None:
    """Damage a file.

    Args:
        at: where a bit is flipped, as a part of its length.
    """
    data = file.read_bytes()
    if harm == "flip":
        if not data:
            return
        place = min(int(len(data) * at), len(data) - 1)
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    elif harm in ("cut", "empty"):
        os.truncate(file, len(data) // 2 if harm == "cut" else 0)
    elif harm == "unreadable":
        file.chmod(0)
    else:
        file.unlink()
        if harm == "folder":
            file.mkdir()


@dataclass(frozen=True)
class Outcome:
    """How a reader ended, and what it produced."""

    ended: Ended
    produced: dict[str, str]


class Healthy:
    """A workspace in which every reader works, to be copied and damaged."""

    def __init__(self, ground: Workspace) -> None:
        self.ground = ground
        self._outcomes: dict[Reader, tuple[Outcome, list[str]]] = {}
        shutil.copytree(ground.model, ground.folder / "base", ignore=shutil.ignore_patterns("sums.json"))
        ground.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in pairs(24)))
        ground.recipe(KEYS)
        ground.recipe(KEYS | {"adapter.init_from": "./run", "trainer.max_steps": 1}, "next.yaml")
        for name, words in (("run", ()), ("other", ("--set", "trainer.learning_rate=0.001"))):
            self._must(ZYGOTE.run(ground, "train", "recipe.yaml", "--output-dir", name, *words), 0)
        self._must(ZYGOTE.run(ground, "merge", "run"), 0)
        for name, where, nth in (
            ("stopped", "peftcli.train.checkpoint:promote", 2),
            ("unmeasured", "peftcli.train.run:write_train", 1),
        ):
            moment = Moment(where, nth, after=True)
            hook = partial(moment.arm, send(signal.SIGKILL))
            self._must(ZYGOTE.run(ground, "train", "recipe.yaml", "--output-dir", name, hook=hook), -9)
        self._kept = ground.folder.with_name(ground.folder.name + "-healthy")
        shutil.copytree(ground.folder, self._kept, symlinks=True)

    def _must(self, ended: Ended, code: int) -> None:
        if ended.code != code:
            raise AssertionError(f"exit {ended.code}, not {code}: {ended.err}")

    def outcome(self, reader: Reader) -> tuple[Outcome, list[str]]:
        """What a reader produces without damage, and the files that it opens."""
        if reader not in self._outcomes:
            self._outcomes[reader] = self._watched(reader)
        return self._outcomes[reader]

    def _watched(self, reader: Reader) -> tuple[Outcome, list[str]]:
        ground = self.restored()
        opened = Opened(ground.folder)
        outcome = play(ground, reader)
        self._must(outcome.ended, 0)
        there = [name for name in opened.files() if (self._kept / name).is_file()]
        return outcome, [name for name in there if Path(name).name not in NEVER_READ_BACK and name[0] != "."]

    def restored(self) -> Workspace:
        """The workspace without damage; its path stays the same, since manifests and plans hold it."""
        shutil.rmtree(self.ground.folder)
        shutil.copytree(self._kept, self.ground.folder, symlinks=True)
        return self.ground


def play(ground: Workspace, reader: Reader) -> Outcome:
    """Run a reader and collect what it produced."""
    ended = ZYGOTE.run(ground, *reader.words, hook=obey_modes)
    produced = {name: content(ground.folder / name) for name in reader.results}
    return Outcome(ended, produced | {"stdout": without_times(ended.out)})


def content(file: Path) -> str:
    """What must be the same in a file, whenever it was written."""
    if not file.is_file():
        return ""
    data = file.read_bytes()
    if file.suffix in (".json", ".md"):
        return without_times(data.decode("utf-8", "replace"))
    return str(hash(data))


def without_times(text: str) -> str:
    """Text without the lines that differ between two equal runs: times, memory and versions of a file's own hash."""
    told = (
        "second",
        "tokens/s",
        "tokens_per",
        "memory",
        "time",
        "checksum",
        "free",
        "left",
        "written",
        "GiB",
        "cache",
        "Time",
    )
    return "\n".join(line for line in text.splitlines() if not any(word in line for word in told))


def problems(healthy: Outcome, damaged: Outcome, file: str) -> list[str]:
    """What is wrong with how a reader ended on a damaged file."""
    ended = damaged.ended
    found = []
    if ended.code not in GOOD_CODES:
        found.append(f"exit {ended.code}: {ended.err.strip()[-400:]}")
    if "Traceback" in ended.err:
        found.append("a traceback")
    # A message names the file, or the folder of a checkpoint, an adapter or a cache entry.
    heard = ended.err + ended.out + "".join(damaged.produced.values())
    said = any(part in heard for part in file.split("/")[-2:] if part not in ("run", "cache"))
    if ended.code == 0 and not said and not file.startswith(INPUTS):
        other = [name for name, value in damaged.produced.items() if healthy.produced[name] != value]
        found += [
            f"silently other {name}: {difference(healthy.produced[name], damaged.produced[name])}" for name in other
        ]
    if ended.code and not said and file.split("/")[0] not in heard and not file.startswith(INPUTS):
        found.append(f"the message does not name it: {ended.err.strip()[-300:]}")
    return found


def difference(one: str, other: str) -> str:
    """The first line that differs."""
    left, right = one.splitlines(), other.splitlines()
    for first, second in zip(left, right, strict=False):
        if first != second:
            return f"{first.strip()[:90]!r} -> {second.strip()[:90]!r}"
    return f"{len(left)} lines -> {len(right)}"


def harm_and_play(healthy: Healthy, reader: Reader, file: str, harm: str, at: float = 0.5) -> tuple[Outcome, list[str]]:
    """Damage one file and run one reader; returns how it ended, and what is wrong with that."""
    whole, _ = healthy.outcome(reader)
    ground = healthy.restored()
    damage(ground.folder / file, harm, at)
    outcome = play(ground, reader)
    return outcome, problems(whole, outcome, file)
