"""`predict`: what a model says about each row of a file, written with all columns of the row to another file.

A window of rows is predicted at a time, sorted by length within it, and recorded in a journal beside the output. A
killed command therefore continues with the next window, and its windows, batches and predictions are those of one that
was never stopped. When all rows are predicted, the file is read again and written with the new columns.
"""

import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from peftcli.data.join import Join
from peftcli.data.journal import Journal
from peftcli.data.model_inputs import Asked, Input, InputFormat, Unusable, choose_inputs
from peftcli.data.readers.images import ImageTable, PictureFolder, open_images
from peftcli.data.readers.open import FileSource, open_source
from peftcli.data.rows import Rows, Source, listed
from peftcli.data.table_writer import ColumnTypes, check_extension, open_writer
from peftcli.errors import DataError, RecipeError
from peftcli.model.adapter_weights import hash_files
from peftcli.model.files import base_facts
from peftcli.model.predictors import (
    Predicted,
    Prediction,
    PredictSettings,
    make_predictor,
    new_columns,
    window_rows,
)
from peftcli.model.target import LoadedTarget, Target
from peftcli.progress import Progress
from peftcli.recipe.schema import DatasetSection, SourceSection
from peftcli.results import DataColumn, DataJson, load_or_default
from peftcli.tasks.registry import TASKS

ERROR = "error"
READ = ("csv", "tsv", "json", "jsonl", "parquet", "arrow", "conll")
"""Formats that have rows with columns."""


@dataclass(frozen=True)
class PredictRequest:
    """What to predict.

    Attributes:
        file: a table; for images also a folder of them.
        output: the table to write; the extension decides its format.
        prefix: put before the names of the new columns.
        overwrite: replace an existing output.
    """

    file: Path
    output: Path
    settings: PredictSettings
    prefix: str = ""
    overwrite: bool = False

    @property
    def journal(self) -> Path:
        """Beside the output: what is predicted so far."""
        return self.output.with_name(f"{self.output.name}.partial")


@dataclass(frozen=True)
class Summary:
    """The result of a prediction.

    Attributes:
        predicted: rows with a prediction.
        errors: rows without, by reason.
        truncated: rows that were truncated to the maximum length, as in training.
        unfinished: answers that reached the maximum length without an end token.
        resumed_rows: rows that an earlier, stopped command predicted.
    """

    output: str
    rows: int
    predicted: int
    errors: dict[str, int]
    truncated: int
    unfinished: int
    resumed_rows: int
    seconds: float


@dataclass(frozen=True)
class Table:
    """A file whose rows are predicted.

    Attributes:
        columns: of all rows.
        types: of the columns in Parquet; empty for other outputs.
        rows: number of rows, including those that cannot be read.
        first: the first rows.
    """

    source: Source
    columns: tuple[str, ...]
    types: dict[str, pa.DataType]
    rows: int
    first: Rows
    fingerprint: str

    def batches(self) -> Iterator[Rows]:
        """All rows.

        Raises:
            DataError: the file changed since it was counted.
        """
        rows = 0
        for batch in self.source.batches():
            rows += len(batch) + len(batch.unread)
            yield batch
        if rows != self.rows:
            raise DataError(f"{self.source.name}: changed while it was read; run the command again")


