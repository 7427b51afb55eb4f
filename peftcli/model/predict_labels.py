"""Predicts labels for new texts and images: a class with its probability, a number, or a tag per word."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peftcli.data.image_processor import read_image
from peftcli.data.label_tokenize import AlignedWords, align_words
from peftcli.data.tokenize import IGNORED
from peftcli.data.values import SkipRow
from peftcli.errors import DataError
from peftcli.metrics.tagging import entities_of, span_tags
from peftcli.model.classification import TaskHead, row_logits, task_head
from peftcli.model.target import Target
from peftcli.progress import Progress
from peftcli.recipe.template import fill_template
from peftcli.tasks.labels import OUTSIDE

WORD = re.compile(r"[@#$]?\w+(?:[-'\u2019.,:/@]\w+)*|[^\w\s]")
"""A word of running text, or a single punctuation mark."""


@dataclass(frozen=True)
class Labelled:
    """The prediction for a text.

    Attributes:
        asked: the input text.
        label: one class, a list of classes, a number, or None for tagged words.
        probabilities: of each class; empty for a number and for tagged words.
    """

    asked: str
    label: str | list[str] | float
    probabilities: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """The answer in the form of `--json`."""
        return vars(self)

    def line(self) -> str:
        """The answer as a line."""
        if isinstance(self.label, float):
            return f"{self.label:.6g}"
        chosen = self.label if isinstance(self.label, list) else [self.label]
        return ", ".join(f"{one} ({self.probabilities[one]:.4f})" for one in chosen) or "none"


@dataclass(frozen=True)
class Tagged:
    """The prediction for the words of a text.

    Attributes:
        tags: of each word; None for a word without a token, or beyond the maximum length.
        probabilities: of those tags.
        entities: type, words, and first and last word (from 0) of each entity.
    """

    asked: str
    words: list[str]
    tags: list[str | None]
    probabilities: list[float | None]
    entities: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """The answer in the form of `--json`."""
        return vars(self)

    def line(self) -> str:
        """The answer as one line of words with their tags."""
        return " ".join(f"{word}/{tag or '?'}" for word, tag in zip(self.words, self.tags, strict=True))


def label_texts(
    target: Target, asked: Sequence[str], *, raw: bool, batch_rows: int, progress: Progress
) -> list[Labelled]:
    """Predict labels of texts and pairs of texts.

    Args:
        target: a model with a head for whole texts.
        asked: texts, or values for the columns of the run's template; a JSON object with `text` and `text_pair` is a
            pair.
        raw: use each text as is, without a template and not as JSON.

    Raises:
        RecipeError: a value does not fit the template.
    """
    texts = _filled(target, asked, raw=raw)
    model, tokenizer = target.load()
    head = task_head(target.base.labels, target.base.problem_type, model, tokenizer)
    limit = _limit(target, tokenizer)
    ids = [_encode(text, tokenizer, raw=raw) for text in texts]
    _tell_cut(sum(len(row) > limit for row in ids), limit, progress)
    ids = [
        row if len(row) <= limit else _encode(text, tokenizer, raw=raw, limit=limit)
        for row, text in zip(ids, texts, strict=True)
    ]
    logits = row_logits(model, ids, None, head, batch_rows=batch_rows, progress=progress, what="labels")
    return [labelled(head, *row) for row in zip(asked, logits, strict=True)]


def tag_texts(target: Target, asked: Sequence[str], *, raw: bool, batch_rows: int, progress: Progress) -> list[Tagged]:
    """Tag the words of texts.

    Args:
        target: a model with a head for tokens.
        asked: texts, or values for the columns of the run's template; a JSON list contains the words of a text.
        raw: split words only at whitespace, and do not parse JSON.

    Raises:
        DataError: the tokenizer does not map tokens to words.
        RecipeError: a value does not fit the template.
    """
    texts = _filled(target, asked, raw=raw)
    model, tokenizer = target.load()
    head = task_head(target.base.labels, None, model, tokenizer)
    limit = _limit(target, tokenizer)
    rows = [split_words(text, raw=raw) for text in texts]
    aligned = align_words(rows, tokenizer)
    _tell_cut(sum(len(row.ids) > limit for row in aligned), limit, progress)
    aligned = [row.cut(limit) for row in aligned]
    ids = [row.ids for row in aligned]
    marks = [[IGNORED if word is None else 0.0 for word in row.words] for row in aligned]
    found = row_logits(model, ids, marks, head, batch_rows=batch_rows, progress=progress, what="labels")
    return [_tagged(head, *row) for row in zip(asked, rows, aligned, found, strict=True)]


def _filled(target: Target, asked: Sequence[str], *, raw: bool) -> list[str]:
    template = target.identity.get("prompt")
    return list(asked) if raw or template is None else [fill_template(text, str(template)) for text in asked]


def _limit(target: Target, tokenizer: PreTrainedTokenizerBase) -> int:
    return int(target.identity.get("max_length") or tokenizer.model_max_length)


def split_words(text: str, *, raw: bool = False) -> list[str]:
    """Split a text into words and punctuation marks; a JSON list is already split.

    >>> split_words("Arsenal's coach (Wenger) left, didn't he?")
    ["Arsenal's", 'coach', '(', 'Wenger', ')', 'left', ',', "didn't", 'he', '?']

    Raises:
        DataError: there is no word.
    """
    words = None if raw else _json(text, list)
    if words is None:
        words = text.split() if raw else WORD.findall(text)
    if not words:
        raise DataError(f"{text[:60]!r} has no word to tag; pass a text with words")
    return [str(word) for word in words]


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, *, raw: bool, limit: int | None = None) -> list[int]:
    pair = None if raw else _json(text, dict)
    texts = (text,) if pair is None or set(pair) != {"text", "text_pair"} else (pair["text"], pair["text_pair"])
    return list(tokenizer(*texts, truncation=limit is not None, max_length=limit)["input_ids"])


def _json(text: str, kind: type) -> Any:
    """The JSON value of a text, if it is of a given type."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, kind) else None


