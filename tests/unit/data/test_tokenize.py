"""Examples to ids and labels: those of TRL, with every trained token accounted for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftcli.data.chat_template import last_answer, render
from peftcli.data.encode import encode, stop_ids
from peftcli.data.tokenize import IGNORED, TokenizedBatch, TokenizeStep
from peftcli.errors import DataError
from peftcli.plan.plan import LossMask

RULE = LossMask(completion_only=True, assistant_only=True, asked=(), max_length=64)
CHAT = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Good day"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]


def tokenize(kind: str, columns: dict[str, list[str]], tokenizer: Any, rule: LossMask = RULE) -> TokenizedBatch:
    return TokenizeStep(kind, tokenizer, rule).batch(columns, None, None)


def rows_of(batch: TokenizedBatch) -> list[tuple[list[int], list[int]]]:
    ends = np.cumsum(batch.lengths)
    labels = batch.labels()
    return [
        (batch.flat[end - length : end].tolist(), labels[end - length : end].tolist())
        for end, length in zip(ends, batch.lengths, strict=True)
    ]


def trained_text(batch: TokenizedBatch, tokenizer: Any, row: int = 0) -> str:
    return str(tokenizer.decode([label for label in rows_of(batch)[row][1] if label != IGNORED]))


def chats(*chats: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {"messages": [json.dumps(chat) for chat in chats]}


def trl_rows(
    rows: list[dict[str, Any]], tokenizer: Any, folder: Path, **arguments: Any
) -> list[tuple[list[int], list[int]]]:
    """Ids and labels as TRL's own trainer prepares them."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(tokenizer.name_or_path)
    config = SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, max_length=64, report_to=[], **arguments)
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.mark.filterwarnings("ignore")  # TRL's own defaults warn
@pytest.mark.parametrize("kind", ["prompt_completion", "text", "messages"])
def test_ids_and_labels_are_those_of_trl(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "Tell me about milk."},
        {"role": "assistant", "content": "Milk is cold."},
        {"role": "user", "content": "And bread?"},
        {"role": "assistant", "content": "Bread is warm."},
    ]
    rows: list[dict[str, Any]] = {
        "prompt_completion": [
            {"prompt": "oat milk ->:", "completion": " dairy eggs"},
            {"prompt": "x ", "completion": "word " * 60},
            {"prompt": "a", "completion": "b"},
        ],
        "text": [{"text": "The cat sat on the mat."}, {"text": "One two three. " * 30}],
        "messages": [{"messages": chat}, {"messages": chat[:2]}],
    }[kind]
    columns = {name: [row[name] if kind != "messages" else json.dumps(row[name]) for row in rows] for name in rows[0]}
    ours = rows_of(tokenize(kind, columns, tokenizer))
    arguments = {"assistant_only_loss": True} if kind == "messages" else {}
    assert ours == trl_rows(rows, tokenizer, tmp_path, **arguments)
    assert len(ours) == len(rows)


def test_no_prompt_token_is_trained_and_the_end_token_is(tokenizer: Any) -> None:
    batch = tokenize("prompt_completion", {"prompt": ["oat milk ->:"], "completion": [" dairy eggs"]}, tokenizer)
    assert trained_text(batch, tokenizer) == " dairy eggs" + tokenizer.eos_token
    prompt = tokenizer("oat milk ->:")["input_ids"]
    ids, labels = rows_of(batch)[0]
    assert ids[: len(prompt)] == prompt and labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert batch.flags["end_trained"].all() and batch.trained[0] == len(ids) - len(prompt)


def test_the_first_token_of_a_row_counts_as_not_trained_since_nothing_predicts_it(tokenizer: Any) -> None:
    batch = tokenize("text", {"text": ["One two three"]}, tokenizer)
    assert batch.trained[0] == batch.lengths[0] - 1


def test_encoding_in_batches_is_calling_the_tokenizer(tokenizer: Any) -> None:
    texts = ["", "One two", "Zwölf Äpfel \U0001f34e", "a" * 3000, "<s> odd </s>"]
    tokenizer("x", truncation=True, max_length=1, padding="max_length")  # leaves a cut set in the backend
    for special in (True, False):
        assert encode(texts, tokenizer, special=special) == tokenizer(texts, add_special_tokens=special)["input_ids"]


def test_of_a_chat_only_the_assistant_is_trained_each_turn_with_its_end(tokenizer: Any) -> None:
    batch = tokenize("messages", chats([{"role": "system", "content": "Be kind."}, *CHAT]), tokenizer)
    text = trained_text(batch, tokenizer)
    assert "Good day" in text and "See you" in text
    assert "Hello" not in text and "kind" not in text and "Bye" not in text
    ends = stop_ids(tokenizer)
    assert sum(label in ends for label in rows_of(batch)[0][1]) == 2
    assert batch.flags["ends"].all() and batch.flags["end_trained"].all()


MARKLESS = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_a_template_without_marks_is_read_by_rendering_the_turns(tokenizer: Any) -> None:
    tokenizer.chat_template = MARKLESS
    batch = tokenize("messages", chats(CHAT), tokenizer)
    end = tokenizer.eos_token
    assert trained_text(batch, tokenizer).replace(" ", "") == f"Goodday{end}Seeyou{end}".replace(" ", "")
    prompt = render(CHAT[: last_answer(CHAT)], None, tokenizer, prompt=True)
    assert prompt.endswith("[assistant] ") and "See you" not in prompt


