"""Loads the JSON files of a run for the report: each may be absent, each value may be null."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftcli.errors import DataError, RecipeError
from peftcli.report.format import DASH
from peftcli.run_dir import RunDir, read_json, read_log

SCHEMA = 1


@dataclass(frozen=True)
class Stages:
    """What each stage of a run wrote; a stage that did not run is an empty object."""

    metrics: dict[str, Any]
    plan: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    train: dict[str, Any]
    eval: dict[str, Any]
    merge: dict[str, Any]
    log: list[dict[str, Any]]
    selection: dict[str, Any] = field(default_factory=dict)
    """What the gradient chose to train; empty where nothing was left to it."""
    ranks: dict[str, Any] = field(default_factory=dict)
    """How AdaLoRA's ranks moved; empty for every other method."""
    earlier: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = ()
    """Folder name, plan and metrics of each stage before the run's own."""


def load_stages(run: RunDir) -> Stages:
    """Read the JSON files of a run.

    Raises:
        RecipeError: no stage of the run has ended, so there is nothing to report.
        DataError: a file is not JSON, or another version of peftcli wrote it.
    """
    if not run.metrics.is_file() or not run.plan.is_file():
        raise RecipeError(
            f"{run.path} holds no finished stage; run `peftcli train RECIPE --output-dir {run.path}` first"
        )
    try:
        log = read_log(run.log)
    except json.JSONDecodeError as error:
        raise DataError(f"{run.log} has a line that is not JSON ({error.msg}); delete the line") from error
    return Stages(
        metrics=_read(run.metrics),
        plan=_read(run.plan),
        environment=_read(run.environment),
        data=_read(run.data),
        train=_read(run.train),
        eval=_read(run.eval),
        merge=_read(run.merge),
        selection=_read(run.selection),
        ranks=_read(run.ranks),
        log=[row for row in log if isinstance(row, dict)],
        earlier=tuple(
            (part.path.name, _read(part.plan), _read(part.metrics))
            for part in map(RunDir, sorted(run.stages.glob("*"), key=_number))
        ),
    )


def _number(path: Path) -> int:
    number, _, _ = path.name.partition("-")
    return int(number) if number.isdigit() else 0


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); run the stage that writes it again") from error
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != SCHEMA:
        raise DataError(
            f"{path} has schema {schema!r}, but this peftcli reads schema {SCHEMA}; "
            "run the stage again, or use the version that wrote it"
        )
    return value


def find(value: Any, *keys: str) -> Any:
    """Walk down nested objects; None where one of the keys is missing or null."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def figure(value: Any, *keys: str) -> float | None:
    """A finite number, or None: null, missing, not a number, or not finite."""
    found = find(value, *keys)
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    return found if math.isfinite(found) else None


def text(value: Any, *keys: str) -> str:
    """A value as words: a dash for null, yes and no for booleans, commas between the parts of a list."""
    found = find(value, *keys)
    if found is None:
        return DASH
    if isinstance(found, bool):
        return "yes" if found else "no"
    if isinstance(found, list):
        return ", ".join(text(part) for part in found) or "none"
    if isinstance(found, dict):
        return ", ".join(f"{key} {text(part)}" for key, part in found.items()) or "none"
    return str(found)


def objects(value: Any, *keys: str) -> list[dict[str, Any]]:
    """A list of objects; empty where it is missing or null."""
    found = find(value, *keys)
    return [part for part in found if isinstance(part, dict)] if isinstance(found, list) else []
