"""`generate`: answers to prompts, written in the form that the model was trained on."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from peftcli.data.encode import encode_prompts, stop_ids
from peftcli.errors import DataError
from peftcli.model.generation import Decoding, generate_answers
from peftcli.model.manifest import refuse_unknown_tokens
from peftcli.model.predict_labels import Labelled, Tagged
from peftcli.model.target import Target
from peftcli.progress import Progress
from peftcli.recipe.template import fill_template
from peftcli.tasks.base import implementation
from peftcli.tasks.registry import TASKS


@dataclass(frozen=True)
class Generated:
    """A prompt as the model saw it, and its answer."""

    asked: str
    prompt: str
    answer: str
    finished: bool


def generate(
    target: Target, asked: Sequence[str], decoding: Decoding, *, raw: bool, batch_rows: int, progress: Progress
) -> list[Generated]:
    """Answer prompts.

    Args:
        target: the model.
        asked: values for the one column of the prompt template, JSON objects for several columns, messages of a user
            for a chat model, or text to go on from.
        raw: take each as the whole prompt, without a template.

    Raises:
        RecipeError: a value does not fit the template.
    """
    model, tokenizer = target.load()
    prompts = [text if raw else write_prompt(text, target.identity, tokenizer) for text in asked]
    is_chat = target.identity.get("format") == "messages" and not raw
    encoded = (
        tokenizer(prompts, add_special_tokens=False)["input_ids"] if is_chat else encode_prompts(prompts, tokenizer)
    )
    refuse_unknown_tokens(model, max((max(ids, default=0) for ids in encoded), default=0))
    ends = frozenset(target.identity.get("stop_ids") or ()) or stop_ids(tokenizer)
    answers = generate_answers(
        model,
        tokenizer,
        encoded,
        stop_ids=ends,
        decoding=decoding,
        batch_rows=batch_rows,
        progress=progress,
        what="answers",
    )
    rows = zip(asked, prompts, answers, strict=True)
    return [Generated(text, prompt, one.text, one.finished) for text, prompt, one in rows]


def label(
    target: Target, asked: Sequence[str], *, raw: bool, batch_rows: int, progress: Progress
) -> Sequence[Labelled | Tagged]:
    """Label texts or images.

    Args:
        target: a model that was trained to label.
        asked: paths of images; texts, or values for the columns of the run's template; of two texts a JSON object.
        raw: take each as it is, without a template.

    Raises:
        RecipeError: a value does not fit the template.
    """
    predict = implementation(TASKS[target.base.task].predict)
    found: Sequence[Labelled | Tagged] = predict(target, asked, raw=raw, batch_rows=batch_rows, progress=progress)
    return found


def write_prompt(text: str, identity: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Put what was asked into the form of the training prompts.

    Raises:
        RecipeError: a value does not fit the template.
    """
    if identity.get("format") == "messages":
        turns = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    template = identity.get("prompt")
    return text if template is None else fill_template(text, template)


def read_prompts(lines: Iterable[str]) -> list[str]:
    """Prompts from lines; a line that is a JSON string stands for its text, so that it may hold line breaks.

    Raises:
        DataError: there is none.
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
        raise DataError("no prompt given: name some as arguments, in a file with --file, or on standard input")
    return prompts
