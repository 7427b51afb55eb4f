"""What stands in the columns: counted with places, told without the values, in time linear in the text."""

import json
from pathlib import Path
from typing import Any

import pytest

from peftcli.data.quality import SEARCHES, ColumnScan
from peftcli.data.rows import Rows
from peftcli.recipe.problems import is_secret

DATA = Path(__file__).parents[4] / "shared" / "data"
TOKEN = "hf_" + "aB3d" * 8


def scan(values: list[Any], name: str = "answer") -> ColumnScan:
    made = ColumnScan("a.jsonl", [name])
    made.add(Rows("a.jsonl", list(range(1, len(values) + 1)), {name: values}))
    return made


def traces(text: Any) -> set[str]:
    (facts,) = scan([text]).facts()
    return {trace for trace in SEARCHES if facts[trace]}


def test_types_gaps_and_their_first_places_are_counted() -> None:
    (facts,) = scan(["x", None, "", 3, float("nan"), True, ["y"], {"z": 1}, " \n"]).facts()
    assert (facts["source"], facts["column"], facts["rows"]) == ("a.jsonl", "answer", 9)
    assert (facts["null"], facts["empty"]) == (2, 2)
    assert facts["types"] == {"text": 3, "number": 1, "true/false": 1, "list": 1, "object": 1}
    assert facts["first"] == {"null": ["a.jsonl:2", "a.jsonl:5"], "empty": ["a.jsonl:3", "a.jsonl:9"]}


def test_counts_go_on_over_batches_and_places_stop_at_five() -> None:
    made = ColumnScan("data", ["a", "b", "c"])
    for file in ("1.jsonl", "2.jsonl"):
        made.add(Rows(file, [1, 2, 3], {"a": [None] * 3, "b": ["me@x.org"] * 3}))
    first, second = made.facts()
    assert (first["rows"], first["null"], second["email"]) == (6, 6, 6)
    assert first["first"]["null"] == ["1.jsonl:1", "1.jsonl:2", "1.jsonl:3", "2.jsonl:1", "2.jsonl:2"]
    assert json.loads(json.dumps(made.facts())) == made.facts()


def test_a_column_that_a_batch_lacks_is_null_there() -> None:
    made = ColumnScan("data", ["a"])
    made.add(Rows("1.jsonl", [1], {"a": ["x"]}))
    made.add(Rows("2.jsonl", [1, 2], {}))
    assert (made.facts()[0]["rows"], made.facts()[0]["null"]) == (3, 2)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("write to jo.doe+x@mail.example.org.", {"email"}),
        ("call +44 20 7946 0958", {"phone"}),
        ("call +15550101234", {"phone"}),
        ("call 555-010-1234.", {"phone"}),
        ("call 1-555-010-1234", {"phone"}),
        ("call 555.010.1234", {"phone"}),
        ("call (555) 010-1234", {"phone"}),
        (f"token={TOKEN}", {"key"}),
        ("ghp_" + "a1B2" * 9, {"key"}),
        ("github_pat_" + "a1B2" * 9, {"key"}),
        ("sk-proj-" + "a1B2" * 9, {"key"}),
        ("AKIA" + "ABCD" * 4, {"key"}),
        ("xoxb-" + "1234-" * 5, {"key"}),
        ("-----BEGIN RSA PRIVATE KEY-----", {"key"}),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N", {"key"}),
        ("a\x1b[31mb", {"control_characters"}),
        ("caf\ufffd", {"replacement_characters"}),
        ("cafÃ©", {"replacement_characters"}),
        ("â€œyesâ€\x9d", {"replacement_characters", "control_characters"}),
        ({"messages": [{"content": ["x", {"deep": f"{TOKEN}"}]}]}, {"key"}),
    ],
)
def test_a_trace_is_found(text: Any, found: set[str]) -> None:
    assert traces(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "on 2024-01-15 at 10:30:00",
        "ISBN 978-0-306-40615-7 and 0-306-40615-2",
        "4111111111111111 12345678901234567890",
        "48+24=72 and 5 +12345678.5 and 3+100000000",
        "x = +12.3456789, 100 200 3000, +1.0 2.0 3.0 4.0 5.0",
        "10.000.000 192.168.100.1000",
        "@name met @other.user at 5 o'clock; a@b",
        "a task-oriented-dialogue-system, desk-lamps, sk-learn-based-classification-approach",
        "hf_models/llama and AKIAN and eyJ",
        "line\nline\ttab\r\n",
        "São, NÃO, Ângela, crème brûlée, 'quotes' and 😀",
    ],
)
def test_plain_text_holds_no_trace(text: str) -> None:
    assert traces(text) == set()


def test_a_trace_never_reaches_over_two_rows() -> None:
    assert scan(["jo", "@x.org", "555-010", "-1234"]).facts()[0]["email"] == 0
    (facts,) = scan(["jo@x.org and jo@x.org", "no", "", "me@x.org"]).facts()
    assert (facts["email"], facts["first"]["email"]) == (2, ["a.jsonl:1", "a.jsonl:4"])


@pytest.mark.parametrize("start", ["hf_", "sk-", "sk-ant-api03-", "ghs_", "AKIA"])
def test_what_a_recipe_may_not_hold_is_found_in_data_too(start: str) -> None:
    token = start + "A1B2C3D4" * 4
    assert is_secret(token) and traces(token) == {"key"}


def test_warnings_count_and_place_and_never_show_the_value() -> None:
    made = scan([TOKEN, "jo@x.org", "b@x.org", "c@x.org", 3, "a\x00", "cafÃ©"])
    warnings = made.warnings()
    assert [text.partition(" (first")[0] for text in warnings] == [
        "a.jsonl: column answer has mixed types: 6 rows are text, 1 number",
        "a.jsonl: column answer: 1 row has what looks like an access key",
        "a.jsonl: column answer: 3 rows have an e-mail address",
        "a.jsonl: column answer: 1 row has control characters",
        "a.jsonl: column answer: 1 row has wrongly decoded characters",
    ]
    assert "(first a.jsonl:5)" in warnings[0] and "(first a.jsonl:2)" in warnings[2]
    told = "".join(warnings) + json.dumps(made.facts())
    assert TOKEN not in told and "x.org" not in told


def test_few_addresses_among_many_rows_are_counted_without_a_warning() -> None:
    made = scan(["jo@x.org"] * 3 + ["x"] * 297)
    assert made.facts()[0]["email"] == 3 and made.warnings() == []
    assert len(scan(["jo@x.org"] * 4 + ["x"] * 296).warnings()) == 1
    assert scan(["555-010-1234"] * 2).warnings() == []


@pytest.mark.parametrize("piece", ["a", "1", "@", "a@", "@a.", "1-", "+1 ", "555-", "sk-", "sk-a", "eyJ", "eyJ.", "Ã"])
def test_hostile_text_takes_linear_time(piece: str) -> None:
    text = piece * (1_000_000 // len(piece))
    assert scan([text]).facts()  # some 0.2 s; a quadratic search takes hours


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not on this machine")
def test_the_dirt_of_real_stories_is_found() -> None:
    stories = json.loads((DATA / "tinystories" / "tinystories_1000.json").read_text(encoding="utf-8"))
    (facts,) = scan(stories).facts()
    assert 0 < facts["replacement_characters"] <= 83
    assert (facts["email"], facts["phone"], facts["key"], facts["null"]) == (0, 0, 0, 0)
