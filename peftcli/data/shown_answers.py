"""Finds the text of a chat that is trained, and compares it with what evaluation and inference ask.

An answer is trained only where the text of the chat shows it as the model generates it: after the prompt that the
template writes for this turn, and with its reasoning. Templates often leave the reasoning out of earlier turns. Such an
answer is context only: trained as it is shown, it would teach the model to answer without reasoning.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import has_generation_markers

from peftcli.data.template_settings import NO_TOKENS, marked_template, settings_of
from peftcli.errors import DataError

Chat: TypeAlias = list[dict[str, Any]]
Span: TypeAlias = tuple[int, int]

REJECTED = (TemplateError, ValueError, TypeError)
"""Errors of templates and tokenizers for a chat that they do not support."""
KEYS, CONTENT, NOWHERE = "keys", "content", "nowhere"

_EMPTY_BLOCK = re.compile(r"(\s*)<think>\s*</think>\s*")
_EMPTY_END = re.compile(r"\s*</think>\s*")
_AROUND = 40
"""Characters shown before and after the first difference of two texts."""
_PROBE = "Zyxwv."


class TemplateProblem(DataError):
    """The chat template is missing, or cannot be used for training."""


@dataclass(frozen=True)
class Mismatch:
    """Where the text that is trained differs from the prompt that evaluation asks.

    Attributes:
        turn: index of the message.
        trained: of the text that is trained, around the first difference.
        asked: of the prompt that evaluation asks, at the same place.
        reason: why, in a few words.
    """

    turn: int
    trained: str
    asked: str
    reason: str


@dataclass(frozen=True)
class ShownChat:
    """The text of a chat, and its trained parts.

    Attributes:
        text: what the model sees.
        spans: the trained answers, as character positions.
        context_only: some answers are not trained because the text shows them differently.
        mismatch: of the last answer; None if the text is the prompt that evaluation asks, followed by the answer.
        by_markers: the spans are those of generation markers, so that a token belongs to a span that it touches.
    """

    text: str
    spans: list[Span]
    context_only: bool = False
    mismatch: Mismatch | None = None
    by_markers: bool = False


def template_of(tokenizer: PreTrainedTokenizerBase, tools: Any) -> str:
    """The tokenizer's chat template; with tools that for tools, where there are several."""
    return str(tokenizer.get_chat_template(None, tools))


def render_chat(
    chat: Chat, tools: Any, tokenizer: PreTrainedTokenizerBase, template: str | None = None, *, prompt: bool = False
) -> str:
    """Render a chat with a template, that of the tokenizer by default; with `prompt`, add the generation prompt.

    Raises:
        TemplateError: the template rejects the chat.
    """
    template = template_of(tokenizer, tools) if template is None else template
    texts, _ = render_jinja_template(
        conversations=[plain_chat(chat, template)],
        tools=tools,
        chat_template=template,
        add_generation_prompt=prompt,
        **tokenizer.special_tokens_map,
    )
    return str(texts[0])


def plain_chat(chat: Chat, template: str) -> Chat:
    """The chat without our own keys and null values, with its reasoning where the template reads it."""
    plain = [{key: value for key, value in turn.items() if key != "train" and value is not None} for turn in chat]
    if not has_reasoning(chat):
        return plain
    place = reasoning_place(template)
    if place == NOWHERE:
        return without_reasoning(plain)
    if place == CONTENT:
        return [_in_content(turn) for turn in plain]
    return [turn | {"thinking": turn["reasoning_content"]} if "reasoning_content" in turn else turn for turn in plain]


def has_reasoning(chat: Chat) -> bool:
    """Whether a message has reasoning."""
    return any(turn.get("reasoning_content") for turn in chat)


def without_reasoning(chat: Chat) -> Chat:
    """The chat without reasoning."""
    return [{key: value for key, value in turn.items() if key != "reasoning_content"} for turn in chat]


def _in_content(turn: dict[str, Any]) -> dict[str, Any]:
    reasoning = turn.get("reasoning_content")
    kept = {key: value for key, value in turn.items() if key != "reasoning_content"}
    return kept | {"content": f"<think>\n{reasoning}\n</think>\n\n{turn['content']}"} if reasoning else kept


@lru_cache(maxsize=16)
def reasoning_place(template: str) -> str:
    """Where a template reads the reasoning of an answer: under keys of its own, in its content, or nowhere."""
    turn = {"role": "assistant", "content": "Two.", "reasoning_content": _PROBE}
    user = {"role": "user", "content": "One?"}
    for place, written in ((KEYS, turn | {"thinking": _PROBE}), (CONTENT, _in_content(turn))):
        try:
            texts, _ = render_jinja_template(conversations=[[user, written]], chat_template=template, **NO_TOKENS)
        except REJECTED:
            continue
        if _PROBE in texts[0]:
            return place
    return NOWHERE