def predict(target: Target, dataset: DatasetSection | None, request: PredictRequest, progress: Progress) -> Summary:
    """Predict for all rows of a file.

    Args:
        dataset: section of the recipe with the columns; None to use the usual names and the template of the manifest.

    Raises:
        DataError: the file cannot be read, or has no column that fits.
        RecipeError: the output exists, a column has the name of a new one, or an earlier command was another one.
    """
    begun = time.monotonic()
    output, base = request.output, target.base
    check_extension(output, "--output")
    if not request.journal.exists():
        _refuse_existing(request)
    sections = _sections(target, dataset)
    table = survey(open_table(request.file, sections[0], target), output.suffix, progress)
    format_, joins = _format(table, sections, dataset, target)
    drops = dataset is not None and dataset.too_long == "drop"
    settings = replace(request.settings, splits_words=format_.splits_words, drops_long=drops)
    added = new_columns(base.labels, base.task, base.problem_type, settings)
    names = [f"{request.prefix}{name}" for name in (*added, ERROR)]
    _check_names(table, names, request)
    output.parent.mkdir(parents=True, exist_ok=True)
    job = _job(target, sections, settings, table)
    with Journal(request.journal, job, restart=request.overwrite) as journal:
        before = journal.totals.get("count", 0)
        if before < table.rows:
            _refuse_existing(request)
            if before:
                progress.note(f"{before:,} of {table.rows:,} rows are predicted already; continuing with the others")
            loaded = LoadedTarget.of(target)
            progress.start("predictions", table.rows)
            windows = _windows(table, format_, joins, window_rows(settings.batch_rows))
            _predict_windows(loaded, windows, settings, list(added), journal, RowProgress(progress, before))
            progress.end()
        types = dict(zip(names, (*added.values(), pa.string()), strict=True))
        errors = _write(table, journal, names, types, output)
        journal.remove()
    return Summary(
        output=str(output),
        rows=table.rows,
        predicted=table.rows - errors.total(),
        errors=dict(errors),
        truncated=journal.totals.get("truncated", 0),
        unfinished=journal.totals.get("unfinished", 0),
        resumed_rows=before,
        seconds=round(time.monotonic() - begun, 3),
    )


def _refuse_existing(request: PredictRequest) -> None:
    if request.output.exists() and not request.overwrite:
        raise RecipeError(
            f"--output {request.output}: exists already; pass --overwrite to replace it, or name another file"
        )


def _sections(target: Target, dataset: DatasetSection | None) -> Sequence[SourceSection]:
    """How the rows are read: by the sources of a recipe, or else by the template of the manifest."""
    if dataset is not None:
        return dataset.sources or (dataset,)
    template = target.identity.get("prompt")
    if template is None:
        return (SourceSection(),)
    generates = TASKS[target.base.task].generates
    return (SourceSection(prompt=template) if generates else SourceSection(text=template),)


def open_table(file: Path, section: SourceSection, target: Target) -> Source:
    """Open a file.

    Args:
        section: of the recipe; its CSV format and encoding are used if its file has the same extension.

    Raises:
        DataError: it cannot be read, or its format has no columns.
    """
    path = file.absolute()
    alike = section.path is not None and Path(section.path).suffix.lower() == path.suffix.lower()
    files = SourceSection(path=str(path))
    if alike:
        files = SourceSection(path=str(path), csv=section.csv, encoding=section.encoding)
    images = TASKS[target.base.task].images
    if images and path.is_dir():
        return PictureFolder(path)
    source = (open_images if images else open_source)(files)
    table = source.table if isinstance(source, ImageTable) else source
    assert isinstance(table, FileSource)  # a section with a path
    if table.parts[0].kind not in READ:
        raise DataError(
            f"{file}: is {table.parts[0].kind}, without columns; use CSV, TSV, JSONL, JSON or Parquet, or "
            "`peftcli generate RUN --file FILE` for one prompt per line"
        )
    return source


def survey(source: Source, suffix: str, progress: Progress) -> Table:
    """Read a file once, so that a broken row is found before the first prediction.

    Args:
        suffix: extension of the output; types are only needed for Parquet.
    """
    columns: dict[str, None] = {}
    found = ColumnTypes(_stored_types(source)) if suffix.lower() == ".parquet" else None
    first: Rows | None = None
    rows = 0
    progress.start("reading rows", 0)
    fingerprint = source.fingerprint()
    for batch in source.batches():
        if first is None or not first.numbers:
            first = batch
        columns.update(dict.fromkeys(batch.columns))
        rows += len(batch) + len(batch.unread)
        if found is not None:
            found.add(batch.columns)
        progress.advance(rows)
    progress.end()
    if first is None or not first.numbers:
        raise DataError(f"{source.name}: none of {rows:,} rows can be read; fix the file")
    return Table(source, tuple(columns), found.types() if found is not None else {}, rows, first, fingerprint)


