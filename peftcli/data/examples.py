"""Builds the texts of one example from the values of a row: templates, columns, instructions, questions.

A maker takes the values of the columns that are read, in order, and gives the columns of the example and, last, the
user's own words.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from peftcli.data.chat_formats import Turn, chat_example, normalize_messages, normalize_tools
from peftcli.data.values import (
    EMPTY,
    EMPTY_PROMPT,
    SkipRow,
    optional_text,
    parsed_list,
    template_text,
    whole_text,
)
from peftcli.recipe.template import compile_template, reach

Maker: TypeAlias = Callable[[tuple[Any, ...]], tuple[str, ...]]
"""Raises Unused where a row makes no example."""

_BAD_HISTORY = "with history that is no list of pairs of texts"


def from_templates(templates: Sequence[str], paths: Sequence[str], steps: Sequence[tuple[str, ...]]) -> Maker:
    """A maker that fills templates; each value read is the column that a path begins with.

    Args:
        templates: one for each column of the example.
        paths: all that the templates name.
        steps: for each path what follows its column.
    """
    writers = [compile_template(template, paths) for template in templates]
    ways = list(zip(paths, steps, strict=True))

    def make(values: tuple[Any, ...]) -> tuple[str, ...]:
        texts = []
        for value, (path, way) in zip(values, ways, strict=True):
            found = _reach(value, way, path) if way else value
            texts.append(found if type(found) is str else template_text(found, path))
        return _with_content([write(*texts) for write in writers], "\n".join(texts))

    return make


def from_columns(names: Sequence[str]) -> Maker:
    """A maker that takes columns of text as they are: one, or a prompt and a completion."""

    def make(values: tuple[Any, ...]) -> tuple[str, ...]:
        texts = [
            value if type(value) is str else whole_text(value, name) for value, name in zip(values, names, strict=True)
        ]
        return _with_content(texts, "\n".join(texts))

    return make


def from_chats(values: tuple[Any, ...]) -> tuple[str, ...]:
    """The example of a list of turns, read from: turns, system, tools, functions."""
    turns, system, tools, functions = values
    return chat_example(_system(system) + normalize_messages(turns), normalize_tools(tools, functions))


def from_chat_pairs(values: tuple[Any, ...]) -> tuple[str, ...]:
    """The example of a prompt and a completion that are lists of turns, read from: prompt, completion, tools.

    The assistant's turns of the prompt are not learned.
    """
    prompt, completion, tools = values
    turns = normalize_messages(prompt, train=False) + normalize_messages(completion)
    return chat_example(turns, normalize_tools(tools, None))


def from_instructions(names: Sequence[str], *, chats: bool) -> Maker:
    """A maker for rows that are read from: instruction, input, output, system, history.

    Args:
        names: the columns' names, for the reasons.
        chats: make turns; else a prompt under the headings of Stanford's Alpaca, without its opening sentence.
    """

    def make(values: tuple[Any, ...]) -> tuple[str, ...]:
        instruction, more = whole_text(values[0], names[0]), optional_text(values[1], names[1])
        asked = [text for text in (instruction, more) if text.strip()]
        answer = whole_text(values[2], names[2])
        history = [_pair(pair) for pair in parsed_list(values[4], _BAD_HISTORY)]
        if chats:
            return _turns(_system(values[3]) + _talk(history), "\n\n".join(asked), answer)
        if history:
            raise SkipRow("with history, which takes a chat template")
        _check(bool(asked), answer)
        content = "\n".join([*asked, answer])
        return _headed(instruction, more, optional_text(values[3], names[3])), answer, content

    return make


def from_questions(names: Sequence[str], *, chats: bool) -> Maker:
    """A maker for rows that are read from: question, answer."""

    def make(values: tuple[Any, ...]) -> tuple[str, ...]:
        question, answer = (whole_text(value, name) for value, name in zip(values, names, strict=True))
        if chats:
            return _turns([], question, answer)
        _check(bool(question.strip()), answer)
        return f"Question: {question}\nAnswer:", f" {answer}", f"{question}\n{answer}"

    return make


def _with_content(texts: list[str], content: str) -> tuple[str, ...]:
    """Texts of which the last is learned and the first, where there are two, is the prompt."""
    _check(len(texts) == 1 or bool(texts[0].strip()), texts[-1])
    return (*texts, content)


def _check(asked: bool, learned: str) -> None:
    if not learned or learned.isspace():
        raise SkipRow(EMPTY)
    if not asked:
        raise SkipRow(EMPTY_PROMPT)


def _reach(value: Any, steps: tuple[str, ...], path: str) -> Any:
    try:
        return reach(value, steps)
    except LookupError:
        raise SkipRow(f"without {path}") from None


def _turns(before: list[Turn], asked: str, answer: str) -> tuple[str, ...]:
    _check(bool(asked.strip()), answer)
    return chat_example([*before, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}], [])


def _system(value: Any) -> list[Turn]:
    text = optional_text(value, "system")
    return [{"role": "system", "content": text}] if text else []


def _talk(history: list[tuple[str, str]]) -> list[Turn]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in history for role, text in zip(roles, pair, strict=True)]


def _pair(value: Any) -> tuple[str, str]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(text, str) for text in value):
        raise SkipRow(_BAD_HISTORY)
    return value[0], value[1]


def _headed(instruction: str, more: str, system: str) -> str:
    parts = [system] if system else []
    parts.append(f"### Instruction:\n{instruction}")
    if more:
        parts.append(f"### Input:\n{more}")
    return "\n\n".join([*parts, "### Response:\n"])
