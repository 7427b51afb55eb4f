"""Inputs from rows without labels: the same prompts and texts as evaluation, whatever the format."""

import json
from pathlib import Path
from typing import Any

import pytest

from peftcli.data.chat_template import render
from peftcli.data.model_inputs import Asked, Chat, Unusable, choose_inputs
from peftcli.data.prepare import prepare
from peftcli.data.rows import Rows
from peftcli.errors import DataError
from peftcli.plan.plan import LossMask
from peftcli.progress import Silent
from peftcli.recipe.schema import DatasetSection, SourceSection
from peftcli.tasks.registry import TASKS

TEXT = "causal-lm"
SAID = [{"role": "user", "content": "how are you"}, {"role": "assistant", "content": "well"}]
MORE = [*SAID, {"role": "user", "content": "and now"}, {"role": "assistant", "content": "better"}]
TOLD = [{"from": "human", "value": "how are you"}, {"from": "gpt", "value": "well"}]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def rows_of(rows: list[dict[str, Any]]) -> Rows:
    names = dict.fromkeys(name for row in rows for name in row)
    return Rows("new.jsonl", list(range(1, len(rows) + 1)), {name: [row.get(name) for row in rows] for name in names})


def asked(task: str = TEXT, kind: str | None = None, known: tuple[str, ...] = ()) -> Asked:
    return Asked(TASKS[task], kind, frozenset(known), Path())


def prompts(rows: list[dict[str, Any]], section: SourceSection, wants: Asked, tokenizer: Any) -> list[str]:
    made = choose_inputs(rows_of(rows), [section], wants).inputs(rows_of(rows))
    assert not any(isinstance(one, Unusable) for one in made), made
    return [
        render(one.messages, one.tools or None, tokenizer, prompt=True) if isinstance(one, Chat) else str(one)
        for one in made
    ]


FORMATS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], tuple[str, ...]]] = {
    "templates": (
        {"prompt": "{a.b} {{x}} {n} ->", "completion": " {c}"},
        [{"a": {"b": "p"}, "n": 3, "c": "q"}],
        ("c",),
    ),
    "columns": ({"columns": {"prompt": "a", "completion": "c"}}, [{"a": "p", "c": "q"}], ("c",)),
    "prompt, completion": ({}, [{"prompt": "p", "completion": "q"}], ("completion",)),
    "alpaca": (
        {},
        [{"instruction": "p", "input": "i", "output": "q"}, {"instruction": "p", "input": "", "output": "q"}],
        ("output",),
    ),
    "dolly": ({}, [{"instruction": "p", "context": "i", "response": "q"}], ("response",)),
    "question": ({}, [{"question": "p", "answer": "q"}], ("answer",)),
    "query": ({}, [{"query": "p", "response": "q"}], ("response",)),
    "messages": ({}, [{"messages": SAID}, {"messages": MORE, "system": "be brief"}], ()),
    "messages as JSON": ({}, [{"messages": json.dumps(MORE)}], ()),
    "sharegpt": ({}, [{"conversations": TOLD}], ()),
    "named messages": ({"columns": {"messages": "talk"}}, [{"talk": MORE}], ()),
    "pairs of chats": (
        {},
        [{"prompt": SAID[:1], "completion": SAID[1:]}, {"prompt": MORE[:3], "completion": MORE[3:]}],
        ("completion",),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_prompts_are_those_of_the_evaluation(
    name: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    keys, rows, learned = FORMATS[name]
    rows = [row | {"id": number} for number, row in enumerate(rows)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DatasetSection.model_validate({"path": str(file), "test": {"path": str(file)}, **keys})
    rule = LossMask(completion_only=True, assistant_only=False, asked=(), max_length=512)
    data = prepare(section, tokenizer, rule, 0, Silent())
    expected = data.test.column("prompt").to_pylist()
    wants = asked(kind=data.format, known=tuple(column for row in rows for column in row if column != "id"))
    assert prompts(rows, section, wants, tokenizer) == expected
    less = [{key: value for key, value in row.items() if key not in learned} for row in rows]
    assert prompts(less, section, wants, tokenizer) == expected, "without the completion"


def test_chats_without_an_answer_are_the_whole_prompt(tokenizer: Any) -> None:
    wants = asked(kind="messages")
    whole = prompts([{"messages": MORE}], SourceSection(), wants, tokenizer)
    empty = {"role": "assistant", "content": ""}
    for turns in (MORE[:3], [*MORE[:3], empty]):
        assert prompts([{"messages": turns}], SourceSection(), wants, tokenizer) == whole
    first = prompts([{"question": "how are you"}], SourceSection(), wants, tokenizer)
    assert first == prompts([{"messages": SAID}], SourceSection(), wants, tokenizer)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": ""}, "with an empty text"),
        ({"text": None}, "with text null"),
        ({"text": 3}, "with text not text (a number)"),
    ],
)
@pytest.mark.parametrize("task", ["sequence-classification", TEXT])
def test_rows_that_cannot_be_used_have_a_reason(row: dict[str, Any], reason: str, task: str) -> None:
    rows = rows_of([{"text": "good"}, row])
    kind = "text" if task == TEXT else "classification"
    first, second = choose_inputs(rows, [SourceSection()], asked(task, kind)).inputs(rows)
    assert first == ("good" if task == TEXT else ("good",)) and second == Unusable(reason)


def test_the_columns_of_the_training_decide_where_several_fit() -> None:
    rows = rows_of([{"text": "good", "comment": "new", "id": 1}])
    with pytest.raises(DataError, match="could be in text and comment"):
        choose_inputs(rows, [SourceSection()], asked("sequence-classification"))
    wants = asked("sequence-classification", "classification", ("text", "label"))
    assert choose_inputs(rows, [SourceSection()], wants).inputs(rows) == [("good",)]
    two = rows_of([{"premise": "a", "hypothesis": "b"}])
    assert choose_inputs(two, [SourceSection()], asked("sequence-classification")).inputs(two) == [("a", "b")]


def test_a_missing_column_is_named() -> None:
    with pytest.raises(DataError, match=r"dataset\.prompt"):
        choose_inputs(rows_of([{"b": 1}]), [SourceSection(prompt="{a}")], asked())
    with pytest.raises(DataError, match=r"no column is known as the prompt.*trained on: talk"):
        choose_inputs(rows_of([{"b": 1}]), [SourceSection()], asked(kind="messages", known=("talk",)))