class _Renders:
    """The renders of one chat, each made once."""

    def __init__(self, chat: Chat, tools: Any, tokenizer: PreTrainedTokenizerBase, tokens: dict[str, Any]) -> None:
        self.chat = chat
        self.answers = [number for number, turn in enumerate(chat) if turn["role"] == "assistant"]
        self._tools = tools
        self._tokens = tokens
        self._template = template_of(tokenizer, tools)
        self._texts: dict[tuple[int, bool], str] = {}

    def text(self, count: int) -> str:
        """The first messages of the chat."""
        return self._render(count, prompt=False)

    def prompt(self, number: int) -> str | None:
        """What is asked for the answer at `number`; None if the template rejects it."""
        try:
            return self._render(number, prompt=True)
        except REJECTED:
            return None

    def _render(self, count: int, *, prompt: bool) -> str:
        key = (count, prompt)
        if key not in self._texts:
            self._texts[key] = self._rendered(self.chat[:count], self._template, add_generation_prompt=prompt)[0]
        return self._texts[key]

    def with_template(self, chat: Chat, template: str) -> str:
        """A chat with another template."""
        return self._rendered(chat, template)[0]

    def marked(self, template: str) -> tuple[str, list[Span]]:
        """The chat with a template that has generation markers, and the marked characters."""
        text, marks = self._rendered(self.chat, template, return_assistant_tokens_mask=True)
        return text, [(start, end) for start, end in marks if end > start]

    def _rendered(self, chat: Chat, template: str, **arguments: Any) -> tuple[str, Sequence[Span]]:
        texts, marks = render_jinja_template(
            conversations=[plain_chat(chat, template)],
            tools=self._tools,
            chat_template=template,
            **arguments,
            **self._tokens,
        )
        return str(texts[0]), marks[0] if marks else ()


