"""Predicts for the rows of a file: what a model says about each input, as the new columns of a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
from jinja2 import TemplateError

from peftcli.data.chat_template import render
from peftcli.data.encode import BATCH_SECONDS, encode, encode_prompts, stop_ids, template_time_limit
from peftcli.data.image_processor import read_image
from peftcli.data.label_tokenize import align_words
from peftcli.data.model_inputs import Chat, Input, Unusable
from peftcli.data.values import SkipRow
from peftcli.errors import DataError
from peftcli.model.classification import row_logits
from peftcli.model.generation import Decoding, generate_answers
from peftcli.model.heads import positions_of
from peftcli.model.manifest import refuse_unknown_tokens
from peftcli.model.predict_labels import (
    Labelled,
    Tagged,
    encode_texts,
    head_of,
    labelled,
    tag_words,
    token_limit,
)
from peftcli.model.target import LoadedTarget
from peftcli.progress import Progress
from peftcli.tasks.registry import TASKS

WINDOW_BATCHES = 16
WINDOW_ROWS = 256
"""Most batches and rows in a window: enough that rows of about equal length share a batch, few enough that little is
lost by a kill."""

Prediction: TypeAlias = Mapping[str, Any] | Unusable
"""The new cells of a row, by column; or why there are none."""


@dataclass(frozen=True)
class Predicted:
    """The predictions of some rows.

    Attributes:
        rows: in the order of the inputs.
        counts: rows that were `truncated` to the maximum length, and answers that are `unfinished`.
    """

    rows: list[Prediction]
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PredictSettings:
    """How rows are predicted.

    Attributes:
        decoding: for answers.
        batch_rows: rows at once.
        probabilities: also give the probability of each label, or of each tag.
        splits_words: also give the words, which were found in running text.
        drops_long: texts that are longer than in training are not predicted, instead of truncated.
    """

    decoding: Decoding
    batch_rows: int
    probabilities: bool = False
    splits_words: bool = False
    drops_long: bool = False


class Predictor(Protocol):
    """Predicts for some rows of a file; the result depends only on these rows, and for samples on their place."""

    def predict(self, inputs: Sequence[Input], first: int, progress: Progress) -> Predicted:
        """Predict.

        Args:
            inputs: of the kind that the task reads.
            first: number of the first row in the file, which the random seed of sampled answers depends on.
        """
        ...


def make_predictor(loaded: LoadedTarget, settings: PredictSettings) -> Predictor:
    """The predictor for the task of a target."""
    task = TASKS[loaded.target.base.task]
    if task.generates:
        return Answers(loaded, settings)
    if task.images:
        return Images(loaded, settings)
    return Tags(loaded, settings) if task.label_of == "token" else Texts(loaded, settings)


@dataclass(frozen=True)
class Answers:
    """Answers prompts and chats, as evaluation does."""

    loaded: LoadedTarget
    settings: PredictSettings

    def predict(self, inputs: Sequence[Input], first: int, progress: Progress) -> Predicted:
        rows: list[Prediction] = list(self._encode(inputs))
        decoding = replace(self.settings.decoding, seed=self.settings.decoding.seed + first)
        rooms: dict[int, list[int]] = {}
        for number, ids in enumerate(rows):
            if not isinstance(ids, Unusable):
                rooms.setdefault(self._room(ids["ids"]), []).append(number)
        unfinished = 0
        for room, numbers in sorted(rooms.items(), reverse=True):
            answers = generate_answers(
                self.loaded.model,
                self.loaded.tokenizer,
                [_ids(rows[number]) for number in numbers],
                stop_ids=self._stops,
                decoding=replace(decoding, max_new_tokens=room),
                batch_rows=self.settings.batch_rows,
                progress=progress,
                what="answers",
                timed=False,
            )
            unfinished += sum(not answer.finished for answer in answers)
            for number, answer in zip(numbers, answers, strict=True):
                rows[number] = {"answer": answer.text.strip()}
        return Predicted(rows, {"unfinished": unfinished})

    @property
    def _stops(self) -> frozenset[int]:
        given = self.loaded.target.identity.get("stop_ids")
        return frozenset(given or ()) or stop_ids(self.loaded.tokenizer)

    @property
    def _positions(self) -> int | None:
        model = self.loaded.model
        virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
        positions = positions_of(model.config)
        return None if positions is None else positions - int(virtual)

    def _room(self, ids: Sequence[int]) -> int:
        """Maximum number of tokens of the answer to a prompt."""
        most = self.settings.decoding.max_new_tokens
        positions = self._positions
        return most if positions is None else min(most, positions - len(ids))

    def _encode(self, inputs: Sequence[Input]) -> list[Prediction]:
        """The token ids of each prompt, under `ids`."""
        tokenizer = self.loaded.tokenizer
        texts = self._texts(inputs)
        usable = [number for number, text in enumerate(texts) if isinstance(text, str)]
        chosen = [str(texts[number]) for number in usable]
        chats = any(isinstance(one, Chat) for one in inputs)
        ids = encode(chosen, tokenizer, special=False) if chats else encode_prompts(chosen, tokenizer)
        rows: list[Prediction] = [text if isinstance(text, Unusable) else {} for text in texts]
        for number, row in zip(usable, ids, strict=True):
            rows[number] = self._checked(row)
        return rows

    def _texts(self, inputs: Sequence[Input]) -> list[str | Unusable]:
        with template_time_limit(BATCH_SECONDS):
            return [self._render(one) if isinstance(one, Chat) else str(one) for one in inputs]

    def _render(self, chat: Chat) -> str | Unusable:
        try:
            return render(chat.messages, chat.tools or None, self.loaded.tokenizer, prompt=True)
        except (TemplateError, ValueError, TypeError) as problem:
            return Unusable(f"rejected by the chat template ({' '.join(str(problem).split())[:100]})")

    def _checked(self, ids: list[int]) -> Prediction:
        if not ids:
            return Unusable("with a prompt without tokens")
        if self._room(ids) < 1:
            return Unusable(
                f"with a prompt of {len(ids)} tokens, but the model takes {self._positions} with the answer"
            )
        try:
            refuse_unknown_tokens(self.loaded.model, max(ids))
        except DataError:
            return Unusable(f"with token id {max(ids)}, which the model's embedding lacks")
        return {"ids": ids}


def _ids(row: Prediction) -> list[int]:
    assert not isinstance(row, Unusable)  # only usable rows are answered
    ids: list[int] = row["ids"]
    return ids


@dataclass(frozen=True)
class Texts:
    """Classifies texts and pairs of texts, or predicts a number."""

    loaded: LoadedTarget
    settings: PredictSettings

    def predict(self, inputs: Sequence[Input], first: int, progress: Progress) -> Predicted:
        limit = token_limit(self.loaded)
        encoded = encode_texts([tuple(one) for one in inputs], self.loaded.tokenizer, limit)  # type: ignore[arg-type]
        rows: list[Prediction] = [{} for _ in encoded]
        drops = self.settings.drops_long
        used = [number for number, row in enumerate(encoded) if not (drops and row.truncated)]
        logits = row_logits(
            self.loaded.model,
            [encoded[number].ids for number in used],
            None,
            head_of(self.loaded),
            batch_rows=self.settings.batch_rows,
            progress=progress,
            what="labels",
        )
        for number in range(len(rows)):
            rows[number] = Unusable(f"longer than max_length {limit}")
        for number, one in zip(used, logits, strict=True):
            found = labelled(head_of(self.loaded), "", one)
            rows[number] = label_cells(found, self.loaded, probabilities=self.settings.probabilities)
        return Predicted(rows, {"truncated": sum(encoded[number].truncated for number in used)})


@dataclass(frozen=True)
class Images:
    """Classifies image files, or predicts a number for each."""

    loaded: LoadedTarget
    settings: PredictSettings

    def predict(self, inputs: Sequence[Input], first: int, progress: Progress) -> Predicted:
        rows: list[Prediction] = [_check_image(str(path)) for path in inputs]
        used = [number for number, row in enumerate(rows) if not isinstance(row, Unusable)]
        logits = row_logits(
            self.loaded.model,
            [str(inputs[number]) for number in used],
            None,
            head_of(self.loaded),
            batch_rows=self.settings.batch_rows,
            progress=progress,
            what="labels",
        )
        for number, one in zip(used, logits, strict=True):
            found = labelled(head_of(self.loaded), "", one)
            rows[number] = label_cells(found, self.loaded, probabilities=self.settings.probabilities)
        return Predicted(rows)


def _check_image(path: str) -> Prediction:
    try:
        read_image(Path(path))
    except SkipRow as reason:
        return Unusable(str(reason))
    return {}


@dataclass(frozen=True)
class Tags:
    """Tags words."""

    loaded: LoadedTarget
    settings: PredictSettings

    def predict(self, inputs: Sequence[Input], first: int, progress: Progress) -> Predicted:
        words = [list(one) for one in inputs]  # type: ignore[arg-type]
        limit = token_limit(self.loaded)
        aligned = align_words(words, self.loaded.tokenizer)
        long = [len(row.ids) > limit for row in aligned]
        rows: list[Prediction] = [Unusable(f"longer than max_length {limit}") for _ in words]
        used = [number for number in range(len(words)) if not (self.settings.drops_long and long[number])]
        tagged = tag_words(
            self.loaded,
            [""] * len(used),
            [words[number] for number in used],
            [aligned[number].cut(limit) for number in used],
            self.settings.batch_rows,
            progress,
        )
        for number, one in zip(used, tagged, strict=True):
            rows[number] = self._cells(one)
        return Predicted(rows, {"truncated": sum(long[number] for number in used)})

    def _cells(self, found: Tagged) -> Prediction:
        cells: dict[str, Any] = {"words": found.words} if self.settings.splits_words else {}
        cells["tags"] = found.tags
        if self.settings.probabilities:
            cells["probabilities"] = [None if one is None else shortest(one) for one in found.probabilities]
        return cells


def label_cells(found: Labelled, loaded: LoadedTarget, *, probabilities: bool) -> dict[str, Any]:
    """The cells of a predicted label, of several labels, or of a number."""
    if isinstance(found.label, float):
        return {"value": shortest(found.label)}
    each = {f"probability_{name}": shortest(share) for name, share in found.probabilities.items()}
    if isinstance(found.label, list):
        return {"label": found.label, **each}
    share = shortest(found.probabilities[found.label])
    return {"label": found.label, "probability": share, **(each if probabilities else {})}


def new_columns(
    labels: Sequence[str], task: str, problem_type: str | None, settings: PredictSettings
) -> dict[str, pa.DataType]:
    """The columns that the predictions of a task have, in order, with their types in Parquet.

    Args:
        labels: names of the labels of the model.
    """
    text, number = pa.string(), pa.float64()
    each = {f"probability_{name}": number for name in labels}
    if TASKS[task].generates:
        return {"answer": text}
    if TASKS[task].label_of == "token":
        words = {"words": pa.list_(text)} if settings.splits_words else {}
        shares = {"probabilities": pa.list_(number)} if settings.probabilities else {}
        return {**words, "tags": pa.list_(text), **shares}
    if problem_type == "regression":
        return {"value": number}
    if problem_type == "multi-label":
        return {"label": pa.list_(text), **each}
    return {"label": text, "probability": number, **(each if settings.probabilities else {})}


def window_rows(batch_rows: int) -> int:
    """Number of rows that are predicted, and recorded or printed, together.

    >>> window_rows(4), window_rows(64), window_rows(1000)
    (64, 256, 1000)
    """
    return max(batch_rows, min(WINDOW_BATCHES * batch_rows, WINDOW_ROWS))


def shortest(value: float) -> float:
    """A float32 with the fewest digits that identify it.

    >>> shortest(0.10000000149011612)
    0.1
    """
    return float(str(np.float32(value)))
