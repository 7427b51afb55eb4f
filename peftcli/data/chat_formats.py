"""Normalizes the messages of a chat; the format is detected from the keys of each message."""

import json
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

from peftcli.data.loss_flags import FLAGS, agreed_flags, message_flag, row_flags
from peftcli.data.turn_order import arrange, check_turns, is_empty
from peftcli.data.values import SkipRow, parsed_list
from peftcli.recipe.problems import printable

Turn: TypeAlias = dict[str, Any]
"""`role` (system, user, assistant or tool) and `content` (text); optionally `tool_calls`, `name`, `tool_call_id`,
`reasoning_content`, and `train`, which is False for a message that is not trained although its role is."""

_NO_LIST = "with messages that are not a list"
_BAD_CALL = "with a tool call that is not JSON with a name and arguments"
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class ChatRules:
    """How the messages of a chat are arranged, and which are trained.

    Attributes:
        turns: `dataset.turns`: refuse, join or keep.
        mask_history: only the last assistant message is trained.
        assistant_only: only assistant messages are trained.
    """

    turns: str = "refuse"
    mask_history: bool = False
    assistant_only: bool = True


DEFAULT_RULES = ChatRules()


def chat_example(turns: list[Turn], tools: list[Any], rules: ChatRules = DEFAULT_RULES) -> tuple[str, str, str]:
    """The columns `messages` and `tools` of an example, and its text.

    Raises:
        SkipRow: the order of the messages is not valid, or none of them can be trained.
    """
    turns = arrange(turns, rules.turns)
    if rules.mask_history:
        turns = _mask_history(turns)
    check_turns(turns)
    content = "\n".join(turn["content"] for turn in turns if turn["role"] != "system")
    written = [json.dumps(value, ensure_ascii=False, default=str) for value in (turns, tools)]
    return written[0], written[1] if tools else "", content


def chat_prompt(turns: list[Turn], mode: str = DEFAULT_RULES.turns) -> list[Turn]:
    """The messages to answer: all, or those before the last answer if the chat ends with one.

    Evaluation asks for the last answer of a chat in the same way.

    Args:
        turns: normalized messages.
        mode: `dataset.turns`.

    Raises:
        SkipRow: the order of the messages is not valid, or the assistant would begin.
    """
    turns = [{key: value for key, value in turn.items() if key != "train"} for turn in turns]
    if turns[-1]["role"] == "assistant" and is_empty(turns[-1]):
        turns = turns[:-1]  # an empty place for the answer
    if not turns or turns[-1]["role"] != "assistant":
        asked = arrange(turns, mode)
        _check_asked([*asked, {"role": "assistant", "content": "answer"}])
        return asked
    turns = arrange(turns, mode)
    _check_asked(turns)
    answers = [at for at, turn in enumerate(turns) if turn["role"] == "assistant"]
    return turns[: next((at for at in reversed(answers) if turns[at]["content"].strip()), answers[-1])]


def _check_asked(turns: list[Turn]) -> None:
    """Check the order of the messages of a prompt and its answer; earlier answers may be empty."""
    check_turns([*({**turn, "train": False} for turn in turns[:-1]), turns[-1]])


def normalize_messages(
    value: Any, *, train: bool = True, flags: dict[str, Any] | None = None, rules: ChatRules = DEFAULT_RULES
) -> list[Turn]:
    """The messages of a list, or of a JSON string with one.

    Args:
        value: the value of the column.
        train: False excludes the messages from training.
        flags: the values of columns with one loss flag per message, by name.
        rules: which messages can be trained.

    Raises:
        SkipRow: a message has no known role or no text, or a loss flag cannot be followed.
    """
    given = parsed_list(value, _NO_LIST)
    if not given:
        raise SkipRow("with no messages")
    turns = [[_normalize_message(part) for part in _split_tool_parts(message)] for message in given]
    roles = [parts[-1]["role"] for parts in turns]
    own = [message_flag(message) for message in given]
    beside = [row_flags(values, name, roles) for name, values in (flags or {}).items()]
    for parts, flag in zip(turns, agreed_flags([own, *beside], len(turns)), strict=True):
        for turn in parts:
            _mark(turn, flag if train else False, rules)
    return list(chain.from_iterable(turns))


