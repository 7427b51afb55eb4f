"""The file names of a run, and how they are written: to a temporary name, then renamed."""

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.errors import DataError, MachineError
from peftcli.filesystem import new_file_mode

CHECKSUM = "checksum"
"""Key of a JSON file with the hash of its other keys; files of earlier versions do not have it."""


class ChecksumError(ValueError):
    """The content of a JSON file differs from what was written."""


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
    """Write a UTF-8 file atomically: a reader sees the old or the new content, never a part of it.

    Raises:
        MachineError: there is a folder of this name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise MachineError(f"{path} cannot be written: a folder of this name is in the way; move it")
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
    """Write one JSON object with its checksum; a non-finite float is an error, since JSON cannot represent it."""
    content = {key: part for key, part in value.items() if key != CHECKSUM}
    write_plain_json(path, content | {CHECKSUM: _checksum(content)})


def write_plain_json(path: Path, value: dict[str, Any]) -> None:
    """The same without a checksum, for a file of another program."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object that `write_json` or another program wrote, without its checksum.

    Raises:
        ValueError: it is not JSON.
        ChecksumError: it has a checksum, which does not fit the other keys.
    """
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    stated = value.pop(CHECKSUM, None) if isinstance(value, dict) else None
    if stated is not None and stated != _checksum(value):
        raise ChecksumError(f"its checksum differs; if you edited the file, remove its key {CHECKSUM}")
    return value


def _checksum(value: dict[str, Any]) -> str:
    """The hash of an object's content, whatever its formatting and the order of its keys."""
    stored = json.loads(json.dumps(value, allow_nan=False))  # keys that are numbers become text
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()[:32]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def log_mark(path: Path) -> str | None:
    """Size and hash of a log, to find later changes; None where there is no log."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    return f"{len(data)} {hashlib.sha256(data).hexdigest()[:32]}"


def has_log_changed(path: Path, mark: str | None) -> bool:
    """Whether a log no longer begins with what it held at a mark; lines may have been added."""
    if mark is None:
        return False
    if not path.is_file():
        return True
    length, _, digest = mark.partition(" ")
    data = path.read_bytes()[: int(length) if length.isdigit() else 0]
    return hashlib.sha256(data).hexdigest()[:32] != digest


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines log; an incomplete last line from a killed process is skipped.

    Raises:
        DataError: another line is not a JSON object.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if not any(lines[number + 1 :]):
                break
            raise DataError(f"{path}:{number + 1}: this line is not JSON ({error}); delete the line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number + 1}: this line is not a JSON object; delete the line")
        rows.append(row)
    return rows