@pytest.mark.parametrize("marks", [True, False])
def test_a_turn_that_is_not_to_be_trained_is_only_read(tokenizer: Any, marks: bool) -> None:
    if not marks:
        tokenizer.chat_template = MARKLESS
    batch = tokenize("messages", chats([CHAT[0], CHAT[1] | {"train": False}, *CHAT[2:]]), tokenizer)
    text = trained_text(batch, tokenizer)
    assert "See you" in text and "Good day" not in text
    assert "Good day" in tokenizer.decode(batch.flat)


def test_an_end_token_that_only_the_last_turn_has_does_not_count_as_trained(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% if loop.last %}{{ eos_token }}{% else %}\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    with pytest.raises(DataError, match="mask is ambiguous"):  # a shorter chat ends differently
        tokenize("messages", chats(CHAT), tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% if loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}{% else %}{{ m['content'] }}"
        "{% endif %}{% endfor %}"
    )
    batch = tokenize("messages", chats(CHAT, CHAT[:2]), tokenizer)
    assert batch.flags["end_trained"].tolist() == [False, True]


def test_a_template_whose_turns_cannot_be_told_apart_stops(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="assistant mask is ambiguous"):
        tokenize("messages", chats(CHAT), tokenizer)


def test_a_chat_that_the_template_refuses_is_left_out_and_named(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    batch = tokenize("messages", chats([{"role": "system", "content": "Be kind."}, *CHAT], CHAT), tokenizer)
    assert batch.of.tolist() == [1]
    assert batch.dropped == [(0, "rejected by the chat template (System role not supported; set dataset.system: fold)")]


def test_tools_reach_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if tools %}{{ tools[0]['function']['name'] }} {% endif %}" + MARKLESS
    tools = json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {}}}])
    batch = tokenize("messages", chats(CHAT) | {"tools": [tools]}, tokenizer)
    assert "weather" in tokenizer.decode(batch.flat)


def test_rows_cut_before_their_first_trained_token_are_dropped_and_counted(tokenizer: Any) -> None:
    long = "word " * 100
    columns = {"prompt": [long, "short ->:", "short"], "completion": ["x", "y", long]}
    batch = tokenize("prompt_completion", columns, tokenizer)
    assert batch.of.tolist() == [1, 2]
    assert batch.dropped == [(0, "with a prompt that fills max_length 64")]
    assert batch.flags["truncated"].tolist() == [False, True]
    assert batch.flags["end_trained"].tolist() == [True, False]
    assert batch.uncut[1] > batch.lengths[1] == 64


def test_too_long_rows_can_be_dropped_or_split(tokenizer: Any) -> None:
    columns = {"text": ["word " * 100, "short"]}
    tokens = TokenizeStep("text", tokenizer, RULE)
    dropped = tokens.batch(columns, None, "drop")
    assert dropped.of.tolist() == [1] and dropped.dropped == [(0, "longer than max_length 64")]
    split = tokens.batch(columns, None, "split")
    assert set(split.of.tolist()) == {0, 1} and not split.dropped
    assert split.flat.tolist() == [token for text in columns["text"] for token in tokenizer(text + "</s>")["input_ids"]]
    assert split.lengths.max() <= 64
    assert split.flags["ends"].tolist() == [False] * (len(split.of) - 2) + [True, True]


def test_a_piece_that_goes_on_gets_no_end_token(tokenizer: Any) -> None:
    batch = TokenizeStep("text", tokenizer, RULE).batch({"text": ["One two", "three."]}, [False, True], None)
    end = tokenizer.eos_token_id
    assert [ids[-1] == end for ids, _ in rows_of(batch)] == [False, True]
    assert batch.flags["ends"].tolist() == [False, True]


def test_a_doubled_start_and_an_unknown_letter_are_flagged(tokenizer: Any) -> None:
    batch = tokenize("text", {"text": [f"{tokenizer.bos_token}One", "One"]}, tokenizer)
    assert batch.flags["doubled_bos"].tolist() == [True, False]


def test_a_chat_that_ends_with_the_user_is_scored_on_its_last_answer() -> None:
    assert last_answer([*CHAT, {"role": "user", "content": "Thanks"}]) == 3


def test_a_prompt_does_not_end_with_the_end_token_that_a_tokenizer_writes(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    ids = [(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A {eos}", special_tokens=ids)
    batch = tokenize("prompt_completion", {"prompt": ["oat milk ->:"], "completion": [" dairy"]}, tokenizer)
    assert trained_text(batch, tokenizer) == f" dairy{eos}"
    assert not batch.flags["merged"].any() and batch.flat.tolist().count(ids[1][1]) == 1


def test_a_template_that_never_ends_is_stopped(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcli.data.encode.PROBE_SECONDS", 0.5)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% if b < 0 %}x{% endif %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = loop + MARKLESS
    with pytest.raises(DataError, match=r"still running after 0.5 s; it has an endless loop"):
        tokenize("messages", chats(CHAT), tokenizer)


def test_the_token_after_both_turns_ends_an_answer(tokenizer: Any) -> None:
    end = tokenizer.all_special_tokens[-1]
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "\n{% endfor %}"
    assert tokenizer.convert_tokens_to_ids(end) in stop_ids(tokenizer)
