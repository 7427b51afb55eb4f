"""Tokenizes examples with labels to token ids and class ids; aligns words with tokens for tagging."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from peftcli.data.class_labels import sorted_names
from peftcli.data.encode import encode, flatten
from peftcli.data.tokenize import FLAGS, IGNORED, Counts, Flags, Ids, TokenizedBatch, row_sums
from peftcli.errors import DataError
from peftcli.plan.plan import LossMask
from peftcli.tasks.labels import OUTSIDE

NO_WORD = "with no word that has a token"

_PROBE = ["New", "York", "in", "a", "day"]


@dataclass
class Classes:
    """Class ids, assigned in the order of appearance."""

    numbers: dict[str, int] = field(default_factory=dict)

    def number(self, name: str) -> int:
        return self.numbers.setdefault(name, len(self.numbers))

    @property
    def names(self) -> list[str]:
        return list(self.numbers)


class TextClasses:
    """Tokenizes texts with the tokenizer's defaults, and maps their classes to ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rule: LossMask, problem_type: str, classes: Classes) -> None:
        self._tokenizer = tokenizer
        self._limit = rule.max_length
        self._problem_type = problem_type
        self._classes = classes

    def batch(
        self, columns: Mapping[str, Sequence[str]], ends: Sequence[bool] | None, too_long: str | None
    ) -> TokenizedBatch:
        """Token ids and labels of a batch; rows are truncated unless `too_long` is `drop`.

        Raises:
            DataError: the maximum length has no space for text.
        """
        texts = list(zip(columns["text"], columns["text_pair"], strict=True))
        rows = self._encode(texts)
        uncut = np.fromiter(map(len, rows), np.int64, len(rows))
        long = uncut > self._limit
        cut = np.flatnonzero(long).tolist() if too_long != "drop" else []
        for row, ids in zip(cut, self._cut([texts[row] for row in cut], [rows[row] for row in cut]), strict=True):
            rows[row] = ids
        keep = ~long if too_long == "drop" else np.ones(len(rows), bool)
        kept = np.flatnonzero(keep)
        flat, lengths = flatten([rows[row] for row in kept])
        dropped = [(int(row), f"longer than max_length {self._limit}") for row in np.flatnonzero(~keep)]
        values = [self._labels(columns["label"][row]) for row in kept.tolist()]
        return TokenizedBatch(
            of=kept,
            flat=flat,
            loss_mask=np.zeros(len(flat), bool),
            lengths=lengths,
            uncut=uncut[kept],
            trained=np.ones(len(kept), np.int64),
            flags=label_flags(flat, lengths, long[kept], self._tokenizer),
            dropped=dropped,
            classes=self._flat_labels(values),
        )

    def numbers(self, columns: Mapping[str, Sequence[str]]) -> list[int]:
        """The class id of each example; -1 for multi-label and regression."""
        if self._problem_type != "single-label":
            return [-1] * len(columns["label"])
        return [self._classes.number(name) for name in columns["label"]]

    def _encode(self, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
        if not any(pair for _, pair in texts):
            return encode([text for text, _ in texts], self._tokenizer)
        return encode(texts, self._tokenizer)

    def _cut(self, texts: Sequence[tuple[str, str]], rows: Sequence[list[int]]) -> list[list[int]]:
        """Truncate rows like the tokenizer, which keeps its special tokens."""
        paired = bool(texts and texts[0][1])
        if texts and self._limit <= self._tokenizer.num_special_tokens_to_add(pair=paired):
            raise DataError(f"dataset.max_length {self._limit} only has space for special tokens; raise it")
        if texts and not paired and self._tail is not None:  # the same result without encoding all rows again
            kept = self._limit - self._tail
            return [ids[:kept] + ids[len(ids) - self._tail :] for ids in rows]
        pairs = [pair for _, pair in texts] if paired else None
        firsts = [text for text, _ in texts]
        how = {"truncation": True, "max_length": self._limit}
        return list(self._tokenizer(firsts, pairs, **how)["input_ids"]) if texts else []

    @cached_property
    def _tail(self) -> int | None:
        """Number of special tokens at the end of a single text; None if the tokenizer truncates differently."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None or self._tokenizer.truncation_side != "right":
            return None
        special = backend.encode("a", add_special_tokens=True).special_tokens_mask
        tail = next((at for at, one in enumerate(reversed(special)) if not one), None)
        return tail

    def _labels(self, label: str) -> list[Any]:
        if self._problem_type == "regression":
            return [float(label)]
        names = json.loads(label) if self._problem_type == "multi-label" else [label]
        return [self._classes.number(name) for name in sorted_names(names)]

    def _flat_labels(self, values: Sequence[Sequence[Any]]) -> tuple[Any, Counts]:
        if self._problem_type != "regression":
            return flatten(values)
        return np.array([value for row in values for value in row], np.float32), np.ones(len(values), np.int64)


@dataclass(frozen=True)
class AlignedWords:
    """The tokens of a row of words.

    Attributes:
        ids: with the tokenizer's special tokens.
        words: for the first token of each word the index of the word, None for all other tokens.
        lead, tail: number of special tokens at the beginning and at the end.
    """

    ids: list[int]
    words: list[int | None]
    lead: int
    tail: int

    def cut(self, limit: int) -> "AlignedWords":
        """The row truncated to `limit` tokens, keeping the special tokens at its end.

        >>> AlignedWords([1, 7, 8, 9, 2], [None, 0, None, 1, None], 1, 1).cut(4)
        AlignedWords(ids=[1, 7, 8, 2], words=[None, 0, None, None], lead=1, tail=1)
        """
        if len(self.ids) <= limit:
            return self
        kept, end = limit - self.tail, len(self.ids) - self.tail
        ids, words = self.ids[:kept] + self.ids[end:], self.words[:kept] + self.words[end:]
        return AlignedWords(ids, words, self.lead, self.tail)


class WordTags:
    """Tokenizes words, and labels the first token of each word with the id of its tag.

    Attributes:
        counts: numbers of `words`; `tagged`, words with another tag than O; `silent`, words without a token; `cut` and
            `cut_tagged`, words truncated at max_length.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rule: LossMask, classes: Classes) -> None:
        self._tokenizer = tokenizer
        self._limit = rule.max_length
        self._classes = classes
        self.counts: Counter[str] = Counter()

    def batch(
        self, columns: Mapping[str, Sequence[str]], ends: Sequence[bool] | None, too_long: str | None
    ) -> TokenizedBatch:
        """Token ids and tag ids of a batch.

        Args:
            columns: `tokens` and `tags`, JSON lists.
            too_long: `truncate`, `drop`, or `split` (between words); None for truncate.

        Raises:
            DataError: the tokenizer cannot map its tokens to words.
        """
        words = [json.loads(one) for one in columns["tokens"]]
        tags = [json.loads(one) for one in columns["tags"]]
        dropped: list[tuple[int, str]] = []
        pieces: list[_Piece] = []
        for row, aligned in enumerate(align_words(words, self._tokenizer)):
            if too_long == "drop" and len(aligned.ids) > self._limit:
                dropped.append((row, f"longer than max_length {self._limit}"))
                continue
            made = [one for one in self._pieces(row, aligned, tags[row], split=too_long == "split") if one.tagged]
            pieces += made
            if not made:
                dropped.append((row, NO_WORD))
            else:
                self._count(aligned, tags[row], made)
        return self._finish(pieces, dropped)

    def numbers(self, columns: Mapping[str, Sequence[str]]) -> list[int]:
        """-1 for each example, since tagging has no class per row."""
        return [-1] * len(columns["tags"])

    def _pieces(self, row: int, aligned: AlignedWords, tags: Sequence[str], *, split: bool) -> "Iterable[_Piece]":
        length = len(aligned.ids)
        parts = _split(aligned, self._limit) if split else [aligned.cut(self._limit)]
        for part in parts:
            labels = [IGNORED if word is None else self._classes.number(tags[word]) for word in part.words]
            uncut = len(part.ids) if split else length
            yield _Piece(row, part.ids, labels, uncut, not split and length > self._limit)

    def _count(self, aligned: AlignedWords, tags: Sequence[str], pieces: Sequence["_Piece"]) -> None:
        with_token = [word for word in aligned.words if word is not None]
        kept = sum(piece.tagged for piece in pieces)
        tagged = [tags[word] != OUTSIDE for word in with_token]
        self.counts["words"] += len(tags)
        self.counts["tagged"] += sum(tag != OUTSIDE for tag in tags)
        self.counts["silent"] += len(tags) - len(with_token)
        self.counts["cut"] += len(with_token) - kept
        self.counts["cut_tagged"] += sum(tagged[kept:])

    def _finish(self, pieces: Sequence["_Piece"], dropped: list[tuple[int, str]]) -> TokenizedBatch:
        flat, lengths = flatten([piece.ids for piece in pieces])
        labels, _ = flatten([piece.labels for piece in pieces])
        truncated = np.array([piece.truncated for piece in pieces], bool)
        return TokenizedBatch(
            of=np.array([piece.row for piece in pieces], np.int64),
            flat=flat,
            loss_mask=labels != IGNORED,
            lengths=lengths,
            uncut=np.array([piece.uncut for piece in pieces], np.int64),
            trained=np.array([piece.tagged for piece in pieces], np.int64),
            flags=label_flags(flat, lengths, truncated, self._tokenizer),
            dropped=dropped,
            classes=(labels, lengths),
        )


