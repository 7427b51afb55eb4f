"""Checks the local data of a recipe by their first rows: files, headers, columns. No library for models is imported.

Files are read as for training, so an error is the same as the one that `peftcli data` shows later. Datasets on the Hub
and databases behind a URL are not opened.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peftcli.data.formats import Given
from peftcli.data.join import Join
from peftcli.data.readers.images import open_images
from peftcli.data.readers.open import open_source
from peftcli.data.rows import Rows, listed
from peftcli.data.selection import Selection
from peftcli.errors import DataError
from peftcli.nearest import nearest
from peftcli.plan.plan import LossMask
from peftcli.recipe.schema import DatasetSection, Recipe, SourceSection, TestSection
from peftcli.tasks.base import Task, implementation
from peftcli.tasks.registry import TASKS


def check_first_rows(recipe: Recipe) -> None:
    """Check that the files of a recipe exist and that their columns fit it.

    Raises:
        DataError: lists the problems of all sources.
        MachineError: the environment variable with a database URL is not set.
    """
    problems = list(dict.fromkeys(_problems(recipe.dataset, TASKS[recipe.model.task], recipe)))
    if len(problems) > 1:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise DataError(f"the data has {len(problems)} problems{lines}")
    if problems:
        raise DataError(problems[0])


def _problems(dataset: DatasetSection, task: Task, recipe: Recipe) -> Iterator[str]:
    joins: list[Join] = []
    joined = True
    for number, join in enumerate(dataset.join):
        try:
            joins.append(Join(open_source(join, key=f"dataset.join[{number}]"), join.on))
        except DataError as problem:
            joined = False
            yield str(problem)
    opened: list[tuple[Any, SourceSection]] = []
    without: frozenset[Path] = frozenset()
    for key, section, like in _sections(dataset):
        if section.path is None:
            continue  # on the Hub, or behind a URL
        try:
            source = (open_images if task.images else open_source)(section, without=without, key=key)
        except DataError as problem:
            yield str(problem)
            continue
        if isinstance(section, TestSection):
            without = frozenset(getattr(source, "files", ()))
        opened.append((source, like))
    if not joined:
        return  # columns of the joined table may be missing
    for source, like in opened:
        yield from _column_problems(source, like, joins, recipe)


def _sections(dataset: DatasetSection) -> Iterator[tuple[str, SourceSection | TestSection, SourceSection]]:
    """Each section with a source, the test rows first: its dotted name, and the section that says how rows are read."""
    sources: Sequence[SourceSection] = dataset.sources or (dataset,)
    if dataset.test is not None:
        yield "dataset.test", dataset.test, sources[0]
    for number, section in enumerate(sources):
        yield (f"dataset.sources[{number}]" if dataset.sources else "dataset"), section, section


def _column_problems(source: Any, section: SourceSection, joins: Sequence[Join], recipe: Recipe) -> Iterator[str]:
    """The problems of a source's columns, found as training finds them in the first rows."""
    task, first = TASKS[recipe.model.task], None
    try:
        first = next((rows for rows in source.batches() if rows.numbers), None)
        for join in joins:
            first = first and join.apply(first)[0]
        if first is not None and first.numbers:
            Selection(section).check(first)
    except DataError as problem:
        yield str(problem)
    if first is None or not first.numbers:
        return  # no row can be read or joined; `data` counts the reasons
    for key in ("stratify", "group"):
        name = getattr(recipe.dataset.split, key)
        if isinstance(name, str) and name not in first.columns:
            yield str(no_split_column(first, key, name))
    if task.images:
        return  # its format needs the image libraries
    rule = LossMask(False, False, (), 1, task.name, recipe.model.problem_type)
    # Whether instructions become chats depends on the tokenizer, but not which columns are needed.
    given = Given(rule, recipe.dataset.labels, getattr(source, "class_names", {}), chats=True)
    try:
        implementation(task.row_format)(Selection(section).offered(first), section, given)
    except DataError as problem:
        yield str(problem)


def no_split_column(first: Rows, key: str, name: str) -> DataError:
    """The error for a column of `dataset.split` that the rows do not have."""
    near = nearest(name, first.columns)
    fix = f"did you mean {near}?" if near else "use one of these"
    return DataError(f"dataset.split.{key}: {first.file} has no column {name}; it has {listed(first.columns)}; {fix}")
