"""Builds what a model reads from rows without a label or a completion, as evaluation builds it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from peftcli.data.chat_formats import chat_prompt, is_chat, normalize_messages, normalize_tools
from peftcli.data.examples import from_instructions, from_questions, from_templates, inner_value
from peftcli.data.formats import COLUMN_FORMATS, ColumnFormat, joined, missing_columns
from peftcli.data.image_rows import IMAGES, file_name
from peftcli.data.label_formats import TEXTS, WORDS, choose_texts, only_column, word_items, word_text
from peftcli.data.rows import Rows, first_value, listed
from peftcli.data.values import EMPTY, SkipRow, optional_text, whole_text
from peftcli.errors import DataError
from peftcli.recipe.schema import SourceSection
from peftcli.recipe.template import split_path, template_columns
from peftcli.tasks.base import Task

WORD = re.compile(r"[@#$]?\w+(?:[-'\u2019.,:/@]\w+)*|[^\w\s]")
"""A word of running text, or a single punctuation mark."""
ASKED = ("prompt", "question", "instruction", "query", "message", "text", "input")
"""Columns with one question to a chat model, if there is no column with messages."""
PLACEHOLDER = "answer"
"""In place of the completion, which the rows do not need."""
EMPTY_TEXT = "with an empty text"


@dataclass(frozen=True)
class Chat:
    """The messages of a row that the model answers, and its tools."""

    messages: list[dict[str, Any]]
    tools: list[Any]


@dataclass(frozen=True)
class Unusable:
    """Takes the place of an input if a row cannot be used; the reason is that of the dropped rows in training."""

    reason: str


Input: TypeAlias = str | Chat | tuple[str, ...] | list[str]
"""A prompt or a text to continue, or the path of an image; a chat; one or two texts to classify; words to tag."""


@dataclass(frozen=True)
class InputFormat:
    """How the rows of a file become inputs of a model.

    Attributes:
        reads: columns whose values `make` takes, in order; some may be missing.
        make: builds an input; raises SkipRow if the row cannot be used.
        splits_words: the words to tag are found in running text, so they are part of the prediction.
    """

    reads: tuple[str, ...]
    make: Callable[[tuple[Any, ...]], Input]
    splits_words: bool = False

    def inputs(self, rows: Rows) -> list[Input | Unusable]:
        """The input of each row."""
        missing = [None] * len(rows)
        columns = [rows.columns.get(name, missing) for name in self.reads]
        if not columns:  # a template without columns
            return [self._input(()) for _ in rows.numbers]
        return [self._input(values) for values in zip(*columns, strict=True)]

    def _input(self, values: tuple[Any, ...]) -> Input | Unusable:
        try:
            return self.make(values)
        except SkipRow as problem:
            return Unusable(EMPTY_TEXT if str(problem) == EMPTY else str(problem))


@dataclass(frozen=True)
class Asked:
    """What decides, besides the columns of a file, how its rows are read.

    Attributes:
        task: of the model.
        kind: data format of the training (`messages`, `prompt_completion`, `text`, ...); None if unknown.
        known: columns that the training used; empty if unknown.
        folder: base folder of relative image paths.
    """

    task: Task
    kind: str | None
    known: frozenset[str]
    folder: Path


def choose_inputs(first: Rows, sections: Sequence[SourceSection], asked: Asked) -> InputFormat:
    """The format of the first section of a recipe that fits the columns of a file.

    Args:
        first: the first rows of the file.
        sections: the sources of the recipe.

    Raises:
        DataError: the file lacks a column, or it is ambiguous which columns to read.
    """
    shared = {name: values for name, values in first.columns.items() if name in asked.known}
    # Other columns of the file must not make ambiguous what was clear in training.
    views = [replace(first, columns=shared), first] if shared else [first]
    problem: DataError | None = None
    for view in views:
        for section in sections:
            try:
                return _choose(view, section, asked)
            except DataError as found:
                problem = found
    assert problem is not None  # there is at least one section
    raise problem


def _choose(first: Rows, section: SourceSection, asked: Asked) -> InputFormat:
    if asked.task.generates:
        return _choose_prompt(first, section, asked)
    if asked.task.images:
        image = _named(first, section, "image") or only_column(first, IMAGES, "image", "the image", ())
        return InputFormat((image,), lambda values: str(asked.folder / file_name(values[0])))
    if asked.task.label_of == "token":
        return _choose_words(first, section)
    _check_named(first, section, ("text", "text_pair"))
    texts = choose_texts(first, section)
    return InputFormat(texts.reads, lambda values: tuple(texts.of(values)))


def _choose_words(first: Rows, section: SourceSection) -> InputFormat:
    words = _named(first, section, "tokens", needed=False)
    found = [name for name in first.columns if name.strip().lower() in WORDS]
    texts = [name for name in first.columns if name.strip().lower() in TEXTS]
    if words is None and not found and len(texts) == 1:
        return InputFormat((texts[0],), lambda values: _words_of(values[0], texts[0]), splits_words=True)
    column = words or only_column(first, WORDS, "tokens", "the words", ())
    return InputFormat((column,), lambda values: _words(values[0], column))


def _words(value: Any, name: str) -> list[str]:
    words = [word_text(word, name) for word in word_items(value, name)]
    if not words:
        raise SkipRow(f"without words in {name}")
    return words


def _words_of(value: Any, name: str) -> list[str]:
    words = WORD.findall(whole_text(value, name))
    if not words:
        raise SkipRow(f"without words in {name}")
    return words


def _choose_prompt(first: Rows, section: SourceSection, asked: Asked) -> InputFormat:
    template = section.text if section.text is not None else section.prompt
    if template is not None:
        key = "dataset.text" if section.text is not None else "dataset.prompt"
        return _by_template(first, template, key, section)
    named = section.columns
    if named is not None and named.messages is not None and (way := split_path(named.messages, first.columns)):
        return _chats(way[0], section.turns, way[1])
    _check_named(first, section, ("messages", "text", "prompt"))
    column = (named.text or named.prompt) if named is not None else None
    if column is None:
        return _detected(first, section, asked)
    return _pairs(column, section.turns) if is_chat(first_value(first, column)) else _text(column)


def _by_template(first: Rows, template: str, key: str, section: SourceSection) -> InputFormat:
    paths = template_columns(template)
    ways = [split_path(path, first.columns) for path in paths]
    missing = [path for path, way in zip(paths, ways, strict=True) if way is None]
    if missing:
        raise missing_columns(first, missing, len(paths), key, section)
    found = [way for way in ways if way is not None]
    fill = from_templates([template, PLACEHOLDER], paths, [steps for _, steps in found])
    return InputFormat(tuple(column for column, _ in found), lambda values: fill(values)[0])


def _text(column: str) -> InputFormat:
    def make(values: tuple[Any, ...]) -> str:
        text = whole_text(values[0], column)
        if not text.strip():
            raise SkipRow(EMPTY_TEXT)
        return text

    return InputFormat((column,), make)


def _chats(column: str, mode: str, steps: tuple[str, ...] = ()) -> InputFormat:
    def make(values: tuple[Any, ...]) -> Chat:
        text = optional_text(values[1], "system")
        system = [{"role": "system", "content": text}] if text else []
        turns = normalize_messages(inner_value(values[0], steps))
        return Chat(chat_prompt(system + turns, mode), normalize_tools(values[2], values[3]))

    return InputFormat((column, "system", "tools", "functions"), make)


def _pairs(column: str, mode: str) -> InputFormat:
    """Prompts that are lists of messages; the completion is another column."""

    def make(values: tuple[Any, ...]) -> Chat:
        turns = [*normalize_messages(values[0]), {"role": "assistant", "content": PLACEHOLDER}]
        return Chat(chat_prompt(turns, mode), normalize_tools(values[1], None))

    return InputFormat((column, "tools"), make)


def _question(column: str) -> InputFormat:
    """One question a row, for a chat model."""
    text = _text(column)
    return InputFormat((column,), lambda values: Chat([{"role": "user", "content": str(text.make(values))}], []))


def _detected(first: Rows, section: SourceSection, asked: Asked) -> InputFormat:
    found = _detect(first, section, asked)
    chats = asked.kind == "messages"
    if found is None:
        return _undetected(first, section, asked)
    if found.format in ("messages", "sharegpt"):
        return _chats(found.needs[0], section.turns)
    if found.format == "alpaca":
        more = "context" if found.name == "dolly" else "input"
        names = (found.needs[0], more, found.needs[1], "system", "history")
        instruct = from_instructions(names, chats=chats)
        reads = (found.needs[0], more, "system", "history")
        return InputFormat(reads, lambda one: _asked_of(instruct((*one[:2], PLACEHOLDER, *one[2:])), chats=chats))
    if found.format == "question_answer":
        question = from_questions(found.needs, chats=chats)
        return InputFormat(found.needs[:1], lambda one: _asked_of(question((*one, PLACEHOLDER)), chats=chats))
    chat = is_chat(first_value(first, found.needs[0]))
    return _pairs(found.needs[0], section.turns) if chat else _text(found.needs[0])


def _asked_of(example: tuple[str, ...], *, chats: bool) -> Input:
    return Chat(chat_prompt(normalize_messages(example[0])), []) if chats else example[0]


def _detect(first: Rows, section: SourceSection, asked: Asked) -> ColumnFormat | None:
    """The format whose columns are there, the completion aside; one with all of its columns is preferred."""
    either = ("messages", "sharegpt")
    wanted = either if section.format in either else (section.format,) if section.format else None
    fits = [one for one in COLUMN_FORMATS if one.needs[0] in first.columns and (not wanted or one.format in wanted)]
    fits = [one for one in fits if _is_of(one, first, asked.kind)]
    whole = [one for one in fits if set(one.needs) <= set(first.columns)]
    fits = whole or fits
    if len(fits) == 2 and {one.name for one in fits} == {"alpaca", "dolly"}:
        dolly = "context" in first.columns and "input" not in first.columns
        fits = [one for one in fits if (one.name == "dolly") == dolly]
    if len({(one.format, one.needs[0]) for one in fits}) > 1:
        said = joined([f"{one.format} ({one.needs[0]})" for one in fits])
        raise DataError(
            f"{first.file}: its columns ({listed(first.columns)}) fit several formats: {said}; set dataset.format or "
            "dataset.columns in the recipe"
        )
    return fits[0] if fits else None


def _is_of(found: ColumnFormat, first: Rows, kind: str | None) -> bool:
    """Whether rows of a format have the kind of the training rows."""
    if kind is None or found.format in ("alpaca", "question_answer"):
        return kind != "text"
    if found.format == "prompt_completion":
        return kind == ("messages" if is_chat(first_value(first, found.needs[0])) else "prompt_completion")
    return kind == ("text" if found.format == "text" else "messages")


def _undetected(first: Rows, section: SourceSection, asked: Asked) -> InputFormat:
    chats = [name for name in first.columns if is_chat(first_value(first, name))]
    if asked.kind in (None, "messages") and len(chats) == 1:
        return _chats(chats[0], section.turns)
    texts = [name for name in first.columns if name.strip().lower() in ASKED]
    if len(texts) == 1:
        return _question(texts[0]) if asked.kind == "messages" else _text(texts[0])
    found = f"several columns could be the prompt, {joined(texts)}" if texts else "no column is known as the prompt"
    trained = f" (trained on: {listed(sorted(asked.known))})" if asked.known else ""
    raise DataError(
        f"{first.file}: {found}{trained}; it has {listed(first.columns)}; rename the column with the chat to messages, "
        "or the column with the prompt to prompt"
    )


def _named(first: Rows, section: SourceSection, key: str, *, needed: bool = True) -> str | None:
    """A column that the recipe names; None if it names none, or if it is not there and not needed."""
    name = getattr(section.columns, key) if section.columns is not None else None
    if name is not None and name not in first.columns:
        if not needed:
            return None
        raise missing_columns(first, [name], 1, f"dataset.columns.{key}", section)
    return str(name) if name is not None else None


def _check_named(first: Rows, section: SourceSection, keys: Sequence[str]) -> None:
    for key in keys:
        _named(first, section, key)
