"""A folder of its own for each case: recipe, rows, and commands that run in it as real processes, offline."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

COLOURS = {"apple": "red fruit", "banana": "yellow fruit", "carrot": "orange root", "spinach": "green leaf"}
TIMEOUT = 300.0
"""Seconds after which a command counts as hanging."""
HANGING = -99
"""Stands for the exit code of a command that had to be killed for that."""


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: exit code; negative for the signal that killed it, as `subprocess` has it.
        peak_mib: largest memory of the process.
        cpu_seconds: that it computed; on a busy machine fewer than those that it took.
    """

    code: int
    seconds: float
    out: str
    err: str
    peak_mib: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def lines(self) -> int:
        return len(self.err.splitlines())


def pairs(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Healthy rows: a thing and its kind."""
    names = list(COLOURS)
    return [
        {"prompt": f"thing {n} {names[n % 4]} ->:", "completion": f" {COLOURS[names[n % 4]]}"}
        for n in range(first, first + count)
    ]


def as_lines(rows: Sequence[Any]) -> bytes:
    """Rows as the bytes of a JSON-lines file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")


class Workspace:
    """A temporary folder with a healthy recipe over healthy rows, to be spoilt by a case.

    Attributes:
        folder: everything of the case happens below it.
        model: folder of the tiny model, which all cases share.
        environment: of the commands.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.model = model
        self.environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "GOMP_SPINCOUNT": "2000",
            "HOME": str(folder),
            "PEFTCLI_CACHE": str(folder / "cache"),
        }
        for name in ("HF_TOKEN", "WANDB_API_KEY", "KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG", "PEFTCLI_TRACEBACK"):
            self.environment.pop(name, None)
        self.write("rows.jsonl", as_lines(pairs(48)))

    def write(self, name: str, content: bytes | str) -> Path:
        """Write a file of the case."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def values(self, keys: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The healthy recipe with dotted keys laid over it; None removes a key."""
        recipe: dict[str, Any] = {
            "name": "case",
            "model": {"name": str(self.model)},
            "quantization": {"bits": 4},
            "adapter": {"r": 8, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
            "dataset": {"path": "rows.jsonl", "split": {"test_size": 0.25, "seed": 1}, "max_length": 64},
            "trainer": {
                "per_device_train_batch_size": 4,
                "max_steps": 4,
                "learning_rate": 5e-3,
                "logging_steps": 1,
                "save_steps": 2,
            },
            "evaluation": {"max_new_tokens": 2, "samples": 1},
        }
        for key, value in (keys or {}).items():
            holder, parts = recipe, key.split(".")
            for part in parts[:-1]:
                holder = holder.setdefault(part, {})
            if value is None:
                holder.pop(parts[-1], None)
            else:
                holder[parts[-1]] = value
        return recipe

    def recipe(self, keys: Mapping[str, Any] | None = None, name: str = "recipe.yaml") -> Path:
        """Write the recipe with dotted keys laid over the healthy one."""
        return self.write(name, yaml.safe_dump(self.values(keys), sort_keys=False))

    def run(self, *words: str, within: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Ended:
        """Run `peftcli` with these words in the folder; standard input is closed.

        Args:
            within: words of a command that runs the command, such as `unshare`.
        """
        return self.call([*within, sys.executable, "-m", "peftcli", *words], environment)

    def call(self, words: Sequence[str], environment: Mapping[str, str] | None = None) -> Ended:
        """Run any command and measure its memory and seconds."""
        out, err = self.folder / ".out", self.folder / ".err"
        begun = time.perf_counter()
        with out.open("wb") as out_file, err.open("wb") as err_file:
            process = subprocess.Popen(
                words,
                cwd=self.folder,
                env={**self.environment, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
                start_new_session=True,
            )
            code, peak, cpu = wait_for(process.pid, begun + TIMEOUT)
            process.returncode = code
        seconds = time.perf_counter() - begun
        return Ended(code, seconds, self.said(out), self.said(err), peak, cpu)

    def start(self, *words: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start `peftcli` with these words and leave it running in a process group of its own."""
        with (self.folder / ".err").open("wb") as err:
            return subprocess.Popen(
                [sys.executable, "-m", "peftcli", *words],
                cwd=self.folder,
                env={**self.environment, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=err,
                start_new_session=True,
            )

    def said(self, path: Path) -> str:
        """What a process wrote, whatever bytes it holds, with the folder left out of its paths."""
        return path.read_bytes().decode("utf-8", "backslashreplace").replace(f"{self.folder}/", "")

    def digest(self, run: str = "run") -> str:
        """First letters of the SHA-256 of a run's adapter, empty where it has none."""
        file = self.folder / run / "adapter" / "adapter_model.safetensors"
        return hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.is_file() else ""


def wait_for(pid: int, until: float) -> tuple[int, float, float]:
    """Exit code, peak MiB and seconds of computing of a child, which is killed when the clock passes `until`."""
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime
        if time.perf_counter() > until:
            os.kill(pid, 9)
            os.wait4(pid, 0)
            return HANGING, 0.0, 0.0
        time.sleep(0.005)
