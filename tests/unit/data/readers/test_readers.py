"""Sources: every row with its place, every file that cannot be read one clear error."""

import bz2
import gzip
import json
import lzma
import os
import sqlite3
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from peftcli.data.readers import csv
from peftcli.data.readers import text as texts
from peftcli.data.readers.open import OpenSource, open_source
from peftcli.data.rows import BATCH_CHARACTERS, BATCH_ROWS, Rows
from peftcli.errors import DataError, MachineError
from peftcli.recipe.schema import JoinSection, SourceSection, TestSection

SHARED = Path(__file__).parents[5] / "shared" / "data"


def opened(path: Path | None = None, **keys: Any) -> OpenSource:
    section = SourceSection.model_validate(keys | ({"path": str(path)} if path is not None else {}))
    return open_source(section)


def rows_of(source: OpenSource) -> list[dict[str, Any]]:
    """The rows as objects."""
    return [row for rows in source.batches() for row in objects(rows)]


def objects(rows: Rows) -> Iterator[dict[str, Any]]:
    for values in zip(*rows.columns.values(), strict=True):
        yield dict(zip(rows.columns, values, strict=True))


def numbers_of(source: OpenSource) -> list[int]:
    return [number for rows in source.batches() for number in rows.numbers]


def unread_of(source: OpenSource) -> list[tuple[int, str]]:
    return [item for rows in source.batches() for item in rows.unread]


def error_of(path: Path | None, **keys: Any) -> str:
    """What is said of a source that cannot be read; also that it is short and names the place."""
    with pytest.raises(DataError) as caught:
        for _ in opened(path, **keys).batches():
            pass
    message = str(caught.value)
    assert "\n" not in message and len(message) < 800
    return message


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- CSV and TSV


def test_a_csv_value_stays_the_text_that_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'id,name\n007,NA\n010,"say \\""hi\\"""\n,null\n')
    assert rows_of(opened(path)) == [
        {"id": "007", "name": "NA"},
        {"id": "010", "name": 'say \\"hi\\"'},
        {"id": "", "name": "null"},
    ]


def test_a_csv_row_is_named_by_the_line_it_begins_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'a,b\r\n1,"x\ny\r\nz"\r\n\r\n2,w\r\n3\r\n4,5,6\r\n7,v')
    source = opened(path)
    (rows,) = source.batches()
    assert (rows.numbers, rows.columns["b"]) == ([2, 6, 9], ["x\ny\r\nz", "w", "v"])
    assert rows.place(1) == "a.csv:6"
    assert rows.unread == [(7, "with 1 cell, but the header has 2"), (8, "with 3 cells, but the header has 2")]


def test_the_csv_keys_are_obeyed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "'x;y';2\n\"q\";3\n")
    csv = {"delimiter": ";", "quote": "'", "column_names": ["text", "n"]}
    assert rows_of(opened(path, csv=csv)) == [{"text": "x;y", "n": "2"}, {"text": '"q"', "n": "3"}]
    assert numbers_of(opened(path, csv=csv)) == [1, 2]


def test_a_file_of_one_column_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text\nhello; you\nthere | you\n")
    assert rows_of(opened(path)) == [{"text": "hello; you"}, {"text": "there | you"}]


@pytest.mark.parametrize(
    ("content", "csv", "message"),
    [
        ("a;b;c\n1;2;3\n", {}, 'a.csv:1: the header is one cell `a;b;c`; set dataset.csv.delimiter: ";"'),
        ("a\tb\n1\t2\n", {}, 'set dataset.csv.delimiter: "\\t"'),
        ("a|b\n1|2\n", {}, 'set dataset.csv.delimiter: "|"'),
        ("a,b\n1,2\n", {"column_names": ["x"]}, "the first line has 2 cells, but dataset.csv.column_names has 1 names"),
        ("a,b\n1,2\n", {"column_names": ["a", "b"]}, "the first line is already a header"),
        ("a,b,a\n1,2,3\n", {}, "a.csv:1: the header has a twice"),
        ("a,,b\n1,2,3\n", {}, "a.csv:1: the header has no name for column 2 of 3"),
        ('a,b\n1,2\n3,"x\n4,5\n', {}, 'a.csv:3: the cell that starts here with " is never closed'),
        ('a,b\n1,"x "y" z"\n', {}, 'a.csv:2: the row that starts here has text after a closing "'),
        ('a,b\n1,"x\n2,y\n3,"z"\n', {}, "a.csv:2: the row that starts here and ends on line 4"),
        ("", {}, "a.csv: empty; add a header line with the column names"),
        ("\n\n", {}, "a.csv: empty; add a header line"),
        ("a,b\n", {}, "a.csv: no rows"),
        ("a,b\n1,2\n", {"delimiter": "|", "quote": "|"}, "delimiter and quote are both |"),
    ],
)
def test_a_csv_file_that_cannot_be_read_says_where_and_the_mend(
    tmp_path: Path, content: str, csv: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "a.csv", content)
    assert message in error_of(path, csv=csv)


def test_a_quoted_cell_may_be_as_long_as_ten_megabytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'a,b\n1,"' + "x\n" * 5_000_000 + '"\n2,y\n')
    source = opened(path)
    assert [len(row["b"]) for row in rows_of(source)] == [10_000_000, 1]
    assert numbers_of(source) == [2, 5_000_003]


