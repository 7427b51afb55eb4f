"""Tokenizes chats and computes the assistant mask, from the chat template or by rendering prefixes."""

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, TypeAlias
from uuid import uuid4

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from peftcli.data.encode import BATCH_SECONDS, BackgroundEncoder, encode, rust_core, template_time_limit
from peftcli.data.turn_order import is_irregular
from peftcli.errors import DataError

Chat: TypeAlias = list[dict[str, Any]]
MaskedChat: TypeAlias = tuple[list[int], list[int]]
"""Token ids of a chat, and the loss mask (1 for trained tokens)."""

_REJECTED = (TemplateError, ValueError, TypeError)
"""Errors of templates and tokenizers for a chat that they do not support."""
Span: TypeAlias = tuple[int, int]


class TemplateProblem(DataError):
    """The chat template is missing, or cannot be used for training."""


def read_chats(columns: Mapping[str, Sequence[str]]) -> tuple[list[Chat], list[Any]]:
    """The chats of a batch of examples, and the tools of each or None."""
    tools = columns.get("tools") or [""] * len(columns["messages"])
    return [json.loads(text) for text in columns["messages"]], [json.loads(text) if text else None for text in tools]


def render(chat: Chat, tools: Any, tokenizer: PreTrainedTokenizerBase, *, prompt: bool = False) -> str:
    """Render a chat with the template; with `prompt`, add the generation prompt.

    Raises:
        TemplateError: the template rejects the chat.
    """
    return str(tokenizer.apply_chat_template(_plain(chat), tools=tools, tokenize=False, add_generation_prompt=prompt))


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A template with generation markers: the tokenizer's own, TRL's for a known family, or None."""
    if has_generation_markers(tokenizer.chat_template):
        return str(tokenizer.chat_template)
    try:
        return str(get_training_chat_template(tokenizer))
    except ValueError:  # TRL does not know this family
        return None


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
        self._template = training_template(tokenizer) if assistant_only else None
        self._background = BackgroundEncoder(tokenizer)

    def start(self, chats: Sequence[Chat], tools: Sequence[Any]) -> Callable[[], list[MaskedChat | str]]:
        """Render chats, and encode them in the background.

        Returns:
            A function that waits and returns the ids and mask of each chat, or the reason why the template rejects it.

        Raises:
            TemplateProblem: the assistant mask is ambiguous, or the template exceeds the time limit; also raised by the
                returned function.
        """
        plain = [row for row, chat in enumerate(chats) if not tools[row] and self._is_plain(chat)]
        together: Callable[[], list[MaskedChat]] = list
        try:
            if plain:
                with template_time_limit(BATCH_SECONDS):
                    together = self._together([chats[row] for row in plain])
        except _REJECTED:  # at least one chat is rejected; find it by rendering them one by one
            plain = []

        def finish() -> list[MaskedChat | str]:
            found: list[MaskedChat | str | None] = [None] * len(chats)
            try:
                for row, marked in zip(plain, together(), strict=True):
                    found[row] = marked
            except _REJECTED:  # the tokenizer rejects a text
                found = [None] * len(chats)
            with template_time_limit(BATCH_SECONDS):
                return [
                    self._one(chats[row], tools[row]) if marked is None else marked for row, marked in enumerate(found)
                ]

        return finish

    def _together(self, chats: Sequence[Chat]) -> Callable[[], list[MaskedChat]]:
        """Render chats like `apply_chat_template`; the returned function waits for their ids and masks."""
        if rust_core(self._tokenizer) is None:
            marked = self._by_template(chats, None)
            return lambda: marked
        texts, spans = render_jinja_template(
            conversations=[_plain(chat) for chat in chats],
            chat_template=self._tokenizer.get_chat_template(self._template, None),
            return_assistant_tokens_mask=self._assistant_only,
            **self._tokenizer.special_tokens_map,
        )
        if not self._assistant_only:
            return self._background.start(_masked_texts, texts, None, self._tokenizer)
        each = zip(chats, texts, spans, strict=True)
        trained = [self._trained_spans(chat, None, text, found) for chat, text, found in each]
        return self._background.start(_masked_texts, texts, trained, self._tokenizer)

    def _is_plain(self, chat: Chat) -> bool:
        """Whether a chat can be rendered with others in one call."""
        if _may_be_left_out(chat):
            return False  # the rendered text is checked
        if self._assistant_only:
            return self._template is not None
        return all(turn.get("train", True) for turn in chat)

    def _one(self, chat: Chat, tools: Any) -> MaskedChat | str:
        partly = any(not turn.get("train", True) for turn in chat)
        try:
            if _may_be_left_out(chat) and (left_out := self._left_out(chat, tools)) is not None:
                return f"with {left_out} that the chat template leaves out"
            if not self._assistant_only:
                return (
                    mask_without_turns(chat, tools, self._tokenizer) if partly else self._by_template([chat], tools)[0]
                )
            if self._template is None or (partly and rust_core(self._tokenizer) is None):
                return assistant_mask_by_prefix(chat, tools, self._tokenizer)
            if not partly:
                return self._by_template([chat], tools)[0]
            text, spans = self._rendered(chat, tools)
            return _masked_texts([text], [self._trained_spans(chat, tools, text, spans)], self._tokenizer)[0]
        except _REJECTED as problem:
            fix = "; set dataset.turns: join" if is_irregular([turn["role"] for turn in chat]) else ""
            return f"rejected by the chat template ({' '.join(str(problem).split())[:100]}{fix})"

    def _left_out(self, chat: Chat, tools: Any) -> str | None:
        """What the template does not render: the message of a role, or a tool call; None if everything is there."""
        text = self._rendered(chat, tools, marked=False)[0]
        for turn in chat:
            if _visible(turn) not in text:
                return f"{'an' if turn['role'] == 'assistant' else 'a'} {turn['role']} message"
        named, names = _with_unique_names(chat)
        text = self._rendered(named, tools, marked=False)[0] if names else ""
        return None if all(name in text for name in names) else "a tool call"

    def _rendered(self, chat: Chat, tools: Any, *, marked: bool = True) -> tuple[str, list[Span]]:
        """The text of a chat in the template of the training, and the character spans that it marks."""
        texts, spans = render_jinja_template(
            conversations=[_plain(chat)],
            tools=tools,
            chat_template=self._tokenizer.get_chat_template(self._template, tools),
            return_assistant_tokens_mask=marked,
            **self._tokenizer.special_tokens_map,
        )
        return texts[0], spans[0] if marked else []

    def _trained_spans(self, chat: Chat, tools: Any, text: str, spans: list[Span]) -> list[Span]:
        """The spans of the trained messages among those that the template marks.

        A template may mark a message several times, or end it in the next one, so the end of each message is found by
        rendering the chat up to it.

        Raises:
            TemplateProblem: the spans of a message cannot be found.
        """
        answers = [number for number, turn in enumerate(chat) if turn["role"] == "assistant"]
        if all(chat[number].get("train", True) for number in answers):
            return spans
        if len(spans) == len(answers) and _has_answers(chat, text, answers, spans):
            of = answers  # without rendering each chat once per answer
        else:
            ends = [_common_prefix(text, self._rendered(chat[: at + 1], tools)[0]) for at in answers[:-1]]
            of = [answers[bisect_right(ends, start)] for start, _ in spans]
        if not _has_answers(chat, text, of, spans):
            raise TemplateProblem(
                "the chat template renders earlier messages differently in a longer chat, so it is ambiguous which "
                "tokens a loss flag excludes; set model.chat_template to a template that renders each message "
                "independently of later ones, or remove the loss flags"
            )
        return [span for at, span in zip(of, spans, strict=True) if chat[at].get("train", True)]

    def _by_template(self, chats: Sequence[Chat], tools: Any) -> list[MaskedChat]:
        encoded = self._tokenizer.apply_chat_template(
            [_plain(chat) for chat in chats],
            tools=tools,
            chat_template=self._template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=self._assistant_only,
        )
        ids = encoded["input_ids"]
        if not self._assistant_only:
            return [(row, [1] * len(row)) for row in ids]
        return list(zip(ids, encoded["assistant_masks"], strict=True))


def _masked_texts(
    texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]] | None, tokenizer: PreTrainedTokenizerBase
) -> list[MaskedChat]:
    """Ids of rendered chats, and masks of the character spans; all tokens if `spans` is None.

    Source: the mask of `PreTrainedTokenizerBase.apply_chat_template`, which takes twice as long.
    """
    if spans is None:
        return [(ids, [1] * len(ids)) for ids in encode(texts, tokenizer, special=False)]
    encoded = rust_core(tokenizer).encode_batch(list(texts), add_special_tokens=False)
    return [(one.ids, _mask(one, inside)) for one, inside in zip(encoded, spans, strict=True)]


def _mask(encoded: Any, spans: Sequence[tuple[int, int]]) -> list[int]:
    mask = [0] * len(encoded)
    for start, end in spans:
        first, last = encoded.char_to_token(start), encoded.char_to_token(end - 1)
        if first is None:
            break
        stop = last + 1 if last else len(mask)
        mask[first:stop] = [1] * (stop - first)
    return mask


def assistant_mask_by_prefix(chat: Chat, tools: Any, tokenizer: PreTrainedTokenizerBase) -> MaskedChat:
    """The assistant mask of a template without generation markers, found by rendering each prefix of the chat.

    Raises:
        TemplateProblem: a prefix of the chat does not render as a prefix of the text, so the mask is ambiguous.
        TemplateError: the template rejects the chat.
    """
    whole = render(chat, tools, tokenizer)
    spans = []
    for number, turn in enumerate(chat):
        if turn["role"] != "assistant" or not turn.get("train", True):
            continue
        before = render(chat[:number], tools, tokenizer, prompt=True)
        after = render(chat[: number + 1], tools, tokenizer)
        if not (whole.startswith(after) and after.startswith(before)):
            raise TemplateProblem(
                "the chat template renders earlier turns differently in a longer chat, so the assistant mask is "
                "ambiguous; set model.chat_template to a template with {% generation %} markers, or set "
                "trainer.assistant_only_loss: false"
            )
        spans.append((len(before), len(after)))
    return _mask_spans(whole, spans, tokenizer)


def mask_without_turns(chat: Chat, tools: Any, tokenizer: PreTrainedTokenizerBase) -> MaskedChat:
    """All tokens trained, except those of the messages with `train: false`, found by rendering prefixes of the chat.

    Raises:
        TemplateProblem: a prefix of the chat does not render as a prefix of the text, so the mask is ambiguous.
        TemplateError: the template rejects the chat.
    """
    whole = render(chat, tools, tokenizer)
    spans, start = [], 0
    for trained, group in groupby(range(len(chat)), key=lambda number: chat[number].get("train", True)):
        last = list(group)[-1]
        if last + 1 == len(chat):
            end = len(whole)
        else:
            # A generation prompt belongs to what the assistant reads.
            answers = chat[last + 1]["role"] == "assistant" and not trained
            text = render(chat[: last + 1], tools, tokenizer, prompt=answers)
            if not whole.startswith(text):
                raise TemplateProblem(
                    "the chat template renders earlier messages differently in a longer chat, so it is ambiguous which "
                    "tokens a loss flag excludes; remove trainer.assistant_only_loss: false, or the loss flags"
                )
            end = len(text)
        spans += [(start, end)] if trained else []
        start = end
    return _mask_spans(whole, spans, tokenizer)


def _common_prefix(text: str, other: str) -> int:
    """Length of the common prefix."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((at for at, (one, two) in pairs if one != two), min(len(text), len(other)))


