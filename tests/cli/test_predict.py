"""Predictions for the rows of a file, through the command line: columns, formats, unusable rows, resuming."""

import csv
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from helpers import rows_of_reviews
from PIL import Image

from peftcli.cli.commands import GenerateFlags, _answer_line, _show_made
from peftcli.cli.console import Streams
from peftcli.cli.main import main
from peftcli.data.journal import Journal
from peftcli.errors import MachineError
from peftcli.generate import Generated

Cli = Callable[..., int]
PAIRS = [f"{size} {fruit} {n}" for n in range(12) for size in ("big", "small") for fruit in ("apple", "pear")]


def trained(folder: Path, rows: list[dict[str, Any]], dataset: dict[str, Any], **sections: Any) -> Path:
    """A run trained on a few rows for a few steps."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe: dict[str, Any] = {
        "model": {"name": "tiny:llama"},
        "adapter": {"r": 4},
        "dataset": {"path": "rows.jsonl", "max_length": 64, "limits": {"max_leaked": 1.0}, **dataset},
        "trainer": {"per_device_train_batch_size": 8, "max_steps": 2, "learning_rate": 1e-2},
        "evaluation": {"samples": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | sections))
    assert main(["train", str(folder / "recipe.yaml"), "--output-dir", str(folder / "run")]) == 0
    return folder / "run"


def labels_run(folder: Path, column: str, task: str = "sequence-classification") -> Path:
    columns = {"text": "text", "label": column} if task.startswith("sequence") else {"tokens": "tokens", "tags": "tags"}
    return trained(folder, rows_of_reviews(), {"columns": columns}, model={"name": "tiny:llama", "task": task})


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labels_run(tmp_path_factory.mktemp("classifier"), "label")


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"thing": thing, "kind": f"{thing.split()[1]} kind"} for thing in PAIRS]
    return trained(tmp_path_factory.mktemp("writer"), rows, {"prompt": "{thing} ->:", "completion": " {kind}"})


def read_csv(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, texts: list[str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "note"])
        writer.writerows([number, text, 'a "note", \r\nof two lines'] for number, text in enumerate(texts))
    return path


def test_each_format_keeps_all_columns_and_rows(classifier: Path, run_cli: Cli, capfd: Any, tmp_path: Path) -> None:
    texts = ["the soup was good", "", "the room was stale", "  "]
    source = write_rows(tmp_path / "new.csv", texts)
    with source.open("a") as file:
        file.write("4,too,many,cells\n5,the staff was kind,x\n")
    found = {}
    for suffix in (".csv", ".tsv", ".jsonl", ".parquet"):
        capfd.readouterr()
        assert run_cli("predict", classifier, source, "--output", tmp_path / f"out{suffix}") == 0
        out = capfd.readouterr().out
        assert "6 rows: 3 predicted; 3 with an error: an empty text (2), 4 cells, but the header has 3 (1);" in out
    found = {
        ".csv": read_csv(tmp_path / "out.csv"),
        ".tsv": read_csv(tmp_path / "out.tsv", "\t"),
        ".jsonl": read_lines(tmp_path / "out.jsonl"),
        ".parquet": pq.read_table(tmp_path / "out.parquet").to_pylist(),
    }
    for rows in found.values():
        assert list(rows[0]) == ["id", "text", "note", "label", "probability", "error"]
        assert [row["id"] or None for row in rows] == ["0", "1", "2", "3", None, "5"]
        assert rows[0]["note"] == 'a "note", \r\nof two lines' and rows[1]["text"] == ""
        errors = [row["error"] or None for row in rows]
        assert errors[:4] == [None, "an empty text", None, "an empty text"] and errors[5] is None
        assert errors[4] == "new.csv:10: 4 cells, but the header has 3"
        assert [row["label"] in ("good", "bad") for row in rows] == [True, False, True, False, False, True]
        assert [float(row["probability"] or 0) for row in rows] == [row["probability"] or 0 for row in found[".jsonl"]]
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.writing"))


def test_predictions_are_those_of_generate(classifier: Path, run_cli: Cli, capfd: Any, tmp_path: Path) -> None:
    texts = ["the soup was good", "the room was stale", "the bread was kind"]
    write_rows(tmp_path / "new.csv", texts)
    words = ("--input", tmp_path / "new.csv", "--output", tmp_path / "out.jsonl", "--probabilities")
    assert run_cli("generate", classifier, *words) == 0
    capfd.readouterr()
    assert run_cli("generate", classifier, *texts, "--json") == 0
    said = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    rows = read_lines(tmp_path / "out.jsonl")
    assert [one["asked"] for one in said] == texts
    for row, one in zip(rows, said, strict=True):
        # The same batch on the same machine; written with the digits of a float32.
        assert row["label"] == one["label"]
        for name, share in one["probabilities"].items():
            assert row[f"probability_{name}"] == pytest.approx(share, rel=1e-6)
        assert row["probability"] == row[f"probability_{row['label']}"]


def test_the_prompt_needs_no_completion(writer: Path, run_cli: Cli, capfd: Any, tmp_path: Path) -> None:
    rows = [{"n": n, "thing": thing, "nested": {"a": [n, None]}} for n, thing in enumerate(PAIRS[:5])]
    rows.insert(2, {"n": 9, "thing": None, "nested": {"a": []}})
    rows.append({"n": 10, "thing": "apple " * 600, "nested": {"a": []}})
    (tmp_path / "new.json").write_text(json.dumps(rows))
    words = ("--output", tmp_path / "out.jsonl", "--max-new-tokens", "4", "--json")
    capfd.readouterr()
    assert run_cli("predict", writer, tmp_path / "new.json", *words) == 0
    found = read_lines(tmp_path / "out.jsonl")
    assert [{key: row[key] for key in ("n", "thing", "nested")} for row in found] == rows
    assert found[2]["answer"] is None and found[2]["error"] == "thing null"
    assert "but the model takes" in found[-1]["error"]
    assert all(isinstance(row["answer"], str) and row["error"] is None for row in (*found[:2], *found[3:-1]))
    said = json.loads(capfd.readouterr().out)
    assert (said["rows"], said["predicted"], sum(said["errors"].values())) == (7, 5, 2)


def test_no_usable_row_is_an_error(writer: Path, run_cli: Cli, capfd: Any, tmp_path: Path) -> None:
    (tmp_path / "new.jsonl").write_text('{"thing": null}\n')
    assert run_cli("predict", writer, tmp_path / "new.jsonl", "--output", tmp_path / "out.csv") == 3
    assert "none of 1 rows could be used" in capfd.readouterr().err
    assert read_csv(tmp_path / "out.csv") == [{"thing": "", "answer": "", "error": "thing null"}]
    (tmp_path / "other.csv").write_text("name\nx\n")
    assert run_cli("predict", writer, tmp_path / "other.csv", "--output", tmp_path / "other.jsonl") == 3
    assert "thing" in capfd.readouterr().err and not (tmp_path / "other.jsonl.partial").exists()


@pytest.mark.parametrize(
    ("column", "added"), [("kinds", ["label", "probability_even", "probability_good"]), ("stars", ["value"])]
)
def test_several_labels_and_numbers(run_cli: Cli, tmp_path: Path, column: str, added: list[str]) -> None:
    run = labels_run(tmp_path / "run", column)
    (tmp_path / "new.csv").write_text("text\nthe soup was good\nthe room was bad\n")
    for suffix in ("csv", "parquet"):
        assert run_cli("predict", run, tmp_path / "new.csv", "--output", tmp_path / f"out.{suffix}") == 0
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["text", *added, "error"]
    for one, other in zip(read_csv(tmp_path / "out.csv"), table.to_pylist(), strict=True):
        if column == "stars":
            assert float(one["value"]) == other["value"]
        else:
            assert (
                json.loads(one["label"])
                == other["label"]
                == [name for name in ("even", "good") if other[f"probability_{name}"] >= 0.5]
            )


def test_words_are_tagged_and_running_text_is_split(run_cli: Cli, tmp_path: Path) -> None:
    run = labels_run(tmp_path / "run", "tags", "token-classification")
    words = ["the", "room", "was", "bad", "3", "in", "Rome"]
    pq.write_table(pa.table({"tokens": [words, []], "tags": [["O"] * 7, []]}), tmp_path / "new.parquet")
    assert run_cli("predict", run, tmp_path / "new.parquet", "--output", tmp_path / "out.parquet") == 2
    assert (
        run_cli("predict", run, tmp_path / "new.parquet", "--output", tmp_path / "out.parquet", "--prefix", "p_") == 0
    )
    first, second = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert first["tokens"] == words and first["tags"] == ["O"] * 7 and len(first["p_tags"]) == 7
    assert set(first["p_tags"]) <= {"O", "B-place"} and second["p_error"] == "without words in tokens"
    (tmp_path / "texts.csv").write_text('text\n"The room, 3 in Rome"\n')
    assert run_cli("predict", run, tmp_path / "texts.csv", "--output", tmp_path / "out.jsonl") == 0
    (row,) = read_lines(tmp_path / "out.jsonl")
    assert row["words"] == ["The", "room", ",", "3", "in", "Rome"] and len(row["tags"]) == 6


def test_images_come_from_a_folder_or_a_column(run_cli: Cli, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for kind, colour in (("red", (200, 10, 10)), ("blue", (10, 10, 200))):
        (photos / kind).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (32, 32), tuple(part + number for part in colour)).save(photos / kind / f"{number}.png")
    recipe = {
        "model": {"name": "tiny:vit", "task": "image-classification"},
        "dataset": {"path": "photos", "split": {"test_size": 0.25}, "limits": {"max_leaked": 1.0}},
        "trainer": {"max_steps": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run_cli("train", tmp_path / "recipe.yaml", "--output-dir", tmp_path / "run") == 0
    (photos / "red" / "note.txt").write_text("no image")
    assert run_cli("predict", tmp_path / "run", photos, "--output", tmp_path / "out.csv") == 0
    rows = read_csv(tmp_path / "out.csv")
    assert [row["image"] for row in rows] == sorted(path.relative_to(photos).as_posix() for path in photos.glob("*/*"))
    assert {row["label"] for row in rows if row["image"].endswith(".png")} <= {"red", "blue"}
    assert next(row["error"] for row in rows if row["image"] == "red/note.txt").startswith(
        "a file that is not an image"
    )
    (tmp_path / "list.csv").write_text("image,id\nphotos/red/0.png,a\nphotos/gone.png,b\n")
    assert run_cli("predict", tmp_path / "run", tmp_path / "list.csv", "--output", tmp_path / "list.jsonl") == 0
    known, gone = read_lines(tmp_path / "list.jsonl")
    assert known["label"] in ("red", "blue") and gone["error"] == "a missing image" and gone["label"] is None


def test_a_merged_model_reads_the_columns_of_its_run(writer: Path, run_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("thing\nbig apple 1\n")
    assert run_cli("merge", writer, "--output-dir", tmp_path / "merged") == 0
    shutil.copytree(writer / "adapter", tmp_path / "adapter")
    for target in ("merged", "adapter"):  # without a run folder: by the template in the manifest
        out = tmp_path / f"{target}.csv"
        assert (
            run_cli("predict", tmp_path / target, tmp_path / "new.csv", "--output", out, "--max-new-tokens", "4") == 0
        )
        (row,) = read_csv(out)
        assert row["thing"] == "big apple 1" and row["error"] == ""


def test_what_exists_or_collides_is_refused(writer: Path, run_cli: Cli, capfd: Any, tmp_path: Path) -> None:
    source, out = tmp_path / "new.csv", tmp_path / "out.csv"
    source.write_text("thing,answer\nbig apple 1,x\n")
    words = ("predict", writer, source, "--output", out, "--max-new-tokens", "2")
    assert run_cli(*words) == 2
    assert "already has the column answer" in capfd.readouterr().err
    assert run_cli(*words, "--prefix", "my_") == 0
    assert list(read_csv(out)[0]) == ["thing", "answer", "my_answer", "my_error"]
    assert run_cli(*words, "--prefix", "my_") == 2
    assert "exists already; pass --overwrite" in capfd.readouterr().err
    assert run_cli(*words, "--prefix", "your_", "--overwrite") == 0
    assert "your_answer" in read_csv(out)[0]
    assert run_cli("predict", writer, source, "--output", tmp_path / "out.xlsx") == 2
    assert ".csv, .tsv, .jsonl, .ndjson or .parquet" in capfd.readouterr().err
    assert run_cli("predict", writer, tmp_path / "gone.csv", "--output", out) == 3


def many_rows(path: Path, count: int) -> Path:
    texts = [f"{number} " + "again " * (number * 7 % 23) + "the soup was good" for number in range(count)]
    texts[5::97] = ["" for _ in texts[5::97]]
    return write_rows(path, texts)


def test_a_run_killed_at_any_moment_continues_to_the_same_bytes(
    classifier: Path, run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = many_rows(tmp_path / "new.csv", 2600), tmp_path / "out.csv"
    words = ("predict", classifier, source, "--output", out)
    journal = tmp_path / "out.csv.partial"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda self: None)  # as if killed between the two last steps
        assert run_cli(*words) == 0
    whole, parts = out.read_bytes(), journal.read_bytes()
    assert parts.count(b"\n") >= 6 and len(read_csv(out)) == 2600
    ends = [at for at, letter in enumerate(parts) if letter == 10]
    # Within the header, at its end, within a window, just before and after the end of a window, and after the last.
    for cut in (3, ends[0] + 1, ends[1] - 40, ends[1], ends[2] + 1, ends[-1], len(parts)):
        journal.write_bytes(parts[:cut])
        out.unlink(missing_ok=True)
        (tmp_path / "out.csv.writing").write_bytes(whole[: cut % len(whole)])
        assert run_cli(*words) == 0, cut
        assert out.read_bytes() == whole, cut
        assert not journal.exists() and not (tmp_path / "out.csv.writing").exists()
    journal.write_bytes(parts[: ends[2] + 1] + b"\0" * 100 + b"\n")
    assert run_cli(*words, "--overwrite") == 0 and out.read_bytes() == whole


@pytest.mark.slow
def test_a_killed_process_continues_to_the_same_bytes(classifier: Path, run_cli: Cli, tmp_path: Path) -> None:
    source, out = many_rows(tmp_path / "new.csv", 4000), tmp_path / "out.csv"
    journal = tmp_path / "out.csv.partial"
    command = [sys.executable, "-m", "peftcli", "predict", str(classifier), str(source), "--output", str(out)]
    lines = 0
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < lines + 3):
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate()
        assert process.returncode == (-number if number == signal.SIGKILL else 75), said
        assert number == signal.SIGKILL or "run the same command again to resume" in said
        assert not out.exists() and journal.read_bytes().count(b"\n") > lines
        lines = journal.read_bytes().count(b"\n")
    assert run_cli(*command[3:]) == 0
    resumed = out.read_bytes()
    assert run_cli(*command[3:-1], tmp_path / "whole.csv") == 0
    assert resumed == (tmp_path / "whole.csv").read_bytes()


def test_another_job_is_not_continued(classifier: Path, run_cli: Cli, capfd: Any, tmp_path: Path) -> None:
    source, out = many_rows(tmp_path / "new.csv", 30), tmp_path / "out.csv"
    words = ("predict", classifier, source, "--output", out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftcli.predict._write", stop)
        assert run_cli(*words) == 4
    assert run_cli(*words, "--probabilities") == 2
    assert "was begun with another settings; pass --overwrite" in capfd.readouterr().err
    source.write_text(source.read_text() + "30,more,x\n")
    assert run_cli(*words) == 2
    assert "another input file" in capfd.readouterr().err
    with (tmp_path / "out.csv.partial").open("a+b") as held:
        import fcntl

        fcntl.flock(held, fcntl.LOCK_EX)
        assert run_cli(*words, "--overwrite") == 4
        assert "another process is writing it" in capfd.readouterr().err
    assert run_cli(*words, "--overwrite") == 0 and len(read_csv(out)) == 31


def stop(*given: Any) -> None:
    raise MachineError("stopped")


def test_rows_come_from_standard_input(
    writer: Path, run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = b'{"thing": "big apple 1"}\n{"thing": "small pear 2"}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(rows)))
    assert run_cli("predict", writer, "-", "--output", tmp_path / "out.jsonl", "--max-new-tokens", "2") == 0
    assert [row["thing"] for row in read_lines(tmp_path / "out.jsonl")] == ["big apple 1", "small pear 2"]


def test_chats_are_answered_from_their_last_question(run_cli: Cli, tmp_path: Path) -> None:
    def chat(number: int) -> list[dict[str, str]]:
        said = [("user", f"is {number} even"), ("assistant", "yes" if number % 2 == 0 else "no")]
        return [{"role": role, "content": text} for role, text in said]

    run = trained(tmp_path / "run", [{"messages": chat(number)} for number in range(24)], {})
    rows: list[dict[str, Any]] = [
        {"messages": chat(3)},
        {"messages": chat(3)[:1]},
        {"messages": [*chat(3), {"role": "assistant", "content": "no"}]},
        {"messages": []},
    ]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--output", tmp_path / "out.jsonl", "--max-new-tokens", "4")
    assert run_cli("predict", run, tmp_path / "new.jsonl", *words) == 0
    found = read_lines(tmp_path / "out.jsonl")
    assert [row["messages"] for row in found] == [row["messages"] for row in rows]
    assert found[0]["answer"] == found[1]["answer"], "the answer in the file is not read"
    assert [row["error"] for row in found[2:]] == [
        "two consecutive assistant messages (set dataset.turns: join or keep)",
        "no messages",
    ]
    (tmp_path / "asked.csv").write_text("question,id\nis 3 even,a\n")
    assert run_cli("predict", run, tmp_path / "asked.csv", *words, "--overwrite") == 0
    (row,) = read_lines(tmp_path / "out.jsonl")
    assert row["answer"] == found[0]["answer"] and row["id"] == "a"


def test_generate_refuses_rows_as_prompts(
    writer: Path, run_cli: Cli, capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.csv", "b.TSV", "c.jsonl", "d.parquet", "e.json.gz"):
        (tmp_path / name).write_text('{"thing": "x"}\n')
        assert run_cli("generate", writer, "--file", tmp_path / name) == 2
        assert "reads one prompt per line; run `peftcli predict RUN" in capfd.readouterr().err
    (tmp_path / "rows.txt").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    assert run_cli("generate", writer, "--file", tmp_path / "rows.txt") == 2
    assert "holds JSON objects" in capfd.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"id": 1}\n'))
    assert run_cli("generate", writer) == 2
    assert run_cli("generate", writer, "x", "--input", "a.csv") == 2
    assert run_cli("generate", writer, "x", "--overwrite") == 2


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_control_characters_are_masked_on_a_terminal_only() -> None:
    made = [Generated("q\x1b[2J", "q", "a\x1b]0;t\x07b", True)]
    flags = GenerateFlags(False, 8, 0.0, 1.0, 0, False)
    for stream, masked in ((Terminal(), True), (io.StringIO(), False)):
        _show_made(iter(made), _answer_line, flags, Streams(stream, stream), several=True)
        assert ("\x1b" in stream.getvalue()) is not masked
    stream = Terminal()
    _show_made(
        iter(made), _answer_line, GenerateFlags(False, 8, 0.0, 1.0, 0, True), Streams(stream, stream), several=True
    )
    assert json.loads(stream.getvalue())["answer"] == "a\x1b]0;t\x07b" and "\x1b" not in stream.getvalue()