@dataclass(frozen=True)
class _Piece:
    """A row of tokens; `labels` are tag ids, IGNORED for tokens that are not the first of a word."""

    row: int
    ids: list[int]
    labels: list[int]
    uncut: int
    truncated: bool

    @property
    def tagged(self) -> int:
        """Number of labeled words."""
        return sum(label != IGNORED for label in self.labels)


def _split(aligned: AlignedWords, limit: int) -> Iterable[AlignedWords]:
    """Split into pieces of at most `limit` tokens with special tokens at both ends, between words if possible."""
    lead, tail = aligned.lead, aligned.tail
    end = len(aligned.ids) - tail
    at, size = lead, limit - lead - tail
    while size > 0 and at < end:
        stop = min(at + size, end)
        starts = [index for index in range(at + 1, stop + 1) if index == end or aligned.words[index] is not None]
        stop = stop if stop == end or not starts else starts[-1]
        ids = aligned.ids[:lead] + aligned.ids[at:stop] + aligned.ids[end:]
        yield AlignedWords(ids, aligned.words[:lead] + aligned.words[at:stop] + aligned.words[end:], lead, tail)
        at = stop


def label_flags(flat: Ids, lengths: Counts, truncated: Flags, tokenizer: PreTrainedTokenizerBase) -> dict[str, Flags]:
    """The flags of rows with labels, which have no prompt and no trained end token."""
    none = np.zeros(len(lengths), bool)
    unknown = none
    if tokenizer.unk_token_id is not None:
        unknown = row_sums(flat == tokenizer.unk_token_id, lengths) > 0
    return dict.fromkeys(FLAGS, none) | {"truncated": truncated, "unknown": unknown}


