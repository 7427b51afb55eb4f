"""Prepares the rows for training and evaluation from the dataset section, and the content of `data.json`."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from peftcli.data.cache import load_or_tokenize
from peftcli.data.chat_template import last_answer, read_chats, render
from peftcli.data.class_labels import label_said
from peftcli.data.encode import as_lists, encode, encode_prompts, flatten, stop_ids
from peftcli.data.formats import LABELLED
from peftcli.data.label_stats import check_classes, class_names, label_stats, label_warnings
from peftcli.data.mixing import mixed_rows
from peftcli.data.pipeline import DataRequest
from peftcli.data.readers.images import open_images
from peftcli.data.readers.open import open_source
from peftcli.data.rows import BATCH_ROWS, Source
from peftcli.data.shown_answers import Chat, TemplateProblem
from peftcli.data.split import drop_duplicates_of_test, rehearsed_split, split_rows
from peftcli.data.split_record import SplitRecord, find_test_rows
from peftcli.data.stats import (
    EQUAL,
    Indices,
    Split,
    balance,
    compare_rows,
    count_ends,
    count_rows,
    crossed_limits,
    data_warnings,
)
from peftcli.data.store import Store
from peftcli.data.synthetic import SyntheticSource
from peftcli.data.template_figures import crossed_mismatch, template_figures, template_warnings
from peftcli.errors import DataError
from peftcli.plan.plan import LossMask
from peftcli.progress import Progress
from peftcli.recipe.schema import DatasetSection, SourceSection, TestSection
from peftcli.tasks.registry import TASKS

SMOKE_ROWS = 48
"""Number of rows that a smoke run reads from each source."""

PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
)
"""A chat template that renders every chat; only to check rows whose own template cannot be used."""

LONGEST_OPENING = 64
"""Maximum tokens of a text that are used as a prompt in the samples."""


@dataclass(frozen=True)
class PreparedData:
    """The training and test rows.

    Attributes:
        train: the training rows; mixed as the weights or shares of the sources say.
        test_split: the test rows; empty if the recipe trains on all rows.
        format: `prompt_completion`, `messages`, `text`, `classification`, `tagging` or `images`.
        stop_ids: token ids that end an answer; empty for rows with labels.
        prompt: template for new prompts; None for chats and plain text.
        facts: the content of `data.json`.
        crossed: one sentence for each exceeded data limit.
        too_long: `dataset.too_long` of the recipe.
        labels: names of the classes or tags by id; empty for rows without labels and for regression.
        problem_type: for classification: `single-label`, `multi-label` or `regression`.
    """

    train: Split
    test_split: Split
    format: str
    stop_ids: frozenset[int]
    prompt: str | None
    facts: dict[str, Any]
    crossed: list[str]
    tokenizer: PreTrainedTokenizerBase
    too_long: str | None
    labels: tuple[str, ...] = ()
    problem_type: str | None = None

    @property
    def holds_out(self) -> bool:
        """Whether there are test rows."""
        return len(self.test_split.rows) > 0

    @cached_property
    def test(self) -> pa.Table:
        """The test rows: `input_ids`, `labels`, `prompt_ids`, `prompt`, `reference`; `words` or `image` for some tasks.

        Requires `holds_out`.
        """
        return held_out_table(self.test_split, self.format, self.tokenizer)

    def comparable(self, rows: int) -> pa.Table:
        """Rows for comparing two models, like `test`: the first test rows, or training rows if there are none.

        Args:
            rows: maximum number.
        """
        if self.holds_out:
            return self.test.slice(0, rows)
        return held_out_table(replace(self.train, rows=self.train.rows[:rows]), self.format, self.tokenizer)

    def sample_chats(self, count: int = 8) -> list[Chat]:
        """The first chats of the training rows; empty for other formats."""
        if self.format != "messages":
            return []
        rows = self.train.store.examples.select(["messages"]).slice(0, count)
        return read_chats(rows.to_pydict())[0]

    def used_ids(self, count: int = BATCH_ROWS) -> set[int]:
        """Token ids that occur in the first training rows."""
        ids = self.train.store.examples.column("input_ids").slice(0, count)
        return set(pc.unique(pc.list_flatten(ids)).to_pylist())

    def raise_if_crossed(self, shown_by: str) -> None:
        """Raise an error if a data limit is exceeded.

        Args:
            shown_by: the command that shows the rows.

        Raises:
            DataError: lists every exceeded limit.
        """
        if self.crossed:
            lines = "".join(f"\n  {line}" for line in self.crossed)
            raise DataError(
                f"a data limit was exceeded; run `{shown_by}` to see the rows, or change the limit shown{lines}"
            )


def prepare(
    dataset: DatasetSection,
    tokenizer: PreTrainedTokenizerBase,
    rule: LossMask,
    seed: int,
    progress: Progress,
    *,
    smoke: bool = False,
    own_tokenizer: bool = True,
    earlier: SplitRecord | None = None,
    record: SplitRecord | None = None,
) -> PreparedData:
    """Read, join, tokenize and split the data of a recipe, using the cache.

    Args:
        dataset: section of the recipe, with absolute paths.
        rule: which tokens are trained.
        seed: for the split if `dataset.split.seed` is not set, and for all other sampling.
        smoke: use only a few rows, and synthetic rows for a Hub dataset or a database.
        own_tokenizer: the tokenizer is the model's own, so the checks of a smoke run also apply to the real run.
        earlier: for training: the rows of earlier trainings that this one continues keep their split.
        record: for scoring a trained run: only rows that it held out, or has never seen, are test rows.

    Raises:
        DataError: a source cannot be read or has no usable rows, or a split is empty.
    """
    work = partial(
        _prepare,
        dataset,
        rule=rule,
        seed=seed,
        progress=progress,
        smoke=smoke,
        own_tokenizer=own_tokenizer,
        earlier=earlier,
        record=record,
    )
    try:
        return work(tokenizer)
    except TemplateProblem as problem:
        others = _other_problems(work, tokenizer, dataset)
        if not others:
            raise
        lines = "".join(f"\n  {line}" for line in (str(problem), *others))
        raise DataError(f"the data has {1 + len(others)} problems{lines}") from problem


def _other_problems(
    work: Callable[[PreTrainedTokenizerBase], PreparedData], tokenizer: PreTrainedTokenizerBase, dataset: DatasetSection
) -> list[str]:
    """What is wrong with the rows besides the chat template, found with a plain one that accepts every chat."""
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = PLAIN_TEMPLATE
    try:
        facts = work(plain).facts
    except DataError as problem:
        return [str(problem)]
    # Lengths and end tokens depend on the template that is still to be fixed.
    limits = dataset.limits.model_copy(update={"max_truncated": 1.0, "min_eos_trained": 0.0})
    return crossed_limits(facts, limits)


def _prepare(
    dataset: DatasetSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rule: LossMask,
    seed: int,
    progress: Progress,
    smoke: bool,
    own_tokenizer: bool,
    earlier: SplitRecord | None,
    record: SplitRecord | None,
) -> PreparedData:
    request = DataRequest(dataset, rule, SMOKE_ROWS if smoke else None)
    sections: Sequence[SourceSection] = dataset.sources or (dataset,)
    synthetic = partial(
        SyntheticSource, rows=SMOKE_ROWS, task=rule.task, problem_type=rule.problem_type, labels=dataset.labels
    )
    images = TASKS[rule.task].images
    open_ = partial(_open, synthetic=synthetic if smoke else None, images=images)
    test_section = _test_section(dataset)
    test_source = None
    if test_section is not None:
        like = partial(synthetic, like=sections[0])
        test_source = _open(test_section, "dataset.test", synthetic=like if smoke else None, images=images)
    test_files = frozenset(getattr(test_source, "files", ()))
    keys = [f"dataset.sources[{number}]" for number in range(len(dataset.sources))] or ["dataset"]
    sources = [(open_(section, key, without=test_files), section) for key, section in zip(keys, sections, strict=True)]
    store, built = load_or_tokenize(sources, tokenizer, request, progress)
    _check_rule(rule, store.facts["kind"])
    test_store = None
    if test_source is not None:
        request = replace(request, rule=replace(rule, problem_type=store.facts.get("problem") or rule.problem_type))
        test_store, _ = load_or_tokenize([(test_source, sections[0])], tokenizer, request, progress)
        if test_store.facts["kind"] != store.facts["kind"]:
            raise DataError(
                f"{test_source.name}: the test rows are {test_store.facts['kind']}, but the training rows are "
                f"{store.facts['kind']}; give the test rows the same columns as the training rows"
            )
    labels: tuple[str, ...] = ()
    if store.facts["kind"] in LABELLED:
        store, test_store, labels = _with_classes(store, test_store, smoke=smoke)
    rows, duplicates, duplicate_places = drop_duplicates_of_test(dataset, store)
    scaled = None
    if smoke and test_store is None:
        dataset, scaled = rehearsed_split(dataset, store, rows)
    if record is None:
        train, test, split = split_rows(dataset, store, test_store, rows, seed, earlier)
    else:
        train, test, split = _recorded(record, store, test_store, rows, progress)
    facts = _facts(store, test_store, train, test, tokenizer, rule, duplicates, duplicate_places)
    facts |= {"split": split, "cache": "made" if built else "reused"}
    crossed = [*crossed_limits(facts, dataset.limits), *crossed_mismatch(facts, dataset.limits)]
    if smoke:
        crossed, notes = _rehearsed(sources, dataset, facts, crossed, own_tokenizer=own_tokenizer)
        facts["warnings"][:0] = [*notes, *([scaled] if scaled else [])]
    order, facts["sources"] = mixed_rows(dataset, train, facts["sources"], seed)
    return PreparedData(
        train=Split(store, order),
        test_split=test,
        format=store.facts["kind"],
        stop_ids=frozenset() if store.facts["kind"] in LABELLED else stop_ids(tokenizer),
        prompt=store.facts["prompt"],
        facts=facts,
        crossed=crossed,
        tokenizer=tokenizer,
        too_long=dataset.too_long,
        labels=labels,
        problem_type=store.facts.get("problem"),
    )


def _recorded(
    record: SplitRecord, store: Store, test_store: Store | None, rows: Indices, progress: Progress
) -> tuple[Split, Split, dict[str, Any]]:
    """The training rows and the test rows of a run, found by content, and how many there are."""
    searched = np.arange(test_store.rows) if test_store is not None else rows
    found = find_test_rows(record, test_store or store, searched)
    if (note := found.note()) is not None:
        progress.note(note)
    train = rows if test_store is not None else np.setdiff1d(rows, found.rows)
    if not len(train):  # nothing is trained here, and what is said of the data needs a row
        train = rows
    counts = {"recorded": found.recorded, "new": found.new, "missing": found.missing}
    return Split(store, train), Split(test_store or store, found.rows), counts


def _rehearsed(
    sources: Sequence[tuple[Source, SourceSection]],
    dataset: DatasetSection,
    facts: dict[str, Any],
    crossed: list[str],
    *,
    own_tokenizer: bool,
) -> tuple[list[str], list[str]]:
    """The limits that stop a smoke run, and its notes about the rows.

    Shares of a few rows say little about all rows, so exceeded limits are only reported. The exception is the end
    token: if the recipe requires it in every row, a single row without it is enough.
    """
    synthetic = [source.section.name or "a database" for source, _ in sources if isinstance(source, SyntheticSource)]
    notes = [f"smoke: synthetic rows instead of {name}, because a smoke run uses no network" for name in synthetic]
    if synthetic or not own_tokenizer:
        return [], notes
    missed = facts.get("eos_trained_rows", 0) < facts.get("eos_expected_rows", 0)
    if dataset.limits.min_eos_trained == 1 and missed:
        ends = crossed_limits(facts, type(dataset.limits)(max_dropped=1, max_truncated=1, max_leaked=1))
        crossed = [line for line in crossed if line not in ends]
    else:
        ends = []
    return ends, [*notes, *(f"smoke: the full data may exceed a limit: {line}" for line in crossed)]


def _with_classes(
    store: Store, test_store: Store | None, *, smoke: bool
) -> tuple[Store, Store | None, tuple[str, ...]]:
    """The stores with a common order of classes, and the class names."""
    labels = class_names([store] if test_store is None else [store, test_store])
    if not smoke:
        check_classes(labels, store)
    elif labels and len(labels) < 2:  # the first rows of a sorted file may have only one class
        labels = (*labels, "other")
    return replace(store, classes=labels), test_store and replace(test_store, classes=labels), labels


def _open(
    section: Any,
    key: str,
    *,
    synthetic: Callable[[Any], Source] | None,
    images: bool,
    without: frozenset[Path] = frozenset(),
) -> Source:
    """The source of a section; synthetic rows in a smoke run, if it is not a file."""
    remote = section.name is not None or getattr(section, "url", None) or getattr(section, "url_env", None)
    if synthetic is not None and remote:
        return synthetic(section)
    open_ = open_images if images else open_source
    return open_(section, without=without, key=key)


def _test_section(dataset: DatasetSection) -> TestSection | None:
    """The section of the test rows, with the Hub dataset of the training rows if it names none."""
    test = dataset.test
    if test is None or test.path is not None:
        return test
    inherited = {name: getattr(dataset, name) for name in ("name", "config", "revision")} if test.name is None else {}
    return test.model_copy(update={**inherited, "hub_split": test.hub_split or "test"})


def _check_rule(rule: LossMask, kind: str) -> None:
    for name, needed in (("assistant_only_loss", "messages"), ("completion_only_loss", "prompt_completion")):
        if name in rule.asked and kind != needed:
            raise DataError(f"trainer.{name} is set, but the data format is {kind}, not {needed}; remove it")


def _facts(
    store: Store,
    test_store: Store | None,
    train: Split,
    test: Split,
    tokenizer: PreTrainedTokenizerBase,
    rule: LossMask,
    duplicates: int,
    duplicate_places: list[str],
) -> dict[str, Any]:
    stores = [store] if test_store is None else [store, test_store]
    dropped = dict(store.facts["dropped"])
    places = dict(store.facts["dropped_examples"])
    if test_store is not None:
        dropped |= {f"of the test rows {reason}": count for reason, count in test_store.facts["dropped"].items()}
        places |= {
            f"of the test rows {reason}": found for reason, found in test_store.facts["dropped_examples"].items()
        }
    if duplicates:
        dropped[EQUAL], places[EQUAL] = duplicates, duplicate_places
    facts: dict[str, Any] = {
        "schema": 1,
        "format": store.facts["kind"],
        "task": rule.task,
        "sources": [source for one in stores for source in one.facts["sources"]],
        "joins": [join for one in stores for join in one.facts["joins"]],
        "rows": sum(one.facts["rows"] for one in stores),
        "dropped_rows": sum(dropped.values()),
        "dropped": dropped,
        "dropped_examples": places,
        "columns": [column for one in stores for column in one.facts["columns"]],
        "labels": balance(train, test),
    }
    facts |= count_rows(train, test, rule) | compare_rows(train, test)
    warnings = [warning for one in stores for warning in one.facts["warnings"]]
    if store.facts["kind"] in LABELLED:
        facts |= label_stats(train, test)
        warnings = [*label_warnings(facts), *warnings]
    else:
        facts |= count_ends(train, tokenizer)
    if store.facts["kind"] == "messages":
        facts |= template_figures(train, test, tokenizer)
        warnings = [*template_warnings(facts), *warnings]
    return facts | {"warnings": [*data_warnings(facts, train, tokenizer), *warnings]}


def held_out_table(split: Split, kind: str, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    """`input_ids`, `labels`, `prompt_ids` (the start of generation), `prompt` and `reference` of the test rows.

    For rows with labels, `prompt_ids` is the full text and `reference` the label as text; tagged rows also have
    `words`, and images their path in `image`.
    """
    examples = split.store.examples.take(pa.array(split.rows, pa.int64()))
    batches = examples.to_batches(max_chunksize=BATCH_ROWS)
    problem_type = str(split.store.facts.get("problem"))
    parts = [
        _labelled(part, kind, problem_type) if kind in LABELLED else _prompts(part, kind, tokenizer) for part in batches
    ]
    prompts = pa.concat_tables(parts)
    table = examples.select(["input_ids", "labels"])
    for name in prompts.column_names:
        table = table.append_column(name, prompts.column(name))
    return table


def _prompts(part: pa.RecordBatch, kind: str, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    make = {"prompt_completion": _of_pairs, "messages": _of_chats, "text": _of_texts}[kind]
    ids, prompts, references = make(part.to_pydict(), tokenizer)
    return pa.table(
        {
            "prompt_ids": as_lists(*flatten(ids)),
            "prompt": pa.array(prompts, pa.large_string()),
            "reference": pa.array(references, pa.large_string()),
        }
    )


def _labelled(part: pa.RecordBatch, kind: str, problem_type: str) -> pa.Table:
    columns = {"prompt_ids": part.column("input_ids")}
    rows = part.to_pydict()
    if kind == "tagging":
        words, tags = ([json.loads(text) for text in rows[name]] for name in ("tokens", "tags"))
        columns["words"] = pa.array(words, pa.large_list(pa.large_string()))
        prompts, references = list(map(" ".join, words)), list(map(" ".join, tags))
    elif kind == "images":
        columns["image"] = part.column("image")
        prompts, references = rows["name"], [label_said(label, problem_type) for label in rows["label"]]
    else:
        texts = zip(rows["text"], rows["text_pair"], strict=True)
        prompts = [f"{text}\n{pair}" if pair else text for text, pair in texts]
        references = [label_said(label, problem_type) for label in rows["label"]]
    columns |= {"prompt": pa.array(prompts, pa.large_string()), "reference": pa.array(references, pa.large_string())}
    return pa.table(columns)


def _of_pairs(
    columns: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[str], list[str]]:
    return encode_prompts(columns["prompt"], tokenizer), columns["prompt"], columns["completion"]


def _of_chats(
    columns: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[str], list[str]]:
    prompts, references = [], []
    for chat, tools in zip(*read_chats(columns), strict=True):
        last = last_answer(chat)
        prompts.append(render(chat[:last], tools, tokenizer, prompt=True))
        references.append(str(chat[last]["content"]))
    return encode(prompts, tokenizer, special=False), prompts, references


def _of_texts(
    columns: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[str], list[str]]:
    openings, rests = [], []
    for ids in columns["input_ids"]:
        start = max(1, min(len(ids) // 4, LONGEST_OPENING))
        openings.append(ids[:start])
        rests.append(ids[start:])
    return (
        openings,
        tokenizer.batch_decode(openings, skip_special_tokens=True),
        tokenizer.batch_decode(rests, skip_special_tokens=True),
    )