def test_a_quote_that_swallows_the_file_is_named_where_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv, "CELL_CHARACTERS", 1000)
    path = write(tmp_path / "a.csv", 'a,b\n1,2\n3,"x\n' + "4,5\n" * 1000)
    assert "a.csv:3: the cell that starts here is longer than 1000 characters" in error_of(path)


def test_quotes_at_the_beginning_of_tsv_cells_are_not_guessed_at(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'text\tn\nsay "hi"\t1\n"x\ty"\t2\n')
    assert "a.tsv:3: a cell starts with a quote; set dataset.csv.quote: '\"'" in error_of(path)
    assert [row["text"] for row in rows_of(opened(path, csv={"quote": '"'}))] == ['say "hi"', "x\ty"]
    as_text = opened(path, csv={"quote": "none"})
    assert rows_of(as_text) == [{"text": 'say "hi"', "n": "1"}]
    assert unread_of(as_text) == [(3, "with 3 cells, but the header has 2")]


def test_the_part_of_the_recipe_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a;b\n1;2\n")
    section = JoinSection.model_validate({"path": str(path), "on": "a"})
    with pytest.raises(DataError, match=r"set dataset\.join\[0\]\.csv\.delimiter"):
        list(open_source(section, key="dataset.join[0]").batches())


# --- JSON


@pytest.mark.parametrize(
    "ending", ["jsonl", "ndjson", "json", "list.json", "parquet", "csv", "tsv", "arrow", "feather"]
)
def test_every_ending_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    rows = [{"prompt": f"p {number}", "completion": f"c, {number} é"} for number in range(3)]
    path = tmp_path / f"rows.{ending}"
    if ending in ("jsonl", "ndjson", "json"):
        write(path, "\ufeff" + "\n\n".join(json.dumps(row) for row in rows))
    elif ending == "list.json":
        write(path, json.dumps(rows, indent=1))
    elif ending == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif ending == "arrow":
        write_stream(path, rows)
    elif ending == "feather":
        pa.feather.write_feather(pa.Table.from_pylist(rows), str(path))
    else:
        comma, quote = (",", '"') if ending == "csv" else ("\t", "")
        lines = [comma.join(rows[0])] + [comma.join(f"{quote}{cell}{quote}" for cell in row.values()) for row in rows]
        write(path, "\ufeff" + "\n".join(lines))
    assert rows_of(opened(path)) == rows