def align_words(rows: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> list[AlignedWords]:
    """The tokens of rows of words, encoded like the words joined with spaces.

    If the tokenizer gives the same ids for a list of words as for their text, it gets the list. Otherwise (byte-level
    tokenizers would omit the spaces) it gets the text, and character offsets map tokens to words.

    Args:
        rows: the words of each row, complete and in order.

    Raises:
        DataError: the tokenizer cannot map its tokens to words.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"{type(tokenizer).__name__} cannot map tokens to words, so tagging is not possible; "
            "set model.name to a model with a tokenizer.json"
        )
    backend.no_truncation()
    backend.no_padding()
    if takes_words(tokenizer):
        found = backend.encode_batch([list(row) for row in rows], is_pretokenized=True, add_special_tokens=True)
        return [_of_encoding(one, _first_of(one.word_ids)) for one in found]
    spans = [_spans(row) for row in rows]
    found = backend.encode_batch([" ".join(row) for row in rows], add_special_tokens=True)
    return [
        _of_encoding(one, _first_in(one.offsets, one.special_tokens_mask, span))
        for one, span in zip(found, spans, strict=True)
    ]


def takes_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer gives the same ids for a list of words as for their text."""
    backend: Any = tokenizer.backend_tokenizer
    words = backend.encode(list(_PROBE), is_pretokenized=True, add_special_tokens=True).ids
    return bool(words == encode([" ".join(_PROBE)], tokenizer)[0])


def _of_encoding(encoding: Any, words: list[int | None]) -> AlignedWords:
    special = encoding.special_tokens_mask
    lead = next((at for at, one in enumerate(special) if not one), len(special))
    tail = next((at for at, one in enumerate(reversed(special)) if not one), 0) if lead < len(special) else 0
    return AlignedWords(list(encoding.ids), words, lead, tail)


def _first_of(words: Sequence[int | None]) -> list[int | None]:
    """Keep the index of each word only at its first token.

    >>> _first_of([None, 0, 0, 1, None])
    [None, 0, None, 1, None]
    """
    seen: set[int] = set()
    found: list[int | None] = []
    for word in words:
        found.append(word if word not in seen else None)
        if word is not None:
            seen.add(word)
    return found


def _spans(words: Sequence[str]) -> list[tuple[int, int]]:
    """Character spans of the words in the text joined with spaces."""
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return spans


def _first_in(
    offsets: Sequence[tuple[int, int]], special: Sequence[int], spans: Sequence[tuple[int, int]]
) -> list[int | None]:
    """The index of each word at the first token that overlaps it.

    >>> _first_in([(0, 3), (3, 8), (8, 9)], [0, 0, 0], [(0, 3), (4, 9)])
    [0, 1, None]
    """
    found: list[int | None] = [None] * len(offsets)
    word = 0
    for at, (start, end) in enumerate(offsets):
        if special[at]:
            continue
        while word < len(spans) and (spans[word][1] <= start or spans[word][0] == spans[word][1]):
            word += 1
        # A token that overlaps two words gets the tag of the first.
        if word < len(spans) and end > spans[word][0] and start < spans[word][1]:
            found[at] = word
            word += 1
    return found
