"""Spoilt and random data files through the real command: whatever stands in them, it never ends as a bug of ours.

PEFTCLI_FUZZ_EXAMPLES=3000 makes of each test that many examples; with PEFTCLI_FUZZ_SEED set they differ each time.
"""

import csv
import datetime
import decimal
import io
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftcli.cli.main import main

EXAMPLES = int(os.environ.get("PEFTCLI_FUZZ_EXAMPLES", "0"))
CASUAL = "PEFTCLI_FUZZ_SEED" in os.environ
ROWS = [{"prompt": f"Name of town {n * 37}, please?", "completion": f" Town-{n * n * 91} é"} for n in range(24)]
CHATS = [
    [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}] for row in ROWS
]
TEMPLATES = {"prompt": "{prompt}", "completion": "{completion}"}
Data = Callable[..., int]


def some(examples: int) -> settings:
    """Settings of a test that makes so many examples in the normal suite."""
    return settings(
        max_examples=EXAMPLES or examples,
        deadline=None,
        derandomize=not CASUAL,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def delimited(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(columns: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def arrow(columns: dict[str, Any]) -> bytes:
    table, sink = pa.table(columns), io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def database(path: Path, rows: list[tuple[Any, Any]]) -> None:
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path)
    connection.execute("create table towns (prompt, completion)")
    connection.executemany("insert into towns values (?, ?)", rows)
    connection.commit()
    connection.close()


def healthy_database() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table towns (prompt text, completion text)")
    connection.executemany("insert into towns values (?, ?)", [tuple(row.values()) for row in ROWS])
    connection.commit()
    content = connection.serialize()
    connection.close()
    return content


COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
HEALTHY: dict[str, tuple[bytes, dict[str, Any]]] = {
    "a.csv": (delimited(ROWS), {}),
    "a.tsv": (delimited(ROWS, "\t"), {"csv": {"quote": '"'}}),
    "b.jsonl": (lines(ROWS), {}),
    "a.jsonl": (lines([{"messages": chat} for chat in CHATS]), {}),
    "a.json": (json.dumps(ROWS, indent=1).encode(), {}),
    "a.conll": (
        "".join(f"Town-{n} B-LOC\nis O\nfar O\n\n" for n in range(24)).encode(),
        {"prompt": "{tokens}:", "completion": " {tags}"},
    ),
    "a.txt": (b"".join(f"Town {n} is far away.\n".encode() for n in range(400)), {}),
    "a.parquet": (parquet(COLUMNS), {}),
    "a.arrow": (arrow(COLUMNS), {}),
    "a.sqlite": (healthy_database(), {}),
}
"""Good files of each kind, with the keys that read them."""

TOKENS = (
    '" \' \\ { } [ ] : , ; \n \r \t \n\n \0 \x1b null NaN -Infinity 1e999 \\ud800 \\u0000 "" true 9999999999999999999 '
    "\ufeff \u2028 <s> </s> <|user|> role content messages prompt {} [] [[ {{ // ..0"
)
PIECES = st.sampled_from([token.encode() for token in TOKENS.split(" ")]) | st.binary(max_size=12)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat", "swap"]),
        st.floats(0, 1),
        st.integers(1, 60),
        PIECES,
        st.integers(1, 255),
    ),
    min_size=1,
    max_size=4,
)
TEXTS = st.text(st.characters(codec=None), max_size=30)
KEYS = ("role", "content", "from", "value", "type", "text", "tool_calls", "function", "name", "arguments", "weight")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.sampled_from(["", " ", "user", "assistant"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS | st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)
CELLS = st.none() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.binary(max_size=8) | st.text(max_size=20)
ARRAYS: list[Any] = [
    pa.array([1.5, None, float("nan"), float("inf")] * 6),
    pa.array([True, None] * 12),
    pa.array([b"\xff", None] * 12),
    pa.array([["a", None], None, []] * 8),
    pa.array([{"a": 1, "b": None}, None] * 12),
    pa.array([decimal.Decimal("1.50"), None] * 12),
    pa.array([datetime.date(1, 1, 1), None] * 12),
    pa.array([2**62, -1] * 12, pa.timestamp("ns")),
    pa.array([2**62, 1] * 12, pa.timestamp("s")),
    pa.array([2**62, 1] * 12, pa.timestamp("us", "Mars/Olympus")),
    pa.array([2**31 - 1, None] * 12, pa.date32()),
    pa.array([2**62, 86_400_000] * 12, pa.date64()),
    pa.array([1, None] * 12, pa.time64("ns")),
    pa.array([2**62, 1] * 12, pa.duration("s")),
    pa.array([2**62 + 1, 1] * 12, pa.duration("ns")),
    pa.array(["x", None] * 12).dictionary_encode(),
    pa.array([[("k", 1)], None] * 12, pa.map_(pa.string(), pa.int32())),
    pa.nulls(24),
    pa.array([b"\xe9", b"a"] * 12).view(pa.string()),
]
"""Columns of the types that Parquet and Arrow know, with values that Python does not hold."""


@pytest.fixture
def data(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Data:
    """A function that runs `peftcli data` over a file and checks what holds for every file."""
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))

    def run(path: Path, keys: dict[str, Any], *, as_json: bool = True) -> int:
        recipe = tmp_path / "recipe.yaml"
        dataset = {"path": str(path), "max_length": 64, "limits": {"max_dropped": 1.0, "max_truncated": 1.0}, **keys}
        sections = {"name": "fuzz", "model": {"name": str(tiny_llama)}, "dataset": dataset}
        recipe.write_text(yaml.safe_dump(sections), encoding="utf-8")
        code = main(["data", str(recipe), *(["--json"] if as_json else [])])
        out, err = capfd.readouterr()
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        assert code in (0, 2, 3, 4), err
        assert "Traceback" not in err and len(err.splitlines()) <= 8 and "\x1b" not in out + err
        assert bool(out) == (as_json or code == 0)
        facts = json.loads(out) if as_json else {}
        if code and as_json and "error" in facts:  # a crossed limit comes after the data
            assert facts["error"]["exit_code"] == code and facts["error"]["message"]
        elif as_json:
            # A text becomes several rows.
            kept = facts["train_rows"] + facts["test_rows"]
            assert facts["format"] == "text" or facts["rows"] == kept + facts["dropped_rows"]
        return code

    return run