def write_stream(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def test_json_rows_are_named_by_the_line_they_begin_on(tmp_path: Path) -> None:
    as_list = write(tmp_path / "a.json", '[\n {"a": 1,\n  "b": [1]}\n,{"a": 2}, {"b": 3}\n]\n')
    (rows,) = opened(as_list).batches()
    assert (rows.numbers, rows.columns) == ([2, 4, 4], {"a": [1, 2, None], "b": [[1], None, 3]})
    lines = write(tmp_path / "a.jsonl", '{"a": 1}\n\n  \r\n{"a": 2}')
    assert numbers_of(opened(lines)) == [1, 4]


def test_a_list_of_texts_is_one_column(tmp_path: Path) -> None:
    assert rows_of(opened(write(tmp_path / "a.json", '["x", "y"]'))) == [{"text": "x"}, {"text": "y"}]


def test_columns_of_the_first_batch_stand_in_every_batch(tmp_path: Path) -> None:
    lines = ['{"a": 1, "b": 2}'] + ['{"a": 1}'] * (BATCH_ROWS + 5)
    batches = list(opened(write(tmp_path / "a.jsonl", "\n".join(lines))).batches())
    assert [len(rows) for rows in batches] == [BATCH_ROWS, 6]
    assert batches[1].columns["b"] == [None] * 6


def test_numbers_beyond_64_bits_and_odd_floats_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"n": 99999999999999999999999}\n{"n": NaN}\n')
    values = [row["n"] for row in rows_of(opened(path))]
    assert values[0] == 99999999999999999999999 and values[1] != values[1]


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_json_row_that_would_lose_something_is_not_read(tmp_path: Path, ending: str) -> None:
    rows = ['{"a": "\\ud83d\\ude00"}', '{"a": "x\\ud800"}', '{"a": 1, "b": {"c": 1, "c": 2}}', '{"a": "\\\\ud800"}']
    content = "\n".join(rows) if ending == "jsonl" else "[" + ",\n".join(rows) + "]"
    source = opened(write(tmp_path / f"a.{ending}", content))
    assert [row["a"] for row in rows_of(source)] == ["😀", "\\ud800"]
    assert unread_of(source) == [(2, "with a lone surrogate"), (3, "with the duplicate key c")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl:2: not JSON at column 9: a value is expected; a row must"),
        (
            "a.jsonl",
            '{"text": "x"}\n  {"text": x}\n',
            "a.jsonl:2: not JSON at column 12: a value is expected; fix or remove the line",
        ),
        ("a.jsonl", '{"a": 1} {"a": 2}\n', "a.jsonl:1: not JSON at column 9: extra data after the value"),
        ("a.jsonl", '{\n  "a": 1\n}\n', "write the file as one list and rename it to .json"),
        (
            "a.jsonl",
            "[1, 2]\n",
            "a.jsonl:1: is a list, but each row must be an object with columns; rename a file with one list",
        ),
        ("a.jsonl", "3\n", "a.jsonl:1: is a number, but each row must be an object"),
        (
            "a.jsonl",
            '{"a": 1}\n"x"\n',
            "a.jsonl:2: is a text, but the previous rows are an object; use one type for all rows",
        ),
        ("a.jsonl", '{"n": ' + "9" * 5000 + "}\n", "a.jsonl:1: cannot be read: a number has more than 4300 digits"),
        ("a.jsonl", "[" * 100_000 + "\n", "a.jsonl:1: cannot be read: lists or objects are nested too deeply"),
        ("a.jsonl", "\n \n", "a.jsonl: no rows"),
        ("a.json", '[{"n": ' + "9" * 5000 + "}]", "a.json:1: cannot be read: a number has more than 4300 digits"),
        ("a.json", "[\n" + "[" * 100_000, "a.json:2: cannot be read: lists or objects are nested too deeply"),
        ("a.json", "[]", "a.json: no rows"),
        ("a.json", "  \n", "a.json: the file is blank"),
        ("a.json", '"x"', 'a.json: starts with "; it must be a list of rows'),
        ("a.json", '[{"a": 1},\n {"a": x}]', "a.json:2: not JSON at column 8: a value is expected"),
        ("a.json", '[{"a": 1},\n {"a": 2}', "a.json:2: not JSON at column 10: the list does not end"),
        ("a.json", '[{"a": 1},\n {"a": "2', "a.json:2: not JSON at column 2: the row that starts here does not end"),
        ("a.json", '[{"a": 1}\n {"a": 2}]', "a.json:2: not JSON at column 2: { between rows"),
        ("a.json", '[{"a": 1}, ]', "a.json:1: not JSON at column 12: a trailing comma"),
        ("a.json", '[{"a": 1}]\n[2]', "a.json:2: not JSON at column 1: extra data after the list"),
        ("a.json", "[[1]]", "a.json:1: is a list, but each row must be an object"),
        ("a.json", '{"v": "x", "data": [1, 2]}', "is one object (v: a text, data: a list of 2)"),
        ("a.json", '{\n "v": 1,\n "data": [\n]}', "save the list under data to a separate file"),
        ("a.json", '{"text": {"a": 1, "b": "x"}, "n": 1}', "put it in [ ] if it is one row"),
        ("a.json", '{\n"a": 1}\n{\n"a": 2}', "a.json: has several objects that span several lines"),
        ("a.json", '{\n"a": 1,\n', "a.json:3: not JSON at column 1"),
    ],
)
def test_a_json_file_that_cannot_be_read_says_where(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = write(tmp_path / name, content)
    assert message in error_of(path) and str(path) in error_of(path)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_with_one_object_is_one_row(tmp_path: Path, indent: int | None) -> None:
    chat = {"id": 7, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Good day"}]}
    write(tmp_path / "a.json", json.dumps(chat, indent=indent))
    write(tmp_path / "b.json", json.dumps({"text": "x", "n": 1}, indent=indent))
    assert rows_of(opened(tmp_path / "a.json")) == [chat]
    rows = rows_of(opened(tmp_path))
    assert [row.get("conversations") or row["text"] for row in rows] == [chat["conversations"], "x"]
    twice = write(tmp_path / "c.json", json.dumps(chat, indent=indent).replace('"id": 7', '"id": 7, "id": 8'))
    assert unread_of(opened(twice)) == [(1, "with the duplicate key id")]


def test_rows_on_one_line_have_numbers_of_their_own(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "a.json", json.dumps([{"a": at} for at in range(5)])))
    assert numbers_of(source) == [1, 2, 3, 4, 5]


def test_a_long_element_of_a_list_is_read_in_proportion_to_its_length(tmp_path: Path) -> None:
    rows = [{"a": "x" * size} for size in (10, 10_000_000, 70_000, 65_530, 3)]
    source = opened(write(tmp_path / "a.json", json.dumps(rows, indent=1)))
    assert [len(row["a"]) for row in rows_of(source)] == [10, 10_000_000, 70_000, 65_530, 3]
    assert numbers_of(source) == [2, 5, 8, 11, 14]
    assert [len(rows) for rows in source.batches()] == [2, 3]  # the long row ends its batch


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 40])
def test_a_list_is_read_alike_wherever_its_stretches_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("peftcli.data.readers.json.CHUNK_CHARACTERS", chunk)
    rows = [{"a": -12.5e-3, "b": '\\ \U0001f600 " \n'}, {}, {"c": [True, None, {"d": [[]]}], "e": "é" * 50}]
    path = write(tmp_path / "a.json", " " + json.dumps(rows, indent=2) + "\n")
    names = {"a": None, "b": None, "c": None, "e": None}
    assert rows_of(opened(path)) == [names | row for row in rows]
    broken = write(tmp_path / "b.json", json.dumps(rows, indent=2).replace("true", "frue"))
    assert "b.json:9: not JSON at column 7: a value is expected" in error_of(broken)


