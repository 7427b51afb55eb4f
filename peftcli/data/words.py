"""Words to tokens: which token carries the tag of a word."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from peftcli.data.encode import encode
from peftcli.errors import DataError

_PROBE = ["New", "York", "in", "a", "day"]


@dataclass(frozen=True)
class Aligned:
    """A row of words as tokens.

    Attributes:
        ids: with the tokenizer's own beginning and end.
        words: for each token the number of the word that it begins, None for all others; a word begins in one token.
        lead, tail: special tokens at the beginning and at the end.
    """

    ids: list[int]
    words: list[int | None]
    lead: int
    tail: int

    def cut(self, limit: int) -> "Aligned":
        """The row with at most `limit` tokens; the special tokens at its end stay.

        >>> Aligned([1, 7, 8, 9, 2], [None, 0, None, 1, None], 1, 1).cut(4)
        Aligned(ids=[1, 7, 8, 2], words=[None, 0, None, None], lead=1, tail=1)
        """
        if len(self.ids) <= limit:
            return self
        kept, end = limit - self.tail, len(self.ids) - self.tail
        ids, words = self.ids[:kept] + self.ids[end:], self.words[:kept] + self.words[end:]
        return Aligned(ids, words, self.lead, self.tail)


def align(rows: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> list[Aligned]:
    """The tokens of rows of words, as the tokenizer writes the words with a space between them.

    A tokenizer that writes the same ids for a list of words as for their text is given the list. One that would write
    the words without spaces between them, as those on bytes do, is given the text, and the places of its tokens in the
    text tell the words.

    Args:
        rows: words, in their order; none of them may be left out.

    Raises:
        DataError: the tokenizer does not tell where its tokens stand.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"{type(tokenizer).__name__} does not tell which word a token is of, so words cannot be tagged; "
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
    """Whether the tokenizer writes the same ids for a list of words as for their text."""
    backend: Any = tokenizer.backend_tokenizer
    words = backend.encode(list(_PROBE), is_pretokenized=True, add_special_tokens=True).ids
    return bool(words == encode([" ".join(_PROBE)], tokenizer)[0])


def _of_encoding(encoding: Any, words: list[int | None]) -> Aligned:
    special = encoding.special_tokens_mask
    lead = next((at for at, one in enumerate(special) if not one), len(special))
    tail = next((at for at, one in enumerate(reversed(special)) if not one), 0) if lead < len(special) else 0
    return Aligned(list(encoding.ids), words, lead, tail)


def _first_of(words: Sequence[int | None]) -> list[int | None]:
    """Each word's number at its first token only.

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
    """Where each word stands in the text that spaces join."""
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return spans


def _first_in(
    offsets: Sequence[tuple[int, int]], special: Sequence[int], spans: Sequence[tuple[int, int]]
) -> list[int | None]:
    """Each word's number at the first token that reaches into it.

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
        # A token that reaches into two words carries the tag of the first.
        if word < len(spans) and end > spans[word][0] and start < spans[word][1]:
            found[at] = word
            word += 1
    return found
