"""Loss flags: which messages are trained, and that the mask is that of plain transformers without the others."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import trl

from peftcli.data.chat_template import last_answer
from peftcli.data.formats import Examples, Given, choose_text_format
from peftcli.data.rows import Rows
from peftcli.data.tokenize import TokenizeStep
from peftcli.errors import DataError
from peftcli.plan.plan import LossMask
from peftcli.recipe.schema import DatasetSection

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Name a fruit."},
    {"role": "assistant", "content": "A brick."},
    {"role": "user", "content": "That is no fruit."},
    {"role": "assistant", "content": "Sorry: apple."},
]


def read(*rows: dict[str, Any], assistant_only: bool = True, **keys: Any) -> Examples:
    names = dict.fromkeys(name for row in rows for name in row)
    given = Rows("a.jsonl", list(range(1, len(rows) + 1)), {name: [row.get(name) for row in rows] for name in names})
    rule = Given(LossMask(True, assistant_only, (), 1024), None, {}, chats=True)
    section = DatasetSection.model_validate({"path": "a", **keys})
    return choose_text_format(given, section, rule).examples(given)


def trained(examples: Examples, row: int = 0) -> list[bool]:
    """Whether each assistant message of a row is trained."""
    chat = json.loads(examples.columns["messages"][row])
    return [turn.get("train", True) for turn in chat if turn["role"] == "assistant"]


def flagged(key: str, first: Any, last: Any) -> list[dict[str, Any]]:
    return [CHAT[0], CHAT[1] | {key: first}, CHAT[2], CHAT[3] | {key: last}]


@pytest.mark.parametrize("key", ["train", "trainable", "training", "train_on_turn", "loss", "loss_mask", "weight"])
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (False, True), (0.0, 1.0), ("false", "True"), ("0", None)])
def test_a_message_is_trained_as_its_flag_says(key: str, no: Any, yes: Any) -> None:
    assert trained(read({"messages": flagged(key, no, yes)})) == [False, True]
    assert trained(read({"messages": flagged(key, None, None)})) == [True, True]


@pytest.mark.parametrize(
    "row",
    [
        {"loss_mask": [0, 0, 0, 1]},
        {"loss_mask": [0, 1]},
        {"train_on_turn": "[false, false, false, true]"},
        {"weight": [None, 0, None, None]},
    ],
)
def test_a_list_beside_the_messages_marks_each_of_them(row: dict[str, Any]) -> None:
    made = read({"messages": CHAT, **row}, {"messages": CHAT})
    assert (trained(made), trained(made, 1)) == ([False, True], [True, True])


def test_a_number_beside_the_messages_is_no_list_of_flags() -> None:
    assert trained(read({"messages": CHAT, "loss": 1.7, "weight": 0.5})) == [True, True]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": flagged("weight", 0.5, 1)}, "with a message weight that is neither 0 nor 1"),
        ({"messages": flagged("loss", "maybe", 1)}, "with a message loss that is neither 0 nor 1"),
        ({"messages": CHAT, "loss_mask": [0, 0.3, 0, 1]}, "with a message loss_mask that is neither 0 nor 1"),
        ({"messages": CHAT, "loss_mask": [0, 1, 1]}, "with a loss_mask whose length is not the number of messages"),
        (
            {"messages": flagged("train", False, True), "loss_mask": [1, 1]},
            "with loss flags of a message that disagree",
        ),
        ({"messages": flagged("train", False, False)}, "without an assistant message to train"),
        (
            {"messages": [CHAT[0] | {"train": True}, CHAT[1]]},
            "with a user message that is marked to be trained (set trainer.assistant_only_loss: false)",
        ),
        (
            {"messages": flagged("train_detail", [{"begin_offset": 0, "end_offset": 3, "train": False}], None)},
            "with train_detail, which trains parts of a message; mark whole messages with train",
        ),
    ],
)
def test_a_flag_that_cannot_be_followed_drops_the_row(row: dict[str, Any], reason: str) -> None:
    made = read({"messages": CHAT, "loss_mask": [0, 0, 0, 1]}, row)
    assert made.kept == [0] and made.dropped == [(1, reason)]


@pytest.mark.parametrize(
    "row", [{"messages": flagged("loss_scale", "last_round", 1)}, {"messages": CHAT, "loss_scale": "react"}]
)
def test_a_loss_scale_of_ms_swift_is_refused_by_its_name(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"loss_scale: (last_round|react) is a setting of ms-swift; .*mask_history"):
        read(row)


def test_with_masked_history_only_the_last_answer_is_trained() -> None:
    assert trained(read({"messages": CHAT}, mask_history=True)) == [False, True]
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hi", "Ho"]]}
    assert trained(read(row, mask_history=True)) == [False, True]
    made = read({"messages": flagged("train", True, False)}, {"messages": CHAT}, mask_history=True)
    assert made.dropped == [(0, "without an assistant message to train")]


def test_the_report_names_the_flags_that_are_read() -> None:
    rows = Rows("a.jsonl", [1], {"messages": [flagged("loss", 0, 1)], "loss_mask": [[0, 0, 0, 1]]})
    given = Given(LossMask(True, True, (), 1024), None, {}, chats=True)
    found = choose_text_format(rows, DatasetSection(path="a"), given)
    assert found.said.endswith("with the loss flags in loss_mask and loss of a message")
    assert "loss_mask" in found.columns


def test_evaluation_asks_for_an_answer_that_is_trained() -> None:
    chat = json.loads(read({"messages": flagged("weight", 1, 0)}).columns["messages"][0])
    assert last_answer(chat) == 1


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


CALL = {"type": "function", "function": {"name": "drive", "arguments": {"north": 1}}}
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "Go there."},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "done", "name": "drive"},
    {"role": "tool", "content": "done", "name": "drive"},
    {"role": "assistant", "content": "I went there."},
]
TOOLS = [{"type": "function", "function": {"name": "drive", "description": "Go", "parameters": {}}}]


def runs(mask: list[int]) -> list[list[int]]:
    """The positions of each run of trained tokens."""
    groups = groupby(enumerate(mask), key=lambda pair: pair[1])
    return [[at for at, _ in group] for bit, group in groups if bit]


@pytest.mark.parametrize("chat", [CHAT, CALLS], ids=["chat", "calls"])
@pytest.mark.parametrize(
    "name",
    ["qwen3", "qwen2_5", "llama3", "gemma", "gemma3", "phi3", "cohere", "deepseekv3", "glm4moe", "gptoss", "lfm2_v2"],
)
@pytest.mark.parametrize("untrained", [0, 1])
def test_the_mask_is_that_of_transformers_without_the_untrained_message(
    name: str, chat: list[dict[str, Any]], untrained: int, tokenizer: Any
) -> None:
    """Each message is one run of trained tokens in the reference, since other roles are between the assistant's."""
    tokenizer.chat_template = (TEMPLATES / f"{name}_training.jinja").read_text(encoding="utf-8")
    tools = TOOLS if chat is CALLS else None
    if chat is CALLS and name in ("llama3", "gemma", "gemma3", "phi3", "cohere", "gptoss"):
        pytest.skip("the template has no tool calls, or only one per message")
    whole = tokenizer.apply_chat_template(
        chat, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    answers = [at for at, turn in enumerate(chat) if turn["role"] == "assistant"]
    # Two of these templates also mark the end of the generation prompt, which is read and not generated.
    prompt = tokenizer.apply_chat_template(
        chat[: answers[1 - untrained]], tools=tools, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    first = len(prompt) if name in ("qwen2_5", "gptoss") else 0
    expected = [0] * len(whole["input_ids"])
    for at in runs(whole["assistant_masks"])[1 - untrained]:
        expected[at] = int(at >= first)
    marked = [turn | ({"weight": 0} if at == answers[untrained] else {}) for at, turn in enumerate(chat)]
    made = read({"messages": marked, "tools": tools or []})
    batch = TokenizeStep("messages", tokenizer, LossMask(True, True, (), 4096)).batch(made.columns, None, None)
    assert batch.flat.tolist() == whole["input_ids"]
    assert batch.loss_mask.tolist() == [bool(bit) for bit in expected]


def test_flags_also_exclude_messages_when_all_roles_are_trained(tokenizer: Any) -> None:
    """The reference is the text before and after the excluded message, and the prompt of the answer is read only."""
    chat = [*flagged("train", False, True)[:3], {**CHAT[3]}]
    made = read({"messages": chat}, assistant_only=False)
    rule = LossMask(True, False, (), 4096)
    batch = TokenizeStep("messages", tokenizer, rule).batch(made.columns, None, None)
    whole = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert batch.flat.tolist() == whole
    text = tokenizer.decode([token for token, bit in zip(whole, batch.loss_mask, strict=True) if bit])
    assert "brick" not in text and "Name a fruit" in text and "no fruit" in text and "apple" in text


def test_of_a_prompt_of_messages_nothing_is_trained_when_all_roles_are(tokenizer: Any) -> None:
    """As in TRL, where `completion_only_loss` is the default for prompts with completions."""
    made = read({"prompt": CHAT[:3], "completion": CHAT[3:]}, assistant_only=False)
    batch = TokenizeStep("messages", tokenizer, LossMask(True, False, (), 4096)).batch(made.columns, None, None)
    text = tokenizer.decode([token for token, bit in zip(batch.flat, batch.loss_mask, strict=True) if bit])
    assert "apple" in text and "fruit" not in text and "brick" not in text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama3", "with a tool call that the chat template leaves out"),
        ("gptoss", "with a tool call that the chat template leaves out"),
        ("phi3", "with a tool message that the chat template leaves out"),
    ],
)
def test_a_tool_call_that_the_template_does_not_render_drops_the_row(name: str, reason: str, tokenizer: Any) -> None:
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    made = read({"messages": CALLS, "tools": TOOLS}, {"messages": CHAT, "tools": None})
    batch = TokenizeStep("messages", tokenizer, LossMask(True, True, (), 4096)).batch(made.columns, None, None)
    assert batch.dropped == [(0, reason)] and batch.of.tolist() == [1]