CHAT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Good day"}]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_or_a_folder_of_files_with_one_chat_each_is_read(tmp_path: Path, indent: int | None) -> None:
    row = {"id": "a", "conversations": CHAT}
    one = write(tmp_path / "a.json", json.dumps(row, indent=indent))
    assert rows_of(opened(one)) == [row] and numbers_of(opened(one)) == [1]
    (tmp_path / "chats").mkdir()
    for name in ("a", "b"):
        write(tmp_path / "chats" / f"{name}.json", json.dumps(row, indent=indent))
    assert rows_of(opened(tmp_path / "chats")) == [row, row]
    bare = write(tmp_path / "b.json", json.dumps(CHAT, indent=indent))
    assert rows_of(opened(bare)) == [{"messages": CHAT}] and numbers_of(opened(bare)) == [1]


def test_a_row_may_be_a_chat_without_a_column(tmp_path: Path) -> None:
    for name, text in (("a.json", json.dumps([CHAT, CHAT])), ("a.jsonl", f"{json.dumps(CHAT)}\n" * 2)):
        assert rows_of(opened(write(tmp_path / name, text))) == [{"messages": CHAT}] * 2
    mixed = write(tmp_path / "b.json", json.dumps([CHAT, [1]]))
    assert "is a list without messages, but the previous rows are a list" in error_of(mixed)


def test_rows_that_only_look_like_messages_stay_rows(tmp_path: Path) -> None:
    rows = [{"role": "user", "content": "Hi", "label": 1}, {"role": "user", "content": "Ho", "label": 0}]
    assert rows_of(opened(write(tmp_path / "a.json", json.dumps(rows)))) == rows
    rows = [{"role": "doctor", "content": "Hi"}, {"role": "nurse", "content": "Ho"}]
    assert rows_of(opened(write(tmp_path / "b.json", json.dumps(rows)))) == rows


def test_rows_on_one_line_are_named_by_their_number(tmp_path: Path) -> None:
    rows = [{"a": "x"}, {"a": "y"}, {"a": "z"}]
    assert numbers_of(opened(write(tmp_path / "a.json", json.dumps(rows)))) == [1, 2, 3]
    assert numbers_of(opened(write(tmp_path / "b.json", "[\n" + json.dumps(rows)[1:]))) == [1, 2, 3]
    assert numbers_of(opened(write(tmp_path / "c.json", json.dumps(rows, indent=1)))) == [2, 5, 8]
    assert numbers_of(opened(write(tmp_path / "d.json", json.dumps(rows[:1])))) == [1]


# --- columnar files


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_the_nulls_of_a_merged_schema_are_left_out(tmp_path: Path, ending: str) -> None:
    """Arrow gives the arguments of one tool call those of every other; JSON keeps a null that was written."""
    calls = [{"north": 1, "flags": [1, None]}, {"order": {"kind": "flat white"}}]
    rows = [{"note": None, "messages": [{"role": "assistant", "call": call}]} for call in calls]
    table = pa.Table.from_pylist(rows)
    assert table.column("messages").to_pylist()[0][0]["call"]["order"] is None
    if ending == "parquet":
        pa.parquet.write_table(table, tmp_path / "a.parquet")
    else:
        pa.feather.write_feather(table, str(tmp_path / "a.arrow"), compression="uncompressed")
    assert rows_of(opened(tmp_path / f"a.{ending}")) == rows
    written = write(tmp_path / "a.jsonl", json.dumps({"a": {"b": None}}))
    assert rows_of(opened(written)) == [{"a": {"b": None}}]


def test_a_parquet_row_is_named_by_its_number_and_batches_are_bounded(tmp_path: Path) -> None:
    kinds = pa.array(["x", "y"] * 2500).dictionary_encode()
    table = pa.table({"n": range(5000), "kind": kinds, "text": ["t" * 3000] * 5000})
    pa.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3000)
    source = opened(tmp_path / "a.parquet")
    batches = list(source.batches())
    assert max(sum(map(len, rows.columns["text"])) for rows in batches) <= BATCH_CHARACTERS
    assert numbers_of(source) == list(range(1, 5001))
    assert rows_of(source)[4999] == {"n": 4999, "kind": "y", "text": "t" * 3000}


