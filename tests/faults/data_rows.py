"""Rows that would train the wrong thing in silence: numbers 12 to 17 and 45 of the matrix."""

import json
from collections.abc import Iterator, Mapping

from table import Case, Judge, Row, Scenario
from workspace import Workspace, as_lines, pairs

ROWS = pairs(48)
LONG = [row | {"prompt": f"{'long ' * 60}{row['prompt']}"} if n % 6 == 5 else row for n, row in enumerate(ROWS)]
"""Every sixth prompt alone is longer than 64 tokens."""
MANY_DROPPED = {"dataset.limits": {"max_dropped": 1.0, "max_truncated": 1.0}}
LOOPS = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
HOSTILE = "[/foo] [bold] \x1b[2J\x1b]0;title\x07 <script>alert(1)</script> \u202e | `x`"


def chat(number: int) -> dict[str, object]:
    """A healthy chat with two answers."""
    turns = [f"Where is town {number}?", f"Town {number} is far.", "And the next?", f"Town {number + 1} is near."]
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]}


CHATS = [chat(number) for number in range(24)]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% endfor %}"
)


def with_template(ground: Workspace) -> None:
    """Put a chat template beside the recipe that would be at work for weeks."""
    ground.write("template.jinja", LOOPS + TEMPLATE)


def bad_chats(messages: list[dict[str, object]]) -> bytes:
    """Chats of which the sixth is spoilt; more would cross a limit and end the case there."""
    return as_lines([*CHATS[:5], {"messages": messages}, *CHATS[6:]])


def look(number: str, fault: str, exits: int, says: tuple[str, ...], rows: bytes, keys: Mapping[str, object]) -> Case:
    """A case that `peftcli data` answers."""
    return Case(number, fault, exits, keys, rows=rows, words=("data", "RECIPE", "--json"), says=says, most_lines=3)


ONE_CHAT = {"dataset.limits": {"max_dropped": 0.05, "max_leaked": 1.0}, "dataset.max_length": 128}
CASES = [
    look(
        "12",
        "one empty completion of 48 is left out and counted",
        0,
        ('"dropped": {"with nothing to learn (empty)": 1}', "rows.jsonl:6"),
        as_lines([row | {"completion": ""} if n == 5 else row for n, row in enumerate(ROWS)]),
        {},
    ),
    look(
        "13",
        "8 of 48 prompts fill max_length: a limit is crossed",
        3,
        ("dataset.limits.max_dropped",),
        as_lines(LONG),
        {},
    ),
    look(
        "13",
        "8 of 48 prompts fill max_length: all 8 counted",
        0,
        ('"dropped_rows": 8', "rows.jsonl:6"),
        as_lines(LONG),
        MANY_DROPPED,
    ),
    look(
        "15",
        "a role typo is left out and named",
        0,
        ("unknown role asistant", "rows.jsonl:6"),
        bad_chats([{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}]),
        ONE_CHAT,
    ),
    look(
        "15",
        "a chat without an assistant message",
        0,
        ('"dropped_rows": 1', "rows.jsonl:6"),
        bad_chats([{"role": "user", "content": "a"}]),
        ONE_CHAT,
    ),
    look("15", "messages: []", 0, ('"dropped_rows": 1', "rows.jsonl:6"), bad_chats([]), ONE_CHAT),
    look(
        "16",
        "the text of an end token inside a prompt is told",
        0,
        ("1 row has the text of a special token", "rows.jsonl:6"),
        as_lines([row | {"prompt": "a </s> b ->:"} if n == 5 else row for n, row in enumerate(ROWS)]),
        {},
    ),
    look(
        "17",
        "four rows planted on both sides",
        3,
        ("dataset.limits.max_leaked",),
        as_lines([*ROWS, *ROWS[:16]]),
        {},
    ),
    Case(
        "45",
        "a chat template of nested loops ends",
        3,
        {"model.chat_template": "template.jinja"},
        rows=as_lines(CHATS),
        prepare=with_template,
        words=("data", "RECIPE", "--json"),
        says=("the chat template was still running",),
        most_seconds=60,
    ),
]