def _stored_types(source: Source) -> dict[str, pa.DataType]:
    """The types of a Parquet file."""
    table = source.table if isinstance(source, ImageTable) else source
    if not isinstance(table, FileSource) or table.parts[0].kind != "parquet":
        return {}
    schema = pq.read_schema(table.parts[0].path)
    return dict(zip(schema.names, schema.types, strict=True))


def _format(
    table: Table, sections: Sequence[SourceSection], dataset: DatasetSection | None, target: Target
) -> tuple[InputFormat, list[Join]]:
    """How the rows become inputs, and the joins that they need for it."""
    kind = target.identity.get("format")
    folder: Path = getattr(table.source, "folder", Path())
    known = frozenset(found.column for found in _trained_columns(target) if found.column is not None)
    asked = Asked(TASKS[target.base.task], str(kind) if kind is not None else None, known, folder)
    try:
        return choose_inputs(table.first, sections, asked), []
    except DataError:
        if dataset is None or not dataset.join:
            raise
    joins = [
        Join(open_source(join, key=f"dataset.join[{number}]"), join.on) for number, join in enumerate(dataset.join)
    ]
    return choose_inputs(_joined(table.first, joins)[0], sections, asked), joins


def _trained_columns(target: Target) -> Sequence[DataColumn]:
    return load_or_default(DataJson, target.run.data).columns if target.run is not None else ()


def _joined(rows: Rows, joins: Sequence[Join]) -> tuple[Rows, dict[int, str]]:
    """The rows with a match, numbered by their place, and the reason of each row without one."""
    rows = replace(rows, numbers=list(range(len(rows))))
    lost: dict[int, str] = {}
    for join in joins:
        numbers = rows.numbers
        rows, missed = join.apply(rows)
        lost |= {numbers[row]: reason for row, reason in missed}
    return rows, lost


def _check_names(table: Table, names: Sequence[str], request: PredictRequest) -> None:
    taken = [name for name in names if name in table.columns]
    if taken:
        raise RecipeError(
            f"{request.file}: already has the column {listed(taken)}, which the predictions need; pass --prefix, such "
            f"as --prefix predicted_ for {listed(f'predicted_{name.removeprefix(request.prefix)}' for name in taken)}"
        )