def test_a_saved_dataset_is_read_in_the_order_of_its_files(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = [{"text": f"t {number}", "label": number % 2} for number in range(25)]
    saved = Dataset.from_list(rows, features=features)
    saved.save_to_disk(str(tmp_path / "saved"), num_shards=12)
    assert rows_of(opened(tmp_path / "saved")) == rows
    DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "splits"))
    assert "has the splits test, train; use one of them" in error_of(tmp_path / "splits")
    (tmp_path / "saved" / "data-00003-of-00012.arrow").unlink()
    assert "data-00003-of-00012.arrow is listed in state.json but missing" in error_of(tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1", "a.parquet: cannot be read as parquet"),
        ("a.parquet", b"x,y\n1,2\n", "a.parquet: its first bytes are not those of a Parquet file"),
        ("a.arrow", b"ARROW1 broken", "a.arrow: cannot be read as arrow"),
        ("a.feather", b"FEA1 old", "a Feather file of version 1"),
        ("a.db", b"no database at all", "a.db: its first bytes are not those of an SQLite database"),
        (
            "a.csv",
            b"PAR1 and more",
            "a.csv: is a Parquet file; change its extension to .parquet, or set dataset.file_format",
        ),
        ("a.csv", b"SQLite format 3\0", "is an SQLite database; change its extension to .sqlite"),
        ("a.csv", b"PK\x03\x04 sheet", "a spreadsheet or a zip archive; export it as CSV"),
        ("a.xlsx", b"PK\x03\x04 sheet", "a.xlsx: is a spreadsheet; export it as CSV"),
        ("a.txt", b"%PDF-1.7", "a.txt: is a PDF document"),
        ("a.csv", gzip.compress(b"a,b\n1,2\n", mtime=0), "a.csv: is compressed with gzip; add the extension .gz"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd1234", "is compressed with Zstandard; add the extension .zst"),
        ("a.jsonl.gz", b'{"a": 1}\n', "a.jsonl.gz: has the extension .gz, but is not compressed like this"),
        (
            "a.parquet.gz",
            gzip.compress(b"PAR1", mtime=0),
            "compressed parquet files are not supported; decompress it first",
        ),
        ("a.csv.gz", gzip.compress(b"", mtime=0), "a.csv.gz: empty after decompression"),
        ("a.bin", b"abc", "a.bin: unknown file extension .bin; known are .csv, .tsv"),
        ("rows", b"a\n1\n", "set dataset.file_format (csv, tsv"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), "a.csv: its first bytes are UTF-16; set dataset.encoding: utf-16"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16-be"), "set dataset.encoding: utf-16-be"),
        ("a.csv", b"a,b\n1,\0\0\x07\x01\n", "a.csv:2: byte 6 is NUL, which is not text"),
    ],
)
def test_what_a_file_is_shows_in_its_first_bytes(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    assert message in error_of(write(tmp_path / name, content))


def test_a_spoilt_offset_in_an_arrow_file_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    write_stream(tmp_path / "a.arrow", [{"text": "one"}, {"text": "two"}])
    content = (tmp_path / "a.arrow").read_bytes()
    offsets = content.index(b"\0\0\0\0\3\0\0\0\6\0\0\0")
    spoilt = content[: offsets + 4] + b"\xff\xff\xff\x7f" + content[offsets + 8 :]
    assert "cannot be read as arrow" in error_of(write(tmp_path / "a.arrow", spoilt))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert "two columns are named a" in error_of(tmp_path / "a.arrow")


# --- packing and letters

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("packing", PACKERS)
def test_packed_files_are_read_and_cut_off_ones_refused(tmp_path: Path, packing: str) -> None:
    content = b"".join(b'{"a": "%s"}\n' % os.urandom(20).hex().encode() for _ in range(3000))
    packed = PACKERS[packing](content)
    whole = write(tmp_path / f"a.jsonl{packing}", packed)
    assert rows_of(opened(whole)) == [json.loads(line) for line in content.splitlines()]
    for length in (len(packed) - 3, len(packed) // 2):
        cut = write(tmp_path / f"cut.jsonl{packing}", packed[:length])
        assert f"cut.jsonl{packing}: the compressed data are truncated" in error_of(cut)


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz"])
def test_spoiled_packing_is_no_traceback(tmp_path: Path, packing: str) -> None:
    packed = bytearray(PACKERS[packing](Random(0).randbytes(50_000).hex().encode()))
    packed[2000:2100] = bytes(100)
    message = error_of(write(tmp_path / f"a.txt{packing}", bytes(packed)))
    assert "cannot be" in message and f"a.txt{packing}" in message


@pytest.mark.parametrize("before", [0, 3, 300_000])
def test_a_byte_that_is_no_letter_is_named_by_line_and_offset(tmp_path: Path, before: int) -> None:
    head = "\ufefftext\n" + "é é é\n" * before
    path = write(tmp_path / "a.csv", head.encode() + "M\xfcller\n".encode("latin-1"))
    message = error_of(path)
    assert f"a.csv:{before + 2}: byte {len(head.encode()) + 1} is not UTF-8; set dataset.encoding" in message
    assert rows_of(opened(path, encoding="latin-1"))[-1] == {"ï»¿text": "Müller"}


def test_a_letter_that_is_cut_off_at_the_end_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "ab\né".encode()[:-1])
    assert "a.txt:2: byte 3 is not UTF-8" in error_of(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252", "utf-8", "shift_jis"])
def test_the_encoding_of_the_recipe_is_obeyed(tmp_path: Path, encoding: str) -> None:
    text = "text\nカ\n" if encoding == "shift_jis" else "text\né\n"
    path = write(tmp_path / "a.csv", text.encode(encoding))
    assert rows_of(opened(path, encoding=encoding)) == [{"text": text[5]}]


def test_another_encoding_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"text\na\x81\n")
    assert "a.csv:2: byte 6 is not CP1252; set dataset.encoding to the" in error_of(path, encoding="cp1252")


# --- plain text and CoNLL


@pytest.mark.parametrize("name", ["lines", "one line", "no spaces"])
def test_a_text_is_one_document_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text = {
        "lines": "".join(f"line {number}\n" + "\n" * (number % 3) for number in range(2000)),
        "one line": "word " * 3000,
        "no spaces": "x" * 20_000,
    }[name]
    monkeypatch.setattr(texts, "PIECE_CHARACTERS", 300)
    batches = list(opened(write(tmp_path / "a.txt", text)).batches())
    pieces = [piece for rows in batches for piece in rows.columns["text"]]
    assert "".join(pieces) == text and max(map(len, pieces)) <= 300 and len(batches) > 1
    ends = [end for rows in batches for end in rows.ends or []]
    assert ends == [False] * (len(pieces) - 1) + [True]
    numbers = [number for rows in batches for number in rows.numbers]
    assert numbers == [1 + "".join(pieces[:index]).count("\n") for index in range(len(pieces))]
    if name != "no spaces":
        assert all(piece.endswith("\n" if name == "lines" else " ") for piece in pieces)


def test_a_short_text_is_whole_with_line_feeds(tmp_path: Path) -> None:
    (rows,) = opened(write(tmp_path / "a.txt", "one\r\ntwo")).batches()
    assert (rows.columns, rows.ends, rows.numbers) == ({"text": ["one\ntwo"]}, [True], [1])


def test_conll_sentences_have_tokens_and_tags(tmp_path: Path) -> None:
    content = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n \n\nPeter NNP B-PER\n\nBad\nx NN O\n\na b\n\nLast NN O"
    source = opened(write(tmp_path / "a.conll", content))
    assert rows_of(source) == [
        {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
        {"tokens": ["Peter"], "tags": ["B-PER"]},
        {"tokens": ["Last"], "tags": ["O"]},
    ]
    assert numbers_of(source) == [3, 7, 14]
    assert unread_of(source) == [
        (9, "with 1 field on a line, but the first line has 3"),
        (12, "with 2 fields on a line, but the first line has 3"),
    ]


def test_a_conll_token_may_hold_a_space_between_tabs(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "a.bio", "New York\tB-LOC\n\t\n\tO\n"))
    assert rows_of(source) == [{"tokens": ["New York"], "tags": ["B-LOC"]}]
    assert unread_of(source) == [(3, "with a line without a token or a tag")]


# --- paths


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "products.csv", "a\n1\n")
    assert error_of(tmp_path / "product.csv").endswith("product.csv: no such file; did you mean products.csv?")
    assert f"the folder {tmp_path / 'nowhere'} does not exist" in error_of(tmp_path / "nowhere" / "a.csv")


