"""The test rows of a run as JSON Lines, which any machine can score without the original files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from peftcli.data.formats import KINDS
from peftcli.data.stats import Split
from peftcli.recipe.schema import DatasetSection

FILE = "test.jsonl"
KEPT = ("max_length", "too_long")
"""Keys of the dataset section that still matter for rows that are already joined, deduplicated and split."""


def write_test_rows(split: Split, file: Path) -> dict[str, str]:
    """Write the test rows; returns the columns for the dataset section."""
    kind, problem_type = split.store.facts["kind"], split.store.facts.get("problem")
    table = split.store.examples.select(list(KINDS[kind])).take(pa.array(split.rows, pa.int64()))
    rows = [_row(row, kind, problem_type) for row in table.to_pylist()]
    with file.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    used = {name for row in rows for name in row}
    return {name: name for name in KINDS[kind] if name in used and name != "tools"}


def _row(row: dict[str, str], kind: str, problem_type: str | None) -> dict[str, Any]:
    return dict(_values(row, kind, problem_type))


def _values(row: dict[str, str], kind: str, problem_type: str | None) -> Iterator[tuple[str, Any]]:
    for name, text in row.items():
        if name in ("tools", "text_pair") and not text:
            continue
        as_json = name in ("messages", "tools") or kind == "tagging"
        as_json = as_json or (name == "label" and problem_type in ("multi-label", "regression"))
        yield name, json.loads(text) if as_json else text


def dataset_of_rows(before: DatasetSection, file: Path, columns: dict[str, str], labels: tuple[str, ...]) -> Any:
    """The dataset section that reads the packed rows.

    Args:
        labels: names of the classes in the order of the model's outputs.
    """
    kept = {key: getattr(before, key) for key in KEPT if key in before.model_fields_set}
    named = {"labels": labels} if labels else {}
    return DatasetSection.model_validate({"path": str(file), "columns": columns, **kept, **named})
