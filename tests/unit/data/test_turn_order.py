"""`dataset.turns`: consecutive messages of one role, later system messages, and empty messages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trl

from peftcli.data.chat_formats import chat_prompt, normalize_messages
from peftcli.data.formats import Examples, Given, choose_text_format
from peftcli.data.rows import Rows
from peftcli.data.tokenize import TokenizedBatch, TokenizeStep
from peftcli.plan.plan import LossMask
from peftcli.recipe.schema import DatasetSection

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
RULE = LossMask(True, True, (), 4096)
HI = {"role": "user", "content": "Hi"}
THERE = {"role": "user", "content": "Are you there?"}
YES = {"role": "assistant", "content": "Yes."}
SORRY = {"role": "assistant", "content": "Sorry for the wait."}
ANGRY = {"role": "system", "content": "The user is angry."}


def call(north: int) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "drive", "arguments": {"north": north}}}


def read(*chats: list[dict[str, Any]], **keys: Any) -> Examples:
    rows = Rows("a.jsonl", list(range(1, len(chats) + 1)), {"messages": list(chats)})
    section = DatasetSection.model_validate({"path": "a", **keys})
    return choose_text_format(rows, section, Given(RULE, None, {}, chats=True)).examples(rows)


def chat_of(made: Examples, row: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(made.columns["messages"][row])
    return found


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def tokenized(tokenizer: Any) -> Callable[[str, Examples], TokenizedBatch]:
    def tokenize(template: str, made: Examples) -> TokenizedBatch:
        tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
        return TokenizeStep("messages", tokenizer, RULE).batch(made.columns, None, None)

    return tokenize


def test_joined_messages_are_one_with_a_blank_line_between() -> None:
    assert chat_of(read([HI, THERE, YES, SORRY, THERE, YES], turns="join")) == [
        {"role": "user", "content": "Hi\n\nAre you there?"},
        {"role": "assistant", "content": "Yes.\n\nSorry for the wait."},
        THERE,
        YES,
    ]
    assert chat_of(read([ANGRY, ANGRY, HI, YES], turns="join"))[0]["content"] == "\n\n".join([ANGRY["content"]] * 2)


def test_parallel_tool_calls_in_messages_of_their_own_are_joined_to_one() -> None:
    calls = [{"role": "assistant", "content": "", "tool_calls": [call(north)]} for north in (1, 2)]
    results = [{"role": "tool", "content": text} for text in ("rain", "sun")]
    turns = chat_of(read([HI, *calls, *results, YES], turns="join"))
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "tool", "assistant"]
    assert turns[1] == {"role": "assistant", "content": "", "tool_calls": [call(1), call(2)]}


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([HI, YES | {"train": False}, SORRY], "with consecutive assistant messages of which only some are trained"),
        (
            [HI, YES | {"tool_calls": [call(1)]}, SORRY],
            "with an assistant message after a tool call without a result",
        ),
        ([HI | {"name": "Ann"}, THERE | {"name": "Bob"}, YES], "with consecutive user messages of different names"),
    ],
)
def test_messages_that_cannot_be_one_drop_the_row(turns: list[dict[str, Any]], reason: str) -> None:
    made = read([HI, YES], turns, turns="join")
    assert made.kept == [0] and made.dropped == [(1, reason)]


def test_kept_messages_are_rendered_and_trained_one_by_one(
    tokenized: Callable[[str, Examples], TokenizedBatch], tokenizer: Any
) -> None:
    """The mask is that of plain transformers."""
    chat = [HI, THERE, YES, SORRY, ANGRY, HI, YES]
    made = read(chat, turns="keep")
    assert chat_of(made) == chat
    batch = tokenized("qwen3_training", made)
    whole = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert batch.flat.tolist() == whole["input_ids"]
    assert batch.loss_mask.tolist() == [bool(bit) for bit in whole["assistant_masks"]]


def test_one_call_per_message_is_kept_for_a_template_that_renders_no_more(
    tokenized: Callable[[str, Examples], TokenizedBatch], tokenizer: Any
) -> None:
    calls = [{"role": "assistant", "content": "", "tool_calls": [call(north)]} for north in (1, 2)]
    results = [{"role": "tool", "name": "drive", "content": text} for text in ("rain", "sun")]
    apart = read([HI, *calls, *results, YES], turns="keep")
    text = tokenizer.decode(tokenized("gptoss", apart).flat)
    assert '{"north": 1}' in text and '{"north": 2}' in text
    ((_, reason),) = tokenized("gptoss", read([HI, *calls, *results, YES], turns="join")).dropped
    assert reason == "with a tool call that the chat template leaves out"


def test_a_chat_that_ends_with_two_questions_trains_its_answer() -> None:
    assert chat_of(read([HI, YES, THERE, HI], turns="join"))[-1]["content"] == "Are you there?\n\nHi"


def test_kept_messages_that_the_template_refuses_name_the_key(
    tokenized: Callable[[str, Examples], TokenizedBatch],
) -> None:
    ((_, reason),) = tokenized("gemma", read([HI, THERE, YES], turns="keep")).dropped
    assert reason.startswith("rejected by the chat template (") and reason.endswith("; set dataset.turns: join)")
    assert not tokenized("gemma", read([HI, THERE, YES], turns="join")).dropped


def test_a_later_system_message_that_the_template_leaves_out_drops_the_row(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% elif m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    made = read([HI, YES, ANGRY, HI, YES], [HI, THERE, YES], turns="keep")
    batch = TokenizeStep("messages", tokenizer, RULE).batch(made.columns, None, None)
    assert batch.dropped == [(0, "with a system message that the chat template leaves out")]


@pytest.mark.parametrize("turns", [[HI, YES | {"content": ""}], [HI, YES | {"content": "\n"}, THERE, SORRY]])
@pytest.mark.parametrize("mode", ["refuse", "join", "keep"])
def test_an_empty_answer_is_called_one(turns: list[dict[str, Any]], mode: str) -> None:
    made = read([HI, YES], turns, turns=mode)
    assert made.kept == [0] and made.dropped == [(1, "with an empty assistant message")]


def test_an_empty_answer_that_is_not_trained_is_kept() -> None:
    assert read([HI, YES | {"content": "", "weight": 0}, THERE, SORRY]).dropped == []


def test_a_prompt_is_arranged_like_the_rows_of_the_training() -> None:
    assert chat_prompt(normalize_messages([HI, THERE, YES]), "join") == [
        {"role": "user", "content": "Hi\n\nAre you there?"}
    ]
    assert chat_prompt(normalize_messages([HI, THERE]), "keep") == [HI, THERE]
    assert chat_prompt(normalize_messages([HI, YES | {"content": ""}, THERE])) == [HI, YES | {"content": ""}, THERE]