def test_a_folder_is_read_in_the_order_of_names_without_what_is_no_data(tmp_path: Path) -> None:
    for name, value in (("b.csv", "2"), ("a.csv", "1"), ("c.csv.gz", "3")):
        content = f"x,y\n{value},z\n".encode()
        write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    for name in ("README.md", "LICENSE", "readme.txt", ".hidden.csv", "dataset_info.json"):
        write(tmp_path / name, "no rows")
    source = opened(tmp_path)
    assert [(row["x"], row["y"]) for row in rows_of(source)] == [("1", "z"), ("2", "z"), ("3", "z")]
    assert [rows.file for rows in source.batches()] == ["a.csv", "b.csv", "c.csv.gz"]
    section = SourceSection.model_validate({"path": str(tmp_path / "*.csv*")})
    without = open_source(section, without=frozenset({tmp_path / "b.csv"}))
    assert [row["x"] for row in rows_of(without)] == ["1", "3"]
    assert [file.name for file in without.files] == ["a.csv", "c.csv.gz"]
    with pytest.raises(DataError, match="all files are already used as test rows"):
        open_source(section, without=frozenset(source.files))


def test_files_below_a_folder_are_named_from_it(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.jsonl", '{"a": 1}\n')
    assert [rows.file for rows in opened(tmp_path / "**" / "*.jsonl").batches()] == ["one/a.jsonl", "two/a.jsonl"]
    assert f"no data file in this folder; to include subfolders use {tmp_path}/**/*" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.csv": "x\n1\n", "b.jsonl": '{"x": 1}'}, "has files of two formats, a.csv (csv) and b.jsonl (jsonl)"),
        ({"a.csv": "x,y\n1,2\n", "b.csv": "x,z\n1,2\n"}, "b.csv: its columns are x, z, those of a.csv are x, y"),
        ({"a.csv": "x\n1\n", "b.dat": "x\n1\n"}, "b.dat: unknown file extension .dat"),
        ({"notes.dat": "x"}, "no data file in this folder"),
        ({"a.csv": "x\n1\n", "b.csv": ""}, "b.csv: empty"),
        ({"a.csv": "x\n", "b.csv": "x\n"}, "no rows"),
    ],
)
def test_a_folder_whose_files_do_not_fit_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        write(tmp_path / name, content)
    assert message in error_of(tmp_path)