def spoil(content: bytes, changes: list[tuple[str, float, int, bytes, int]]) -> bytes:
    """Change some bytes, one change after the other."""
    for change, where, length, piece, flip in changes:
        at = int(where * max(len(content) - 1, 0))
        chunk, rest = content[at : at + length], content[at + length :]
        content = (
            content[:at]
            + {
                "flip": bytes([chunk[0] ^ flip]) + chunk[1:] + rest if chunk else rest,
                "cut": rest,
                "insert": piece + chunk + rest,
                "repeat": chunk * (flip % 5 + 2) + rest,
                "swap": rest[:length] + chunk + rest[length:],
            }[change]
        )
    return content


@pytest.mark.parametrize("name", list(HEALTHY))
def test_the_healthy_files_are_read(name: str, data: Data, tmp_path: Path) -> None:
    content, keys = HEALTHY[name]
    (tmp_path / name).write_bytes(content)
    assert data(tmp_path / name, keys | {"limits": {}}) == 0


@some(90)
@given(name=st.sampled_from(list(HEALTHY)), changes=CHANGES, as_json=st.booleans())
def test_spoilt_bytes(
    data: Data, tmp_path: Path, name: str, changes: list[tuple[str, float, int, bytes, int]], as_json: bool
) -> None:
    content, keys = HEALTHY[name]
    (tmp_path / name).write_bytes(spoil(content, changes))
    data(tmp_path / name, keys, as_json=as_json)


@some(20)
@given(cells=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6), delimiter=st.sampled_from(",;\t|"))
def test_random_cells_of_a_csv_file(data: Data, tmp_path: Path, cells: list[tuple[str, str]], delimiter: str) -> None:
    rows = ROWS[:8] + [dict(zip(TEMPLATES, pair, strict=True)) for pair in cells]
    (tmp_path / "a.csv").write_bytes(delimited(rows, delimiter))
    data(tmp_path / "a.csv", TEMPLATES | {"csv": {"delimiter": delimiter, "quote": '"'}})


@some(30)
@given(
    values=st.lists(VALUES, min_size=1, max_size=4), place=st.integers(0, 4), first=st.booleans(), whole=st.booleans()
)
def test_random_values_in_json(
    data: Data, tmp_path: Path, values: list[Any], place: int, first: bool, whole: bool
) -> None:
    keys: dict[str, Any] = {}
    if place == 0:
        odd, good, keys = [{"prompt": "a", "completion": value} for value in values], ROWS[:8], TEMPLATES
    elif place == 1:
        odd, good = [{"prompt": value, "completion": "b"} for value in values], ROWS[:8]
    else:
        good = [{"messages": chat} for chat in CHATS[:8]]
        made = {
            2: lambda v: v,
            3: lambda v: [*CHATS[0], v],
            4: lambda v: [CHATS[0][0], {"role": "assistant", "content": v}],
        }
        odd = [{"messages": made[place](value), "tools": value} for value in values]
    rows = [*odd, *good] if first else [*good, *odd]
    path = tmp_path / ("a.json" if whole else "a.jsonl")
    path.write_bytes(json.dumps(rows).encode() if whole else lines(rows))
    data(path, keys)


@some(10)
@given(cells=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6), template=st.booleans())
def test_random_values_in_a_database(data: Data, tmp_path: Path, cells: list[tuple[Any, Any]], template: bool) -> None:
    database(tmp_path / "a.db", [tuple(row.values()) for row in ROWS[:8]] + cells)
    data(tmp_path / "a.db", TEMPLATES if template else {})


@pytest.mark.parametrize("write", [parquet, arrow])
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: str(array.type))
def test_a_column_of_any_type(data: Data, tmp_path: Path, array: Any, write: Callable[[dict[str, Any]], bytes]) -> None:
    path = tmp_path / f"a.{write.__name__}"
    try:
        path.write_bytes(write(COLUMNS | {"completion": array}))
    except pa.ArrowException:
        pytest.skip("not a type that Parquet holds")
    data(path, TEMPLATES)
    data(path, {})
