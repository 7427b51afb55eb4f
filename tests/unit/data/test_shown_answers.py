"""What is trained of a chat is what evaluation and inference ask, followed by the answer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pretrain_tiny_llama import make_causal_tokenizer
from template_parity import CHATS, FOLDER, PAGE, PLAIN, TEMPLATES, load, ours, page
from trl.chat_template_utils import has_generation_markers

from peftcli.data.chat_formats import normalize_messages
from peftcli.data.chat_template import last_answer, render
from peftcli.data.encode import encode
from peftcli.data.shown_answers import AnswerFinder
from peftcli.data.template_settings import marked_template, settings_of, settle
from peftcli.data.tokenize import TokenizedBatch, TokenizeStep
from peftcli.errors import RecipeError
from peftcli.plan.plan import LossMask

RULE = LossMask(completion_only=True, assistant_only=True, asked=(), max_length=4096)
REASONED = CHATS["reasoning in several turns"][0]
QWEN3 = (FOLDER / "qwen3.jinja").read_text(encoding="utf-8")
OFF = {"variables": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_causal_tokenizer(400, 512)


def with_template(tokenizer: Any, name: str, **settings: Any) -> Any:
    tokenizer.chat_template = load(name, **settings).chat_template
    return tokenizer


def encoded(tokenizer: Any, *chats: list[dict[str, Any]]) -> TokenizedBatch:
    columns = {"messages": [json.dumps(chat) for chat in chats]}
    return TokenizeStep("messages", tokenizer, RULE).batch(columns, None, None)


def trained_text(tokenizer: Any, batch: TokenizedBatch) -> str:
    return str(tokenizer.decode(batch.flat[batch.loss_mask], skip_special_tokens=False))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
def test_the_trained_text_begins_with_what_inference_asks_or_the_run_stops(name: str, chat: str) -> None:
    assert ours(load(name), *CHATS[chat]) in (
        "served",
        "served, 1 of 2 answers",
        "stops",
        "refused",
    )  # `ours` itself compares the two texts


def test_the_table_of_templates_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python scripts/template_parity.py --write"


@pytest.mark.parametrize(
    ("name", "of_prompt"),
    [
        ("cohere2", ""),
        ("gemma", ""),
        ("gemma3", ""),
        ("gptoss", "<|start|>assistant"),  # TRL marks this as generated, but inference asks it
        ("llama3", ""),
        ("phi3", ""),
        ("qwen2_5", "\n"),
    ],
)
def test_ids_and_mask_are_those_of_transformers_where_the_template_has_marks(
    tokenizer: Any, name: str, of_prompt: str
) -> None:
    with_template(tokenizer, name)
    marked = marked_template(tokenizer.chat_template)
    batch = encoded(tokenizer, PLAIN)
    plain = tokenizer.apply_chat_template(
        PLAIN, chat_template=marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert batch.flat.tolist() == plain["input_ids"]
    theirs = np.array(plain["assistant_masks"], bool)
    assert not (batch.loss_mask & ~theirs).any()
    assert tokenizer.decode(batch.flat[theirs & ~batch.loss_mask], skip_special_tokens=False) == 2 * of_prompt
    assert render(PLAIN[:1], None, tokenizer, prompt=True).endswith(of_prompt)
    assert not batch.flags["mismatched"].any() and not batch.flags["context_only"].any()


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ids_of_a_prompt_are_the_beginning_of_the_trained_row(tokenizer: Any, name: str) -> None:
    with_template(tokenizer, name)
    chat = CHATS["reasoning"][0]
    batch = encoded(tokenizer, chat)
    prompt = encode([render(chat[: last_answer(chat)], None, tokenizer, prompt=True)], tokenizer, special=False)[0]
    assert batch.flat[: len(prompt)].tolist() == prompt
    assert not batch.loss_mask[: len(prompt)].any() and batch.loss_mask[len(prompt)]
    assert "One and one more." in trained_text(tokenizer, batch)


def test_reasoning_is_read_alike_wherever_the_row_has_it() -> None:
    content = {"role": "assistant", "content": "4"}
    spellings = [
        content | {"reasoning_content": "Twice 2."},
        content | {"thinking": "Twice 2."},
        content | {"content": "<think>\nTwice 2.\n</think>\n\n4"},
        content | {"content": "Twice 2.\n</think>\n\n4"},
    ]
    expected = content | {"reasoning_content": "Twice 2."}
    assert [normalize_messages([turn]) for turn in spellings] == [[expected]] * 4
    assert normalize_messages([content | {"content": "<think>\n\n</think>\n\n4"}]) == [content]
    quoted = content | {"content": "Write <think> before </think>."}
    assert normalize_messages([quoted]) == [quoted]


def test_an_earlier_answer_without_its_reasoning_is_context_only(tokenizer: Any) -> None:
    with_template(tokenizer, "qwen3")
    batch = encoded(tokenizer, REASONED)
    assert batch.flags["context_only"].all() and not batch.flags["mismatched"].any()
    assert "One and one more." not in tokenizer.decode(batch.flat)
    trained = trained_text(tokenizer, batch)
    assert "Twice two." in trained and "Four." in trained and "Two." not in trained


def test_keep_trains_all_reasoning_and_asks_with_it(tokenizer: Any) -> None:
    with_template(tokenizer, "qwen3", thinking="keep")
    batch = encoded(tokenizer, REASONED)
    assert not batch.flags["context_only"].any() and not batch.flags["mismatched"].any()
    trained = trained_text(tokenizer, batch)
    assert "One and one more." in trained and "Twice two." in trained
    assert "One and one more." in render(REASONED[:-1], None, tokenizer, prompt=True)
    assert not has_generation_markers(tokenizer.chat_template)  # servers other than transformers read it


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gptoss"])
def test_drop_shows_no_reasoning_in_training_and_in_prompts(tokenizer: Any, name: str) -> None:
    with_template(tokenizer, name, thinking="drop")
    batch = encoded(tokenizer, REASONED)
    assert not batch.flags["mismatched"].any() and not batch.flags["context_only"].any()
    asked = render(REASONED[:-1], None, tokenizer, prompt=True)
    raw = [turn | {"content": f"<think>\nHm.\n</think>\n\n{turn['content']}"} for turn in REASONED[1:2]]
    assert "Hm." not in render([REASONED[0], *raw], None, tokenizer)  # what a client of a server sends
    assert "One and one more." not in asked and "Twice two." not in tokenizer.decode(batch.flat)


def test_an_empty_think_block_is_not_trained(tokenizer: Any) -> None:
    with_template(tokenizer, "qwen3")
    assert "think" in render(PLAIN, None, tokenizer)
    batch = encoded(tokenizer, PLAIN)
    assert "think" not in tokenizer.decode(batch.flat)
    assert "Two." in trained_text(tokenizer, batch) and "Four." in trained_text(tokenizer, batch)
    with_template(tokenizer, "qwen3", **OFF)
    batch = encoded(tokenizer, PLAIN)
    assert "think" in tokenizer.decode(batch.flat) and "think" not in trained_text(tokenizer, batch)


def test_a_prompt_that_opens_a_think_block_does_not_fit_answers_without_reasoning() -> None:
    found = AnswerFinder(load("qwen3_5_think"), assistant_only=True).find(PLAIN[:2], None)
    assert found.mismatch is not None and "opens a think block" in found.mismatch.reason
    assert found.text[found.spans[-1][0] :].startswith("Two.")
    assert AnswerFinder(load("qwen3_5_think", **OFF), assistant_only=True).find(PLAIN[:2], None).mismatch is None


def test_a_fold_is_also_in_the_template_for_servers() -> None:
    template = load("gemma", system="fold")
    chat = [{"role": "system", "content": "Be brief."}, *PLAIN[:1]]
    text = render(chat, None, template, prompt=True)
    assert "Be brief.\n\nOne plus one?" in text
    parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in chat]
    qwen = render(parts, None, load("qwen3_5_think", system="fold"), prompt=True)
    assert "system" not in qwen and "Be brief.\n\nOne plus one?" in qwen
    assert "Be brief." not in render(chat, None, load("gemma", system="drop"), prompt=True)


def test_a_variable_of_a_request_wins_over_the_recipe() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = settle(QWEN3, OFF)
    asked: dict[str, Any] = {"conversations": [PLAIN[:1]], "chat_template": template, "add_generation_prompt": True}
    assert render_jinja_template(**asked)[0][0].endswith("<think>\n\n</think>\n\n")
    assert render_jinja_template(**asked, enable_thinking=True)[0][0].endswith("assistant\n")


def test_an_unknown_variable_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"model.template.enable_thinkin: .*did you mean enable_thinking\?"):
        settle(QWEN3, {"variables": {"enable_thinkin": False}})
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(RecipeError, match="no such variable"):
        settle(plain, {"variables": {"m": 1}})  # its own
    with pytest.raises(RecipeError, match=r"dataset\.thinking: keep: the chat template leaves out"):
        settle(plain.replace("m.content", "m.content.split('</think>')[-1]"), {"thinking": "keep"})


def test_a_template_without_settings_stays_as_it_is() -> None:
    assert settle(QWEN3, {"variables": {}, "thinking": "last", "system": "keep"}) == QWEN3
    stated = settle(QWEN3, {"variables": {"enable_thinking": "#} {{"}, "system": "fold"})
    assert settings_of(stated) == {"variables": {"enable_thinking": "#} {{"}, "system": "fold"}


@pytest.mark.parametrize(("name", "written"), [("llama3_2", "28 Nov 2026"), ("gptoss", "2026-11-28")])
def test_a_date_is_fixed_in_the_template(name: str, written: str) -> None:
    template = load(name, date="2026-11-28")
    assert settings_of(template.chat_template)["date"] == "2026-11-28"
    assert written in render(PLAIN, None, template)


def test_a_date_that_is_given_is_no_date_of_today() -> None:
    template = load("llama3_2", variables={"date_string": "1 May 2025"}, date="2026-11-28")
    assert "date" not in settings_of(template.chat_template)
    assert "1 May 2025" in render(PLAIN, None, template)


def test_a_flagged_turn_is_rendered_like_any_other(tokenizer: Any) -> None:
    for name in ("qwen3", "llama3"):
        with_template(tokenizer, name)
        flagged = [PLAIN[0], PLAIN[1] | {"train": False}, *PLAIN[2:]]
        one, other = encoded(tokenizer, PLAIN), encoded(tokenizer, flagged)
        assert one.flat.tolist() == other.flat.tolist()
        assert "Two." not in trained_text(tokenizer, other)
        assert np.flatnonzero(one.loss_mask)[-1] == np.flatnonzero(other.loss_mask)[-1]


def test_every_template_of_the_table_is_one_of_trl() -> None:
    assert all((Path(FOLDER) / f"{name}.jinja").is_file() for name in TEMPLATES) and len(TEMPLATES) >= 10


def test_a_last_answer_that_is_not_trained_leaves_the_one_before_as_it_is_asked(tokenizer: Any) -> None:
    with_template(tokenizer, "qwen3")
    chat = [*REASONED[:3], REASONED[3] | {"train": False}]
    batch = encoded(tokenizer, chat)
    assert not batch.flags["mismatched"].any() and not batch.flags["context_only"].any()
    asked = encode([render(chat[: last_answer(chat)], None, tokenizer, prompt=True)], tokenizer, special=False)[0]
    assert batch.flat[: len(asked)].tolist() == asked and not batch.loss_mask[: len(asked)].any()
    trained = trained_text(tokenizer, batch)
    assert "One and one more." in trained and "Two." in trained and "Twice" not in trained
