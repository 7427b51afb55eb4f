"""`generate`: answers prompts, formatted the way the model was trained."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from peftcli.data.encode import encode_prompts, stop_ids
from peftcli.data.readers.files import ENDINGS, PACKED
from peftcli.errors import DataError, RecipeError
from peftcli.model.generation import Decoding, generate_answers
from peftcli.model.manifest import refuse_unknown_tokens
from peftcli.model.predict_labels import Labelled, Tagged, check_asked
from peftcli.model.predictors import window_rows
from peftcli.model.target import LoadedTarget, Target
from peftcli.progress import Progress
from peftcli.recipe.template import fill_template, template_columns
from peftcli.tasks.base import implementation
from peftcli.tasks.registry import TASKS


@dataclass(frozen=True)
class Generated:
    """A prompt as the model gets it, and the answer."""

    asked: str
    prompt: str
    answer: str
    finished: bool

    def as_dict(self) -> dict[str, Any]:
        """The answer in the form of `--json`."""
        return vars(self)


def generate(
    target: Target, asked: Sequence[str], decoding: Decoding, *, raw: bool, batch_rows: int, progress: Progress
) -> Iterator[Generated]:
    """Answer prompts, in order; each answer is returned as soon as its window of prompts is done.

    Args:
        target: the model.
        asked: values for the only column of the prompt template, JSON objects for several columns, user messages for a
            chat model, or texts to continue.
        raw: use each text as the whole prompt, without a template.

    Raises:
        RecipeError: a value does not fit the template; then none is answered.
    """
    is_chat = target.identity.get("format") == "messages" and not raw
    if not is_chat:  # before the model is loaded
        prompts = [text if raw else write_prompt(text, target.identity, None) for text in asked]
    model, tokenizer = target.load()
    if is_chat:
        prompts = [write_prompt(text, target.identity, tokenizer) for text in asked]
    encoded = (
        tokenizer(prompts, add_special_tokens=False)["input_ids"] if is_chat else encode_prompts(prompts, tokenizer)
    )
    refuse_unknown_tokens(model, max((max(ids, default=0) for ids in encoded), default=0))
    ends = frozenset(target.identity.get("stop_ids") or ()) or stop_ids(tokenizer)
    for window in windows(len(prompts), batch_rows):
        answers = generate_answers(
            model,
            tokenizer,
            encoded[window],
            stop_ids=ends,
            decoding=replace(decoding, seed=decoding.seed + window.start),
            batch_rows=batch_rows,
            progress=progress,
            what="answers",
        )
        for text, prompt, one in zip(asked[window], prompts[window], answers, strict=True):
            yield Generated(text, prompt, one.text, one.finished)


def label(
    target: Target, asked: Sequence[str], *, raw: bool, batch_rows: int, progress: Progress
) -> Iterator[Labelled | Tagged]:
    """Classify or tag texts or images, in order; each result is returned as soon as its window is done.

    Args:
        target: a classification or tagging model.
        asked: image paths; texts, or values for the columns of the run's template; a JSON object for a pair of texts.
        raw: use each text as it is, without a template.

    Raises:
        DataError: an image cannot be read, or a text has no words to tag; then nothing is predicted.
        RecipeError: a value does not fit the template; then nothing is predicted.
    """
    check_asked(target, asked, raw=raw)
    predict = implementation(TASKS[target.base.task].predict)
    loaded = LoadedTarget.of(target)
    for window in windows(len(asked), batch_rows):
        yield from predict(loaded, asked[window], raw=raw, batch_rows=batch_rows, progress=progress)


def windows(rows: int, batch_rows: int) -> Iterator[slice]:
    """The windows of prompts whose answers appear together; within one, prompts of about equal length share a batch.

    >>> list(windows(20, 1))
    [slice(0, 16, None), slice(16, 20, None)]
    """
    size = window_rows(batch_rows)
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def write_prompt(text: str, identity: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Format a text like the training prompts.

    Args:
        tokenizer: for chats, which its template formats.

    Raises:
        RecipeError: a value does not fit the template.
    """
    if identity.get("format") == "messages":
        assert tokenizer is not None  # a chat needs its template
        turns = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    template = identity.get("prompt")
    return text if template is None else fill_template(text, template)


def refuse_rows(prompts: Sequence[str], identity: Mapping[str, Any], place: str) -> None:
    """Refuse rows of a JSONL file as prompts of a model that takes plain text.

    Args:
        identity: the manifest of the model; with a prompt template, a prompt may be an object with its columns.
        place: where the prompts are from.

    Raises:
        RecipeError: the first prompt is a JSON object that the model cannot use as columns.
    """
    if not prompts[0].startswith("{"):
        return
    try:
        row = json.loads(prompts[0])
    except ValueError:
        return
    template = identity.get("prompt")
    used = {"text", "text_pair"} if template is None else {path.split(".")[0] for path in template_columns(template)}
    if isinstance(row, dict) and row and not used <= set(row):
        raise RecipeError(
            f"{place}: holds JSON objects, but `generate` reads one prompt per line; for a file of rows, run `peftcli "
            "predict RUN FILE.jsonl --output ANSWERS.jsonl`"
        )


def refuse_table(file: Path) -> None:
    """Refuse a table as a file of prompts, whose lines are not its rows.

    Raises:
        RecipeError: the extension is that of a table.
    """
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() not in PACKED]
    kind = ENDINGS.get(suffixes[-1], "text") if suffixes else "text"
    if kind != "text":
        raise RecipeError(
            f"--file {file}: is a table ({kind}), but --file reads one prompt per line; run `peftcli predict RUN "
            f"{file} --output ANSWERS.csv`, or pass it with --input and --output"
        )


def read_prompts(lines: Iterable[str]) -> list[str]:
    """Read one prompt per line; a line that is a JSON string is decoded, so that a prompt can contain line breaks.

    Raises:
        DataError: there are no prompts.
    """
    prompts = []
    for line in lines:
        text = line.rstrip("\r\n")
        if not text.strip():
            continue
        if text.startswith('"') and text.endswith('"') and len(text) > 1:
            try:
                text = str(json.loads(text))
            except json.JSONDecodeError:
                prompts.append(text)
                continue
        prompts.append(text)
    if not prompts:
        raise DataError("no prompts; pass them as arguments, in a file with --file, or on standard input")
    return prompts
