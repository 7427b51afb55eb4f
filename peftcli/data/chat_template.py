"""Tokenizes chats and marks the assistant tokens: by the chat template, or by rendering prefixes."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from peftcli.data.encode import BATCH_SECONDS, BackgroundEncoder, encode, rust_core, template_time_limit
from peftcli.errors import DataError

Chat: TypeAlias = list[dict[str, Any]]
MaskedChat: TypeAlias = tuple[list[int], list[int]]
"""Ids of a chat, and a 1 for each that is trained."""

_REFUSED = (TemplateError, ValueError, TypeError)
"""What templates and tokenizers raise on a chat that they do not take."""


def read_chats(columns: Mapping[str, Sequence[str]]) -> tuple[list[Chat], list[Any]]:
    """The chats of a batch of examples and, for each, its tools or None."""
    tools = columns.get("tools") or [""] * len(columns["messages"])
    return [json.loads(text) for text in columns["messages"]], [json.loads(text) if text else None for text in tools]


def render(chat: Chat, tools: Any, tokenizer: PreTrainedTokenizerBase, *, prompt: bool = False) -> str:
    """A chat as the template writes it; with `prompt`, up to where the assistant begins to speak.

    Raises:
        TemplateError: the template refuses the chat.
    """
    return str(tokenizer.apply_chat_template(_plain(chat), tools=tools, tokenize=False, add_generation_prompt=prompt))


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A template that marks the assistant's turns: the tokenizer's own, TRL's for a known family, or None."""
    if has_generation_markers(tokenizer.chat_template):
        return str(tokenizer.chat_template)
    try:
        return str(get_training_chat_template(tokenizer))
    except ValueError:  # TRL's way to say that it does not know this family
        return None


def last_answer(chat: Chat) -> int:
    """Number of the assistant's last turn that says something, from 0."""
    said = [number for number, turn in enumerate(chat) if turn["role"] == "assistant" and turn["content"].strip()]
    return said[-1] if said else max(number for number, turn in enumerate(chat) if turn["role"] == "assistant")