class AnswerFinder:
    """Finds the trained parts of chats for one tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, assistant_only: bool) -> None:
        self._tokenizer = tokenizer
        self._tokens = dict(tokenizer.special_tokens_map)
        self._assistant_only = assistant_only
        template = template_of(tokenizer, None)
        self._marked = marked_template(template)
        self._own_markers = has_generation_markers(template)
        thinking = settings_of(template).get("thinking")
        self._keeps, self._omits = thinking == "keep", thinking == "drop"

    def find(self, chat: Chat, tools: Any) -> ShownChat:
        """The text of a chat and its trained parts.

        Raises:
            TemplateProblem: the template has no generation markers, and its earlier turns cannot be found.
            TemplateError: the template rejects the chat.
        """
        one = _Renders(without_reasoning(chat) if self._omits else chat, tools, self._tokenizer, self._tokens)
        found = self._by_markers(one) or self._by_prompts(one)
        if self._assistant_only:
            return found
        return ShownChat(found.text, [(0, len(found.text))], mismatch=found.mismatch, by_markers=True)

    def _by_markers(self, one: _Renders) -> ShownChat | None:
        """From generation markers, if they mark each answer where evaluation asks for it; else None."""
        if self._marked is None:
            return None
        text, marks = one.marked(self._marked)
        if not self._own_markers and text != one.text(len(one.chat)):
            return None
        prompts = [one.prompt(number) for number in one.answers]
        starts = [len(prompt) for prompt in prompts if prompt is not None and text.startswith(prompt)]
        if len(starts) != len(one.answers):
            return None
        spans = []
        for place, number in enumerate(one.answers):
            following = starts[place + 1] if place + 1 < len(starts) else len(text)
            inside = [(max(start, starts[place]), end) for start, end in marks if starts[place] < end <= following]
            if not inside or not self._is_generated(text, starts[place], inside, one.chat[number]):
                return None
            if one.chat[number].get("train", True):
                spans += _joined(inside)
        return ShownChat(text, spans, by_markers=True)

    def _is_generated(self, text: str, start: int, marks: Sequence[Span], turn: dict[str, Any]) -> bool:
        """Whether the marked text follows the prompt, with the reasoning of the answer and without an empty block."""
        if marks[0][0] != start:  # the text between them would be neither asked nor generated
            return False
        if reasoning := turn.get("reasoning_content"):
            return _contains(text[start : marks[-1][1]], str(reasoning))
        return self._keeps or not (_EMPTY_BLOCK.match(text, start) or _EMPTY_END.match(text, start))

    def _by_prompts(self, one: _Renders) -> ShownChat:
        """From the prompt of each answer, and the answer as it is generated after it."""
        last = max(number for number in one.answers if one.chat[number].get("train", True) or number == one.answers[0])
        text, mismatch = self._generated(one, last)  # what follows the last trained answer is not needed
        if self._own_markers:
            return self._within_markers(one, last, mismatch)
        prompt = one.prompt(last) or ""
        if mismatch is not None:
            self._refuse_ambiguous(text + prompt)
        spans = []
        context_only = False
        for number in [number for number in one.answers if number < last]:
            if not one.chat[number].get("train", True):
                continue
            shown, problem = self._generated(one, number)
            if problem is None and text.startswith(shown):
                spans.append((len(one.prompt(number) or ""), len(shown)))
            else:
                self._refuse_ambiguous(shown)
                context_only = True
        if one.chat[last].get("train", True):
            spans.append((len(prompt) if mismatch is None else self._start(text, prompt), len(text)))
        return ShownChat(text, spans, context_only, mismatch)

    def _within_markers(self, one: _Renders, last: int, mismatch: Mismatch | None) -> ShownChat:
        """The marks of the template's own markers, without answers whose reasoning it leaves out."""
        assert self._marked is not None  # the template's own
        text, marks = one.marked(self._marked)
        context_only = False
        spans: list[Span] = []
        ends = [*(len(one.prompt(number) or "") for number in one.answers[1:]), len(text)]
        for number, until in zip(one.answers, ends, strict=True):
            inside = [mark for mark in marks if mark[1] <= until]
            marks = marks[len(inside) :]
            shown, problem = self._generated(one, number)
            if one.chat[number].get("reasoning_content") and (problem is not None or not text.startswith(shown)):
                context_only = True
            elif one.chat[number].get("train", True):
                spans += inside
        gap = self._gap(text, spans, one.prompt(last), last)
        return ShownChat(text, spans, context_only, mismatch or gap, by_markers=True)

    def _gap(self, text: str, spans: Sequence[Span], prompt: str | None, turn: int) -> Mismatch | None:
        """Text between the prompt that is asked and the first trained character, which nobody writes at inference."""
        after = [start for start, end in spans if prompt is not None and end > len(prompt)]
        if prompt is None or not after or min(after) <= len(prompt):
            return None
        trained = text[max(0, len(prompt) - _AROUND) : min(after) + _AROUND]
        return Mismatch(turn, trained, prompt[-_AROUND:], "the prompt lacks the text before the answer")

    def _generated(self, one: _Renders, number: int) -> tuple[str, Mismatch | None]:
        """The text up to the end of an answer, as it is generated: its prompt, its reasoning and its content."""
        turn, prompt, own = one.chat[number], one.prompt(number), one.text(number + 1)
        if prompt is None:
            return own, Mismatch(number, own[-2 * _AROUND :], "", "the template renders no prompt for it")
        reasoning = str(turn.get("reasoning_content") or "")
        for text in self._candidates(one, number, own):
            if text.startswith(prompt) and _contains(text[len(prompt) :], reasoning):
                return self._without_empty_block(text, prompt, turn, number)
        if own.startswith(prompt):
            hidden = own[max(0, len(prompt) - _AROUND) : len(prompt) + _AROUND]
            return own, Mismatch(number, hidden, reasoning[:_AROUND], "the template leaves out its reasoning")
        trained, asked = _difference(own, prompt)
        return own, Mismatch(number, trained, asked, "the trained text is not the prompt followed by the answer")

    def _candidates(self, one: _Renders, number: int, own: str) -> Iterator[str]:
        yield own
        if self._marked is not None and not self._own_markers:
            # A training template may show reasoning that the template itself leaves out even of the last answer.
            try:
                yield one.with_template([*without_reasoning(one.chat[:number]), one.chat[number]], self._marked)
            except REJECTED:
                return

    def _without_empty_block(
        self, text: str, prompt: str, turn: dict[str, Any], number: int
    ) -> tuple[str, Mismatch | None]:
        """The text without an empty think block between prompt and answer, which is neither asked nor an answer."""
        if turn.get("reasoning_content") or self._keeps or self._own_markers:
            return text, None
        if block := _EMPTY_BLOCK.match(text, len(prompt)):
            return text[: block.end(1)] + text[block.end() :], None
        if _EMPTY_END.match(text, len(prompt)):
            trained = text[max(0, len(prompt) - _AROUND) : len(prompt) + _AROUND]
            reason = "the prompt opens a think block, and the answer has no reasoning"
            return text, Mismatch(number, trained, prompt[-_AROUND:], reason)
        return text, None

    def _start(self, text: str, prompt: str) -> int:
        """Where an answer begins that does not follow the prompt exactly; an empty think block is not trained."""
        start = _common(text, prompt)
        end = _EMPTY_END.match(text, start)
        return end.end() if end is not None else start

    def _refuse_ambiguous(self, shown: str) -> None:
        """Refuse a template without markers whose turns change with what follows, other than in their reasoning."""
        if self._marked is not None or "think" in shown:
            return
        raise TemplateProblem(
            "the chat template renders earlier turns differently in a longer chat, so the assistant mask is "
            "ambiguous; set model.chat_template to a template with {% generation %} markers, or set "
            "trainer.assistant_only_loss: false"
        )


def _joined(spans: Sequence[Span]) -> list[Span]:
    """The spans, with those that touch joined to one."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _contains(text: str, reasoning: str) -> bool:
    return "".join(reasoning.split()) in "".join(text.split()) if reasoning else True


def _common(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


def _difference(one: str, other: str) -> tuple[str, str]:
    place = max(0, _common(one, other) - _AROUND)
    return one[place : place + 2 * _AROUND], other[place : place + 2 * _AROUND]