def test_json_files_may_differ_in_their_columns_and_csv_files_in_their_order(tmp_path: Path) -> None:
    write(tmp_path / "a.json", '[{"a": 1}]')
    write(tmp_path / "b.jsonl", '{"b": 2}\n')
    assert rows_of(opened(tmp_path)) == [{"a": 1}, {"b": 2}]
    write(tmp_path / "a.csv", "a,b\n1,2\n")
    write(tmp_path / "b.csv", "b,a\n3,4\n")
    assert rows_of(opened(tmp_path / "*.csv")) == [{"a": "1", "b": "2"}, {"a": "4", "b": "3"}]


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    assert "pipe.csv: is not a regular file" in error_of(tmp_path / "pipe.csv")
    assert "pipe.csv: is not a regular file" in error_of(tmp_path)
    assert "is not a regular file" in error_of(Path("/dev/null"))
    (tmp_path / "link.csv").symlink_to(tmp_path / "gone.csv")
    assert "link.csv: no such file; the link is broken" in error_of(tmp_path / "link.csv")
    assert "no file matches" in error_of(tmp_path / "*.parquet")
    assert "cannot be read: File name too long" in error_of(tmp_path / ("x" * 300))


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.csv", "a\n1\n")

    def refuse(self: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    assert "a.csv: cannot be read: Permission denied; check its permissions" in error_of(path)


def test_the_fingerprint_follows_the_bytes_and_the_keys_of_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a,b\n1,2\n")
    first = opened(path).fingerprint()
    assert first == opened(path, prompt="{a}", completion="{b}").fingerprint()
    others = [opened(path, encoding="latin-1"), opened(path, csv={"quote": "'"}), opened(path, file_format="csv")]
    assert len({first, *(other.fingerprint() for other in others)}) == 4
    write(path, "a,b\n1,3\n")
    assert opened(path).fingerprint() != first


# --- databases


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    path = tmp_path / "shop.db"
    with sqlite3.connect(path) as connection:
        connection.execute('CREATE TABLE "my items" (id INTEGER, name TEXT, price REAL, note BLOB)')
        connection.executemany(
            'INSERT INTO "my items" VALUES (?, ?, ?, ?)', [(n, f"item {n}", n / 2, None) for n in range(5000)]
        )
    connection.close()
    return path


def test_the_only_table_of_an_sqlite_file_is_read(shop: Path) -> None:
    source = opened(shop)
    assert numbers_of(source) == list(range(1, 5001))
    assert rows_of(source)[3] == {"id": 3, "name": "item 3", "price": 1.5, "note": None}
    assert max(len(rows) for rows in source.batches()) == BATCH_ROWS


def test_a_query_of_an_sqlite_file_is_read(shop: Path) -> None:
    query = """
        -- cheap; ones
        WITH few AS (SELECT * FROM "my items" WHERE name <> 'x;y') SELECT name AS text FROM few WHERE id < 2;
    """
    assert rows_of(opened(shop, query=query)) == [{"text": "item 0"}, {"text": "item 1"}]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"table": "my item"}, "shop.db: no table my item; it has my items; did you mean my items?"),
        ({"table": "x", "query": "SELECT 1"}, "dataset.table and dataset.query are both set"),
        ({"query": "DROP TABLE x"}, "dataset.query: is not a read-only query"),
        ({"query": 'SELECT 1; DROP TABLE "my items"'}, "dataset.query: has several statements"),
        ({"query": "WITH a AS (SELECT 1) DELETE FROM b"}, "dataset.query: is not a read-only query"),
        ({"query": "SELECT a FROM nowhere"}, "no such table: nowhere; check dataset.table and dataset.query"),
        ({"query": "SELECT 1 AS a, 2 AS a"}, "the query has a twice"),
        ({"query": 'SELECT * FROM "my items" WHERE id < 0'}, "shop.db: no rows"),
    ],
)
def test_a_query_that_cannot_be_read_leaves_the_file_as_it_is(shop: Path, keys: dict[str, str], message: str) -> None:
    before = shop.read_bytes()
    assert message in error_of(shop, **keys)
    assert shop.read_bytes() == before


def test_an_sqlite_file_with_several_tables_asks_which(shop: Path) -> None:
    with sqlite3.connect(shop) as connection:
        connection.execute('CREATE VIEW cheap AS SELECT id FROM "my items" WHERE id < 3')
    connection.close()
    assert "the table is ambiguous, it has cheap, my items; set dataset.table" in error_of(shop)
    assert rows_of(opened(shop, table="cheap")) == [{"id": 0}, {"id": 1}, {"id": 2}]


def test_a_password_in_the_recipe_is_refused_and_not_shown() -> None:
    for address in ("postgresql://me:s3cret@host/db", "postgresql://host/db?password=s3cret"):
        message = error_of(None, url=address)
        assert "put the URL into an environment variable" in message and "s3cret" not in message


def test_an_environment_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOP_URL", raising=False)
    with pytest.raises(MachineError, match="the environment variable SHOP_URL is not set"):
        opened(url_env="SHOP_URL")


def test_without_sqlalchemy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sqlalchemy", None)
    with pytest.raises(MachineError, match=r"pip install 'peftcli\[sql\]'"):
        list(opened(url="sqlite:///x.db", table="t").batches())


