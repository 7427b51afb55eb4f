"""Statistics of labels after the split: classes, numbers, entities, conflicts; a part of `data.json`."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from peftcli.data.class_labels import Names, sorted_names
from peftcli.data.dedup import first_occurrence
from peftcli.data.formats import Examples
from peftcli.data.quality import hide_keys
from peftcli.data.rows import FIRST_PLACES, Dropped, Rows, listed
from peftcli.data.stats import SHOWN_LABELS, Split, counted
from peftcli.data.store import Store
from peftcli.errors import DataError
from peftcli.metrics.tagging import entities_of, span_tags

MANY_CLASSES = 20
"""A column with more distinct values than this, and more than half as many as rows, is not a class column."""
LOPSIDED = 0.95
"""Share of the most common class above which accuracy says little."""

_INSIDE = ("I", "E", "L")
"""Prefixes of tags that continue an entity."""


def class_names(stores: Sequence[Store]) -> Names:
    """The classes of all stores, in the given order or sorted."""
    names = list(dict.fromkeys(name for store in stores for name in store.facts["classes"]))
    if stores[0].facts["problem"] == "regression":
        return ()
    return tuple(names) if stores[0].facts["named"] else sorted_names(names)


def check_classes(names: Names, store: Store) -> None:
    """Reject a label column that cannot be learned.

    Raises:
        DataError: all rows have the same class, or nearly every row has its own.
    """
    if store.facts["problem"] == "regression":
        return
    column, source = store.facts["label_column"], store.facts["sources"][0]["path"]
    if len(names) < 2:
        raise DataError(
            f"{source}: all rows have the same {column} ({listed(names)}), so there is nothing to learn; "
            "set dataset.columns.label to another column, or use more rows"
        )
    if store.facts["problem"] == "single-label" and not store.facts["named"]:
        many = len(store.facts["classes"])
        if many > MANY_CLASSES and many > store.rows / 2:
            raise DataError(
                f"{source}: {column} has {many:,} distinct values in {store.rows:,} rows, too many for classes; set "
                "dataset.columns.label to another column, or model.task: causal-lm to train on it as text"
            )


def label_stats(train: Split, test: Split) -> dict[str, Any]:
    """The distribution of labels over the splits, and rows with conflicting labels.

    Args:
        train, test: of stores with the same classes; an empty test split is omitted.
    """
    stored, names = train.store.facts, train.store.classes
    splits = {"train": train} | ({"test": test} if len(test.rows) else {})
    facts: dict[str, Any] = {"problem": stored["problem"], "classes": [_shown(name) for name in names]}
    facts |= _conflicts(train)
    if stored["problem"] == "regression":
        spread = {key: _spread(split) for key, split in splits.items()}
        return facts | {"labels": None, "numbers": {"of": stored["label_column"], **spread}}
    counts = {key: class_counts(split, len(names)) for key, split in splits.items()}
    order = np.argsort(-counts["train"], kind="stable")[:SHOWN_LABELS]
    facts["labels"] = {"of": stored["label_column"], "distinct": len(names)} | {
        key: {_shown(names[label]): int(found[label]) for label in order} for key, found in counts.items()
    }
    if stored["problem"] is None:  # tags belong to words, not rows
        facts["labels"]["total"] = {key: int(found.sum()) for key, found in counts.items()}
    facts["absent_classes"] = {
        key: [_shown(names[label]) for label in np.flatnonzero(found == 0)] for key, found in counts.items()
    }
    if stored["problem"] == "multi-label":
        facts["rows_without_class"] = {key: _without(split) for key, split in splits.items()}
    if stored["problem"] == "single-label":
        facts["majority_share"] = {key: float(found.max() / found.sum()) for key, found in counts.items()}
    return facts | (_words([train, test]) if "words" in stored else {})


def class_counts(split: Split, classes: int) -> NDArray[np.int64]:
    """(classes,), how often each class or tag occurs in a split."""
    values = _values(split)
    found: NDArray[np.int64] = np.bincount(values[values >= 0], minlength=classes)
    return found


def absent_from_validation(validation: Split, train: Split) -> list[str]:
    """A warning about classes of the training rows that no validation row has; empty without a validation split."""
    names = train.store.classes
    if not len(validation.rows) or train.store.facts["problem"] == "regression":
        return []
    trained, found = class_counts(train, len(names)), class_counts(validation, len(names))
    absent = [_shown(names[label]) for label in np.flatnonzero((trained > 0) & (found == 0))]
    if not absent:
        return []
    which = f"{listed(absent)} {'is' if len(absent) == 1 else 'are'}"
    return [f"{which} in no validation row, so no choice depends on it; raise dataset.split.validation_size"]


def label_warnings(facts: Mapping[str, Any]) -> list[str]:
    """Warnings about the labels, as sentences."""
    warnings = [
        _absent(facts, "train", "training", "it cannot be learned"),
        _absent(facts, "test", "test", "it is not evaluated"),
    ]
    if facts["conflicting_rows"]:
        pair = facts["conflicting_examples"][0]
        rows = counted(facts["conflicting_rows"], "training row has", "training rows have")
        what = "pixels" if facts.get("format") == "images" else "text"
        warnings.append(
            f"{rows} the same {what} as an earlier one but another label ({pair['row']} and {pair['first']})"
        )
    similar = _similar(facts["classes"])
    if similar:
        warnings.append(f"classes differ only in case or white space ({'; '.join(similar[:3])}); use one spelling")
    without = sum((facts.get("rows_without_class") or {}).values())
    if without:
        rows = counted(without, "row has", "rows have")
        warnings.append(f"{rows} no class; the model learns to predict none for them")
    share = (facts.get("majority_share") or {}).get("test", 0)
    if share >= LOPSIDED:
        warnings.append(f"{share:.1%} of the test rows have the same class, so accuracy is misleading; use F1")
    return [one for one in [*warnings, *_word_warnings(facts.get("words"))] if one]


def _word_warnings(words: Mapping[str, Any] | None) -> list[str]:
    if words is None:
        return []
    warnings = []
    if words["cut"]:
        cut = counted(words["cut"], "word is", "words are")
        warnings.append(
            f"{cut} truncated at max_length, {words['cut_tagged']:,} with a tag; set dataset.too_long: split"
        )
    if words["silent"]:
        warnings.append(f"{counted(words['silent'], 'word has', 'words have')} no token, so no tag is learned for it")
    if words["odd_tags"]:
        odd = counted(words["odd_tags"], "tag continues", "tags continue")
        warnings.append(f"{odd} an entity that has not started, as in O I-X (first {words['odd_tag_examples'][0]})")
    return warnings


def _words(splits: Sequence[Split]) -> dict[str, Any]:
    """Words, tags and entities of both splits together."""
    stores = list({id(split.store): split.store.facts for split in splits}.values())
    words: Counter[str] = Counter()
    entities: Counter[str] = Counter()
    for facts in stores:
        words.update(facts["words"])
        entities.update(facts["entities"])
    found: dict[str, Any] = {name: words[name] for name in ("words", "tagged", "silent", "cut", "cut_tagged")}
    found["entities"] = dict(entities.most_common())
    found["odd_tags"] = sum(facts["odd_tags"] for facts in stores)
    places = [place for facts in stores for place in facts["odd_tag_examples"]]
    return {"words": found | {"odd_tag_examples": places[:FIRST_PLACES]}}


def _conflicts(train: Split) -> dict[str, Any]:
    """Rows with the same text as an earlier one but another label."""
    first = first_occurrence(train.column("prompt"))
    full = train.column("plain")
    rows = np.flatnonzero((first != np.arange(len(first))) & (full != full[first]))
    pairs = zip(train.places(rows[:FIRST_PLACES]), train.places(first[rows[:FIRST_PLACES]]), strict=True)
    return {
        "conflicting_rows": len(rows),
        "conflicting_examples": [{"row": row, "first": earlier} for row, earlier in pairs],
    }


def _spread(split: Split) -> dict[str, float]:
    values = _values(split).astype(np.float64)
    figures = {"min": values.min(), "median": np.median(values), "max": values.max(), "mean": values.mean()}
    return {name: float(value) for name, value in (figures | {"deviation": values.std()}).items()}


def _without(split: Split) -> int:
    lists = split.store.examples.column("labels").take(pa.array(split.rows, pa.int64()))
    return int(pc.sum(pc.equal(pc.list_value_length(lists), 0)).as_py() or 0)


def _values(split: Split) -> NDArray[Any]:
    lists = split.store.examples.column("labels").take(pa.array(split.rows, pa.int64()))
    values: NDArray[Any] = pc.list_flatten(lists).to_numpy()
    return values


def _absent(facts: Mapping[str, Any], key: str, split: str, effect: str) -> str | None:
    names = (facts.get("absent_classes") or {}).get(key) or []
    if not names:
        return None
    has = "no row of the class" if len(names) == 1 else f"no row of {len(names)} classes, such as"
    return f"the {split} split has {has} {listed(names[:3])}, so {effect}"


def _similar(names: Sequence[str]) -> list[str]:
    """Classes that differ only in case or white space."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(" ".join(name.casefold().split()), []).append(name)
    return [", ".join(group) for group in groups.values() if len(group) > 1]