def _tell_cut(count: int, limit: int, progress: Progress) -> None:
    if count:
        are = "text is" if count == 1 else "texts are"
        progress.note(f"{count} {are} truncated at {limit} tokens, the maximum length in training")


def labelled(head: TaskHead, asked: str, logits: Tensor) -> Labelled:
    """The prediction from the outputs for one text or image.

    Args:
        logits: (C,).
    """
    chosen = head.chosen(logits)
    if head.problem_type == "regression":
        return Labelled(asked, float(chosen[0]), {})
    shares = dict(zip(head.names, head.probabilities(logits).tolist(), strict=True))
    label = [head.names[one] for one in chosen] if head.problem_type == "multi-label" else head.names[chosen]
    return Labelled(asked, label, shares)


def _tagged(head: TaskHead, asked: str, words: list[str], aligned: AlignedWords, logits: Tensor) -> Tagged:
    tags: list[str | None] = [None] * len(words)
    shares: list[float | None] = [None] * len(words)
    carried = [word for word in aligned.words if word is not None]
    best = head.probabilities(logits).max(-1)
    for word, number, share in zip(carried, best.indices.tolist(), best.values.tolist(), strict=True):
        tags[word], shares[word] = head.names[number], share
    known = span_tags([[tag or OUTSIDE for tag in tags]], head.names)[0] if OUTSIDE in head.names else []
    found = entities_of(known)
    entities = [
        {"type": kind, "words": words[first : last + 1], "first": first, "last": last} for kind, first, last in found
    ]
    return Tagged(asked, words, tags, shares, entities)


def label_images(
    target: Target, asked: Sequence[str], *, raw: bool, batch_rows: int, progress: Progress
) -> list[Labelled]:
    """Predict labels of image files.

    Args:
        target: a model with a head for images.
        asked: paths of the files, relative to the working directory.
        raw: ignored for images.

    Raises:
        DataError: one of them cannot be read; then none is predicted.
    """
    for path in asked:
        try:
            read_image(Path(path))
        except SkipRow as reason:
            raise DataError(f"{path}: {str(reason).removeprefix('with ')}; pass image files") from reason
    model, reader = target.load()
    head = task_head(target.base.labels, target.base.problem_type, model, reader)
    logits = row_logits(model, list(asked), None, head, batch_rows=batch_rows, progress=progress, what="labels")
    return [labelled(head, *row) for row in zip(asked, logits, strict=True)]
