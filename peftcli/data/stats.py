"""Statistics of the data after the split (`data.json`), and the data limits."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from peftcli.data.dedup import first_occurrence, match_exact, match_near_duplicates
from peftcli.data.encode import stop_ids
from peftcli.data.formats import LABELLED
from peftcli.data.quality import hide_keys
from peftcli.data.rows import FIRST_PLACES
from peftcli.data.selection import FILTERED
from peftcli.data.store import Store, StoredSignatures
from peftcli.data.tokenize import IGNORED
from peftcli.plan.plan import LossMask
from peftcli.recipe.schema import LimitsSection

Indices = NDArray[np.int64]
HISTOGRAM_BINS = 24
SHOWN_LABELS = 50

EQUAL = "equal to an earlier row"
"""Reason of rows dropped by `dataset.deduplicate`; they do not count for a limit."""


def is_wanted(reason: str) -> bool:
    """Whether rows are dropped because the recipe asks for it; the reason of test rows has words before it."""
    return reason == EQUAL or reason.endswith(FILTERED)


@dataclass(frozen=True)
class Split:
    """Some rows of a store: the training or the test split."""

    store: Store
    rows: Indices

    def column(self, name: str) -> NDArray[Any]:
        """(rows,), a column of the store."""
        found: NDArray[Any] = self.store.column(name)[self.rows]
        return found

    def signatures(self) -> StoredSignatures:
        """MinHash signatures for finding near duplicates."""
        return StoredSignatures(self.store.signatures, self.rows)

    def flag(self, name: str) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = self.store.flag(name)[self.rows]
        return found

    def places(self, rows: Sequence[int] | Indices) -> list[str]:
        """File and line of rows, by their index in this split."""
        return self.store.places(self.rows[np.asarray(rows, np.int64)])


def count_rows(train: Split, test: Split, rule: LossMask) -> dict[str, Any]:
    """Rows, tokens and lengths of both splits.

    Args:
        train: not empty.
        test: empty if no rows are held out.
    """
    lengths = train.column("uncut")
    trained, tested = train.column("trained"), test.column("trained")
    truncated = [split.flag("truncated") for split in (train, test)]
    cut = [*train.places(np.flatnonzero(truncated[0])[:FIRST_PLACES])]
    cut += test.places(np.flatnonzero(truncated[1])[:FIRST_PLACES])
    return {
        "train_rows": len(train.rows),
        "test_rows": len(test.rows),
        "truncated_rows": int(truncated[0].sum() + truncated[1].sum()),
        "truncated_examples": cut[:FIRST_PLACES],
        "merged_boundary_rows": int(train.flag("merged").sum()),
        "doubled_bos_rows": int(train.flag("doubled_bos").sum()),
        "unknown_token_rows": int(train.flag("unknown").sum()),
        "tokens": {
            "train": int(train.column("length").sum()),
            "trained": int(trained.sum()),
            "test": int(test.column("length").sum()),
            "test_trained": int(tested.sum()),
        },
        "trained_per_row": {"min": int(trained.min()), "median": float(np.median(trained))},
        "length": {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "p95": float(np.percentile(lengths, 95)),
            "max": int(lengths.max()),
        },
        "length_histogram": _histogram(lengths, rule.max_length),
        "max_length": rule.max_length,
        "fingerprint": {"train": _fingerprint(train), "test": _fingerprint(test) if len(test.rows) else None},
    }


def count_ends(train: Split, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Number of training rows whose end token is trained, not counting truncated and continued rows."""
    expected, trained = train.flag("ends"), train.flag("end_trained")
    lacking = np.flatnonzero(expected & ~trained)
    return {
        "eos_expected_rows": int(expected.sum()),
        "eos_trained_rows": int(trained.sum()),
        "eos_lacking_examples": train.places(lacking[:FIRST_PLACES]),
        "ends_with": _ends_with(train, int(lacking[0]), tokenizer) if len(lacking) else None,
    }


def _ends_with(train: Split, row: int, tokenizer: PreTrainedTokenizerBase) -> str:
    labels = train.store.examples.column("labels")[int(train.rows[row])].as_py()
    last = next(label for label in reversed(labels) if label != IGNORED)
    stops = ", ".join(repr(tokenizer.convert_ids_to_tokens(stop)) for stop in sorted(stop_ids(tokenizer)))
    if not stops:
        return "the tokenizer has no end token; set model.eos_token to one that the model knows"
    fix = "add it after the answer"
    if train.store.facts["kind"] == "messages":
        fix = "set model.chat_template to a template that ends assistant turns with {{ eos_token }}"
    return f"an answer ends with {tokenizer.convert_ids_to_tokens(last)!r}, but generation stops on {stops}: {fix}"


