"""Tokenizes chats and computes the assistant mask, from the chat template or by rendering prefixes."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any
from uuid import uuid4

from transformers import PreTrainedTokenizerBase

from peftcli.data.encode import BATCH_SECONDS, BackgroundEncoder, encode, rust_core, template_time_limit
from peftcli.data.shown_answers import (
    REJECTED,
    AnswerFinder,
    Chat,
    ShownChat,
    Span,
    TemplateProblem,
    render_chat,
)
from peftcli.data.template_settings import has_settings, marked_template, settings_of, settle
from peftcli.data.turn_order import is_irregular


@dataclass(frozen=True)
class EncodedChat:
    """The token ids of a chat, and which are trained.

    Attributes:
        ids: token ids.
        mask: 1 for trained tokens.
        mismatched: evaluation asks the last answer with another text than the trained one.
        context_only: some answers are not trained because the text shows them differently than they are generated.
    """

    ids: list[int]
    mask: list[int]
    mismatched: bool = False
    context_only: bool = False


def read_chats(columns: Mapping[str, Sequence[str]]) -> tuple[list[Chat], list[Any]]:
    """The chats of a batch of examples, and the tools of each or None."""
    tools = columns.get("tools") or [""] * len(columns["messages"])
    return [json.loads(text) for text in columns["messages"]], [json.loads(text) if text else None for text in tools]


def render(chat: Chat, tools: Any, tokenizer: PreTrainedTokenizerBase, *, prompt: bool = False) -> str:
    """Render a chat with the template; with `prompt`, add the generation prompt.

    Raises:
        TemplateError: the template rejects the chat.
    """
    return render_chat(chat, tools, tokenizer, prompt=prompt)


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A template with generation markers: the tokenizer's own, TRL's for a known family, or None."""
    return marked_template(str(tokenizer.get_chat_template(None, None)))


def last_answer(chat: Chat) -> int:
    """Index of the last assistant message with content that is trained; of the last one if there is none."""
    answers = [index for index, turn in enumerate(chat) if turn["role"] == "assistant"]
    learned = [index for index in answers if chat[index].get("train", True)]
    texts = [index for index in learned if chat[index]["content"].strip()]
    return (texts or learned or answers)[-1]