def _shown(name: str) -> str:
    return hide_keys([name])[0][:80]


class TagCounts:
    """Counts entities by type, and tags that continue an entity that has not started."""

    def __init__(self) -> None:
        self._entities: Counter[str] = Counter()
        self._odd = Dropped()
        self._seen: set[str] = set()

    def add(self, rows: Rows, examples: Examples) -> None:
        """Count the tags of the examples of a batch."""
        for row, text in zip(examples.kept, examples.columns["tags"], strict=True):
            tags: list[str] = json.loads(text)
            self._seen.update(tags)
            self._entities.update(kind for kind, _, _ in entities_of(span_tags([tags], tags)[0]))
            self._odd.add(rows, [(row, "odd")] * _odd_tags(tags))

    def facts(self) -> dict[str, Any]:
        """Entities by type, and the odd tags; no odd tags if no tag marks the start of an entity."""
        begins = any(tag.startswith("B-") for tag in self._seen)
        spans = begins or any(tag.startswith("I-") for tag in self._seen) or "O" in self._seen
        return {
            "entities": dict(self._entities.most_common()) if spans else {},
            "odd_tags": self._odd.counts["odd"] if begins else 0,
            "odd_tag_examples": self._odd.places.get("odd", []) if begins else [],
        }


def _odd_tags(tags: list[str]) -> int:
    """Number of tags that continue an entity without a preceding tag of the same entity.

    >>> _odd_tags(["O", "I-PER", "I-PER", "B-LOC", "I-PER"])
    2
    """
    odd = 0
    before = "O"
    for tag in tags:
        prefix, dash, kind = tag.partition("-")
        if dash and prefix in _INSIDE and before not in (f"B-{kind}", f"I-{kind}"):
            odd += 1
        before = tag
    return odd