class ChatEncoder:
    """Turns chats into ids and marks, with one template for all of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, assistant_only: bool) -> None:
        """
        Raises:
            DataError: the tokenizer has no chat template.
        """
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, and the data are chats; set model.chat_template to a Jinja file, "
                "or make texts of the chats with dataset.prompt and dataset.completion"
            )
        self._tokenizer = tokenizer
        self._assistant_only = assistant_only
        self._template = training_template(tokenizer) if assistant_only else None
        self._aside = BackgroundEncoder(tokenizer)

    def start(self, chats: Sequence[Chat], tools: Sequence[Any]) -> Callable[[], list[MaskedChat | str]]:
        """Render chats, and encode them aside.

        Returns:
            What waits for the ids and marks of each chat, or the reason why the template takes it not.

        Raises:
            DataError: the assistant's turns cannot be told apart with certainty, or the template does not end its
                work; also from what is returned.
        """
        plain = [
            row for row, chat in enumerate(chats) if not tools[row] and all(turn.get("train", True) for turn in chat)
        ]
        if self._assistant_only and self._template is None:
            plain = []
        together: Callable[[], list[MaskedChat]] = list
        try:
            if plain:
                with template_time_limit(BATCH_SECONDS):
                    together = self._together([chats[row] for row in plain])
        except _REFUSED:  # one of them; which is found out one by one
            plain = []

        def finish() -> list[MaskedChat | str]:
            found: list[MaskedChat | str | None] = [None] * len(chats)
            try:
                for row, marked in zip(plain, together(), strict=True):
                    found[row] = marked
            except _REFUSED:  # a text that the tokenizer takes not
                found = [None] * len(chats)
            with template_time_limit(BATCH_SECONDS):
                return [
                    self._one(chats[row], tools[row]) if marked is None else marked for row, marked in enumerate(found)
                ]

        return finish

    def _together(self, chats: Sequence[Chat]) -> Callable[[], list[MaskedChat]]:
        """Render chats as `apply_chat_template` does; what is returned waits for their ids and marks."""
        if rust_core(self._tokenizer) is None:
            marked = self._by_template(chats, None)
            return lambda: marked
        texts, spans = render_jinja_template(
            conversations=[_plain(chat) for chat in chats],
            chat_template=self._tokenizer.get_chat_template(self._template, None),
            return_assistant_tokens_mask=self._assistant_only,
            **self._tokenizer.special_tokens_map,
        )
        return self._aside.start(_masked_texts, texts, spans if self._assistant_only else None, self._tokenizer)

    def _one(self, chat: Chat, tools: Any) -> MaskedChat | str:
        partly = any(not turn.get("train", True) for turn in chat)
        try:
            if self._assistant_only and (self._template is None or partly):
                return assistant_mask_by_prefix(chat, tools, self._tokenizer)
            return self._by_template([chat], tools)[0]
        except _REFUSED as problem:
            return f"refused by the chat template ({' '.join(str(problem).split())[:100]})"

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
    """Ids of rendered chats, and marks on the characters of the spans; on all where there are none.

    Source: the mask of `PreTrainedTokenizerBase.apply_chat_template`, which takes the texts twice as long.
    """
    if spans is None:
        return [(ids, [1] * len(ids)) for ids in encode(texts, tokenizer, special=False)]
    encoded = rust_core(tokenizer).encode_batch(list(texts), add_special_tokens=False)
    return [(one.ids, _marks(one, inside)) for one, inside in zip(encoded, spans, strict=True)]


def _marks(encoded: Any, spans: Sequence[tuple[int, int]]) -> list[int]:
    marks = [0] * len(encoded)
    for start, end in spans:
        first, last = encoded.char_to_token(start), encoded.char_to_token(end - 1)
        if first is None:
            break
        stop = last + 1 if last else len(marks)
        marks[first:stop] = [1] * (stop - first)
    return marks


def assistant_mask_by_prefix(chat: Chat, tools: Any, tokenizer: PreTrainedTokenizerBase) -> MaskedChat:
    """Find the assistant's turns of a template without marks by rendering the chat up to each of them.

    Raises:
        DataError: a shorter chat does not render as the beginning of the longer one, so the turns cannot be told.
        TemplateError: the template refuses the chat.
    """
    whole = render(chat, tools, tokenizer)
    spans = []
    for number, turn in enumerate(chat):
        if turn["role"] != "assistant" or not turn.get("train", True):
            continue
        before = render(chat[:number], tools, tokenizer, prompt=True)
        after = render(chat[: number + 1], tools, tokenizer)
        if not (whole.startswith(after) and after.startswith(before)):
            raise DataError(
                "the chat template renders earlier turns differently in a longer chat, so the assistant's turns cannot "
                "be told apart with certainty; give model.chat_template a template with {% generation %} marks, or set "
                "trainer.assistant_only_loss: false"
            )
        spans.append((len(before), len(after)))
    return _mask_spans(whole, spans, tokenizer)


def _mask_spans(text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase) -> MaskedChat:
    """Ids of a text, and marks on the characters of the spans and no other.

    A token that reaches over the edge of a span would train a part of the prompt, or leave out a part of the answer.
    Then the pieces are encoded apart, which is also what generation sees: a prompt that ends at that edge.

    Raises:
        DataError: the pieces do not add up to the text.
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
    marks: list[int] = []
    for start, end in pairwise(cuts):
        piece = tokenizer(text[start:end], add_special_tokens=False)["input_ids"]
        pieces += piece
        marks += [int((start, end) in spans)] * len(piece)
    if tokenizer.decode(pieces) != tokenizer.decode(ids):
        raise DataError(
            "a token reaches over the edge of an assistant's turn and the tokenizer cannot encode the turns apart; end "
            "the generation prompt of the chat template on a special token or a line break"
        )
    return pieces, marks


def _plain(chat: Chat) -> Chat:
    """The chat without our own word on whether a turn is trained, and without keys that hold nothing."""
    return [{key: value for key, value in turn.items() if key != "train" and value is not None} for turn in chat]