class ChatEncoder:
    """Encodes chats to token ids and loss masks."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, assistant_only: bool) -> None:
        """
        Raises:
            TemplateProblem: the tokenizer has no chat template.
        """
        if not tokenizer.chat_template:
            raise TemplateProblem(
                "the tokenizer has no chat template, but the data format is messages; set model.chat_template to a "
                "Jinja file, or use dataset.prompt and dataset.completion"
            )
        self._tokenizer = tokenizer
        self._assistant_only = assistant_only
        self._finder = AnswerFinder(tokenizer, assistant_only=assistant_only)
        self._background = BackgroundEncoder(tokenizer)

    def start(self, chats: Sequence[Chat], tools: Sequence[Any]) -> Callable[[], list[EncodedChat | str]]:
        """Render chats, and encode them in the background.

        Returns:
            A function that waits and returns the ids and mask of each chat, or the reason why the template rejects it.

        Raises:
            TemplateProblem: the assistant mask is ambiguous, or the template exceeds the time limit; also raised by the
                returned function.
        """
        with template_time_limit(BATCH_SECONDS):
            found = [self._find(chat, given) for chat, given in zip(chats, tools, strict=True)]
        shown = [one for one in found if isinstance(one, ShownChat)]
        encoding = self._background.start(encode_shown, shown, self._tokenizer)

        def finish() -> list[EncodedChat | str]:
            encoded = iter(encoding())
            return [one if isinstance(one, str) else next(encoded) for one in found]

        return finish

    def _find(self, chat: Chat, tools: Any) -> ShownChat | str:
        try:
            if _may_be_left_out(chat) and (left_out := self._left_out(chat, tools)) is not None:
                return f"with {left_out} that the chat template leaves out"
            found = self._finder.find(chat, tools)
            if self._assistant_only or all(turn.get("train", True) for turn in chat):
                return found
            return replace(found, spans=self._flagged_spans(chat, tools, found.text), by_markers=False)
        except TemplateProblem:
            raise
        except REJECTED as problem:
            reason = " ".join(str(problem).split())[:100]
            return f"rejected by the chat template ({reason}{self._advice(chat, tools)})"

    def _left_out(self, chat: Chat, tools: Any) -> str | None:
        """What the template does not render: the message of a role, or a tool call; None if everything is there."""
        text = render_chat(chat, tools, self._tokenizer)
        drops = settings_of(str(self._tokenizer.get_chat_template(None, tools))).get("system") == "drop"
        for turn in chat:
            if turn["content"].strip() not in text and not (drops and turn["role"] == "system"):
                return f"{'an' if turn['role'] == 'assistant' else 'a'} {turn['role']} message"
        named, names = _with_unique_names(chat)
        text = render_chat(named, tools, self._tokenizer) if names else ""
        return None if all(name in text for name in names) else "a tool call"

    def _flagged_spans(self, chat: Chat, tools: Any, text: str) -> list[Span]:
        """All of the text, except the messages with `train: false`, found by rendering the chat up to each of them.

        Raises:
            TemplateProblem: a part of the chat does not render as the beginning of the text.
        """
        spans, start = [], 0
        for trained, group in groupby(range(len(chat)), key=lambda number: chat[number].get("train", True)):
            last = list(group)[-1]
            end = len(text)
            if last + 1 < len(chat):
                # A generation prompt belongs to what the assistant reads.
                answers = chat[last + 1]["role"] == "assistant" and not trained
                shown = render_chat(chat[: last + 1], tools, self._tokenizer, prompt=answers)
                if not text.startswith(shown):
                    raise TemplateProblem(
                        "the chat template renders earlier messages differently in a longer chat, so it is ambiguous "
                        "which tokens a loss flag excludes; remove trainer.assistant_only_loss: false, or the flags"
                    )
                end = len(shown)
            spans += [(start, end)] if trained else []
            start = end
        return spans

    def _advice(self, chat: Chat, tools: Any) -> str:
        """The key that makes the template take the order of the messages, or a system message."""
        if is_irregular([turn["role"] for turn in chat]):
            return "; set dataset.turns: join"
        template = str(self._tokenizer.get_chat_template(None, tools))
        if chat[0]["role"] != "system" or has_settings(template):
            return ""
        try:
            render_chat(chat, tools, self._tokenizer, settle(template, {"system": "fold"}))
        except REJECTED:
            return ""
        return "; set dataset.system: fold"


def _may_be_left_out(chat: Chat) -> bool:
    """Whether the chat has messages that some templates skip: in an unusual order, with tool calls or their results."""
    roles = [turn["role"] for turn in chat]
    return is_irregular(roles) or "tool" in roles or any(turn.get("tool_calls") for turn in chat)


def _with_unique_names(chat: Chat) -> tuple[Chat, list[str]]:
    """The chat with a unique name for each tool call, and these names."""
    names: list[str] = []

    def renamed(call: dict[str, Any]) -> dict[str, Any]:
        names.append(f"call_{len(names)}_of_{uuid4().hex[:8]}")
        return {**call, "function": {**call["function"], "name": names[-1]}}

    turns = [
        {**turn, "tool_calls": [renamed(call) for call in turn["tool_calls"]]} if turn.get("tool_calls") else turn
        for turn in chat
    ]
    return turns, names


def encode_shown(shown: Sequence[ShownChat], tokenizer: PreTrainedTokenizerBase) -> list[EncodedChat | str]:
    """Ids and masks of rendered chats, or the reason why the tokenizer rejects one.

    Source: the mask of `PreTrainedTokenizerBase.apply_chat_template`, which takes twice as long.

    Raises:
        TemplateProblem: a token crosses the boundary of a turn.
    """
    core = rust_core(tokenizer)
    if core is None:
        return [_encode_slowly(one, tokenizer) for one in shown]
    encoded = core.encode_batch([one.text for one in shown], add_special_tokens=False)
    found: list[EncodedChat | str] = []
    for one, row in zip(shown, encoded, strict=True):
        if one.by_markers:
            ids, mask = row.ids, _mask(row, one.spans)
        else:
            ids, mask = _mask_spans(one.text, one.spans, row.ids, row.offsets, tokenizer)
        found.append(EncodedChat(ids, mask, one.mismatch is not None, one.context_only))
    return found


def _encode_slowly(one: ShownChat, tokenizer: PreTrainedTokenizerBase) -> EncodedChat | str:
    """Of a tokenizer in Python, which does not know the characters of its tokens."""
    if one.spans == [(0, len(one.text))]:
        ids = encode([one.text], tokenizer, special=False)[0]
        return EncodedChat(ids, [1] * len(ids), one.mismatch is not None, one.context_only)
    try:
        ids, mask = _pieces(one.text, one.spans, encode([one.text], tokenizer, special=False)[0], tokenizer)
    except REJECTED as problem:
        return f"rejected by the tokenizer ({' '.join(str(problem).split())[:100]})"
    return EncodedChat(ids, mask, one.mismatch is not None, one.context_only)


def _mask(encoded: Any, spans: Sequence[Span]) -> list[int]:
    mask = [0] * len(encoded)
    for start, end in spans:
        first, last = encoded.char_to_token(start), encoded.char_to_token(end - 1)
        if first is None:
            break
        stop = last + 1 if last else len(mask)
        mask[first:stop] = [1] * (stop - first)
    return mask


def _mask_spans(
    text: str,
    spans: Sequence[Span],
    ids: list[int],
    offsets: Sequence[Span],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[int], list[int]]:
    """Ids of a text, and a mask of exactly the character spans.

    A token that crosses the boundary of a span would train a part of the prompt, or miss a part of the answer. In this
    case the pieces are encoded separately, as in generation, where the prompt also ends at that boundary.

    Raises:
        TemplateProblem: the separately encoded pieces decode to another text.
    """
    edges = {edge for span in spans for edge in span}
    if any(left < edge < right for left, right in offsets for edge in edges):
        return _pieces(text, spans, ids, tokenizer)
    inside = [any(start <= left and right <= end for start, end in spans) for left, right in offsets]
    return ids, [int(bit and right > left) for bit, (left, right) in zip(inside, offsets, strict=True)]


def _pieces(
    text: str, spans: Sequence[Span], ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Ids and mask of a text whose trained spans are encoded by themselves."""
    edges = {edge for span in spans for edge in span}
    cuts = [0, *sorted(edges - {0, len(text)}), len(text)]
    pieces: list[int] = []
    mask: list[int] = []
    for start, end in pairwise(cuts):
        piece = tokenizer(text[start:end], add_special_tokens=False)["input_ids"]
        pieces += piece
        mask += [int((start, end) in spans)] * len(piece)
    if tokenizer.decode(pieces) != tokenizer.decode(ids):
        raise TemplateProblem(
            "a token crosses the boundary of an assistant turn, and the tokenizer cannot encode the turns separately; "
            "end the generation prompt of the chat template with a special token or a line break"
        )
    return pieces, mask
