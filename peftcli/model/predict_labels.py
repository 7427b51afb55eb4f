"""Predicts labels for new texts and images: a class with its probability, a number, or a tag per word."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peftcli.data.encode import encode
from peftcli.data.image_processor import read_image
from peftcli.data.label_tokenize import AlignedWords, align_words
from peftcli.data.model_inputs import WORD
from peftcli.data.tokenize import IGNORED
from peftcli.data.values import SkipRow
from peftcli.errors import DataError
from peftcli.metrics.tagging import entities_of, span_tags
from peftcli.model.classification import TaskHead, row_logits, task_head
from peftcli.model.heads import positions_of
from peftcli.model.target import LoadedTarget, Target
from peftcli.progress import Progress
from peftcli.recipe.template import fill_template
from peftcli.tasks.labels import OUTSIDE
from peftcli.tasks.registry import TASKS


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
    loaded: LoadedTarget, asked: Sequence[str], *, raw: bool, batch_rows: int, progress: Progress
) -> list[Labelled]:
    """Predict labels of texts and pairs of texts.

    Args:
        loaded: a model with a head for whole texts.
        asked: texts, or values for the columns of the run's template; a JSON object with `text` and `text_pair` is a
            pair.
        raw: use each text as is, without a template and not as JSON.

    Raises:
        RecipeError: a value does not fit the template.
    """
    texts = [_text_or_pair(text, raw=raw) for text in filled(loaded.target, asked, raw=raw)]
    limit = token_limit(loaded)
    rows = encode_texts(texts, loaded.tokenizer, limit)
    tell_truncated(sum(row.truncated for row in rows), limit, progress)
    logits = row_logits(
        loaded.model,
        [row.ids for row in rows],
        None,
        head_of(loaded),
        batch_rows=batch_rows,
        progress=progress,
        what="labels",
    )
    return [labelled(head_of(loaded), *row) for row in zip(asked, logits, strict=True)]


def tag_texts(
    loaded: LoadedTarget, asked: Sequence[str], *, raw: bool, batch_rows: int, progress: Progress
) -> list[Tagged]:
    """Tag the words of texts.

    Args:
        loaded: a model with a head for tokens.
        asked: texts, or values for the columns of the run's template; a JSON list contains the words of a text.
        raw: split words only at whitespace, and do not parse JSON.

    Raises:
        DataError: the tokenizer does not map tokens to words.
        RecipeError: a value does not fit the template.
    """
    texts = filled(loaded.target, asked, raw=raw)
    rows = [split_words(text, raw=raw) for text in texts]
    limit = token_limit(loaded)
    aligned = align_words(rows, loaded.tokenizer)
    tell_truncated(sum(len(row.ids) > limit for row in aligned), limit, progress)
    return tag_words(loaded, asked, rows, [row.cut(limit) for row in aligned], batch_rows, progress)


def tag_words(
    loaded: LoadedTarget,
    asked: Sequence[str],
    rows: Sequence[list[str]],
    aligned: Sequence[AlignedWords],
    batch_rows: int,
    progress: Progress,
) -> list[Tagged]:
    """Tag rows of words.

    Args:
        asked: the text of each row.
        aligned: the tokens of each row, not longer than the model takes.
    """
    head = head_of(loaded)
    ids = [row.ids for row in aligned]
    marks = [[IGNORED if word is None else 0.0 for word in row.words] for row in aligned]
    found = row_logits(loaded.model, ids, marks, head, batch_rows=batch_rows, progress=progress, what="labels")
    return [_tagged(head, *row) for row in zip(asked, rows, aligned, found, strict=True)]


def head_of(loaded: LoadedTarget) -> TaskHead:
    """The meaning of a model's outputs."""
    base = loaded.target.base
    return task_head(base.labels, base.problem_type, loaded.model, loaded.tokenizer, threshold=base.threshold)


def filled(target: Target, asked: Sequence[str], *, raw: bool) -> list[str]:
    """The texts of a command line in the template of the training.

    Raises:
        RecipeError: a value does not fit the template.
    """
    template = target.identity.get("prompt")
    return list(asked) if raw or template is None else [fill_template(text, str(template)) for text in asked]


def token_limit(loaded: LoadedTarget) -> int:
    """The maximum length of a row: that of the training, or what the model takes."""
    given = loaded.target.identity.get("max_length")
    return int(given or min(loaded.tokenizer.model_max_length, positions_of(loaded.model.config) or sys.maxsize))


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


def _text_or_pair(text: str, *, raw: bool) -> tuple[str, ...]:
    pair = None if raw else _json(text, dict)
    return (text,) if pair is None or set(pair) != {"text", "text_pair"} else (pair["text"], pair["text_pair"])


@dataclass(frozen=True)
class EncodedText:
    """The token ids of a text or a pair of texts, and whether they were truncated."""

    ids: list[int]
    truncated: bool


def encode_texts(texts: Sequence[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[EncodedText]:
    """Encode texts and pairs of texts as in training.

    Args:
        limit: longer rows are truncated, as the tokenizer does it.
    """
    counts = {len(text) for text in texts}
    if counts == {1}:
        found = encode([text[0] for text in texts], tokenizer)
    elif counts == {2}:
        found = encode([(text[0], text[1]) for text in texts], tokenizer)
    else:
        found = [list(tokenizer(*text)["input_ids"]) for text in texts]
    rows = []
    for text, ids in zip(texts, found, strict=True):
        long = len(ids) > limit
        short = list(tokenizer(*text, truncation=True, max_length=limit)["input_ids"]) if long else ids
        rows.append(EncodedText(short, long))
    return rows


def _json(text: str, kind: type) -> Any:
    """The JSON value of a text, if it is of a given type."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, kind) else None


def tell_truncated(count: int, limit: int, progress: Progress) -> None:
    """Say how many texts were truncated."""
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
    loaded: LoadedTarget, asked: Sequence[str], *, raw: bool, batch_rows: int, progress: Progress
) -> list[Labelled]:
    """Predict labels of image files.

    Args:
        loaded: a model with a head for images.
        asked: paths of the files, relative to the working directory.
        raw: ignored for images.

    Raises:
        DataError: one of them can no longer be read.
    """
    head = head_of(loaded)
    logits = row_logits(loaded.model, list(asked), None, head, batch_rows=batch_rows, progress=progress, what="labels")
    return [labelled(head, *row) for row in zip(asked, logits, strict=True)]


def check_asked(target: Target, asked: Sequence[str], *, raw: bool) -> None:
    """Check the inputs of a command line before the model is loaded; a bad one stops all.

    Raises:
        DataError: an image cannot be read, or a text has no words to tag.
        RecipeError: a value does not fit the template.
    """
    task = TASKS[target.base.task]
    if not task.images:
        texts = filled(target, asked, raw=raw)
        if task.label_of == "token":
            for text in texts:
                split_words(text, raw=raw)
        return
    for path in asked:
        try:
            read_image(Path(path))
        except SkipRow as reason:
            raise DataError(f"{path}: {str(reason).removeprefix('with ')}; pass image files") from reason