def compare_rows(train: Split, test: Split) -> dict[str, Any]:
    """Duplicates and near duplicates within the training split and between the splits.

    Args:
        test: empty if no rows are held out; its values are null then.
    """
    hashes, test_hashes = train.column("plain"), test.column("plain")
    first = first_occurrence(hashes)
    duplicate = np.flatnonzero(first != np.arange(len(first)))
    leak = match_exact(test_hashes, hashes)
    leaked = np.flatnonzero(leak >= 0)
    signatures, test_signatures = train.signatures(), test.signatures()
    near = match_near_duplicates(signatures, None)
    near[duplicate] = -1
    near_duplicate = np.flatnonzero(near >= 0)
    near_leak = match_near_duplicates(test_signatures, signatures)
    near_leak[leaked] = -1
    near_leaked = np.flatnonzero(near_leak >= 0)
    prompts = train.store.facts["kind"] in ("prompt_completion", *LABELLED)
    held_out = len(test.rows) > 0
    return {
        "leaked_rows": len(leaked) if held_out else None,
        "leaked_examples": _pairs(test, train, leaked, leak, ("test", "train")),
        "leaked_prompts": int((match_exact(test.column("prompt"), train.column("prompt")) >= 0).sum())
        if prompts and held_out
        else None,
        "duplicate_rows": len(duplicate),
        "duplicate_examples": _pairs(train, train, duplicate, first, ("row", "first")),
        "near_duplicate_rows": len(near_duplicate),
        "near_duplicate_examples": _pairs(train, train, near_duplicate, near, ("row", "first")),
        "near_leaked_rows": len(near_leaked) if held_out else None,
        "near_leaked_examples": _pairs(test, train, near_leaked, near_leak, ("test", "train")),
    }


def balance(train: Split, test: Split) -> dict[str, Any] | None:
    """How often each completion occurs in each split, if there are few enough to be labels."""
    names = train.store.facts["labels"]
    if names is None:
        return None
    counts = np.bincount(train.column("label"), minlength=len(names))
    found: dict[str, Any] = {"of": "completion", "distinct": len(names)}
    shown = [hide_keys([name])[0][:80] for name in names]
    order = np.argsort(-counts, kind="stable")[:SHOWN_LABELS]
    found["train"] = {shown[label]: int(counts[label]) for label in order}
    if test.store is train.store and len(test.rows):
        other = np.bincount(test.column("label"), minlength=len(names))
        found["test"] = {shown[label]: int(other[label]) for label in order}
    return found


def odd_labels(train: Split) -> list[int]:
    """Training rows with a unique completion, if nearly all others share a few: possibly shifted columns."""
    names = train.store.facts["labels"]
    if names is None or len(train.rows) < 40:
        return []
    labels = train.column("label")
    counts = np.bincount(labels, minlength=len(names))
    common = int(counts[counts >= 5].sum())
    single = np.flatnonzero(counts[labels] == 1)
    if common < 0.9 * len(labels) or not len(single):
        return []
    return [int(row) for row in single]