def assistant_only(ground: Workspace) -> Iterator[Row]:
    """Of chats, exactly the assistant's turns are trained, each with its end; counted here by hand."""
    judge = Judge("14", "of chats the assistant's turns alone are trained, each with its end", "0")
    ground.write("rows.jsonl", as_lines(CHATS))
    recipe = ground.recipe({"dataset.max_length": 128, "dataset.limits": {"max_leaked": 1.0}})
    end = judge.ended(ground.run("data", str(recipe), "--json", "--preview", "8"), 0)
    facts = json.loads(end.out)
    for row in facts["preview"]:
        trained = "".join(part["text"] for part in row["parts"] if part["kind"] == "trained")
        number = int(row["place"].rsplit(":", 1)[1]) - 1
        judge.holds(f"Town {number} is far." in trained, f"{row['place']} does not train its answer: {trained!r}")
        judge.holds(
            "Where" not in trained and "next" not in trained, f"{row['place']} trains a user's turn: {trained!r}"
        )
    judge.holds(len(facts["preview"]) == 8, "no preview")
    judge.holds(facts["eos_trained_rows"] == facts["eos_expected_rows"] > 0, "an end is not trained")
    yield judge.row(f"{facts['eos_trained_rows']} of {facts['eos_expected_rows']} ends trained")


def counted_by_force(ground: Workspace) -> Iterator[Row]:
    """Cut rows, equal to those that the tokenizer alone finds longer."""
    from transformers import AutoTokenizer  # slow to import, and only this drill needs it

    judge = Judge("13", "cut rows equal a count by hand", "0")
    texts = ["word " * length for length in range(10, 130, 5)]
    ground.write("rows.jsonl", as_lines([{"text": text} for text in texts]))
    recipe = ground.recipe({"dataset.too_long": "truncate", "dataset.split": {"test_size": 2}, **MANY_DROPPED})
    end = judge.ended(ground.run("data", str(recipe), "--json"), 0)
    tokenizer = AutoTokenizer.from_pretrained(ground.model)
    # A row ends in an end token, which the tokenizer alone may not write.
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in texts]
    expected = sum(length > 64 for length in lengths)
    cut = json.loads(end.out)["truncated_rows"] if end.out else None
    judge.holds(0 < expected < len(texts) and cut == expected, f"{cut} cut, {expected} counted")
    yield judge.row(f"{expected} of {len(texts)} rows cut")


def hostile_text(ground: Workspace) -> Iterator[Row]:
    """Rows with terminal commands, markup and scripts: none of it reaches the terminal or the page as such."""
    judge = Judge("45", "markup, terminal commands and scripts in rows and answers", "0")
    ground.write("rows.jsonl", as_lines([row | {"prompt": f"{HOSTILE} {row['prompt']}"} for row in ROWS]))
    recipe = ground.recipe({"dataset.max_length": 128, "evaluation.samples": 3, "trainer.max_steps": 2})
    for words in (("data", str(recipe)), ("train", str(recipe), "--output-dir", "run")):
        end = judge.ended(ground.run(*words), 0)
        judge.holds("\x1b" not in end.out + end.err and "\x07" not in end.out + end.err, f"{words[0]} lets ESC through")
        judge.holds("[/foo]" in end.out, f"{words[0]} swallows markup")
    page = (ground.folder / "run" / "report.html").read_text(encoding="utf-8")
    judge.holds("<script>alert" not in page and "alert(1)" in page, "the page does not escape its rows")
    judge.holds("\x1b" not in page, "an escape sign is in the page")
    yield judge.row()


DRILLS = [
    Scenario("13", "cut rows", counted_by_force),
    Scenario("14", "assistant's turns", assistant_only),
    Scenario("45", "hostile text", hostile_text),
]