def _job(target: Target, sections: Sequence[SourceSection], settings: PredictSettings, table: Table) -> dict[str, str]:
    """What decides the predictions."""
    base = target.base
    model = [target.identity, asdict(base_facts(base.path, base.revision))]
    model += [hash_files(target.adapter)] if target.adapter is not None else []
    read = [section.model_dump(include={"text", "prompt", "columns", "format"}, mode="json") for section in sections]
    return {
        "input file": table.fingerprint,
        "model": _digest(model),
        "recipe": _digest(read),
        "settings": json.dumps(asdict(settings), sort_keys=True),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _order(rows: Rows) -> list[tuple[int, int | None, str]]:
    """Number, place in the columns, and reason of each row of a batch in the order of the file.

    A row that could not be read has no place.
    """
    found: list[tuple[int, int | None, str]] = [(number, place, "") for place, number in enumerate(rows.numbers)]
    found += [(number, None, reason) for number, reason in rows.unread]
    return sorted(found, key=lambda row: row[0])


def _windows(table: Table, format_: InputFormat, joins: Sequence[Join], rows: int) -> Iterator[list[Input | Unusable]]:
    """The inputs of all rows, some at a time; where a window begins depends only on the file."""
    for batch in table.batches():
        inputs: list[Input | Unusable] = [Unusable("")] * len(batch)
        joined, lost = _joined(batch, joins)
        for place, one in zip(joined.numbers, format_.inputs(joined), strict=True):
            inputs[place] = one
        for place, reason in lost.items():
            inputs[place] = Unusable(reason)
        made = [Unusable(reason) if place is None else inputs[place] for _, place, reason in _order(batch)]
        for first in range(0, len(made), rows):
            yield made[first : first + rows]


def _predict_windows(
    loaded: LoadedTarget,
    windows: Iterator[list[Input | Unusable]],
    settings: PredictSettings,
    added: Sequence[str],
    journal: Journal,
    progress: "RowProgress",
) -> None:
    """Predict the windows that the journal lacks, and record each."""
    predictor = make_predictor(loaded, settings)
    done = journal.totals.get("count", 0)
    for window in itertools.islice(windows, journal.count, None):
        usable = [place for place, one in enumerate(window) if not isinstance(one, Unusable)]
        inputs = [one for one in window if not isinstance(one, Unusable)]
        made = predictor.predict(inputs, done, progress) if inputs else Predicted([])
        rows: list[Prediction] = [one if isinstance(one, Unusable) else {} for one in window]
        for place, one in zip(usable, made.rows, strict=True):
            rows[place] = one
        done += len(window)
        journal.append({"rows": [_cells(one, added) for one in rows], "count": len(window), **made.counts})
        progress.finish(done)


def _cells(prediction: Prediction, added: Sequence[str]) -> list[Any]:
    if isinstance(prediction, Unusable):
        return [*(None for _ in added), prediction.reason.removeprefix("with ")]
    return [*(prediction[name] for name in added), None]


class RowProgress:
    """The progress over all rows, reported by work on one window after the other."""

    def __init__(self, shown: Progress, done: int) -> None:
        """
        Args:
            shown: of all rows; started.
            done: rows that are predicted.
        """
        self._shown = shown
        self._begun = time.monotonic()
        self._before = self._done = done
        shown.advance(done)

    def note(self, text: str) -> None:
        self._shown.note(text)

    def start(self, what: str, total: int) -> None:
        """Show nothing: a window is a part of the whole."""

    def advance(self, done: int, figures: Mapping[str, str] | None = None) -> None:
        self._show(self._done + done)

    def end(self) -> None:
        """Show nothing."""

    def finish(self, done: int) -> None:
        """Report that a window is recorded.

        Args:
            done: rows of all windows so far.
        """
        self._done = done
        self._show(done)

    def _show(self, done: int) -> None:
        rate = (done - self._before) / max(time.monotonic() - self._begun, 1e-3)
        self._shown.advance(done, {"rows/s": f"{rate:,.1f}" if rate < 10 else f"{rate:,.0f}"})


def _write(
    table: Table, journal: Journal, names: Sequence[str], types: Mapping[str, pa.DataType], output: Path
) -> Counter[str]:
    """Write the file with the predictions beside its name, and move it there.

    Args:
        names: of the new columns; the last has the error.
        types: of the new columns, for Parquet.

    Returns:
        Number of rows by error.
    """
    predictions = itertools.chain.from_iterable(part["rows"] for part in journal.parts())
    errors: Counter[str] = Counter()
    writing = output.with_name(f"{output.name}.writing")
    try:
        with open_writer(writing, output.suffix, [*table.columns, *names], {**table.types, **types}) as writer:
            for batch in table.batches():
                writer.write(list(_rows(batch, table.columns, predictions, errors)))
        with writing.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(writing, output)
    except BaseException:
        writing.unlink(missing_ok=True)
        raise
    return errors


def _rows(
    batch: Rows, columns: Sequence[str], predictions: Iterator[list[Any]], errors: Counter[str]
) -> Iterator[list[Any]]:
    """The cells of each row of a batch, followed by those of its prediction; counts the errors."""
    missing = [None] * len(batch)
    values = [batch.columns.get(name, missing) for name in columns]
    for number, place, _ in _order(batch):
        *cells, error = next(predictions)
        if error is not None:
            errors[error] += 1
        if place is None:
            error = f"{batch.file}:{number}: {error}"
        yield [*(None if place is None else column[place] for column in values), *cells, error]
