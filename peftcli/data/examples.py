"""Builds the texts of one example from the values of a row: templates, columns, instructions, questions.

A maker gets the values of the columns that it reads, in order, and returns the columns of the example and, last, the
text without templates.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from peftcli.data.chat_formats import (
    DEFAULT_RULES,
    ChatRules,
    Turn,
    chat_example,
    normalize_messages,
    normalize_tools,
)
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
"""Raises SkipRow if a row is not usable."""

_BAD_HISTORY = "with a history that is not a list of text pairs"


def from_templates(templates: Sequence[str], paths: Sequence[str], steps: Sequence[tuple[str, ...]]) -> Maker:
    """A maker that fills templates; the values are the columns at the start of each path.

    Args:
        templates: one for each column of the example.
        paths: all paths in the templates.
        steps: for each path, the steps after its column.
    """
    fill = [compile_template(template, paths) for template in templates]
    targets = list(zip(paths, steps, strict=True))

    def make(values: tuple[Any, ...]) -> tuple[str, ...]:
        texts = []
        for value, (path, rest) in zip(values, targets, strict=True):
            found = _reach(value, rest, path) if rest else value
            texts.append(found if type(found) is str else template_text(found, path))
        return _with_content([one(*texts) for one in fill], "\n".join(texts))

    return make


def from_columns(names: Sequence[str]) -> Maker:
    """A maker that uses text columns without templates: one, or a prompt and a completion."""

    def make(values: tuple[Any, ...]) -> tuple[str, ...]:
        texts = [
            value if type(value) is str else whole_text(value, name) for value, name in zip(values, names, strict=True)
        ]
        return _with_content(texts, "\n".join(texts))

    return make


def from_chats(rules: ChatRules, flags: Sequence[str] = (), steps: tuple[str, ...] = ()) -> Maker:
    """A maker for chats, from the columns: messages, system, tools, functions, and those with loss flags.

    Args:
        rules: how messages are arranged, and which are trained.
        flags: names of the columns with one loss flag per message.
        steps: from the value of the first column to the messages.
    """

    def make(values: tuple[Any, ...]) -> tuple[str, ...]:
        turns, system, tools, functions, *given = values
        marked = normalize_messages(inner_value(turns, steps), flags=dict(zip(flags, given, strict=True)), rules=rules)
        return chat_example(_system(system) + marked, normalize_tools(tools, functions), rules)

    return make


def from_chat_pairs(rules: ChatRules) -> Maker:
    """A maker for a prompt and a completion that are lists of messages, from the columns: prompt, completion, tools.

    The messages of the prompt are not trained.
    """

    def make(values: tuple[Any, ...]) -> tuple[str, ...]:
        prompt, completion, tools = values
        answer = [completion] if isinstance(completion, dict) else completion  # a single message, as in preference data
        turns = normalize_messages(prompt, train=False, rules=rules) + normalize_messages(answer, rules=rules)
        return chat_example(turns, normalize_tools(tools, None), rules)

    return make


def from_instructions(names: Sequence[str], *, chats: bool, rules: ChatRules = DEFAULT_RULES) -> Maker:
    """A maker for rows with the columns: instruction, input, output, system, history.

    Args:
        names: of the columns, for the reasons.
        chats: build messages; otherwise a prompt with the headings of Stanford Alpaca, without its opening sentence.
        rules: whether the answers in the history are trained.
    """

    def make(values: tuple[Any, ...]) -> tuple[str, ...]:
        instruction, more = whole_text(values[0], names[0]), optional_text(values[1], names[1])
        prompt = [text for text in (instruction, more) if text.strip()]
        answer = whole_text(values[2], names[2])
        history = [_pair(pair) for pair in parsed_list(values[4], _BAD_HISTORY)]
        if chats:
            return _messages(_system(values[3]) + _history(history), "\n\n".join(prompt), answer, rules)
        if history:
            raise SkipRow("with a history, which needs a chat template")
        _check(bool(prompt), answer)
        content = "\n".join([*prompt, answer])
        return _headed(instruction, more, optional_text(values[3], names[3])), answer, content

    return make


def from_questions(names: Sequence[str], *, chats: bool) -> Maker:
    """A maker for rows with the columns: question, answer."""

    def make(values: tuple[Any, ...]) -> tuple[str, ...]:
        question, answer = (whole_text(value, name) for value, name in zip(values, names, strict=True))
        if chats:
            return _messages([], question, answer)
        _check(bool(question.strip()), answer)
        return f"Question: {question}\nAnswer:", f" {answer}", f"{question}\n{answer}"

    return make


def _with_content(texts: list[str], content: str) -> tuple[str, ...]:
    """Check and complete texts; the last is trained, and the first of two is the prompt."""
    _check(len(texts) == 1 or bool(texts[0].strip()), texts[-1])
    return (*texts, content)


def _check(has_prompt: bool, learned: str) -> None:
    if not learned or learned.isspace():
        raise SkipRow(EMPTY)
    if not has_prompt:
        raise SkipRow(EMPTY_PROMPT)


def inner_value(value: Any, steps: tuple[str, ...]) -> Any:
    """The value that the steps lead to; None if there is none."""
    try:
        return reach(value, steps)
    except LookupError:
        return None


def _reach(value: Any, steps: tuple[str, ...], path: str) -> Any:
    try:
        return reach(value, steps)
    except LookupError:
        raise SkipRow(f"without {path}") from None


def _messages(before: list[Turn], prompt: str, answer: str, rules: ChatRules = DEFAULT_RULES) -> tuple[str, ...]:
    _check(bool(prompt.strip()), answer)
    turns = [*before, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return chat_example(turns, [], rules)


def _system(value: Any) -> list[Turn]:
    text = optional_text(value, "system")
    return [{"role": "system", "content": text}] if text else []


def _history(history: list[tuple[str, str]]) -> list[Turn]:
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