def _mark(turn: Turn, flag: bool | None, rules: ChatRules) -> None:
    if flag and rules.assistant_only and turn["role"] != "assistant":
        raise SkipRow(
            f"with a {turn['role']} message that is marked to be trained (set trainer.assistant_only_loss: false)"
        )
    if flag is False and (turn["role"] == "assistant" or not rules.assistant_only):
        turn["train"] = False


def _split_tool_parts(message: Any) -> list[Any]:
    """An Anthropic message in OpenAI's form: tool calls under their key, and the result of each in a message."""
    parts = message.get("content") if isinstance(message, dict) else None
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts] if isinstance(parts, list) else []
    if not isinstance(parts, list) or not {"tool_use", "tool_result"} & set(kinds):
        return [message]
    of = {kind: [part for part, one in zip(parts, kinds, strict=True) if one == kind] for kind in set(kinds)}
    calls, results = of.pop("tool_use", []), of.pop("tool_result", [])
    rest = [part for part, kind in zip(parts, kinds, strict=True) if kind in of]
    made = [
        {"role": "tool", "content": part.get("content") or "", "tool_call_id": part.get("tool_use_id")}
        for part in results
    ]
    if rest or calls:
        made.append({**message, "content": rest or "", **({"tool_calls": calls} if calls else {})})
    return made


def _mask_history(turns: list[Turn]) -> list[Turn]:
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    return [turn if number not in answers[:-1] else {**turn, "train": False} for number, turn in enumerate(turns)]


def normalize_tools(tools: Any, functions: Any) -> list[Any]:
    """The tools of a row in the format of chat templates, from `tools` or OpenAI's older `functions`.

    Raises:
        SkipRow: they are not a list, or one of them has no name.
    """
    reason = "with tools that are not a list"
    return [_normalize_tool(tool) for tool in parsed_list(tools, reason) or parsed_list(functions, reason)]


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages in a known format.

    >>> is_chat([{"from": "human", "value": "Hi"}]), is_chat([{"id": 1}]), is_chat("Hi")
    (True, False, False)
    """
    return isinstance(value, list) and bool(value) and all(map(_has_speaker, value))


def is_sharegpt(value: Any) -> bool:
    """Whether the first message of a list, or of a JSON string with one, has the keys from and value.

    >>> is_sharegpt('[{"from": "human", "value": "Hi"}]'), is_sharegpt([{"role": "user", "content": "Hi"}])
    (True, False)
    """
    try:
        turns = parsed_list(value, _NO_LIST)
    except SkipRow:
        return False
    return is_chat(list(turns[:1])) and turns[0].get("role") is None


def is_message(value: Any) -> bool:
    """Whether a value is a message and nothing else: a known role and a content.

    >>> is_message({"role": "user", "content": "Hi"}), is_message({"role": "user", "content": "Hi", "label": 1})
    (True, False)
    """
    if not isinstance(value, dict) or not set(value) <= MESSAGE_KEYS | {"id"}:
        return False
    name = _first(value, "role", "from")
    return isinstance(name, str) and name.strip().lower() in _ROLES and not {"content", "value"}.isdisjoint(value)


def _has_speaker(turn: Any) -> bool:
    return isinstance(turn, dict) and any(isinstance(turn.get(key), str) for key in ("role", "from"))


def _normalize_message(turn: Any) -> Turn:
    # In Arrow files every message has the same keys, so a key may be present and null.
    name = _first(turn, "role", "from") if isinstance(turn, dict) else None
    if not isinstance(name, str):
        raise SkipRow("with a message without a role")
    role = _ROLES.get(name) or _ROLES.get(name.strip().lower())
    if role is None:
        raise SkipRow(f"with the unknown role {printable(name, 20)}")
    if role != "assistant" and turn.get("tool_calls"):
        raise SkipRow(f"with tool calls in a {role} message")
    content = _first(turn, "content", "value")
    if name.strip().lower() in _CALLS:
        calls = _sharegpt_calls(content)
        content = ""
    else:
        calls = _calls(turn) if role == "assistant" else []
    made: Turn = {"role": role, "content": _text(content, bool(calls))}
    if calls:
        made["tool_calls"] = calls
    made.update({key: turn[key] for key in _PASSED_ON if isinstance(turn.get(key), str) and turn[key]})
    if role == "assistant":
        _separate_reasoning(made, turn)
    return made


_CALLS = ("function_call", "tool_call")
"""Roles of messages whose content is the tool calls: those of ShareGPT files and of ms-swift."""
_PASSED_ON = ("name", "tool_call_id")
"""Further text keys of a message for chat templates."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which the reasoning of an answer is given; or it is in the content, in a think block."""
MESSAGE_KEYS = frozenset(
    ("role", "from", "content", "value", "tool_calls", "function_call", *_PASSED_ON, *_REASONING, *FLAGS)
)
PART_KEYS = frozenset(("type", "text", "value", "content", "id", "name", "input", "tool_use_id"))
CALL_KEYS = frozenset(("id", "type", "function", "name", "arguments", "parameters", "input", "args"))
FUNCTION_KEYS = frozenset(("name", "arguments", "parameters", "input", "args"))
"""The keys of a message, of a part of its content, of a tool call and of its function that are read here; others are
reported as not read."""