def data_warnings(facts: Mapping[str, Any], train: Split, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Warnings about the rows, as sentences."""
    begin, unknown = tokenizer.bos_token, tokenizer.unk_token
    before = ", before the end token" if "eos_expected_rows" in facts else ""
    warnings = []
    for key, one, many, rest in (
        ("truncated_rows", "row is", "rows are", f"truncated at {facts['max_length']} tokens{before}"),
        ("leaked_rows", "test row is", "test rows are", "also in the training split"),
        ("near_leaked_rows", "test row is", "test rows are", "nearly equal to a training row"),
        ("duplicate_rows", "training row is", "training rows are", "equal to an earlier one"),
        ("near_duplicate_rows", "training row is", "training rows are", "nearly equal to an earlier one"),
        (
            "doubled_bos_rows",
            "training row starts",
            "training rows start",
            f"with {begin} twice, because the text contains it too",
        ),
        ("merged_boundary_rows", "row has", "rows have", "a token that spans the end of the prompt and the completion"),
        ("unknown_token_rows", "row has", "rows have", f"text that the tokenizer encodes as {unknown}"),
    ):
        if facts[key]:
            warnings.append(f"{counted(facts[key], one, many)} {rest}{_where(facts, key)}")
    for reason, count in facts["dropped"].items():
        where = _place(facts["dropped_examples"].get(reason))
        if reason == EQUAL:
            warnings.append(f"{counted(count, 'duplicate row', 'duplicate rows')} left out{where}")
        elif reason.endswith(FILTERED):
            warnings.append(f"{counted(count, 'row', 'rows')} {reason}{where}")
        else:
            row, is_ = ("row", "is") if count == 1 else ("rows", "are")
            warnings.append(f"{count:,} {row} {reason} {is_} dropped{where}")
    odd = odd_labels(train)
    if odd:
        warnings.append(
            f"{counted(len(odd), 'training row has', 'training rows have')} a unique answer, while all others share a "
            f"few; check for shifted columns{_place(train.places(odd[:1]))}"
        )
    return warnings


def counted(count: int, one: str, many: str) -> str:
    """A number with the singular or plural form.

    >>> counted(1, "row is", "rows are"), counted(1200, "row is", "rows are")
    ('1 row is', '1,200 rows are')
    """
    return f"{count:,} {one if count == 1 else many}"


def _where(facts: Mapping[str, Any], key: str) -> str:
    examples = facts.get(key.replace("_rows", "_examples")) or []
    first = examples[0] if examples else None
    if isinstance(first, dict):
        return " ({} and {})".format(*first.values())
    return _place(examples)


def _place(places: Sequence[str] | None) -> str:
    return f" (first {places[0]})" if places else ""


def _pairs(left: Split, right: Split, rows: Indices, partner: Indices, names: tuple[str, str]) -> list[dict[str, str]]:
    chosen = rows[:FIRST_PLACES]
    ours, theirs = left.places(chosen), right.places(partner[chosen])
    return [dict(zip(names, pair, strict=True)) for pair in zip(ours, theirs, strict=True)]


def _histogram(lengths: NDArray[Any], max_length: int) -> dict[str, list[int]]:
    """Histogram of row lengths in bins of equal size; the last bin has all rows longer than twice the limit."""
    longest = int(lengths.max())
    step = max(1, -(-min(longest, 2 * max_length) // HISTOGRAM_BINS))
    edges = list(range(0, min(longest, 2 * max_length) + step, step))
    edges[-1] = max(edges[-1], longest + 1)
    return {"edges": edges, "counts": np.histogram(lengths, edges)[0].tolist()}


def _fingerprint(split: Split) -> str:
    """SHA-256 over the 64-bit hashes of the rows, in order."""
    return hashlib.sha256(np.ascontiguousarray(split.column("exact"), "<u8").tobytes()).hexdigest()


def crossed_limits(facts: Mapping[str, Any], limits: LimitsSection) -> list[str]:
    """One sentence for each exceeded data limit.

    Args:
        facts: the content of `data.json`.
        limits: shares in 0..1.

    Returns:
        The measured and the allowed share, the location of the first rows, and the fix with the key of the limit.
    """
    found = []
    wanted = sum(count for reason, count in facts["dropped"].items() if is_wanted(reason))
    rows, kept = facts["rows"] - wanted, facts["train_rows"] + facts["test_rows"]
    dropped = facts["dropped_rows"] - wanted
    if _above(dropped, rows, limits.max_dropped):
        reasons = sorted(_counted(facts), key=lambda item: -item[1])[:3]
        named = "; ".join(f"{count:,} {reason}{_first(facts, reason)}" for reason, count in reasons)
        found.append(_sentence("max_dropped", dropped, rows, "rows are dropped", limits.max_dropped) + f": {named}")
    if _above(facts["truncated_rows"], kept, limits.max_truncated):
        longest = facts["length"]["max"]
        found.append(
            _sentence("max_truncated", facts["truncated_rows"], kept, "rows are truncated", limits.max_truncated)
            + f" at dataset.max_length {facts['max_length']}, so their end is not {_use(facts)}; the longest has "
            f"{longest} tokens: raise it, or set dataset.too_long: drop"
        )
    if _above(facts["leaked_rows"], facts["test_rows"], limits.max_leaked):
        pair = next(iter(facts["leaked_examples"]), None)
        where = f" ({pair['test']} equals {pair['train']})" if pair else ""
        found.append(
            _sentence(
                "max_leaked",
                facts["leaked_rows"],
                facts["test_rows"],
                "test rows are also in the training split",
                limits.max_leaked,
            )
            + f"{where}; {_against_leaks(facts)}"
        )
    expected, trained = facts.get("eos_expected_rows", 0), facts.get("eos_trained_rows", 0)
    if expected and trained < limits.min_eos_trained * expected:
        lacking = expected - trained
        found.append(
            f"the end token is trained in {trained:,} of {expected:,} training rows, so a model would not learn to "
            f"stop (dataset.limits.min_eos_trained: {limits.min_eos_trained:g}); {facts['ends_with']}"
            + (f", first {facts['eos_lacking_examples'][0]}" if lacking and facts["eos_lacking_examples"] else "")
        )
    return found


def _use(facts: Mapping[str, Any]) -> str:
    return "trained" if "eos_expected_rows" in facts else "read"


def _against_leaks(facts: Mapping[str, Any]) -> str:
    if not facts["split"]:  # the test rows have their own file
        return "remove them from one of the two files"
    return "set dataset.deduplicate: true, or split by a column with dataset.split.group"


def _counted(facts: Mapping[str, Any]) -> list[tuple[str, int]]:
    return [(reason, count) for reason, count in facts["dropped"].items() if not is_wanted(reason)]


def _above(part: int, whole: int, limit: float) -> bool:
    return bool(whole) and part > limit * whole


def _sentence(key: str, part: int, whole: int, what: str, limit: float) -> str:
    return f"{part:,} of {whole:,} {what} ({part / whole:.1%}, dataset.limits.{key}: {limit:g})"


def _first(facts: Mapping[str, Any], reason: str) -> str:
    places = facts["dropped_examples"].get(reason, ())
    return f" (first {places[0]})" if places else ""
