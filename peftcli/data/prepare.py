"""From the dataset section to what the trainer and the evaluation get, with the facts of `data.json`."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from peftcli.data.examples import Examples, make_examples
from peftcli.data.join import JoinFacts, join_tables
from peftcli.data.sources import SourceFacts, read_path, read_source
from peftcli.data.split import count_leaked, fingerprint, split_indices
from peftcli.data.tokens import TokenFacts, stop_ids, tokenize
from peftcli.errors import DataError
from peftcli.plan.plan import LabelRule
from peftcli.recipe.schema import DatasetSection
from peftcli.recipe.template import template_columns

SMOKE_ROWS = 48
"""Rows that a smoke run takes from the head of the data."""


@dataclass(frozen=True)
class Sides:
    """The examples of a recipe before any token is made: train and test, and where they come from."""

    train: Examples
    test: Examples
    sources: list[SourceFacts]
    joins: list[JoinFacts]
    dropped: dict[str, int]
    rows: int
    split: dict[str, Any]

    @property
    def format(self) -> str:
        return self.train.format


@dataclass(frozen=True)
class PreparedData:
    """What is trained and tested.

    Attributes:
        train: `input_ids` and `labels`, a row for each example.
        test: the same with `prompt_ids`, `prompt` and `reference`.
        format: `prompt_completion`, `messages` or `text`.
        stop_ids: token ids on which an answer ends.
        facts: the content of `data.json`.
    """

    train: pa.Table
    test: pa.Table
    format: str
    stop_ids: frozenset[int]
    facts: dict[str, Any]


def load_sides(dataset: DatasetSection, seed: int, *, smoke: bool = False) -> Sides:
    """Read, join and split the data of a recipe.

    Args:
        dataset: section of the recipe; its paths are absolute.
        seed: of the split where `dataset.split.seed` is not given.
        smoke: take a few rows only, and rows made up here where the source is a Hub data set.

    Raises:
        DataError: as in the parts; also where one side of the split is empty.
    """
    table, source, joins = _read_joined(dataset, smoke=smoke)
    examples = make_examples(table, dataset, source.path)
    sources = [source]
    split: dict[str, Any] = {}
    if dataset.test is not None:
        test_table, test_source = read_path(Path(dataset.test.path))
        for join in dataset.join:
            right, _ = read_path(Path(join.path))
            test_table, facts = join_tables(test_table, right, list(join.on), Path(join.path).name)
            joins.append(replace(facts, path=f"{facts.path} (test rows)"))
        test = make_examples(test_table.slice(0, SMOKE_ROWS) if smoke else test_table, dataset, test_source.path)
        if test.format != examples.format:
            raise DataError(f"{test_source.path}: holds {test.format}, the training file holds {examples.format}")
        train = examples
        sources.append(test_source)
    else:
        drawn = dataset.split.seed if dataset.split.seed is not None else seed
        indices = split_indices(examples.table.num_rows, dataset.split.test_size, drawn)
        train, test = examples.take(indices[0]), examples.take(indices[1])
        split = {"test_size": dataset.split.test_size, "seed": drawn}
    if dataset.max_train_samples is not None and train.table.num_rows > dataset.max_train_samples:
        order = np.random.default_rng(seed).permutation(train.table.num_rows)[: dataset.max_train_samples]
        train = train.take(sorted(order.tolist()))
        split["max_train_samples"] = dataset.max_train_samples
    for side, rows in (("training", train.table.num_rows), ("test", test.table.num_rows)):
        if rows == 0:
            raise DataError(
                f"{source.path}: the {side} side is empty ({examples.table.num_rows} usable rows); change dataset.split"
            )
    dropped = dict(examples.dropped)
    rows = table.num_rows
    if dataset.test is not None:
        dropped |= {f"of the test file {reason}": count for reason, count in test.dropped.items()}
        rows += test.table.num_rows + sum(test.dropped.values())
    if joins:
        for fact in joins:
            if fact.unmatched:
                dropped[f"without a partner in {fact.path}"] = fact.unmatched
    return Sides(train, test, sources, joins, dropped, rows + sum(j.unmatched for j in joins), split)


def prepare(sides: Sides, tokenizer: PreTrainedTokenizerBase, rule: LabelRule) -> PreparedData:
    """Tokenize both sides and state the facts.

    Raises:
        DataError: no row is left with a trained token, or the template cannot be used.
    """
    for name, format_ in (("assistant_only_loss", "messages"), ("completion_only_loss", "prompt_completion")):
        if name in rule.asked and sides.format != format_:
            raise DataError(f"trainer.{name} is set, but the data are {sides.format}, not {format_}; leave it out")
    train, trained = tokenize(sides.train, tokenizer, rule)
    test, tested = tokenize(sides.test, tokenizer, rule)
    for side, facts in (("training", trained), ("test", tested)):
        if facts.rows == 0:
            raise DataError(
                f"all {facts.dropped} {side} rows are cut off before the first trained token: the prompts alone fill "
                f"dataset.max_length = {rule.max_length} (longest row {max(facts.lengths)} tokens); raise it"
            )
        if facts.trained == 0:
            raise DataError(f"no token of the {side} rows is trained; look at the completions and the chat template")
    return PreparedData(
        train=train.select(["input_ids", "labels"]),
        test=test,
        format=sides.format,
        stop_ids=stop_ids(tokenizer),
        facts=_facts(sides, trained, tested, rule),
    )


def _facts(sides: Sides, trained: TokenFacts, tested: TokenFacts, rule: LabelRule) -> dict[str, Any]:
    train_texts, test_texts = sides.train.texts(), sides.test.texts()
    dropped = dict(sides.dropped)
    cut = trained.dropped + tested.dropped
    if cut:
        dropped[f"with a prompt longer than max_length {rule.max_length}"] = cut
    lengths = np.array(trained.lengths)
    return {
        "schema": 1,
        "format": sides.format,
        "sources": [asdict(source) for source in sides.sources],
        "joins": [asdict(join) for join in sides.joins],
        "rows": sides.rows,
        "train_rows": trained.rows,
        "test_rows": tested.rows,
        "dropped_rows": sum(dropped.values()),
        "dropped": dropped,
        "truncated_rows": trained.truncated + tested.truncated,
        "leaked_rows": count_leaked(train_texts, test_texts),
        "merged_boundary_rows": trained.merged_boundaries,
        "tokens": {
            "train": trained.tokens,
            "trained": trained.trained,
            "test": tested.tokens,
            "test_trained": tested.trained,
        },
        "length": {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "p95": float(np.percentile(lengths, 95)),
            "max": int(lengths.max()),
        },
        "max_length": rule.max_length,
        "eos_trained_rows": trained.eos_trained,
        "split": sides.split,
        "fingerprint": {"train": fingerprint(train_texts), "test": fingerprint(test_texts)},
    }


def _read_joined(dataset: DatasetSection, *, smoke: bool) -> tuple[pa.Table, SourceFacts, list[JoinFacts]]:
    if smoke and dataset.name is not None:
        table, source = made_up_rows(dataset)
    else:
        table, source = read_source(dataset)
    joins = []
    for join in dataset.join:
        right, _ = read_path(Path(join.path))
        table, facts = join_tables(table, right, list(join.on), Path(join.path).name)
        joins.append(facts)
    return (table.slice(0, SMOKE_ROWS) if smoke else table), source, joins


def made_up_rows(dataset: DatasetSection) -> tuple[pa.Table, SourceFacts]:
    """Rows that stand in for a Hub data set in a smoke run, which has no network."""
    numbers = range(SMOKE_ROWS)
    chosen = dataset.columns.model_dump(exclude_none=True) if dataset.columns is not None else {}
    templates = [part for part in (dataset.text, dataset.prompt, dataset.completion) if part is not None]
    names = [name for part in templates for name in template_columns(part)]
    names += [column for key, column in chosen.items() if key != "messages"]
    rows: dict[str, list[Any]] = {name: [f"{name} number {number}" for number in numbers] for name in names}
    if not names:
        turns = [("user", "Say the number {}."), ("assistant", "The number is {}.")]
        rows[chosen.get("messages", "messages")] = [
            [{"role": role, "content": text.format(number)} for role, text in turns] for number in numbers
        ]
    return pa.table(rows), SourceFacts(f"{dataset.name} (made-up rows of a smoke run)", SMOKE_ROWS)
