"""How commands fail: one error for one fault, a JSON object with --json, lines as wide as the terminal."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from peftcli.cli.main import app, main
from peftcli.cli.text import cells, wrapped

Cli = Callable[..., int]
GROUP: Any = get_command(app)
WITH_JSON = sorted(name for name, one in GROUP.commands.items() if any("--json" in given.opts for given in one.params))


@pytest.mark.parametrize("command", ["eval", "generate", "merge", "report"])
def test_a_missing_run_folder_is_one_error_before_heavy_imports(command: str, tmp_path: Path) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    script = (
        "import sys\nfrom peftcli.cli.main import main\ncode = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules and 'pyarrow' not in sys.modules\nsys.exit(code)"
    )
    words = [sys.executable, "-c", script, command, "runs/dmeo"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: runs/dmeo: no such folder; did you mean runs/demo?\n"


LIGHT = """
import sys
from peftcli.cli.main import main
code = main(sys.argv[1:])
print([name for name in ("torch", "transformers", "pyarrow", "numpy") if name in sys.modules])
sys.exit(code)
"""


def validated(recipe: Path, *words: str) -> tuple[int, str, str]:
    """Exit code of `validate`, its message, and the heavy libraries that it imported."""
    command = [sys.executable, "-c", LIGHT, "validate", str(recipe), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=recipe.parent)
    return done.returncode, done.stderr, done.stdout.splitlines()[-1]


ROWS = [{"thing": f"apple {number}", "kind": "fruit"} for number in range(8)]


def write_csv(path: Path) -> None:
    path.write_text("thing,kind\n" + "".join(f"{row['thing']},{row['kind']}\n" for row in ROWS))


def write_tsv(path: Path) -> None:
    path.write_text("thing\tkind\n" + "".join(f"{row['thing']}\t{row['kind']}\n" for row in ROWS))


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_folder(path: Path) -> None:
    path.mkdir()
    write_csv(path / "first.csv")


@pytest.mark.parametrize(
    ("name", "write"),
    [("rows.csv", write_csv), ("rows.tsv", write_tsv), ("rows.jsonl", write_jsonl), ("rows", write_folder)],
)
def test_validate_finds_a_misspelled_column_without_a_heavy_import(
    name: str, write: Callable[[Path], None], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    write(tmp_path / name)
    recipe = write_recipe(dataset={"path": name, "prompt": "{thnig} ->:"})
    code, said, heavy = validated(recipe)
    assert (code, heavy) == (3, "[]")
    file = "first.csv" if name == "rows" else name
    assert said == f"error: {file}: no column thnig; it has thing, kind; did you mean thing?\n"
    assert validated(recipe, "--set", 'dataset.prompt="{thing} ->:"')[0] == 0
    assert validated(recipe, "--no-data")[0] == 0


def test_validate_reads_the_schema_of_a_parquet_file(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    code, said, heavy = validated(write_recipe(dataset={"path": "rows.parquet", "completion": " {knid}"}))
    assert code == 3 and "rows.parquet: no column knid; it has thing, kind; did you mean kind?" in said
    assert "torch" not in heavy and "transformers" not in heavy


def test_validate_reports_all_problems_of_the_data(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    write_csv(tmp_path / "rows.csv")
    sources = [{"path": "rows.csv", "prompt": "{thing}", "completion": "{knd}"}, {"path": "row.csv", "text": "{thing}"}]
    dataset = {"path": None, "prompt": None, "completion": None, "sources": sources, "split": {"stratify": "kin"}}
    code, said, _ = validated(write_recipe(dataset=dataset))
    assert code == 3 and said.startswith("error: the data has 3 problems\n")
    assert "row.csv: no such file; did you mean rows.csv?" in said
    assert "dataset.split.stratify: rows.csv has no column kin; it has thing, kind; did you mean kind?" in said
    assert "rows.csv: no column knd; it has thing, kind; did you mean kind?" in said


def test_validate_looks_for_columns_in_joined_tables(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "shops.csv").write_text("kind,shop\nfruit,corner\n")
    write_csv(tmp_path / "rows.csv")
    dataset = {"path": "rows.csv", "join": [{"path": "shops.csv", "on": "kind"}], "completion": " {shop}"}
    recipe = write_recipe(dataset=dataset)
    assert validated(recipe)[0] == 0
    assert "no column shp" in validated(recipe, "--set", 'dataset.completion=" {shp}"')[1]


@pytest.mark.parametrize("command", ["eval", "generate", "merge", "report"])
def test_a_folder_without_a_run_is_one_error(command: str, run_cli: Cli, capfd: Any, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert run_cli(command, "other") == 2
    assert "error: other: not a run folder (no recipe.yaml)" in capfd.readouterr().err


@pytest.mark.parametrize("command", WITH_JSON)
def test_a_wrong_command_line_is_a_json_object(command: str, capfd: Any) -> None:
    assert main([command, "--json", "--no-such-option"]) == 2
    said = capfd.readouterr()
    error = json.loads(said.out)["error"]
    assert error["exit_code"] == 2 and error["kind"] == "usage" and "--no-such-option" in error["message"]
    assert said.err.startswith("error: ") and "--no-such-option" in said.err


@pytest.mark.parametrize(
    "command", ["validate", "data", "plan", "train", "doctor", "eval", "merge", "generate", "report"]
)
def test_a_known_error_is_a_json_object(command: str, run_cli: Cli, capfd: Any) -> None:
    assert run_cli(command, "nowhere/none.yaml", "--json") == 2
    said = capfd.readouterr()
    assert json.loads(said.out)["error"]["kind"] == "recipe"
    assert f"error: {json.loads(said.out)['error']['message']}\n" == said.err


def test_a_result_is_the_only_json_object_of_a_failed_command(
    write_recipe: Callable[..., Path], things: Path, run_cli: Cli, capfd: Any
) -> None:
    header, *rows = things.read_text().splitlines()
    things.write_text("\n".join([header, *rows, *rows]) + "\n")
    recipe = write_recipe(dataset={"split": {"test_size": 0.5}})
    assert run_cli("data", recipe, "--json") == 3
    said = capfd.readouterr()
    assert json.loads(said.out)["crossed"] and "error: " in said.err


def test_help_and_the_traceback_option_work_anywhere(capfd: Any) -> None:
    assert main(["help", "train"]) == 0
    shown = capfd.readouterr().out
    assert main(["train", "--help"]) == 0
    assert shown == capfd.readouterr().out
    assert main(["help"]) == 0
    page = capfd.readouterr().out
    assert "--traceback" in page and "--version" in page and "..." not in page.partition("Commands:")[2]
    assert main(["help", "trian"]) == 2
    assert "Did you mean 'train'?" in capfd.readouterr().err
    assert main(["validate", "none.yaml", "--traceback"]) == 2
    assert "Traceback" in capfd.readouterr().err


def test_a_terminal_gets_no_wider_line() -> None:
    words = [sys.executable, "-m", "peftcli", "train", "a-recipe-that-does-not-exist", "--set", "adapter.r=8"]
    ours, theirs = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    subprocess.run(["stty", "cols", "50"], stdin=theirs, check=True)
    with subprocess.Popen(words, stdout=theirs, stderr=theirs, stdin=theirs, env=env) as child:
        os.close(theirs)
        text = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # Linux reports the end of a terminal as an error
                break
            text += piece
    assert child.returncode == 2
    lines = text.decode().splitlines()
    assert len(lines) > 2 and max(map(len, lines)) <= 50 and lines[1].startswith("  ")


def test_a_list_of_methods_fits_a_terminal() -> None:
    from peftcli.cli.methods import method_lines

    assert max(map(len, method_lines(None, 80))) <= 80
    assert max(map(len, method_lines("prefix", 80))) <= 80
    rows = [line for line in method_lines() if line.startswith("trainable_tokens")]
    assert len(rows) == 1 and rows[0].split()[:5] == ["trainable_tokens", "yes", "yes", "yes", "text"]


def test_wide_letters_count_twice_and_long_words_stay_whole() -> None:
    assert cells("模型") == 4
    assert wrapped("a 模型 b", 5) == "a\n  模型\n  b"
    assert wrapped("see /a/very/long/path/of/a/file now", 12) == "see\n  /a/very/long/path/of/a/file\n  now"
    assert wrapped("one line", None) == "one line"
