"""The file names of a run, and how they are written: to a temporary name, then renamed."""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.filesystem import new_file_mode


@dataclass(frozen=True)
class RunDir:
    """The folder of one run; each property is the path of one of its files."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def data(self) -> Path:
        return self.path / "data.json"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def library_log(self) -> Path:
        return self.path / "log.txt"

    @property
    def received(self) -> Path:
        """Files that process 0 has sent to a machine without a shared disk; removed after training."""
        return self.path / ".received"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def ranks(self) -> Path:
        return self.path / "ranks.json"

    @property
    def rows(self) -> Path:
        """Which rows were trained on and which were held out, by content."""
        return self.path / "rows.npz"

    @property
    def inputs(self) -> Path:
        """The files that the recipe names: where they were, and a hash of their content."""
        return self.path / "inputs.json"

    @property
    def selection(self) -> Path:
        return self.path / "selection.json"

    @property
    def merged(self) -> Path:
        return self.path / "merged"

    @property
    def train(self) -> Path:
        return self.path / "train.json"

    @property
    def eval(self) -> Path:
        return self.path / "eval.json"

    @property
    def merge(self) -> Path:
        return self.path / "merge.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def report_md(self) -> Path:
        return self.path / "report.md"

    @property
    def report_html(self) -> Path:
        return self.path / "report.html"

    @property
    def stages(self) -> Path:
        return self.path / "stages"

    def stage(self, number: int, name: str) -> "RunDir":
        """The run folder of a stage before the last; stages count from 1."""
        return RunDir(self.stages / f"{number}-{name}")

    def remove_torn(self) -> None:
        """Remove the temporary files of `write_text` that a killed process left behind."""
        texts = (self.recipe, self.plan, self.environment, self.data, self.log, self.train, self.eval, self.merge)
        for path in (*texts, self.inputs, self.metrics, self.report_md, self.report_html):
            for torn in self.path.glob(f".{path.name}.????????"):
                torn.unlink(missing_ok=True)


def is_external_adapter(folder: Path) -> bool:
    """Whether a folder contains a PEFT adapter from another tool, without peftcli's own files."""
    return (folder / "adapter_config.json").is_file() and not (folder / "peftcli.json").is_file()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically: a reader sees the old or the new content, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, new_file_mode())  # mkstemp makes private files
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write one JSON object; a non-finite float is an error, since JSON cannot represent it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object that `write_json` wrote."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines log; an incomplete last line from a killed process is skipped."""
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines) - 1 and any(lines[number + 1 :]):
                raise
    return rows