def _separate_reasoning(made: Turn, turn: Turn) -> None:
    """Put the reasoning of an answer under `reasoning_content`, wherever the row has it."""
    given = next((turn[key] for key in _REASONING if isinstance(turn.get(key), str) and turn[key].strip()), None)
    thought, made["content"] = split_reasoning(made["content"])
    if given := given or thought:
        made["reasoning_content"] = given.strip("\n")


def split_reasoning(text: str) -> tuple[str, str]:
    """The reasoning in a think block at the beginning of an answer, and the answer after it.

    >>> split_reasoning("<think>\\nTwice 2.\\n</think>\\n\\n4"), split_reasoning("Twice 2.\\n</think>\\n\\n4")
    (('Twice 2.', '4'), ('Twice 2.', '4'))
    >>> split_reasoning("4"), split_reasoning("<think>\\n\\n</think>\\n\\n4"), split_reasoning("<think>")
    (('', '4'), ('', '4'), ('', '<think>'))
    """
    thought, closed, answer = text.partition("</think>")
    opened = thought.lstrip().removeprefix("<think>")
    if not closed or "<think>" in opened:  # text before the block belongs to the answer
        return "", text
    return opened.strip() and opened.strip("\n"), answer.lstrip("\n")


def _first(turn: Turn, key: str, other: str) -> Any:
    value = turn.get(key)
    return turn.get(other) if value is None else value


def _text(content: Any, has_calls: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and has_calls:
        return ""
    if not isinstance(content, list) or not content:
        raise SkipRow("with a message whose content is not text")
    return "".join(map(_part_text, content))


_TEXT_PARTS = ("text", "input_text", "output_text")
_PART_KEYS = ("text", "value", "content")
"""Keys of the text of a typed part: OpenAI's, that of ShareGPT files, and that of some exports."""


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS:
        text = next((part[key] for key in _PART_KEYS if isinstance(part.get(key), str)), None)
        if text is not None:
            return str(text)
    kind = part.get("type") if isinstance(part, dict) else None
    raise SkipRow(f"with a part that is not text ({printable(str(kind), 20)})")


def _calls(turn: Turn) -> list[Turn]:
    """The tool calls of an assistant message, including OpenAI's older `function_call`."""
    given = list(parsed_list(turn.get("tool_calls"), _BAD_CALL))
    if not given and turn.get("function_call") is not None:
        given = [turn["function_call"]]
    return [_call(call) for call in given]


def _sharegpt_calls(value: Any) -> list[Turn]:
    """The tool calls in ShareGPT rows, which are the content of a message from function_call."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise SkipRow(_BAD_CALL) from None
    found = [_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    if not found:
        raise SkipRow(_BAD_CALL)
    return found


_ARGUMENTS = ("arguments", "parameters", "input", "args")
"""Keys of the arguments of a call: OpenAI's, Llama's, Anthropic's and LangChain's."""


def _call(call: Any) -> Turn:
    """One call, with its arguments as an object: templates serialize them as JSON themselves."""
    function = call.get("function") if isinstance(call, dict) and call.get("function") is not None else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise SkipRow(_BAD_CALL)
    arguments = next((function[key] for key in _ARGUMENTS if function.get(key) is not None), None)
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise SkipRow(_BAD_CALL) from None
    if not isinstance(arguments, dict | None):
        raise SkipRow(_BAD_CALL)
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **named, "function": {"name": function["name"], "arguments": dict(arguments or {})}}


def _normalize_tool(tool: Any) -> Any:
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
        return tool
    if isinstance(tool, dict) and isinstance(tool.get("name"), str):
        return {"type": "function", "function": tool}
    raise SkipRow("with a tool without a name")