def _has_answers(chat: Chat, text: str, of: Sequence[int], spans: Sequence[Span]) -> bool:
    """Whether the spans of each assistant message have its text.

    Args:
        text: the rendered chat.
        of: the message of each span.
    """
    marked: dict[int, str] = {}
    for at, (start, end) in zip(of, spans, strict=True):
        marked[at] = marked.get(at, "") + text[start:end]
    return all(_visible(turn) in marked.get(at, "") for at, turn in enumerate(chat) if turn["role"] == "assistant")


def _may_be_left_out(chat: Chat) -> bool:
    """Whether the chat has messages that some templates skip: in an unusual order, with tool calls or their results."""
    roles = [turn["role"] for turn in chat]
    return is_irregular(roles) or "tool" in roles or any(turn.get("tool_calls") for turn in chat)


def _visible(turn: Mapping[str, Any]) -> str:
    """The text of a message that a template renders, which may remove its reasoning."""
    return str(turn["content"]).rpartition("</think>")[2].strip()


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


def _mask_spans(text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase) -> MaskedChat:
    """Ids of a text, and a mask of exactly the character spans.

    A token that crosses the boundary of a span would train a part of the prompt, or miss a part of the answer. In this
    case the pieces are encoded separately, as in generation, where the prompt also ends at that boundary.

    Raises:
        TemplateProblem: the separately encoded pieces decode to another text.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    offsets = encoded["offset_mapping"]
    edges = {edge for span in spans for edge in span}
    if not any(left < edge < right for left, right in offsets for edge in edges):
        inside = [any(start <= left and right <= end for start, end in spans) for left, right in offsets]
        return ids, [int(bit and right > left) for bit, (left, right) in zip(inside, offsets, strict=True)]
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


def _plain(chat: Chat) -> Chat:
    """The chat without our `train` flags and without null values."""
    return [{key: value for key, value in turn.items() if key != "train" and value is not None} for turn in chat]
