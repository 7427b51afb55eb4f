"""The names of a run's files, and how they are written: to a temporary name, then renamed."""

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
        """What the first process has sent to a machine that does not share its disk, for as long as that trains."""
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
        """The run of a stage before the last, counted from 1."""
        return RunDir(self.stages / f"{number}-{name}")

    def remove_torn(self) -> None:
        """Remove what `write_text` left of these files when a process was killed in it."""
        texts = (self.recipe, self.plan, self.environment, self.data, self.log, self.train, self.eval, self.merge)
        for path in (*texts, self.metrics, self.report_md, self.report_html):
            for torn in self.path.glob(f".{path.name}.????????"):
                torn.unlink(missing_ok=True)


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds an adapter that PEFT wrote for another tool, without what a run leaves beside it."""
    return (folder / "adapter_config.json").is_file() and not (folder / "peftcli.json").is_file()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, new_file_mode())  # mkstemp makes private files
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write one JSON object; a float that is not finite is an error, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object that `write_json` wrote."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines log; a last line that a killed process left torn is skipped."""
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
