"""Whatever is done to a data file after a training, no row that was trained on is scored as held out."""

import csv
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftcli.data.prepare import PreparedData, prepare
from peftcli.data.split_record import SplitRecord, join_records
from peftcli.errors import DataError
from peftcli.plan.plan import LossMask
from peftcli.progress import Silent
from peftcli.recipe.schema import DatasetSection

RULE = LossMask(completion_only=True, assistant_only=False, asked=(), max_length=64)
Row = tuple[str, str]
Read = Callable[..., PreparedData]
ROWS: list[Row] = [(f"item {number}", ("red", "blue", "green")[number % 3]) for number in range(14)]


def edited(rows: list[Row], edits: list[tuple[str, int, int]]) -> list[Row]:
    """Rows after edits, each with a name, a position and a number."""
    rows = list(rows)
    for what, position, number in edits:
        at = position % max(len(rows), 1)
        if what == "insert":
            rows.insert(at, (f"new {number}", "red"))
        elif what == "sort":
            rows.sort(key=lambda row: (row[0][::-1] if number % 2 else row[0], row))
        elif rows and what == "delete":
            del rows[at]
        elif rows and what == "duplicate":
            rows.insert(number % len(rows), rows[at])
        elif rows and what == "text":
            rows[at] = (f"other {number}", rows[at][1])
        elif rows and what == "case":
            rows.insert(number % len(rows), (rows[at][0].upper(), rows[at][1]))
        elif rows and what == "label":
            rows[at] = (rows[at][0], "black")
    return rows


KINDS = ("insert", "sort", "delete", "duplicate", "text", "case", "label")
EDITS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 40), st.integers(0, 40)), max_size=12)


@pytest.fixture
def read(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """A function that writes rows to a CSV file and prepares them."""
    from transformers import AutoTokenizer

    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    file = tmp_path / "rows.csv"

    def make(rows: list[Row], *, deduplicate: bool, validation: int = 0, **records: Any) -> PreparedData:
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows([("name", "color"), *rows])
        keys = {"path": str(file), "prompt": "{name}:", "completion": " {color}"}
        keys |= {"split": {"test_size": 4, "validation_size": validation}}
        section = DatasetSection.model_validate(keys | {"deduplicate": deduplicate})
        return prepare(section, tokenizer, RULE, 0, Silent(), **records)

    return make


def rows_of(split: Any) -> list[Row]:
    chosen = split.store.examples.select(["prompt", "completion"]).take(split.rows).to_pylist()
    return [(row["prompt"][:-1], row["completion"][1:]) for row in chosen]


def kept(rows: list[Row], *, deduplicate: bool) -> list[Row]:
    """The rows that are used: of equal ones, ignoring case, the first."""
    if not deduplicate:
        return rows
    first: dict[tuple[str, str], Row] = {}
    for name, color in rows:
        first.setdefault((name.lower(), color), (name, color))
    return list(first.values())


def names(rows: list[Row]) -> set[str]:
    return {name.lower() for name, _ in rows}


def saved(record: SplitRecord, file: Path) -> SplitRecord:
    record.save(file)
    return SplitRecord.load(file)


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS, more=EDITS, deduplicate=st.booleans(), validation=st.sampled_from((0, 3)))
def test_no_edit_of_a_file_makes_a_trained_row_a_test_row(
    read: Read, tmp_path: Path, edits: list[Any], more: list[Any], deduplicate: bool, validation: int
) -> None:
    read = functools.partial(read, validation=validation)
    first = read(ROWS, deduplicate=deduplicate)
    chosen_with = rows_of(first.validation_split)
    assert len(chosen_with) == validation
    trained, tested = rows_of(first.train) + chosen_with, rows_of(first.test_split)
    assert not set(tested) & set(trained) and not set(chosen_with) & set(rows_of(first.train))
    record = saved(SplitRecord.of(first.train, first.test_split, first.validation_split), tmp_path / "rows.npz")
    rows = edited(ROWS, edits)
    if not rows:
        return
    used = kept(rows, deduplicate=deduplicate)
    left = {row for row in used if row in tested}

    # eval and merge
    try:
        scored = rows_of(read(rows, deduplicate=deduplicate, record=record).test_split)
    except DataError as problem:
        assert "the run trained on all" in str(problem) and names(used) <= names(trained)
    else:
        assert scored
        assert not set(scored) & set(trained) and (left or not names(scored) & names(trained))
        assert not left or (set(scored) == left and len(scored) == len(left))

    # init_from and stages, then resume: more of the rows may be drawn, or none
    for earlier in (join_records([record]), replace(record, closed=True)):
        try:
            again = read(rows, deduplicate=deduplicate, earlier=earlier)
        except DataError as problem:
            assert "split is empty" in str(problem)
            continue
        test = rows_of(again.test_split)
        assert left <= set(test) and not set(test) & set(trained)
        assert not names([row for row in test if row not in tested]) & names(trained)
        validated = {row for row in used if row in chosen_with}
        assert validated <= set(rows_of(again.validation_split))
        assert not set(rows_of(again.validation_split)) & {*rows_of(first.train), *test, *rows_of(again.train)}
        if earlier is not None and earlier.closed and left:
            assert set(test) == left and set(rows_of(again.train)) == set(used) - left - validated

    # what was trained on in any of the sessions is not scored after further edits
    after, seen = record, list(trained)
    if left:
        record_now = SplitRecord.of(again.train, again.test_split, again.validation_split)
        after = saved(record_now.extended(record), tmp_path / "rows.npz")
        seen = [*rows_of(first.train), *rows_of(again.train), *rows_of(again.validation_split)]
    later = edited(rows, more)
    try:
        scored = rows_of(read(later, deduplicate=deduplicate, record=after).test_split) if later else []
    except DataError as problem:
        assert "the run trained on all" in str(problem)
    else:
        assert not set(scored) & set(seen)


def test_where_no_test_row_is_left_a_changed_label_is_no_new_row(read: Read) -> None:
    first = read(ROWS, deduplicate=True)
    record = SplitRecord.of(first.train, first.test_split)
    trained = rows_of(first.train)
    rows = [(name, "black") for name, _ in trained] + [(trained[0][0].upper(), trained[0][1]), ("pear", "green")]
    assert rows_of(read(rows, deduplicate=True, record=record).test_split) == [("pear", "green")]


def test_a_prompt_that_is_shared_by_training_rows_does_not_mark_new_rows(read: Read) -> None:
    rows = [("a haiku", f"poem {number}") for number in range(14)]
    first = read(rows, deduplicate=True)
    record = SplitRecord.of(first.train, first.test_split)
    new = [("a haiku", f"other {number}") for number in range(3)]
    assert rows_of(read(new, deduplicate=True, record=record).test_split) == new
