"""From the dataset section to what the trainer and the evaluation get, with the facts of `data.json`."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from peftcli.cache import built_once, cache_root, forget_unused, mark_used
from peftcli.data.encode import stop_ids
from peftcli.data.facts import Indices, Side, balance, compare_rows, count_ends, count_rows, say_warnings
from peftcli.data.ingest import Asked, ingest
from peftcli.data.join import Join
from peftcli.data.limits import EQUAL, crossed_limits
from peftcli.data.made_up import MadeUp
from peftcli.data.rows import BATCH_ROWS, FIRST_PLACES, Source
from peftcli.data.sources.open import open_source
from peftcli.data.split import split_by_class, split_by_group, split_indices, weighted
from peftcli.data.store import Store
from peftcli.data.test_side import test_table
from peftcli.data.turns import Chat, read_chats
from peftcli.data.twins import firsts
from peftcli.errors import DataError
from peftcli.plan.plan import LabelRule
from peftcli.progress import Progress
from peftcli.recipe.schema import DatasetSection, SourceSection, TestSection

SMOKE_ROWS = 48
"""Rows that a smoke run takes from the head of each source."""
CACHE_BYTES = 20 * 2**30
"""Prepared data beyond this are removed from the cache, the oldest first."""
VERSION = 1
"""Raised with every change that makes other rows of the same sources."""


@dataclass(frozen=True)
class PreparedData:
    """What is trained and tested.

    Attributes:
        train: the training rows; a row with a weight above 1 stands there several times.
        test_side: the test rows.
        format: `prompt_completion`, `messages` or `text`.
        stop_ids: token ids on which an answer ends.
        prompt: template that new prompts are written in; None for chats and for plain text.
        facts: the content of `data.json`.
        crossed: one sentence for each limit of the recipe that the data cross.
        too_long: what was done with rows longer than the limit, None for what fits the source.
    """

    train: Side
    test_side: Side
    format: str
    stop_ids: frozenset[int]
    prompt: str | None
    facts: dict[str, Any]
    crossed: list[str]
    tokenizer: PreTrainedTokenizerBase
    too_long: str | None

    @cached_property
    def test(self) -> pa.Table:
        """The test rows: `input_ids`, `labels`, `prompt_ids`, `prompt` and `reference`."""
        return test_table(self.test_side, self.format, self.tokenizer)

    def sample_chats(self, count: int = 8) -> list[Chat]:
        """The first chats of the training rows; none where the rows are no chats."""
        if self.format != "messages":
            return []
        rows = self.train.store.examples.select(["messages"]).slice(0, count)
        return read_chats(rows.to_pydict())[0]

    def used_ids(self, count: int = BATCH_ROWS) -> set[int]:
        """Token ids that stand in the first training rows."""
        ids = self.train.store.examples.column("input_ids").slice(0, count)
        return set(pc.unique(pc.list_flatten(ids)).to_pylist())

    def raise_if_crossed(self, shown_by: str) -> None:
        """Stop where a limit is crossed.

        Args:
            shown_by: the command that shows the rows.

        Raises:
            DataError: with every limit that is crossed.
        """
        if self.crossed:
            lines = "".join(f"\n  {line}" for line in self.crossed)
            raise DataError(f"the data cross a limit; `{shown_by}` shows the rows, the key named lifts it{lines}")


def prepare(
    dataset: DatasetSection,
    tokenizer: PreTrainedTokenizerBase,
    rule: LabelRule,
    seed: int,
    progress: Progress,
    *,
    smoke: bool = False,
) -> PreparedData:
    """Read, join, tokenize and split the data of a recipe; what was prepared before is taken from the cache.

    Args:
        dataset: section of the recipe; its paths are absolute.
        rule: which tokens are trained.
        seed: of the split where `dataset.split.seed` is not given, and of every other draw.
        smoke: take a few rows only, and rows made up here where the source is a Hub data set.

    Raises:
        DataError: a source cannot be read or holds nothing usable, or a side of the split is empty.
    """
    asked = Asked(dataset, rule, SMOKE_ROWS if smoke else None)
    test_section = _test_section(dataset)
    test_source = None if test_section is None else _open(test_section, "dataset.test", smoke=smoke)
    apart = frozenset(getattr(test_source, "files", ()))
    sections: Sequence[SourceSection] = dataset.sources or (dataset,)
    keys = [f"dataset.sources[{number}]" for number in range(len(dataset.sources))] or ["dataset"]
    sources = [
        (_open(section, key, smoke=smoke, without=apart), section) for key, section in zip(keys, sections, strict=True)
    ]
    store, made = _store(sources, tokenizer, asked, progress)
    _check_rule(rule, store.facts["kind"])
    test_store = None
    if test_source is not None:
        test_store, _ = _store([(test_source, sections[0])], tokenizer, asked, progress)
        if test_store.facts["kind"] != store.facts["kind"]:
            raise DataError(
                f"{test_source.name}: holds {test_store.facts['kind']}, the training rows are {store.facts['kind']}; "
                "test rows need the columns of the training rows"
            )
    rows, equal, equal_places = _without_equal(dataset, store)
    train, test, split = _split(dataset, store, test_store, rows, seed)
    facts = _facts(store, test_store, train, test, tokenizer, rule, equal, equal_places)
    facts |= {"split": split, "cache": "made" if made else "reused"}
    order = weighted(
        train.rows, [section["weight"] for section in store.facts["sources"]], train.column("source"), seed
    )
    return PreparedData(
        train=Side(store, order),
        test_side=test,
        format=store.facts["kind"],
        stop_ids=stop_ids(tokenizer),
        prompt=store.facts["prompt"],
        facts=facts,
        crossed=[] if smoke else crossed_limits(facts, dataset.limits),
        tokenizer=tokenizer,
        too_long=dataset.too_long,
    )


def _open(section: Any, key: str, *, smoke: bool, without: frozenset[Path] = frozenset()) -> Source:
    if smoke and (section.name is not None or getattr(section, "url", None) or getattr(section, "url_env", None)):
        return MadeUp(section, SMOKE_ROWS)
    return open_source(section, without=without, key=key)


def _test_section(dataset: DatasetSection) -> TestSection | None:
    """The section of the test rows, with what it takes over from a Hub data set."""
    test = dataset.test
    if test is None or test.path is not None:
        return test
    taken = {name: getattr(dataset, name) for name in ("name", "config", "revision")} if test.name is None else {}
    return test.model_copy(update={**taken, "hub_split": test.hub_split or "test"})


def _check_rule(rule: LabelRule, kind: str) -> None:
    for name, needed in (("assistant_only_loss", "messages"), ("completion_only_loss", "prompt_completion")):
        if name in rule.asked and kind != needed:
            raise DataError(f"trainer.{name} is set, but the data are {kind}, not {needed}; leave it out")


def _store(
    sources: Sequence[tuple[Source, SourceSection]],
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    progress: Progress,
) -> tuple[Store, bool]:
    """The rows of some sources, tokenized, from the cache or made now; and whether they were made."""
    join_sources = [
        (open_source(join, key=f"dataset.join[{number}]"), join) for number, join in enumerate(asked.dataset.join)
    ]
    key = _key(sources, join_sources, tokenizer, asked)
    root = cache_root(None) / "data"
    made = not (root / key).is_dir()

    def build(folder: Path) -> None:
        joins = [Join(source, section.on) for source, section in join_sources]
        ingest(folder, sources, joins, tokenizer, asked, progress)

    if made and root.is_dir():
        forget_unused(root, CACHE_BYTES)
    folder = built_once(root, key, build)
    mark_used(folder)
    return Store.open(folder), made


def _key(
    sources: Sequence[tuple[Source, SourceSection]],
    joins: Sequence[tuple[Source, Any]],
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
) -> str:
    """Hexadecimal name of what one pass makes: all that it depends on, hashed."""
    reading = ("format", "text", "prompt", "completion", "columns", "weight")
    parts = {
        "version": [VERSION, transformers.__version__, tokenizers.__version__],
        "sources": [
            [source.fingerprint(), source.name, section.model_dump(include=set(reading))] for source, section in sources
        ],
        "joins": [[source.fingerprint(), source.name, list(section.on)] for source, section in joins],
        "split": [asked.dataset.split.stratify, asked.dataset.split.group],
        "rule": [asked.rule.completion_only, asked.rule.assistant_only, asked.rule.max_length],
        "too_long": asked.dataset.too_long,
        "limit": asked.limit,
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over all of a tokenizer that decides which ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # a cut or a padding that an earlier call has set is no property of the tokenizer
        backend.no_truncation()
        backend.no_padding()
    parts = [
        type(tokenizer).__name__,
        backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        bool(tokenizer.split_special_tokens),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _without_equal(dataset: DatasetSection, store: Store) -> tuple[Indices, int, list[str]]:
    """The rows that are used; how many are left out as equal to an earlier one, and where the first of those stand."""
    rows = np.arange(store.rows)
    if not dataset.deduplicate:
        return rows, 0, []
    first = firsts(store.column("plain"))
    equal = np.flatnonzero(first != rows)
    return np.flatnonzero(first == rows), len(equal), store.places(equal[:FIRST_PLACES])


def _split(
    dataset: DatasetSection, store: Store, test_store: Store | None, rows: Indices, seed: int
) -> tuple[Side, Side, dict[str, Any]]:
    """Both sides, and how they were drawn."""
    drawn = dataset.split.seed if dataset.split.seed is not None else seed
    split: dict[str, Any] = {}
    if test_store is not None:
        train, test = rows, np.arange(test_store.rows)
    else:
        split = {"test_size": dataset.split.test_size, "seed": drawn}
        sides = _draw(dataset, store, rows, drawn)
        train, test = rows[sides[0]], rows[sides[1]]
        split |= {key: getattr(dataset.split, key) for key in ("stratify", "group") if getattr(dataset.split, key)}
    if dataset.max_train_samples is not None and len(train) > dataset.max_train_samples:
        order = np.random.default_rng(seed).permutation(len(train))[: dataset.max_train_samples]
        train = train[np.sort(order)]
        split["max_train_samples"] = dataset.max_train_samples
    for side, count in (("training", len(train)), ("test", len(test))):
        if count == 0:
            raise DataError(f"the {side} side is empty ({len(rows)} usable rows); change dataset.split")
    return Side(store, train), Side(test_store or store, test), split


def _draw(dataset: DatasetSection, store: Store, rows: Indices, seed: int) -> tuple[Indices, Indices]:
    if dataset.split.stratify is not None:
        return split_by_class(store.column("class")[rows], dataset.split.test_size, seed)
    groups = store.column("group")[rows]
    if dataset.split.group is not None or (dataset.too_long == "split" and len(np.unique(groups)) > 1):
        return split_by_group(groups, dataset.split.test_size, seed)
    return split_indices(len(rows), dataset.split.test_size, seed)


def _facts(
    store: Store,
    test_store: Store | None,
    train: Side,
    test: Side,
    tokenizer: PreTrainedTokenizerBase,
    rule: LabelRule,
    equal: int,
    equal_places: list[str],
) -> dict[str, Any]:
    stores = [store] if test_store is None else [store, test_store]
    dropped = dict(store.facts["dropped"])
    places = dict(store.facts["dropped_examples"])
    if test_store is not None:
        dropped |= {f"of the test rows {reason}": count for reason, count in test_store.facts["dropped"].items()}
        places |= {
            f"of the test rows {reason}": found for reason, found in test_store.facts["dropped_examples"].items()
        }
    if equal:
        dropped[EQUAL], places[EQUAL] = equal, equal_places
    facts: dict[str, Any] = {
        "schema": 1,
        "format": store.facts["kind"],
        "sources": [source for one in stores for source in one.facts["sources"]],
        "joins": [join for one in stores for join in one.facts["joins"]],
        "rows": sum(one.facts["rows"] for one in stores),
        "dropped_rows": sum(dropped.values()),
        "dropped": dropped,
        "dropped_examples": places,
        "columns": [column for one in stores for column in one.facts["columns"]],
        "labels": balance(train, test),
    }
    facts |= count_rows(train, test, rule) | count_ends(train, tokenizer) | compare_rows(train, test)
    warnings = [warning for one in stores for warning in one.facts["warnings"]]
    return facts | {"warnings": [*say_warnings(facts, train, tokenizer), *warnings]}
