"""Reads and writes the files of a run folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from peftcli.errors import DataError
from peftcli.results.metrics import MetricsJson
from peftcli.results.plan import Forecast, PlanJson
from peftcli.results.schema import SCHEMA
from peftcli.results.training import TrainJson
from peftcli.run_dir import ChecksumError, RunDir, read_json, write_json
from peftcli.typed_json import WrongType, dump, parse

T = TypeVar("T")

EARLIER_SCHEMAS: Mapping[type[Any], tuple[int, ...]] = {Forecast: (1,), PlanJson: (1,), TrainJson: (1,)}
"""The earlier schemas of a file that are still read; their keys that have a new name are stated by the fields."""


def load(kind: type[T], path: Path) -> T | None:
    """Read a file of a run; None where there is none.

    Raises:
        DataError: it is not JSON, it was changed since it was written, another version of peftcli wrote it, or a key
            has a value of the wrong type.
    """
    if not path.exists():
        return None
    if not path.is_file():
        raise DataError(f"{path} is not a file; remove it, and run the stage that writes it again")
    again = "run the stage that writes it again"
    try:
        value = read_json(path)
    except ChecksumError as error:
        raise DataError(f"{path} was changed after it was written: {error}; else {again}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); {again}") from error
    schema = value.get("schema") if isinstance(value, dict) else None
    current = getattr(kind, "schema", SCHEMA)
    if not isinstance(schema, int) or schema not in (current, *EARLIER_SCHEMAS.get(kind, ())):
        raise DataError(
            f"{path} has schema {schema!r}, but this peftcli reads schema {current}; "
            "run the stage again, or use the version that wrote it"
        )
    try:
        return parse(kind, value)
    except WrongType as error:
        raise DataError(f"{path}: {error}; {again}") from error


def load_or_default(kind: type[T], path: Path) -> T:
    """The same, with all fields at their defaults where there is no file."""
    found = load(kind, path)
    return kind() if found is None else found


def save(path: Path, value: Any) -> None:
    """Write a file of a run."""
    write_json(path, dump(value))


def as_text(value: Any) -> str:
    """A file of a run on one line, as `--json` prints it."""
    return json.dumps(dump(value), ensure_ascii=False)


def status_of(run: RunDir) -> str | None:
    """The status that `metrics.json` states, or None where no run has ended in the folder."""
    found = load(MetricsJson, run.metrics)
    return None if found is None else found.status


def lost_files(run: RunDir, metrics: MetricsJson) -> tuple[str, ...]:
    """Names of files that are missing, although `metrics.json` repeats figures of them."""
    repeated = {
        run.eval: metrics.base or metrics.adapter,
        run.train: metrics.train,
        run.data: metrics.data.train_rows,
        run.merge: metrics.merge,
        run.environment: metrics.train,
        run.log: metrics.train,
    }
    return tuple(path.name for path, figure in repeated.items() if figure is not None and not path.exists())
