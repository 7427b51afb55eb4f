"""What nothing reads of a source is named: columns, and keys of messages, parts and tool calls."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trl
import yaml

from peftcli.cli.console import plan_lines
from peftcli.cli.pipeline import inspect_data, plan_recipe
from peftcli.data.selection import matches
from peftcli.data.unread import MOST_UNREAD, Unread
from peftcli.errors import DataError, RecipeError
from peftcli.progress import Silent
from peftcli.recipe.dump import dump_recipe
from peftcli.recipe.load import Loaded, load_recipe
from peftcli.report.data import data_section
from peftcli.report.load import Stages
from peftcli.report.terminal import section_blocks
from peftcli.results import DataJson
from peftcli.typed_json import parse

CHATS = Path(__file__).parents[2] / "fixtures" / "broken_data" / "with_end.jinja"
CALLS = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
"""A template that renders tool calls."""
Facts = dict[str, Any]


@pytest.fixture
def loaded(tmp_path: Path, tiny_llama: Path) -> Callable[..., Loaded]:
    """A function that writes rows as JSON lines and gives a recipe over them."""

    def make(rows: list[dict[str, Any]], model: dict[str, Any] | None = None, **dataset: Any) -> Loaded:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        section = {"path": "rows.jsonl", "max_length": 256} | dataset
        if "sources" in dataset:
            del section["path"]
        recipe = {"model": {"name": str(tiny_llama)} | (model or {}), "dataset": section}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return load_recipe(tmp_path / "recipe.yaml")

    return make


@pytest.fixture
def look(loaded: Callable[..., Loaded]) -> Callable[..., Facts]:
    """The facts about such rows."""

    def run(*args: Any, **keys: Any) -> Facts:
        return inspect_data(loaded(*args, **keys).recipe, Silent(), smoke=False, preview=0).facts

    return run


def rows(count: int = 24, **more: Callable[[int], Any]) -> list[dict[str, Any]]:
    return [
        {"id": at, "question": f"Ask {at}", "answer": f"It is {at}", **{key: make(at) for key, make in more.items()}}
        for at in range(count)
    ]


TEMPLATES = {"prompt": "{question}", "completion": " {answer}"}


def test_columns_that_no_template_uses_are_named_with_their_types(look: Any) -> None:
    facts = look(rows(ok=lambda at: at % 2 == 0, note=lambda at: None, mixed=lambda at: [at, "x"][at % 2]), **TEMPLATES)
    (source,) = facts["sources"]
    assert source["unread"] == {"id": "number", "ok": "true/false", "note": "null", "mixed": "number, text"}
    assert source["unread_columns"] == 4


def test_columns_for_the_split_the_selection_and_the_join_are_read(look: Any, tmp_path: Path) -> None:
    with (tmp_path / "kinds.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["kind", "shelf", "price"], *([str(at), f"shelf {at}", "1"] for at in range(3))])
    given = rows(kind=lambda at: at % 3, team=lambda at: at % 6, lang=lambda at: ["en", "de"][at % 2])
    more = {"join": [{"path": "kinds.csv", "on": "kind"}], "where": {"lang": "en"}}
    facts = look(given, prompt="{question} {shelf}", completion=" {answer}", split={"group": "team"}, **more)
    assert facts["sources"][0]["unread"] == {"id": "number", "price": "text"}
    assert facts["dropped"] == {"left out by dataset.where": 12}


def test_a_nested_path_reads_its_column(look: Any) -> None:
    facts = look(rows(answers=lambda at: [{"text": f"a {at}"}]), prompt="{question}", completion=" {answers.0.text}")
    assert list(facts["sources"][0]["unread"]) == ["id", "answer"]


def test_a_column_that_comes_late_is_named_too(look: Any) -> None:
    facts = look([*rows(2500), *({"late": 1} | row for row in rows(2))], **TEMPLATES, limits={"max_leaked": 1})
    assert facts["sources"][0]["unread"] == {"id": "number", "late": "number"}


def test_each_source_has_its_own(look: Any, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row | {"url": "x"}) + "\n" for row in rows()))
    sources = [TEMPLATES | {"path": path} for path in ("rows.jsonl", "other.jsonl")]
    facts = look(rows(), sources=sources, limits={"max_leaked": 1})
    assert [list(source["unread"]) for source in facts["sources"]] == [["id"], ["id", "url"]]


def test_labels_are_read_by_the_tasks_that_learn_them(look: Any) -> None:
    given = [{"text": f"some text {at}", "label": ["a", "b"][at % 2], "source": "web"} for at in range(24)]
    facts = look(given, {"task": "sequence-classification"})
    assert facts["sources"][0]["unread"] == {"source": "text"}


CALL = {
    "id": "c1",
    "type": "function",
    "index": 0,
    "function": {"name": "find", "arguments": '{"x": 1}', "strict": True},
}
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "Ask", "cache_control": {"type": "ephemeral"}}], "date": "1"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "refusal": None},
    {"role": "tool", "content": "found", "tool_call_id": "c1"},
    {"role": "assistant", "content": "It is there", "rating": 5, "refusal": None},
]
UNREAD = {
    "messages[].date",
    "messages[].rating",
    "messages[].content[].cache_control",
    "messages[].tool_calls[].index",
    "messages[].tool_calls[].function.strict",
}


@pytest.mark.parametrize("write", [list, json.dumps], ids=["lists", "text"])
def test_keys_of_messages_parts_and_tool_calls_are_named(write: Any, look: Any) -> None:
    given = [{"messages": write([*CHAT[:3], CHAT[3] | {"content": f"It is {at}"}])} for at in range(24)]
    facts = look(given, {"chat_template": str(CALLS)}, limits={"max_leaked": 1})
    assert facts["sources"][0]["unread_keys"] == dict.fromkeys(UNREAD, 24)


def test_keys_that_only_the_common_schema_of_an_arrow_file_has_are_not_named(look: Any, tmp_path: Path) -> None:
    turns = [
        [{"role": "user", "content": f"Ask {at}"}, {"role": "assistant", "content": "A", "v": 1}] for at in range(24)
    ]
    pq.write_table(pa.table({"messages": turns}), tmp_path / "rows.parquet")
    facts = look([], {"chat_template": str(CHATS)}, path="rows.parquet")
    assert facts["sources"][0]["unread_keys"] == {"messages[].v": 24}
    assert pq.read_table(tmp_path / "rows.parquet")["messages"][0].as_py()[0]["v"] is None


def test_many_names_are_counted_and_the_line_stays_short(look: Any, loaded: Any) -> None:
    given = [row | {f"column {at:03d}": 1 for at in range(MOST_UNREAD + 50)} for row in rows()]
    facts = look(given, **TEMPLATES)
    source = parse(DataJson, facts).sources[0]
    assert len(source.unread) == MOST_UNREAD and source.unread_columns == MOST_UNREAD + 51
    said = source.not_read()
    assert said is not None and said.endswith("column 018 (number), and 131 more") and len(said) < 600
    chats = [[{"role": "user", f"key {at}": 1}] for at in range(MOST_UNREAD + 50)]
    unread = Unread(["messages"], ["messages"])
    unread.add(_rows(chats))
    assert len(unread.facts()["unread_keys"]) == MOST_UNREAD


def _rows(chats: list[Any]) -> Any:
    from peftcli.data.rows import Rows

    return Rows("a.jsonl", list(range(len(chats))), {"messages": chats})


def test_the_report_and_the_first_lines_of_training_name_them(loaded: Any) -> None:
    recipe = loaded(rows(), **TEMPLATES)
    data = parse(DataJson, inspect_data(recipe.recipe, Silent(), smoke=False, preview=0).facts)
    lines = plan_lines(plan_recipe(recipe).plan.as_json(None), data)
    assert lines[-1] == "  not read: id (number)"
    shown = section_blocks([data_section(Stages(data=data))])
    assert any(("Not read", "id (number)") in getattr(block, "pairs", ()) for block in shown)
    everything = [{key: row[key] for key in ("question", "answer")} for row in rows()]
    recipe = loaded(everything, **TEMPLATES)
    data = parse(DataJson, inspect_data(recipe.recipe, Silent(), smoke=False, preview=0).facts)
    assert data.sources[0].not_read() is None
    assert not any("not read" in line for line in plan_lines(plan_recipe(recipe).plan.as_json(None), data))


# Selection


@pytest.mark.parametrize(
    ("value", "wanted", "expected"),
    [
        (True, True, True),
        ("TRUE ", True, True),
        (1, True, True),
        (False, True, False),
        (None, False, False),
        ("4", 4, True),
        (4.0, 4, True),
        (True, 1, False),
        ("x", 4, False),
        (" en", "en", True),
        ("en", ("de", "en"), True),
        (3.9, ">= 4", False),
        ("4.5", ">= 4", True),
        (float("nan"), "< 4", False),
        ("", None, True),
        (float("nan"), None, True),
    ],
)
def test_values_match_however_a_file_writes_them(value: Any, wanted: Any, expected: bool) -> None:
    assert matches(value, wanted) is expected


def test_rows_that_are_left_out_do_not_count_for_a_limit(look: Any) -> None:
    facts = look(rows(score=lambda at: at / 24), **TEMPLATES, where={"score": ">= 0.5"})
    assert facts["train_rows"] + facts["test_rows"] == 12
    assert facts["warnings"] == ["12 rows left out by dataset.where (first rows.jsonl:1)"]
    other = rows(40, score=lambda at: at % 2)
    for at in (1, 3):
        other[at]["answer"] = ""
    (problem,) = crossed(look, other, where={"score": 1})
    assert problem.startswith("2 of 20 rows are dropped (10.0%"), "the share is of the rows that are selected"


def crossed(look: Any, given: list[dict[str, Any]], **keys: Any) -> list[str]:
    from peftcli.data.stats import crossed_limits
    from peftcli.recipe.schema import LimitsSection

    return crossed_limits(look(given, **TEMPLATES, **keys), LimitsSection())


def test_a_smoke_run_reads_on_until_rows_match(loaded: Any) -> None:
    recipe = loaded(rows(600, ok=lambda at: at >= 500), **TEMPLATES, where={"ok": True}).recipe
    facts = inspect_data(recipe, Silent(), smoke=True, preview=0).facts
    assert facts["train_rows"] + facts["test_rows"] == 48


def test_a_selection_without_rows_says_which_values_there_are(look: Any) -> None:
    with pytest.raises(DataError, match=r'no row matches dataset\.where: \{lang: "fr"\}; lang has en, de; use one'):
        look(rows(lang=lambda at: ["en", "de"][at % 2]), **TEMPLATES, where={"lang": "fr"})


@pytest.mark.parametrize("key", ["where", "ignore_columns"])
def test_a_selected_column_that_is_not_there_gets_the_nearest(key: str, look: Any, loaded: Any) -> None:
    from peftcli.data.first_rows import check_first_rows

    given = {"where": {"lange": "en"}} if key == "where" else {"ignore_columns": ["lange"]}
    for check in (look, lambda *args, **keys: check_first_rows(loaded(*args, **keys).recipe)):
        with pytest.raises(DataError, match=r"no column lange; it has .*; did you mean lang\?"):
            check(rows(lang=lambda at: "en"), **TEMPLATES, **given)


@pytest.mark.parametrize("where", [[], {}, "x", {"a": {"b": 1}}, {"a": []}])
def test_a_selection_that_is_none_is_refused(where: Any, loaded: Any) -> None:
    with pytest.raises(RecipeError, match=r"dataset\.where = .*(must be columns|needs a value or a list of values)"):
        loaded(rows(), **TEMPLATES, where=where)


def test_a_selection_is_written_as_it_was_read(loaded: Any, tmp_path: Path) -> None:
    where = {"ok": True, "lang": ["en", "de"], "score": ">= 4", "note": None}
    recipe = loaded(rows(), **TEMPLATES, where=where, ignore_columns=["id"]).recipe
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe, tmp_path / "again.yaml"))
    again = load_recipe(tmp_path / "again.yaml").recipe
    assert again.dataset.where == recipe.dataset.where == {**where, "lang": ("en", "de")}
    assert again.dataset.ignore_columns == ("id",)
