"""What columns mean: templates and paths, dialects of chats and instructions, and each row that makes no example."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from peftcli.data.formats import KINDS, Examples, Given, RowFormat, choose_text_format
from peftcli.data.rows import Rows
from peftcli.errors import DataError
from peftcli.plan.plan import LossMask
from peftcli.recipe.schema import DatasetSection
from peftcli.recipe.template import render, template_columns, value_at

DATA = Path(__file__).parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not on this machine")


def rows_of(objects: list[dict[str, Any]], file: str = "a.jsonl") -> Rows:
    names = dict.fromkeys(name for row in objects for name in row)
    return Rows(file, list(range(1, len(objects) + 1)), {name: [row.get(name) for row in objects] for name in names})


def choose(rows: Rows, *, chats: bool = True, **keys: Any) -> RowFormat:
    given = Given(LossMask(True, True, (), 1024), None, {}, chats=chats)
    return choose_text_format(rows, DatasetSection.model_validate({"path": "a", **keys}), given)


def read(objects: list[dict[str, Any]], *, chats: bool = True, **keys: Any) -> Examples:
    rows = rows_of(objects)
    made = choose(rows, chats=chats, **keys).examples(rows)
    assert sorted([*made.kept, *(row for row, _ in made.dropped)]) == list(range(len(objects)))
    return made


def read_chat(*turns: dict[str, Any], **beside: Any) -> list[dict[str, Any]]:
    (text,) = read([{"messages": list(turns), **beside}]).columns["messages"]
    turns_read: list[dict[str, Any]] = json.loads(text)
    return turns_read


def user(content: Any = "Hi") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any = "Good day", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


# Templates


def test_a_path_reaches_into_nested_values() -> None:
    row = {"instances": [{"output": "yes"}], "a.b": "dotted", "a": {"b": "nested"}}
    assert render("{instances.0.output} {a.b}", row) == "yes dotted"
    assert template_columns("{instances.0.output}") == ["instances.0.output"]
    for path in ("instances.1.output", "instances.0.input", "instances.x", "other.0", "instances." + "9" * 5000):
        with pytest.raises(KeyError):
            value_at(row, path)


def test_a_template_takes_words_numbers_and_lists_of_words() -> None:
    made = read(
        [{"tokens": ["New", "York"], "n": 3, "sure": True}],
        prompt="{tokens} {{{n}}} {{0}}",
        completion=" {sure}",
    )
    assert made.columns == {"prompt": ["New York {3} {0}"], "completion": [" True"]}
    assert made.content == ["New York\n3\nTrue"]


def test_values_are_never_templates() -> None:
    assert read([{"a": "{b} {0} %s", "b": "x"}], text="{a}|{b}").columns["text"] == ["{b} {0} %s|x"]


def test_rows_that_a_template_cannot_use_say_why() -> None:
    objects = [
        {"q": "x", "a": "y", "in": [{"out": "z"}]},
        {"q": None, "a": "y", "in": [{"out": "z"}]},
        {"a": "y", "in": [{"out": "z"}]},
        {"q": float("nan"), "a": "y", "in": [{"out": "z"}]},
        {"q": [1, 2], "a": "y", "in": [{"out": "z"}]},
        {"q": "x", "a": {"b": 1}, "in": [{"out": "z"}]},
        {"q": "x", "a": "y", "in": []},
        {"q": "x", "a": "y", "in": [{"out": None}]},
        {"q": "x", "a": " ", "in": [{"out": ""}]},
        {"q": b"x", "a": "y", "in": [{"out": "z"}]},
        {"q": "x", "a": "\ud83d", "in": [{"out": "z"}]},
    ]
    made = read(objects, prompt="{q}", completion="{a}{in.0.out}")
    assert made.kept == [0] and made.columns["completion"] == ["yz"]
    assert made.dropped == [
        (1, "with q null"),
        (2, "with q null"),
        (3, "with q null"),
        (4, "with q not text (a list)"),
        (5, "with a not text (an object)"),
        (6, "without in.0.out"),
        (7, "with in.0.out null"),
        (8, "with nothing to learn (empty)"),
        (9, "with q not text (bytes)"),
        (10, "with a lone surrogate (half a character)"),
    ]


def test_a_prompt_of_white_space_is_dropped() -> None:
    assert read([{"q": " \n", "a": "y"}], prompt="{q}", completion="{a}").dropped == [(0, "with an empty prompt")]


def test_a_missing_column_names_the_nearest_and_the_key() -> None:
    rows = rows_of([{"product_name": "x", "department": "y"}], "p.csv")
    with pytest.raises(DataError) as caught:
        choose(rows, prompt="{product_nam} ->", completion=" {department}")
    assert str(caught.value) == (
        "p.csv: no column product_nam; it has product_name, department; did you mean product_name?"
    )
    with pytest.raises(DataError, match=r"no column zzz; .*; set dataset\.prompt to one of these$"):
        choose(rows, prompt="{zzz}", completion="{department}")
    with pytest.raises(DataError, match=r"no column reviews\.0; .*set dataset\.text"):
        choose(rows, text="{reviews.0}")


def test_a_csv_without_a_header_is_told_where_to_name_its_columns() -> None:
    hint = r"if the first line is not a header, name the columns in dataset\.csv\.column_names$"
    rows = rows_of([{"1": "2", "Cookies": "Salt"}], "p.csv")
    with pytest.raises(DataError, match=hint):
        choose(rows, prompt="{id}", completion="{name}")
    with pytest.raises(DataError, match=hint):
        choose(rows)
    with pytest.raises(DataError) as caught:
        choose(rows, prompt="{id}", completion="{Cookies}")
    assert "header" not in str(caught.value)
    with pytest.raises(DataError) as caught:
        choose(rows, text="{id}", csv={"column_names": ["1", "Cookies"]})
    assert "header" not in str(caught.value)


def test_a_template_without_a_column_is_refused() -> None:
    with pytest.raises(DataError, match="completion has no column, so all rows would be equal"):
        choose(rows_of([{"a": "x"}]), prompt="{a}", completion="yes")


# Columns by name


@pytest.mark.parametrize(
    ("columns", "name", "kind"),
    [
        (("text", "id"), "text", "text"),
        (("prompt", "completion"), "prompt_completion", "prompt_completion"),
        (("instruction", "input", "output"), "alpaca", "messages"),
        (("instruction", "context", "response", "category"), "dolly", "messages"),
        (("question", "answer"), "question_answer", "messages"),
        (("query", "response", "type"), "question_answer", "messages"),
        (("question", "response"), "question_answer", "messages"),
    ],
)
def test_a_format_is_recognised_by_its_columns(columns: tuple[str, ...], name: str, kind: str) -> None:
    rows = rows_of([dict.fromkeys(columns, "x")])
    reading = choose(rows)
    assert (reading.name, reading.kind) == (name, kind)
    made = reading.examples(rows)
    assert made.kept == [0] and tuple(made.columns) == KINDS[kind]
    assert all(len(column) == 1 for column in made.columns.values())
    assert "\n" not in reading.said and set(reading.columns) <= set(columns)


@pytest.mark.parametrize(
    ("columns", "formats"),
    [
        (("text", "messages"), "text or messages"),
        (("prompt", "completion", "text"), "text or prompt_completion"),
        (("instruction", "input", "output", "text"), "text or alpaca"),
        (("question", "answer", "messages"), "messages or question_answer"),
        (("messages", "conversations"), "messages or sharegpt"),
    ],
)
def test_columns_of_two_formats_ask_which(columns: tuple[str, ...], formats: str) -> None:
    with pytest.raises(DataError, match=rf"fit 2 formats: .*; set dataset\.format: {formats}$"):
        choose(rows_of([dict.fromkeys(columns, "x")]))


def test_a_format_that_is_named_decides() -> None:
    both = [{"text": "t", "instruction": "i", "input": "", "output": "o"}]
    assert read(both, format="text").columns == {"text": ["t"]}
    assert choose(rows_of(both), format="alpaca").name == "alpaca"
    with pytest.raises(
        DataError, match=r"format: alpaca needs the columns instruction with output or instruction with"
    ):
        choose(rows_of([{"text": "x"}]), format="alpaca")
    with pytest.raises(DataError, match=r"choose the columns with templates, such as .*question.*answer"):
        choose(rows_of([{"question": "q", "answer": "a", "response": "r"}]), format="question_answer")


def test_an_unknown_table_gets_an_example_of_its_own_columns() -> None:
    with pytest.raises(DataError) as caught:
        choose(rows_of([{"id": 7, "question_text": "Who?", "reply": "Me.", "meta": {"a": 1}}]))
    message = str(caught.value)
    assert "its columns (id, question_text, reply, meta) do not match a known format; known are text," in message
    assert message.endswith('dataset: {prompt: "{question_text} ->", completion: " {reply}"}')
    with pytest.raises(DataError, match=r'dataset: \{text: "\{body\}"\}$'):
        choose(rows_of([{"body": "x"}]))
    with pytest.raises(DataError, match=r"dataset: \{columns: \{messages: dialog\}\}$"):
        choose(rows_of([{"dialog": [user(), assistant()]}]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, r'preference data.*prompt: "\{prompt\}", .*"\{chosen\}"'),
        ({"chosen": [user(), assistant()], "rejected": []}, r"preference data.*dataset\.columns: \{messages: chosen\}"),
        ({"prompt": "a", "completion": "b", "label": True}, r"KTO.*dataset\.where: \{label: true\}"),
        ({"tokens": ["a"], "tags": ["O"]}, r'token classification.*"\{tokens\}\\ntags:", completion: " \{tags\}"'),
        ({"tokens": ["a"], "ner_tags": [0]}, r"with names instead of numbers in ner_tags"),
        ({"text": "a", "label": 1}, r'classification.*"\{text\}\\nlabel:", .*" \{label\}".*dataset\.format: text'),
        ({"sentence": "a", "label": "1"}, r'prompt: "\{sentence\}\\nlabel:", completion: " \{label\}"'),
        ({"question": "a", "answer": "b", "context": "c"}, r"the column context .*dataset\.format: question_answer"),
    ],
)
def test_data_of_another_trade_say_how_they_can_be_used(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        choose(rows_of([row]))
    assert len(str(caught.value).splitlines()) <= 3


def test_columns_that_the_recipe_names_are_taken_whole() -> None:
    made = read(
        [{"q": "a", "r": "b"}, {"q": 1, "r": "b"}, {"q": "a", "r": True}, {"q": "a", "r": ["b"]}, {"q": "a"}],
        columns={"prompt": "q", "completion": "r"},
    )
    assert made.columns == {"prompt": ["a"], "completion": ["b"]} and made.content == ["a\nb"]
    assert [reason for _, reason in made.dropped] == [
        "with q not text (a number)",
        "with r not text (true or false)",
        "with r not text (a list)",
        "with r null",
    ]
    with pytest.raises(DataError, match=r"no column textt; it has text; did you mean text\?"):
        choose(rows_of([{"text": "x"}]), columns={"text": "textt"})
    assert choose(rows_of([{"chat": [user(), assistant()]}]), columns={"messages": "chat"}).kind == "messages"


# Instructions and questions


def test_alpaca_rows_become_chats() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["Hi", "Ho"]]}
    made = read([row, {**row, "input": " ", "system": None, "history": None}])
    first, second = map(json.loads, made.columns["messages"])
    assert [turn["content"] for turn in first] == ["Be brief.", "Hi", "Ho", "Add.\n\n1 2", "3"]
    assert [turn["role"] for turn in first] == ["system", "user", "assistant", "user", "assistant"]
    assert second == [user("Add."), assistant("3")]
    assert made.content[1] == "Add.\n3" and "Be brief." not in made.content[0]
    assert made.columns["tools"] == ["", ""]


def test_alpaca_rows_without_a_chat_template_stand_under_headings() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "history": None}
    made = read([row, {**row, "input": ""}, {**row, "history": [["Hi", "Ho"]]}], chats=False)
    assert made.columns["prompt"] == [
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
        "### Instruction:\nAdd.\n\n### Response:\n",
    ]
    assert made.columns["completion"] == ["3", "3"]
    assert made.dropped == [(2, "with a history, which needs a chat template")]
    reading = choose(rows_of([row]), chats=False)
    assert reading.prompt is not None and render(reading.prompt, row) == made.columns["prompt"][1]
    assert "### Response:" in reading.said


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"output": ""}, "with nothing to learn (empty)"),
        ({"output": 3}, "with output not text (a number)"),
        ({"instruction": None}, "with instruction null"),
        ({"instruction": " ", "input": ""}, "with an empty prompt"),
        ({"history": [["Hi"]]}, "with a history that is not a list of text pairs"),
    ],
)
@pytest.mark.parametrize("chats", [True, False])
def test_alpaca_rows_that_cannot_be_used_say_why(change: dict[str, Any], reason: str, chats: bool) -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "history": None}
    assert read([{**row, **change}], chats=chats).dropped == [(0, reason)]


def test_an_optional_column_that_comes_late_is_read() -> None:
    reading = choose(rows_of([{"instruction": "Add.", "output": "3"}]))
    later = rows_of([{"instruction": "Add.", "output": "3", "input": "1 2"}])
    assert json.loads(reading.examples(later).columns["messages"][0])[0] == user("Add.\n\n1 2")


def test_questions_without_a_chat_template_are_marked_as_such() -> None:
    made = read([{"question": "Who?", "answer": "Me."}, {"question": "", "answer": "x"}], chats=False)
    assert made.columns == {"prompt": ["Question: Who?\nAnswer:"], "completion": [" Me."]}
    assert made.content == ["Who?\nMe."] and made.dropped == [(1, "with an empty prompt")]


# Chats


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "with no messages"),
        (None, "with no messages"),
        ("{", "with messages that are not a list"),
        ("[" * 100_000, "with messages that are not a list"),
        ({"role": "user"}, "with messages that are not a list"),
        ([{"content": "a"}], "with a message without a role"),
        (["a"], "with a message without a role"),
        ([{"role": "asistant", "content": "a"}], "with the unknown role asistant"),
        ([user(), assistant(None)], "with a message whose content is not text"),
        ([user(3), assistant()], "with a message whose content is not text"),
        ([user([{"type": "image_url"}]), assistant()], "with a part that is not text (image_url)"),
        ([user()], "without an assistant message"),
        ([user(), assistant(" ")], "with an empty assistant message"),
        ([assistant()], "with no user message before the assistant message"),
        ([{"role": "system", "content": "a"}, assistant()], "with no user message before the assistant message"),
        ([user(), user(), assistant()], "with two consecutive user messages (set dataset.turns: join or keep)"),
        (
            [user(), assistant(), assistant()],
            "with two consecutive assistant messages (set dataset.turns: join or keep)",
        ),
        (
            [user(), {"role": "system", "content": "a"}, assistant()],
            "with a system message after the beginning (set dataset.turns: join or keep)",
        ),
        ([user(), assistant(weight=0)], "without an assistant message to train"),
        ([user(), assistant(weight=0.5)], "with a message weight that is neither 0 nor 1"),
        ([user(), assistant(tool_calls=[{"x": 1}])], "with a tool call that is not JSON with a name and arguments"),
        (
            [{"from": "human", "value": "a"}, {"from": "function_call", "value": "call it"}],
            "with a tool call that is not JSON with a name and arguments",
        ),
    ],
)
def test_a_chat_that_cannot_be_used_says_why(turns: Any, reason: str) -> None:
    made = read([{"messages": [user(), assistant()]}, {"messages": turns}])
    assert made.kept == [0] and made.dropped == [(1, reason)]


def test_openai_turns_become_regular() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = read_chat(
        {"role": "developer", "content": "Be brief."},
        user([{"type": "text", "text": "1 "}, {"type": "text", "text": "2"}]),
        assistant(None, tool_calls=[call], weight=1),
        {"role": "tool", "content": "3", "tool_call_id": "c1", "name": None},
        assistant("3", weight=0),
        user("Thanks"),
    )
    assert turns == [
        {"role": "system", "content": "Be brief."},
        user("1 2"),
        assistant("", tool_calls=[{**call, "function": {"name": "add", "arguments": {"a": 1}}}]),
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        assistant("3", train=False),
        user("Thanks"),
    ]


@pytest.mark.parametrize("key", ["text", "value", "content"])
def test_typed_parts_have_their_text_under_any_usual_key(key: str) -> None:
    assert read_chat(user([{"type": "text", key: "1 "}, {"type": "input_text", key: "2"}]), assistant())[0] == user(
        "1 2"
    )


@pytest.mark.parametrize("arguments", [{"a": None, "b": 1}, '{"a": null, "b": 1}'])
@pytest.mark.parametrize("key", ["arguments", "parameters", "input", "args"])
def test_arguments_are_an_object_or_json_and_keep_their_nulls(key: str, arguments: Any) -> None:
    call = {"name": "add", key: arguments}
    turns = read_chat(user(), assistant(None, tool_calls=[call]), {"role": "tool", "content": "3"}, assistant("3"))
    assert turns[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": None, "b": 1}}


@pytest.mark.parametrize("arguments", ["null", "", None, {}])
def test_a_call_without_arguments_has_an_empty_object(arguments: Any) -> None:
    turns = read_chat(user(), assistant("", tool_calls=[{"function": {"name": "now", "arguments": arguments}}]))
    assert turns[1]["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}


def test_the_roles_of_ms_swift_agents_are_calls_and_their_results() -> None:
    call = '{"name": "aqi", "arguments": {"city": "Bonn"}}'
    turns = [
        user(),
        {"role": "tool_call", "content": call},
        {"role": "tool_call", "content": call},
        {"role": "tool_response", "content": "72"},
        {"role": "tool_response", "content": "64"},
        assistant("Good."),
    ]
    made = read([{"messages": turns}], turns="join")
    chat = json.loads(made.columns["messages"][0])
    assert [turn["role"] for turn in chat] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [one["function"]["name"] for one in chat[1]["tool_calls"]] == ["aqi", "aqi"]
    assert read([{"messages": turns[:2]}]).dropped == []  # the call is the last answer


def test_the_parts_of_anthropic_messages_are_calls_and_their_results() -> None:
    use = {"type": "tool_use", "id": "t1", "name": "aqi", "input": {"city": "Bonn"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "72"}]}
    turns = [
        user(),
        assistant([{"type": "text", "text": "Let me look."}, use], weight=0),
        user([result, {"type": "text", "text": "Well?"}]),
        assistant("Good."),
    ]
    arguments = {"name": "aqi", "arguments": {"city": "Bonn"}}
    assert json.loads(read([{"messages": turns}]).columns["messages"][0]) == [
        user(),
        assistant("Let me look.", tool_calls=[{"type": "function", "id": "t1", "function": arguments}], train=False),
        {"role": "tool", "content": "72", "tool_call_id": "t1"},
        user("Well?"),
        assistant("Good."),
    ]


def test_messages_inside_objects_are_named_by_a_path() -> None:
    row = {"input": {"messages": [user(), assistant()]}}
    with pytest.raises(DataError, match=r"columns: \{messages: input\.messages\}"):
        choose(rows_of([row]))
    made = read([row, {"input": {}}], columns={"messages": "input.messages"})
    assert json.loads(made.columns["messages"][0]) == [user(), assistant()]
    assert made.dropped == [(1, "with no messages")]
    with pytest.raises(DataError, match=r"no column output\.messages"):
        choose(rows_of([row]), columns={"messages": "output.messages"})


def test_a_result_without_a_call_is_read() -> None:
    assert read_chat(user(), {"role": "tool", "content": "It rains."}, assistant())[1]["content"] == "It rains."


def test_the_older_function_calls_become_tool_calls() -> None:
    function = {"name": "add", "parameters": {}}
    row = {
        "messages": [
            user(),
            assistant(None, function_call={"name": "add", "arguments": ""}),
            {"role": "function", "name": "add", "content": "3"},
            assistant("3"),
        ],
        "functions": [function],
    }
    made = read([row])
    turns = json.loads(made.columns["messages"][0])
    assert turns[1]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    assert turns[2] == {"role": "tool", "content": "3", "name": "add"}
    assert json.loads(made.columns["tools"][0]) == [{"type": "function", "function": function}]


def test_sharegpt_turns_become_regular() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "1 and 2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "3"},
        ],
        "system": "Be brief.",
        "tools": '[{"name": "add"}]',
    }
    reading = choose(rows_of([row]))
    assert (reading.name, reading.columns) == ("sharegpt", ("conversations", "system", "tools"))
    made = reading.examples(rows_of([row, {**row, "system": "", "tools": ""}, {**row, "tools": "{"}]))
    turns = json.loads(made.columns["messages"][0])
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "tool", "assistant"]
    assert turns[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert json.loads(made.columns["messages"][1]) == turns[1:]
    assert [bool(tools) for tools in made.columns["tools"]] == [True, False]
    assert made.dropped == [(2, "with tools that are not a list")]
    assert made.content[0] == "1 and 2?\n\n3\n3"


def test_the_dialect_is_told_turn_by_turn() -> None:
    turns = [{"from": "human", "value": "a", "role": None, "content": None}, assistant("b", **{"from": None})]
    assert read_chat(*turns) == [user("a"), assistant("b")]
    text = json.dumps([user("a"), assistant("ü")])
    (made,) = read([{"conversations": text}]).columns["messages"]
    assert json.loads(made) == [user("a"), assistant("ü")]


def test_of_a_prompt_of_turns_only_the_completion_is_learned() -> None:
    row = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
    reading = choose(rows_of([row]))
    assert (reading.kind, reading.name) == ("messages", "prompt_completion")
    (text,) = reading.examples(rows_of([row])).columns["messages"]
    assert json.loads(text) == [user("a"), assistant("b", train=False), user("c"), assistant("d")]


# Real data


def shared(name: str) -> list[dict[str, Any]]:
    path = DATA / name
    if path.suffix == ".json":
        return list(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with path.open(encoding="utf-8", newline="") as file:
        quoting = csv.QUOTE_NONE if path.suffix == ".tsv" else csv.QUOTE_MINIMAL
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", quoting=quoting))


@needs_data
@pytest.mark.parametrize(
    ("name", "rows", "reading", "kind", "plain_kind"),
    [
        ("instruct-llmfs/instruction-data.json", 1100, "alpaca", "messages", "prompt_completion"),
        ("sgd-chat/sample200.sharegpt.json", 200, "sharegpt", "messages", "messages"),
        ("sgd-chat/train.messages.jsonl", 1000, "messages", "messages", "messages"),
        ("gsm8k/test.jsonl", 1319, "question_answer", "messages", "prompt_completion"),
        ("superbowl-prompt-completion/train.jsonl", 1800, "prompt_completion", *["prompt_completion"] * 2),
        ("wikisql-text/train.jsonl", 1000, "text", "text", "text"),
    ],
)
def test_real_data_sets_are_read_whole(name: str, rows: int, reading: str, kind: str, plain_kind: str) -> None:
    given = rows_of(shared(name))
    for chats, expected in ((True, kind), (False, plain_kind)):
        chosen = choose(given, chats=chats)
        made = chosen.examples(given)
        assert (chosen.name, chosen.kind, len(made.kept), made.dropped) == (reading, expected, rows, [])


@needs_data
@pytest.mark.parametrize(
    ("name", "rows", "keys"),
    [
        ("seed-tasks/seed_tasks.jsonl", 175, {"prompt": "{instruction}\n", "completion": "{instances.0.output}"}),
        ("sst2/dev.tsv", 872, {"prompt": "{sentence}\nlabel:", "completion": " {label}"}),
        ("instacart-products/products.csv", 49_688, {"prompt": "{product_name} ->", "completion": " {aisle_id}"}),
    ],
)
def test_real_data_sets_are_read_by_templates(name: str, rows: int, keys: dict[str, str]) -> None:
    made = read(shared(name), **keys)
    assert (len(made.kept), made.dropped) == (rows, [])


@needs_data
def test_real_labels_without_a_template_say_how_to_learn_them() -> None:
    with pytest.raises(DataError, match=r'prompt: "\{sentence\}\\nlabel:"'):
        choose(rows_of(shared("sst2/dev.tsv")))
