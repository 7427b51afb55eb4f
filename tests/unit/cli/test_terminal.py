"""The data report on the terminal: what is counted is said, what is missing is left out, and data stay data."""

import subprocess
import sys
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from peftcli.cli.terminal import show_data

DATA: dict[str, Any] = {
    "schema": 1,
    "format": "prompt_completion",
    "sources": [{"path": "products.csv", "rows": 49688, "read_as": "prompt_completion", "files": 1, "weight": 1.0}],
    "joins": [{"path": "departments.csv", "on": ["department_id"], "rows": 21, "unmatched": 4}],
    "rows": 49688,
    "train_rows": 39746,
    "test_rows": 9937,
    "dropped_rows": 5,
    "dropped": {"with department null": 1, "without a partner in departments.csv": 4},
    "dropped_examples": {"with department null": ["products.csv:12"]},
    "truncated_rows": 2,
    "truncated_examples": ["products.csv:77", "products.csv:1033"],
    "leaked_rows": 1,
    "leaked_examples": [{"test": "products.csv:3", "train": "products.csv:700"}],
    "leaked_prompts": 0,
    "duplicate_rows": 7,
    "duplicate_examples": [{"row": "products.csv:90", "first": "products.csv:8"}],
    "tokens": {"train": 1000, "trained": 250, "test": 100, "test_trained": 20},
    "length": {"min": 6, "median": 14.0, "p95": 25.0, "max": 7100},
    "length_histogram": {"edges": [*range(0, 128, 8), 7101], "counts": [40, 600, *[30] * 13, 3]},
    "max_length": 64,
    "eos_trained_rows": 39740,
    "eos_expected_rows": 39744,
    "labels": {"of": "completion", "distinct": 21, "train": {" snacks": 19873, " deli": 2}, "test": {" snacks": 1}},
    "columns": [
        {
            "source": "products.csv",
            "column": "product_name",
            "rows": 49688,
            "null": 7,
            "empty": 0,
            "types": {"text": 49681},
            "email": 2,
            "key": 0,
            "first": {"email": ["products.csv:19", "products.csv:20"]},
        }
    ],
    "warnings": ["2 rows are cut at 64 tokens (first products.csv:77)"],
    "checks": [
        {"name": "pad token", "result": "warn", "said": "The pad token is odd; mend it."},
        {"name": "end token", "result": "fail", "said": "There is none; set model.eos_token."},
    ],
    "preview": [
        {
            "place": "products.csv:77",
            "tokens": 70,
            "trained": 2,
            "parts": [
                {"kind": "prompt", "text": "<s>Salt " + "very " * 400 + "->:"},
                {"kind": "trained", "text": " pan"},
                {"kind": "dropped", "text": "try</s>"},
            ],
        }
    ],
}


def shown(data: dict[str, Any], width: int = 80, *, colour: bool = False) -> str:
    stream = StringIO()
    show_data(data, Console(file=stream, width=width, markup=False, highlight=False, force_terminal=colour))
    return stream.getvalue()


def test_counts_reasons_places_and_shares_are_said() -> None:
    lines = [" ".join(line.split()) for line in shown(DATA, 120).splitlines()]
    for line in (
        "training 39,746 80.0%",
        "cut at max_length 2 <0.1% products.csv:77, products.csv:1033",
        "test, also in training 1 <0.1% products.csv:3 = products.csv:700",
        "equal to an earlier row 7 <0.1% products.csv:90 = products.csv:8",
        "training, end token trained 39,740 >99.9%",
        "with department null 1 products.csv:12",
        "departments.csv department_id 21 4",
        "training 1,000 250 25.0%",
        "snacks ############## 19,873 50.0% <0.1%",
        "and 19 more",
        "product_name 49,688 7 0 text 49,681 2 email (first products.csv:19)",
    ):
        assert line in lines
    assert not [line for line in lines if line.startswith("test, prompt")]


def test_few_bars_stand_for_all_lengths_and_one_of_them_holds_max_length() -> None:
    lines = [" ".join(line.split()) for line in shown(DATA, 100).splitlines()]
    bars = [line for line in lines if " to " in line and "[" not in line and line[0].isdigit()]
    assert bars[0] == "0 to 15 ############################ 640"
    assert [line for line in bars if "max_length" in line] == ["64 to 79 ### 60 <- max_length 64"]
    assert bars[-1] == "112 to 7,100 # 33"
    assert sum(int(line.split(" <-")[0].split()[-1].replace(",", "")) for line in bars) == 1033


def test_a_limit_beyond_all_rows_is_said_to_be_so() -> None:
    assert "max_length 8,000: no training row is longer" in shown({**DATA, "max_length": 8000}).replace("\n", " ")


def test_what_to_look_at_comes_last_and_the_worst_of_it_first() -> None:
    lines = shown(DATA).splitlines()
    assert (
        [line for line in lines if line.startswith("note: ")]
        == lines[-2:]
        == [
            "note: There is none; set model.eos_token.",
            "note: 2 rows are cut at 64 tokens (first products.csv:77)",
        ]
    )


def test_without_colour_the_marks_are_brackets_and_long_parts_lose_their_middle() -> None:
    text = shown(DATA)
    assert "->:{+ pan+}[-try</s>-]" in text
    assert "characters ..." in " ".join(text.split()) and len(text[text.index("<s>Salt") : text.index("{+ pan")]) < 700
    assert "\x1b" not in text


def test_with_colour_the_marks_are_styles_and_the_text_is_the_rows_own() -> None:
    text = shown(DATA, colour=True)
    assert "{+" not in text and "[-" not in text
    assert "\x1b[1;32m pan\x1b[0m\x1b[9;31mtry</s>\x1b[0m" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_table_is_wider_than_the_terminal(width: int) -> None:
    table_lines = shown(DATA, width).split("rows as the trainer")[0].splitlines()
    assert max(map(len, table_lines)) <= width


def test_absent_and_null_keys_are_left_out() -> None:
    assert shown({}) == ""
    assert shown(dict.fromkeys(DATA)) == ""
    assert shown({"rows": 49688}).split() == ["rows", "number", "share", "first", "at", "read", "49,688"]
    for key in DATA:
        assert "note: " in shown({name: value for name, value in DATA.items() if name != key})


def test_data_can_neither_colour_nor_rewrite_the_terminal() -> None:
    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {key if key in KEYS else f"\x1b[31m{key}\x07": spoil(item) for key, item in value.items()}
        if isinstance(value, list):
            return [spoil(item) for item in value]
        return f"\x1b]0;x\x07[red]{value}\u202e" if isinstance(value, str) else value

    text = shown(spoil(DATA))
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text
    assert "[red]" in text and "\u241b" in text


KEYS = set(DATA) | {"path", "rows", "read_as", "weight", "on", "unmatched", "train", "trained", "test"}
KEYS |= {"test_trained", "min", "median", "p95", "max", "edges", "counts", "of", "distinct", "column", "null", "empty"}
KEYS |= {"types", "email", "first", "name", "result", "said", "place", "parts", "kind", "text", "row"}


def test_the_view_imports_nothing_heavy() -> None:
    code = (
        "import sys; import peftcli.cli.terminal; "
        "print({'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
