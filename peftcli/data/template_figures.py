"""Figures about chat templates: chats trained with another text than evaluation asks, and answers not trained."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from peftcli.data.quality import hide_keys
from peftcli.data.rows import FIRST_PLACES
from peftcli.data.shown_answers import REJECTED, AnswerFinder, ShownChat, template_of
from peftcli.data.stats import Split
from peftcli.data.template_settings import settings_of, settle, split_settings, variables_of
from peftcli.errors import RecipeError
from peftcli.recipe.schema import LimitsSection

NO_FIX = (
    "set model.chat_template to a template whose generation prompt begins the answer as the rows have it, or change "
    "the reasoning in the rows"
)


def template_figures(train: Split, test: Split, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The figures of both splits, for `data.json`.

    Args:
        train, test: of chats; the test split may be empty.
    """
    mismatched = [split.flag("mismatched") for split in (train, test)]
    omitted = [split.flag("context_only") for split in (train, test)]
    first = [
        (split, int(row))
        for split, flags in zip((train, test), mismatched, strict=True)
        for row in np.flatnonzero(flags)[:FIRST_PLACES]
    ][:FIRST_PLACES]
    examples, fix = _examples(first, tokenizer)
    kept = [
        (split, int(row)) for split, flags in zip((train, test), omitted, strict=True) for row in np.flatnonzero(flags)
    ]
    places = train.places(np.flatnonzero(omitted[0])[:FIRST_PLACES]) + test.places(
        np.flatnonzero(omitted[1])[:FIRST_PLACES]
    )
    return {
        "template": settings_of(tokenizer.chat_template) or None,
        "template_mismatch_rows": int(mismatched[0].sum() + mismatched[1].sum()),
        "template_mismatch_examples": examples,
        "template_mismatch_fix": fix,
        "context_only_rows": int(omitted[0].sum() + omitted[1].sum()),
        "context_only_examples": places[:FIRST_PLACES],
        "context_only_fix": _fix(*_chat(*kept[0]), tokenizer, lambda one: not one.context_only) if kept else None,
    }


def template_warnings(facts: Mapping[str, Any]) -> list[str]:
    """Warnings about answers that are context only, and a date that the template writes."""
    warnings = []
    if facts["context_only_rows"]:
        count = facts["context_only_rows"]
        chats = "1 chat has an earlier answer" if count == 1 else f"{count:,} chats have earlier answers"
        warnings.append(
            f"{chats} that the chat template does not show as they are generated, with their reasoning or think block "
            f"(first {facts['context_only_examples'][0]}); they are context and not trained"
            + (f"; to train them too, {facts['context_only_fix']}" if facts["context_only_fix"] else "")
        )
    if date := (facts["template"] or {}).get("date"):
        warnings.append(
            f"the chat template writes the date: it is {date} in training, evaluation and the saved template"
        )
    return warnings


def crossed_mismatch(facts: Mapping[str, Any], limits: LimitsSection) -> list[str]:
    """One sentence if more chats than allowed are trained with another text than evaluation asks."""
    count, chats = facts.get("template_mismatch_rows", 0), facts["train_rows"] + facts["test_rows"]
    if count <= limits.max_template_mismatch * chats:
        return []
    first = facts["template_mismatch_examples"][0]
    return [
        f"{count:,} of {chats:,} chats are trained with another text than evaluation and inference ask "
        f"({count / chats:.1%}, dataset.limits.max_template_mismatch: {limits.max_template_mismatch:g}): "
        f"{first['place']}, message {first['turn'] + 1}: {first['reason']}: trained {first['trained']!r}, asked "
        f"{first['asked']!r}; {facts['template_mismatch_fix'] or NO_FIX}"
    ]


def _examples(
    rows: list[tuple[Split, int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[dict[str, Any]], str | None]:
    """Where the first chats differ, and the fix of the first."""
    examples: list[dict[str, Any]] = []
    fix = None
    for split, row in rows:
        messages, tools = _chat(split, row)
        found = AnswerFinder(tokenizer, assistant_only=True).find(messages, tools).mismatch
        if found is None:
            continue
        fix = fix or _fix(messages, tools, tokenizer, lambda one: one.mismatch is None)
        trained, asked = hide_keys([found.trained, found.asked])
        place = split.places([row])[0]
        examples.append(
            {"place": place, "turn": found.turn, "trained": trained, "asked": asked, "reason": found.reason}
        )
    return examples, fix


def _chat(split: Split, row: int) -> tuple[Any, Any]:
    """The messages and the tools of a row."""
    found = (split.store.examples.column(name)[int(split.rows[row])].as_py() for name in ("messages", "tools"))
    messages, tools = (json.loads(text) if text else None for text in found)
    return messages, tools


def _fix(
    messages: Any, tools: Any, tokenizer: PreTrainedTokenizerBase, is_good: Callable[[ShownChat], bool]
) -> str | None:
    """The keys of the recipe with which a chat is good; None if none of them helps."""
    template = template_of(tokenizer, tools)
    _, own = split_settings(template)
    for keys, changed in _changes(own, settings_of(template)):
        try:
            trial: Any = _Template(tokenizer, settle(own, changed))
            found = AnswerFinder(trial, assistant_only=True).find(messages, tools)
        except (*REJECTED, RecipeError):
            continue
        if found.mismatch is None and is_good(found):
            return f"set {keys}"
    return None


def _changes(own: str, settings: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Settings to try, with their keys in a recipe."""
    variables = dict(settings.get("variables") or {})
    off = settings | {"variables": variables | {"enable_thinking": False}}
    kept = settings | {"thinking": "keep"}
    changes = [("dataset.thinking: keep", kept), ("dataset.thinking: drop", settings | {"thinking": "drop"})]
    if "enable_thinking" not in variables_of(own) or variables.get("enable_thinking") is False:
        return changes
    key = "model.template: {enable_thinking: false}"
    return [(key, off), *changes, (f"{key} and dataset.thinking: keep", off | kept | {"variables": off["variables"]})]


class _Template:
    """A tokenizer with another chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self.chat_template = template
        self.special_tokens_map = tokenizer.special_tokens_map

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The template."""
        return self.chat_template
