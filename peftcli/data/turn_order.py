"""The order of the messages of a chat: what is refused, joined or kept (`dataset.turns`)."""

import itertools
from collections.abc import Sequence
from typing import Any

from peftcli.data.values import SkipRow

_REASONING = ("reasoning_content", "thinking")
_JOINED = ("user", "assistant", "system")
"""Roles whose consecutive messages can be joined; the results of parallel tool calls are separate messages."""
_KEY = "set dataset.turns: join or keep"


def arrange(turns: list[dict[str, Any]], mode: str) -> list[dict[str, Any]]:
    """The messages of a chat in an order that `mode` allows.

    Args:
        turns: normalized messages.
        mode: `refuse`, `join` or `keep`.

    Raises:
        SkipRow: the order is refused, or consecutive messages cannot be joined.
    """
    if mode == "keep":
        return turns
    if mode == "join":
        return join_consecutive(turns)
    roles = [turn["role"] for turn in turns]
    if "system" in roles[1:]:
        raise SkipRow(f"with a system message after the beginning ({_KEY})")
    for role in ("user", "assistant"):
        if any(one == two == role for one, two in itertools.pairwise(roles)):
            raise SkipRow(f"with two consecutive {role} messages ({_KEY})")
    return turns


def is_irregular(roles: Sequence[str]) -> bool:
    """Whether a chat template may leave out or refuse messages because of their order.

    >>> is_irregular(["system", "user", "assistant"]), is_irregular(["user", "user", "assistant"])
    (False, True)
    """
    pairs = itertools.pairwise(roles)
    return "system" in roles[1:] or any(one == two and one in _JOINED for one, two in pairs)


def join_consecutive(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join consecutive messages of one role with a blank line; tool calls are put into one list.

    Raises:
        SkipRow: two messages differ in what a joined message has only once.
    """
    joined: list[dict[str, Any]] = []
    for turn in turns:
        if joined and turn["role"] == joined[-1]["role"] and turn["role"] in _JOINED:
            joined[-1] = _join(joined[-1], turn)
        else:
            joined.append(turn)
    return joined


def _join(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    role = one["role"]
    if one.get("train", True) != two.get("train", True):
        raise SkipRow(f"with consecutive {role} messages of which only some are trained")
    if one.get("tool_calls") and two["content"].strip():
        raise SkipRow("with an assistant message after a tool call without a result")
    if one.get("name", two.get("name")) != two.get("name", one.get("name")):
        raise SkipRow(f"with consecutive {role} messages of different names")
    calls = [*one.get("tool_calls", ()), *two.get("tool_calls", ())]
    texts = {
        key: "\n\n".join(text for text in (one.get(key, ""), two.get(key, "")) if text.strip())
        for key in ("content", *_REASONING)
        if key in one or key in two
    }
    return {**one, **two, **texts, **({"tool_calls": calls} if calls else {})}


def is_empty(turn: dict[str, Any]) -> bool:
    """Whether a message has no text, no reasoning and no tool call."""
    return not any(turn.get(key, "").strip() for key in ("content", *_REASONING)) and not turn.get("tool_calls")


def check_turns(turns: Sequence[dict[str, Any]]) -> None:
    """
    Raises:
        SkipRow: the assistant has nothing to say or begins, or none of its messages can be trained.
    """
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise SkipRow("without an assistant message")
    empty = [turn for turn in turns if turn["role"] == "assistant" and is_empty(turn)]
    if any(turn.get("train", True) for turn in empty):
        raise SkipRow("with an empty assistant message")
    answers = [
        number
        for number, turn in enumerate(turns)
        if turn["role"] == "assistant" and (turn["content"].strip() or "tool_calls" in turn)
    ]
    if not any("train" not in turns[number] for number in answers):
        raise SkipRow("without an assistant message to train")
    if set(roles[: answers[-1]]) <= {"system"}:
        raise SkipRow("with no user message before the assistant message")
