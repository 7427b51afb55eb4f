"""The body of `predict`: rows of a file in, the same rows with predictions out."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftcli.cli.commands import DEFAULT_BATCH, evaluation_batch, print_json, shown_run
from peftcli.cli.console import Shown, Streams
from peftcli.cli.pointers import Pointers
from peftcli.cli.recipes import find_recipe
from peftcli.cli.text import printable
from peftcli.errors import DataError, RecipeError
from peftcli.recipe.load import load_recipe, load_run_recipe
from peftcli.recipe.schema import DatasetSection
from peftcli.run_dir import is_external_adapter
from peftcli.train.stop import StoppableProgress, StopRequests

STANDARD_INPUT = "-"
SHOWN_ERRORS = 5
"""Number of reasons in the summary."""


@dataclass(frozen=True)
class PredictFlags:
    """The flags of `predict`."""

    output: Path
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    probabilities: bool
    prefix: str
    overwrite: bool
    as_json: bool


def predict_command(name: str, recipe: str | None, file: str, flags: PredictFlags, pointers: Pointers) -> None:
    """Predict for the rows of a file, and print how many there are.

    Args:
        file: a path, or `-` for JSON Lines on standard input.
        recipe: with the base or the columns, for a target that has none.

    Raises:
        DataError: no row could be used.
    """
    with _rows_file(file) as path, shown_run(None) as (shown, streams):
        from peftcli.model.generation import Decoding
        from peftcli.model.predictors import PredictSettings
        from peftcli.predict import PredictRequest, predict

        target, dataset, rows = _open(name, recipe, pointers, shown)
        decoding = Decoding(flags.max_new_tokens, flags.temperature, flags.top_p, flags.seed)
        settings = PredictSettings(decoding, rows, flags.probabilities)
        request = PredictRequest(path, flags.output, settings, flags.prefix, flags.overwrite)
        with StopRequests(request.journal, None) as stops:
            stoppable = StoppableProgress(shown, stops, "before all rows were predicted")
            found = predict(target, dataset, request, stoppable)
        if flags.as_json:
            print_json(streams, asdict(found))
        else:
            _show(found, streams)
        if not found.predicted:
            raise DataError(
                f"{file}: none of {found.rows:,} rows could be used; the column error of {flags.output} says why"
            )


@contextmanager
def _rows_file(file: str) -> Iterator[Path]:
    """The file with the rows; standard input is copied, since it is read more than once."""
    if file != STANDARD_INPUT:
        path = Path(file)
        if not path.exists():
            raise DataError(f"{file}: no such file; name a CSV, TSV, JSONL, JSON or Parquet file, or - for JSONL")
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="peftcli-") as folder:
        path = Path(folder) / "standard-input.jsonl"
        with path.open("wb") as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy)
        yield path


def _open(name: str, recipe: str | None, pointers: Pointers, shown: Shown) -> tuple[Any, DatasetSection | None, int]:
    """The target, the section of its recipe that says how rows are read, and its batch size."""
    from peftcli.cli.run_inputs import open_model

    if is_external_adapter(Path(name)):
        from peftcli.cli.external_adapters import opened

        with opened(Path(name), recipe, pointers, shown) as (loaded, _, target):
            return target, loaded.recipe.dataset if recipe is not None else None, DEFAULT_BATCH
    target, changed = open_model(name, pointers, ("model.name", "evaluation.batch_size", "dataset"))
    if target.run is not None:
        if recipe is not None:
            raise RecipeError(f"--recipe {recipe}: {name} belongs to a run with its own recipe; remove --recipe")
        loaded = changed or load_run_recipe(target.run.recipe)
    elif recipe is None:
        return target, None, evaluation_batch(target, None)
    else:
        loaded = load_recipe(find_recipe(recipe))
    return target, loaded.recipe.dataset, evaluation_batch(target, changed)


def _show(found: Any, streams: Streams) -> None:
    parts = [f"{found.rows:,} rows: {found.predicted:,} predicted"]
    if found.errors:
        reasons = sorted(found.errors.items(), key=lambda one: -one[1])
        said = ", ".join(f"{reason} ({count:,})" for reason, count in reasons[:SHOWN_ERRORS])
        more = f", and {len(reasons) - SHOWN_ERRORS} other reasons" if len(reasons) > SHOWN_ERRORS else ""
        parts.append(f"{sum(found.errors.values()):,} with an error: {said}{more}")
    if found.truncated:
        parts.append(f"{found.truncated:,} truncated to the maximum length, as in training")
    if found.unfinished:
        parts.append(f"{found.unfinished:,} answers cut off at --max-new-tokens")
    streams.out.write(printable(f"{'; '.join(parts)}; written to {found.output}") + "\n")
