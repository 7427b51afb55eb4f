"""Recognizes data of another task by its columns, and says how to use it."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from peftcli.data.chat_formats import is_chat
from peftcli.data.rows import Dropped, Rows, first_value, listed
from peftcli.data.values import is_null
from peftcli.errors import DataError

_TAGS = ("tags", "ner_tags", "pos_tags", "labels")
_LABELLED = ("text", "sentence")
_PAIRS = (
    ("chosen", "rejected"),
    ("response_j", "response_k"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("preferred", "rejected"),
    ("preferred", "dispreferred"),
    ("accepted", "rejected"),
    ("pos_answer", "neg_answer"),
    ("positive_answer", "negative_answer"),
    ("better", "worse"),
    ("win", "lose"),
    ("winner", "loser"),
)
"""Columns with the better and the worse answer."""
_PROMPTS = ("prompt", "question", "instruction", "query", "input", "conversations", "messages", "context")
"""Columns with the prompt of preference data, the most likely first."""
_LIKED = (
    *("label", "kto_tag", "liked", "is_liked", "thumbs_up", "desirable", "is_desirable", "accepted", "preferred"),
    *("is_good", "good", "is_correct", "correct"),
)
"""Columns that say whether an answer is good."""
_TEXT_KEYS = ("content", "value", "text", "answer", "response", "output")
"""Keys of an object with its text, the most likely first."""
_DEEPEST = 4
_TRUE, _FALSE = ("true", "1"), ("false", "0")
_EMBEDDINGS = (("anchor", "positive"), ("query", "pos", "neg"), ("query", "positive", "negative"))
_MEDIA = {
    **dict.fromkeys(("image", "images", "image_path", "image_paths", "pixel_values"), "images"),
    **dict.fromkeys(("video", "videos"), "videos"),
    **dict.fromkeys(("audio", "audios", "speech"), "audio"),
}
_PARTS = {"image": "images", "image_url": "images", "video": "videos", "video_url": "videos"} | dict.fromkeys(
    ("audio", "audio_url", "input_audio"), "audio"
)
"""Types of the parts of a message that are not text."""


_MARK = re.compile("<(?:image|video|audio)>")
"""The place of an image, a video or a sound in a text."""


class MediaMarks:
    """Counts the rows with the mark of an image, a video or a sound, which a language model reads as text."""

    def __init__(self) -> None:
        self._found = Dropped()

    def add(self, rows: Rows, kept: Sequence[int], texts: Sequence[str]) -> None:
        """Count the texts of a batch; `kept` has the row of each."""
        found = [(row, match.group()) for row, text in zip(kept, texts, strict=True) if (match := _MARK.search(text))]
        self._found.add(rows, found)

    def warnings(self) -> list[str]:
        """One sentence for each mark."""
        return [
            f"{count:,} {'row has' if count == 1 else 'rows have'} {mark}, which is trained as text, without what it "
            f"refers to (first {self._found.places[mark][0]})"
            for mark, count in self._found.counts.items()
        ]


def refuse_other_tasks(first: Rows) -> None:
    """Raise an error for the columns of another task, if the recipe does not say how to read the rows.

    Raises:
        DataError: what the rows are for, and a way to use them.
    """
    found = _recognized(first)
    if found is not None:
        what, fix = found
        raise DataError(f"{first.file}: its columns ({listed(first.columns)}) have {what}; {fix}")


def refuse_ratings_and_media(first: Rows, kind: str, read: Collection[str]) -> None:
    """Raise an error for ratings of the answers, and for images, videos and audio, that the format does not read.

    Args:
        kind: of the examples.
        read: columns that the format or the recipe uses.

    Raises:
        DataError: all answers would be trained alike, or texts without what they are about.
    """
    beside = [name for name in first.columns if name not in read]
    if kind in ("messages", "prompt_completion"):
        _refuse_ratings(first, beside)
        _refuse_parts(first, read)
    media = [name for name in beside if name.strip().lower() in _MEDIA and _is_given(first.columns[name])]
    if media:
        what = _MEDIA[media[0].strip().lower()]
        mark = "<audio>" if what == "audio" else f"<{what.removesuffix('s')}>"
        marks = f", and {mark} in their text" if _has_mark(first, read, mark) else ""
        raise DataError(
            f"{first.file}: its rows are about {what} (the column {listed(media)}{marks}); the task causal-lm reads "
            f"only text, and peftcli has no task that reads {what} together with text; to train on the text alone, set "
            f"dataset.ignore_columns: [{', '.join(media)}]"
        )


def template_pair(prompt: str, learned: str) -> str:
    """An example of templates for two columns."""
    return f'dataset: {{prompt: "{{{prompt}}}\\n{learned}:", completion: " {{{learned}}}"}}'


def _recognized(first: Rows) -> tuple[str, str] | None:
    names = set(first.columns)
    tags = next((name for name in _TAGS if name in names), None)
    labelled = next((name for name in _LABELLED if name in names), None)
    pair = next((pair for pair in _PAIRS if set(pair) <= names), None)
    if pair is not None:
        better, worse = pair
        what = (
            f"better and worse answers in {better} and {worse} (preference data), and peftcli has no preference tuning"
        )
        return what, f"to train on the better ones, set {_better(first, better)}"
    if "tokens" in names and tags is not None:
        return _tagged(first, tags)
    if labelled is not None and "label" in names and not {"prompt", "completion"} <= names:
        fix = "set model.task: sequence-classification, or, to train on the label as text, "
        fix += template_pair(labelled, "label")
        fix += "; to train on the text only, dataset.format: text" if labelled == "text" else ""
        return f"a label for each {labelled} (classification)", fix
    return _unsupported(first)


def _tagged(first: Rows, tags: str) -> tuple[str, str]:
    fix = f"set model.task: token-classification, or, to train on the tags as text, {template_pair('tokens', tags)}"
    value = first_value(first, tags)
    if isinstance(value, list) and not all(isinstance(one, str) for one in value):
        fix += f", with names instead of numbers in {tags}"
    return f"a tag for each word ({tags}; token classification)", fix


def _unsupported(first: Rows) -> tuple[str, str] | None:
    """Rows for tasks that only an explicit template or another task reads."""
    names = set(first.columns)
    if {"image", "label"} <= names and not names & {"text", "messages", "prompt", "question"}:
        return "an image and its label (classification)", "set model.task: image-classification"
    if "input_ids" in names:
        return (
            "token ids (rows that were tokenized before)",
            "use the texts or chats that they were made from: peftcli tokenizes them with the model's own tokenizer",
        )
    if {"prompt", "completions", "labels"} <= names:
        return (
            "a label for each step of an answer (a process reward model), and peftcli has no task for it",
            'to train on the steps as text, set dataset: {prompt: "{prompt}", completion: "{completions}"}',
        )
    embedding = next((columns for columns in _EMBEDDINGS if set(columns) <= names), None)
    if embedding is not None:
        text, match = embedding[:2]
        return (
            "texts that match (for an embedding model), and peftcli has no task for it",
            f'to train a language model on them, set dataset: {{prompt: "{{{text}}}\\n", completion: "{{{match}}}"}}',
        )
    return None


def _better(first: Rows, better: str) -> str:
    """The key that trains on the better answers, for the form in which these rows have them."""
    answer = first_value(first, better)
    prompt = next((name for name in _PROMPTS if name in first.columns and first_value(first, name) is not None), None)
    asked = None if prompt is None else first_value(first, prompt)
    if is_chat(asked) and (is_chat(answer) or is_chat([answer])):
        return f"dataset.columns: {{prompt: {prompt}, completion: {better}}}"
    if is_chat(answer) and any(_speaker(turn) in ("user", "human") for turn in answer):
        return f"dataset.columns: {{messages: {better}}}"
    path = better + text_path(answer)
    if prompt is None:
        return f'dataset.text: "{{{path}}}"'
    if prompt == "instruction" and "input" in first.columns:
        return f'dataset: {{prompt: "{{instruction}}\\n{{input}}\\n", completion: "{{{path}}}"}}'
    return f'dataset: {{prompt: "{{{prompt}{text_path(asked)}}}", completion: "{{{path}}}"}}'


def text_path(value: Any, *, inner: int = 0) -> str:
    """The path to the text in a value, for a template: that of a message, or of the first item of a list.

    Args:
        inner: number of lists and objects around the value; deeper values than a few have no path.

    >>> text_path("a"), text_path([{"role": "user", "content": "a"}]), text_path({"text": ["a"], "start": [0]})
    ('', '.0.content', '.text.0')
    """
    if inner > _DEEPEST:
        return ""
    if isinstance(value, list) and value and (inner or not isinstance(value[0], str)):
        return f".0{text_path(value[0], inner=inner + 1)}"
    if isinstance(value, Mapping):
        found = next((key for key in (*_TEXT_KEYS, *value) if key in value and _has_text(value[key])), None)
        return "" if found is None else f".{found}{text_path(value[found], inner=inner + 1)}"
    return ""


def _has_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], str))


def rating(first: Rows) -> tuple[str, str] | None:
    """The column that says whether a row is good, and the value of the good ones; None without such a column."""
    name = next((name for name in first.columns if name in _LIKED and _rates(name, first.columns[name])), None)
    if name is None:
        return None
    value = next(value for value in first.columns[name] if not is_null(value))
    return name, "1" if not isinstance(value, bool) and str(value).strip() in ("0", "1") else "true"


def _speaker(turn: Any) -> str:
    return str(turn.get("role") or turn.get("from")).lower()


def _refuse_ratings(first: Rows, beside: Sequence[str]) -> None:
    found = rating(replace(first, columns={name: first.columns[name] for name in beside}))
    if found is None:
        return
    name, liked = found
    raise DataError(
        f"{first.file}: the column {name} says whether an answer is good (KTO data), but all would be trained as good "
        f"ones, because peftcli has no preference tuning; for the good ones, set dataset.where: {{{name}: {liked}}}; "
        f"if {name} means something else, or to train on all, set dataset.ignore_columns: [{name}]"
    )


def _rates(name: str, values: Sequence[Any]) -> bool:
    """Whether a column has only true and false; in a column `label` also 1 and 0, if both occur."""
    present = [value for value in values if not is_null(value)]
    texts = {str(value).strip().lower() for value in present}
    if not texts <= {*_TRUE, *_FALSE}:
        return False
    if texts <= {"true", "false"}:
        return bool(texts)
    return name in ("label", "kto_tag") and texts == {"0", "1"}


def _refuse_parts(first: Rows, read: Collection[str]) -> None:
    """Raise an error if most chats have parts that are not text."""
    for name in (name for name in first.columns if name in read):
        chats = [value for value in first.columns[name] if is_chat(value)]
        found = [kind for kind in (next(_media_parts(chat), None) for chat in chats) if kind is not None]
        if len(found) * 2 > len(chats):
            what = _PARTS[found[0]]
            raise DataError(
                f"{first.file}: its rows are about {what} (parts of the type {found[0]} in {name}); the task "
                f"causal-lm reads only text, and peftcli has no task that reads {what} together with text; remove "
                "these parts from the messages to train on the text alone, or use other rows"
            )


def _media_parts(chat: Sequence[Any]) -> Iterator[str]:
    for turn in chat:
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") in _PARTS:
                yield str(part["type"])


def _is_given(values: Sequence[Any]) -> bool:
    return any(value is not None and value != "" and value != [] and not is_null(value) for value in values)


def _has_mark(first: Rows, read: Collection[str], mark: str) -> bool:
    return any(mark in str(value) for name in read for value in first.columns.get(name, ())[:20])