def test_a_database_with_an_address_is_read(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("SHOP_URL", f"sqlite:///{shop}")
    source = opened(url_env="SHOP_URL", query="SELECT id, name FROM \"my items\" WHERE name LIKE '%9%' AND id < 20")
    assert rows_of(source) == [{"id": 9, "name": "item 9"}, {"id": 19, "name": "item 19"}]
    assert (source.name, source.files) == ("sqlite query", ())
    other = opened(url_env="SHOP_URL", table="my items")
    assert len(rows_of(other)) == 5000 and other.fingerprint() != source.fingerprint() == source.fingerprint()
    assert "sqlite itms: no table itms; it has my items" in error_of(None, url_env="SHOP_URL", table="itms")
    assert "no such column: nope" in error_of(None, url_env="SHOP_URL", query='SELECT nope FROM "my items"')
    monkeypatch.setenv("SHOP_URL", "no address, p4ss")
    assert "p4ss" not in error_of(None, url_env="SHOP_URL", table="t")
    monkeypatch.setenv("SHOP_URL", "sqlite:////nowhere/x.db")
    assert "unable to open" in error_of(None, url_env="SHOP_URL", table="t")


# --- the Hub


def test_a_hub_data_set_is_read_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[object, ...]] = []

    def load(name: str, config: str | None, *, revision: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, revision, split))
        return datasets.Dataset.from_dict({"text": [f"row {number}" for number in range(BATCH_ROWS + 1)]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = opened(name="me/things", config="c", revision="r", hub_split="train[:10%]")
    assert [len(rows) for rows in source.batches()] == [BATCH_ROWS, 1]
    assert numbers_of(source)[-1] == BATCH_ROWS + 1
    assert source.fingerprint() and source.files == ()
    list(open_source(TestSection(name="me/things")).batches())
    list(opened(name="me/things").batches())
    assert asked == [("me/things", "c", "r", "train[:10%]")] + [("me/things", None, None, s) for s in ("test", "train")]


def test_a_hub_split_that_is_not_there_lists_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", '{"text": "x"}\n')
    write(tmp_path / "set" / "test.jsonl", '{"text": "y"}\n')
    assert rows_of(opened(name=str(tmp_path / "set"))) == [{"text": "x"}]
    message = error_of(None, name=str(tmp_path / "set"), hub_split="trian")
    assert "trian" in message and "train" in message and "test" in message and "dataset.hub_split" in message
    assert "cannot be loaded" in error_of(None, name=str(tmp_path / "nowhere"))


# --- size


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    with path.open("w", encoding="utf-8") as file:
        if ending == "csv":
            file.write("id,text\n")
            file.writelines(f'{number},"{"some words " * 8}"\n' for number in range(200_000))
        else:
            file.writelines(
                f'{"[" if number == 0 else ","}\n {{"id": {number}, "text": "{"some words " * 8}"}}'
                for number in range(200_000)
            )
            file.write("]")
    tracemalloc.start()
    try:
        count = sum(len(rows) for rows in opened(path).batches())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 200_000 and peak < 9e6 < path.stat().st_size / 2


# --- real data

REAL: list[tuple[str, dict[str, Any], int]] = [
    ("instacart-products/products.csv", {}, 49_688),
    ("instacart-products/departments.csv", {}, 21),
    ("instacart-products/aisles.csv", {}, 134),
    (
        "sms-spam/SMSSpamCollection",
        {"file_format": "tsv", "csv": {"column_names": ["label", "text"], "delimiter": "\t", "quote": "none"}},
        5574,
    ),
    ("sst2/train_6000.tsv", {}, 6000),
    ("sst2/dev.tsv", {}, 872),
    ("gsm8k/train.jsonl", {}, 7473),
    ("gsm8k/test.jsonl", {}, 1319),
    ("instruct-llmfs/instruction-data.json", {}, 1100),
    ("seed-tasks", {}, 175),
    ("sgd-chat/train.messages.jsonl", {}, 1000),
    ("sgd-chat/test.messages.jsonl", {}, 128),
    ("sgd-chat/sample200.sharegpt.json", {}, 200),
    ("superbowl-prompt-completion/train.jsonl", {}, 1800),
    ("superbowl-prompt-completion/valid.jsonl", {}, 144),
    ("tinystories/tinystories_1000.json", {}, 1000),
    ("tinystories/tinystories_clean.jsonl", {}, 917),
    ("wikisql-text/train.jsonl", {}, 1000),
    ("wikisql-text", {}, 1200),
    ("wnut17/wnut17train.conll", {}, 3394),
    ("wnut17/emerging.dev.conll", {}, 1009),
    ("wnut17/emerging.test.annotated", {"file_format": "conll"}, 1287),
    ("wnut17", {"file_format": "conll"}, 3394 + 1009 + 1287),
]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize(("path", "keys", "count"), REAL, ids=[case[0] for case in REAL])
def test_real_data_sets_are_read_whole(path: str, keys: dict[str, Any], count: int) -> None:
    source = opened(SHARED / path, **keys)
    assert sum(len(rows) for rows in source.batches()) == count
    assert unread_of(source) == []


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize("path", ["the-verdict", "tinyshakespeare", "wikitext-2/test.txt", "wikitext-2/valid.txt"])
def test_real_texts_are_one_document_each(path: str) -> None:
    source = opened(SHARED / path)
    batches = list(source.batches())
    assert sum(sum(rows.ends or []) for rows in batches) == 1
    text = "".join(piece for rows in batches for piece in rows.columns["text"])
    assert text == source.files[0].read_text(encoding="utf-8")
