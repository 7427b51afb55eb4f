"""Rows of any columns, turned into examples of one of the three formats; what cannot be used is counted."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from peftcli.errors import DataError
from peftcli.recipe.schema import DatasetSection
from peftcli.recipe.template import render, template_columns

BATCH_ROWS = 2000
FORMATS = {
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}


@dataclass(frozen=True)
class Examples:
    """Examples of one format.

    Attributes:
        format: a key of FORMATS; its value names the columns of `table`, all text (messages as JSON).
        table: one row for each example.
        dropped: number of source rows left out, by reason.
    """

    format: str
    table: pa.Table
    dropped: dict[str, int]

    def texts(self) -> list[str]:
        """Each example as one text, for fingerprints and comparisons."""
        columns = [self.table.column(name).to_pylist() for name in FORMATS[self.format]]
        return ["\x1f".join(parts) for parts in zip(*columns, strict=True)]

    def take(self, indices: list[int]) -> "Examples":
        return Examples(self.format, self.table.take(pa.array(indices, pa.int64())), {})


def make_examples(table: pa.Table, dataset: DatasetSection, path: str) -> Examples:
    """Fill the templates of the recipe, or pick the columns that it names or that are recognised.

    Args:
        table: the joined rows.
        dataset: section of the recipe.
        path: name of the source, for messages.

    Raises:
        DataError: a column is missing, no format is recognised, or no row is usable.
    """
    format_, templates = _templates(table.column_names, dataset, path)
    needed = [name for template in templates.values() for name in template_columns(template)]
    missing = [name for name in needed if name not in table.column_names]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}; it has {', '.join(table.column_names)}")
    columns: dict[str, list[str]] = {name: [] for name in templates}
    dropped: Counter[str] = Counter()
    for batch in table.select(list(dict.fromkeys(needed))).to_batches(BATCH_ROWS):
        for row in batch.to_pylist():
            values = _usable(row, templates, format_)
            if isinstance(values, str):
                dropped[values] += 1
                continue
            for name, value in values.items():
                columns[name].append(value)
    if not next(iter(columns.values())):
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
        raise DataError(f"{path}: no usable row of {table.num_rows}: {reasons}")
    strings = {name: pa.array(values, pa.large_string()) for name, values in columns.items()}
    return Examples(format_, pa.table(strings), dict(dropped))


def _templates(names: list[str], dataset: DatasetSection, path: str) -> tuple[str, dict[str, str]]:
    if dataset.text is not None:
        return "text", {"text": dataset.text}
    if dataset.prompt is not None and dataset.completion is not None:
        return "prompt_completion", {"prompt": dataset.prompt, "completion": dataset.completion}
    chosen = dataset.columns.model_dump(exclude_none=True) if dataset.columns is not None else {}
    for format_, wanted in FORMATS.items():
        columns = {name: chosen.get(name, name) for name in wanted}
        if set(wanted) <= set(chosen) or (not chosen and set(wanted) <= set(names)):
            return format_, {name: "{" + column + "}" for name, column in columns.items()}
    raise DataError(
        f"{path}: its columns ({', '.join(names)}) are no known format; known are text, prompt with completion, "
        "and messages; set dataset.prompt and dataset.completion (or dataset.text) to templates over the columns"
    )


def _usable(row: dict[str, Any], templates: dict[str, str], format_: str) -> dict[str, str] | str:
    """The values of an example, or the reason why there is none."""
    null = [name for name, value in row.items() if value is None]
    if null:
        return f"with {null[0]} null"
    if format_ == "messages":
        (column,) = row
        return _usable_messages(row[column])
    nested = [name for name, value in row.items() if isinstance(value, (list, dict))]
    if nested:
        return f"with {nested[0]} not text"
    values = {name: render(template, row) for name, template in templates.items()}
    trained = values["completion" if format_ == "prompt_completion" else "text"]
    if not trained.strip():
        return "with nothing to learn (empty)"
    return values


def _usable_messages(value: Any) -> dict[str, str] | str:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return "with messages that are no list"
    if not isinstance(value, list) or not value:
        return "with messages that are no list"
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            return "with a message without a role"
        if turn["role"] not in ("system", "user", "assistant", "tool"):
            return f"with the unknown role {turn['role'][:20]}"
        if not isinstance(turn.get("content"), str):
            return "with a message whose content is not text"
        turns.append({"role": turn["role"], "content": turn["content"]})
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant" and turn["content"].strip()]
    if not answers:
        return "without an assistant turn"
    if answers[-1] == 0:
        return "with an answer and nothing before it"
    return {"messages": json.dumps(turns, ensure_ascii=False)}
