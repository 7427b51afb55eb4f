"""Data with one fault each, through the real command: the exit code, and exactly the words that a person gets.

The files stand in fixtures/broken_data/, what they must say in its cases.yaml; those that are no text are made here.
"""

import gzip
import json
import os
import pickle
import re
import shutil
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from advice import Offer, nested_keys, offers

from peftcli.cli.main import main

FOLDER = Path(__file__).parents[1] / "fixtures" / "broken_data"
CASES: list[dict[str, Any]] = yaml.safe_load((FOLDER / "cases.yaml").read_text(encoding="utf-8"))
HEALTHY = (FOLDER / "healthy.csv").read_bytes()
Look = Callable[..., tuple[int, str, str]]


def _rows() -> dict[str, list[str]]:
    lines = [line.rsplit(",", 1) for line in HEALTHY.decode().splitlines()[1:]]
    return {"prompt": [prompt for prompt, _ in lines], "completion": [completion for _, completion in lines]}


def _parquet(path: Path) -> None:
    pq.write_table(pa.table(_rows()), path)


def _truncated_parquet(path: Path) -> None:
    _parquet(path)
    path.write_bytes(path.read_bytes()[:-600])


def _no_rows_parquet(path: Path) -> None:
    pq.write_table(pa.table(_rows()).slice(0, 0), path)


def _wrong_letters_parquet(path: Path) -> None:
    rows = _rows()
    raw = [text.encode() for text in rows["completion"]]
    raw[6] = b" S\xe3o Tom\xe9"
    pq.write_table(
        pa.table({"prompt": rows["prompt"], "completion": pa.array(raw, pa.binary()).view(pa.string())}), path
    )


def _truncated_arrow(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.table(_rows()).schema) as writer:
        writer.write_table(pa.table(_rows()))
    path.write_bytes(path.read_bytes()[:1500])


def _truncated_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(HEALTHY, mtime=0)[:-40])


def _flipped_gzip(path: Path) -> None:
    packed = bytearray(gzip.compress(HEALTHY, mtime=0))
    packed[-6] ^= 0xFF
    path.write_bytes(bytes(packed))


def _truncated_zst(path: Path) -> None:
    path.write_bytes(pa.Codec("zstd").compress(HEALTHY, asbytes=True)[:-40])


def _spreadsheet(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")


def _long_line(path: Path) -> None:
    rows = [dict(zip(_rows(), pair, strict=True)) for pair in zip(*_rows().values(), strict=True)]
    rows[6]["completion"] = " Havana" * (2_000_000 // 7)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _access_key(path: Path) -> None:
    path.write_bytes(HEALTHY.replace(b" Havana", SECRET.encode()))


def _database(path: Path, *statements: str, completion: Any = " Havana") -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    if statements:
        rows = [list(pair) for pair in zip(*_rows().values(), strict=True)]
        rows[6][1] = completion
        connection.executemany("insert into towns values (?, ?)", rows)
    else:
        connection.execute("pragma user_version = 1")
    connection.commit()
    connection.close()


TOWNS = "create table towns (prompt text, completion)"
SECRET = " sk-proj-" + "0123456789abcdef" * 2


def _overwritten(path: Path) -> None:
    _database(path, TOWNS)
    content = bytearray(path.read_bytes())
    content[4096:6000] = b"\x07" * 1904
    path.write_bytes(bytes(content))


def _splits(path: Path) -> None:
    (path / "train").mkdir(parents=True)
    (path / "test").mkdir()
    (path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


MADE: dict[str, Callable[[Path], Any]] = {
    "truncated.csv.gz": _truncated_gzip,
    "flipped.csv.gz": _flipped_gzip,
    "truncated.csv.zst": _truncated_zst,
    "packed.jsonl": lambda path: path.write_bytes(gzip.compress(HEALTHY, mtime=0)),
    "plain.csv.gz": lambda path: path.write_bytes(HEALTHY),
    "parquet.csv": _parquet,
    "truncated.parquet": _truncated_parquet,
    "no_rows.parquet": _no_rows_parquet,
    "wrong_letters.parquet": _wrong_letters_parquet,
    "pickle.parquet": lambda path: path.write_bytes(pickle.dumps(_rows())),
    "truncated.arrow": _truncated_arrow,
    "spreadsheet.csv": _spreadsheet,
    "sheet.xlsx": _spreadsheet,
    "document.txt": lambda path: path.write_bytes(b"%PDF-1.7\n" + HEALTHY),
    "long_line.jsonl": _long_line,
    "access_key.csv": _access_key,
    "no_tables.sqlite": _database,
    "two_tables.sqlite": lambda path: _database(path, TOWNS, "create table rivers (name text)"),
    "null_column.sqlite": lambda path: _database(path, TOWNS, completion=None),
    "bytes.sqlite": lambda path: _database(path, TOWNS, completion=b"\xff\x00"),
    "overwritten.sqlite": _overwritten,
    "empty_folder": Path.mkdir,
    "folder.csv": Path.mkdir,
    "splits": _splits,
    "pipe.csv": os.mkfifo,
    "dangling.csv": lambda path: path.symlink_to(path.with_name("nowhere.csv")),
    "unknown.dat": lambda path: path.write_bytes(HEALTHY),
}


@pytest.fixture(scope="session")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all cases."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def look(
    tiny_llama: Path,
    tokenized: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str, str]]:
    """A function that runs the command over a case and gives the exit code and both streams, with short paths."""
    monkeypatch.setenv("PEFTCLI_CACHE", str(tokenized))

    def run(case: dict[str, Any], *flags: str) -> tuple[int, str, str]:
        make = MADE.get(case["file"])
        path = case.get("path") or (tmp_path if make else FOLDER) / case["file"]
        if make and "path" not in case:
            make(path)
        keys = json.loads(json.dumps(case, default=str).replace("DIR", str(FOLDER)))
        split = {} if "test" in keys.get("dataset", {}) else {"split": {"seed": 1}}
        sections = {
            "name": "broken",
            "model": {"name": str(tiny_llama)} | keys.get("model", {}),
            "dataset": {"path": str(path), "max_length": 128} | split | keys.get("dataset", {}),
            "trainer": {"max_steps": 2} | keys.get("trainer", {}),
        }
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(sections), encoding="utf-8")
        code = main(["data", str(recipe), *flags])
        out, err = capfd.readouterr()
        for place, name in ((recipe, "RECIPE"), (path, "FILE"), (FOLDER, "DIR"), (tmp_path, "DIR")):
            err = err.replace(str(place), name)
        return code, out, err

    return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.get("name", case["file"]))
def test_broken_data_gets_exactly_its_message(case: dict[str, Any], look: Look) -> None:
    code, out, err = look(case, "--json")
    assert code == case["exit"]
    assert err == (f"error: {case['error']}\n" if code else "")
    if code == 0:
        facts = json.loads(out)
        assert out.count("\n") == 1
        assert facts["warnings"] == case.get("warnings", [])
        assert facts["rows"] == facts["train_rows"] + facts["test_rows"] + facts["dropped_rows"]
        assert facts["dropped_rows"] == sum(facts["dropped"].values())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.get("name", case["file"]))
def test_the_messages_are_short_and_plain(case: dict[str, Any]) -> None:
    said = [*case.get("warnings", []), *case.get("error", "").splitlines()]
    assert (case["exit"] == 0) == ("error" not in case)
    assert len(said) <= 8
    for line in said:
        assert len(line) <= 320 and line.isprintable()
        assert not re.search(r"Traceback|[A-Z][a-z]+Error\b|\bInvalid\b|\bplease\b|!$|\bNone\b", line), line


def test_every_file_has_a_case() -> None:
    there = {path.name for path in FOLDER.glob("[!.]*")} - {"cases.yaml"}
    used = {case["file"] for case in CASES} | set(re.findall(r"DIR/([\w.]+)", json.dumps(CASES)))
    assert there == used - set(MADE) - {"helthy.csv", "heathy.csv"}
    assert len(CASES) >= 150


def test_an_access_key_is_shown_nowhere_though_its_row_is(look: Look) -> None:
    case = {"file": "access_key.csv", "dataset": {"test": {"path": "DIR/test_apart.csv"}}}
    assert look(case)[0] == 0
    code, out, err = look(case, "--preview", "40")
    assert code == 0
    assert "Which town governs Cuba?" in out and "***" in out
    assert SECRET.strip()[:16] not in out + err
    assert SECRET.strip()[:16] not in look(case, "--preview", "40", "--json")[1]


@pytest.mark.parametrize(
    "case",
    [
        {"file": "escape.csv", "dataset": {"test": {"path": "DIR/test_apart.csv"}}},
        {"file": "escape_in_header.csv"},
        {"file": "escape_in_role.jsonl"},
        {"file": "escape_in_key.jsonl"},
    ],
    ids=lambda case: case["file"],
)
def test_no_escape_sequence_of_the_data_reaches_the_terminal(case: dict[str, Any], look: Look) -> None:
    _, out, err = look(case, "--preview", "40")
    assert "\x1b" not in out + err
    assert re.search(r"\\x1b\[|\u241b\[", out + err), "what stands there is named"


def test_without_permission_a_file_is_named(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    monkeypatch.setitem(MADE, "closed.csv", lambda path: (path.write_bytes(HEALTHY), path.chmod(0)))
    code, _, err = look({"file": "closed.csv"})
    assert code == 3
    assert err == "error: FILE: cannot be read: Permission denied; check its permissions, or download it again\n"


# Advice: each fix that a message offers is applied, and must lead to success or to another problem.

Fixes = list[tuple[str, dict[str, Any], Path]]
"""What was done, the keys of the recipe afterwards, and the file that it names."""


def _key_fixes(case: dict[str, Any], path: Path) -> Fixes:
    """Keys that the message says to set, remove or correct."""
    error, keys = case["error"], {name: case[name] for name in ("model", "dataset", "trainer") if name in case}
    found = offers(error, keys)
    for match in re.finditer(r"(dataset\.\w+) \((?:for example )?([\w-]+)(?: or|,) ([\w-]+)", error):
        found += [
            Offer(f"{match[1]}: {value}", nested_keys(match[1].split("."), value)) for value in match.groups()[1:]
        ]
    if match := re.search(r"name (?:the columns in|every column).*", error):
        found.append(Offer(match[0], nested_keys(["dataset", "csv", "column_names"], ["prompt", "completion"])))
    if match := re.search(r"DIR/([\w.]+): no such file; did you mean ([\w.]+)\?", error):
        found.append(Offer(match[0], json.loads(json.dumps(keys).replace(match[1], match[2]))))
    if match := re.search(r"([a-z]+\.\w+) is set, .*; remove it$|; remove ([a-z.]+\.[a-z_]+)$", error):
        found.append(Offer(match[0], nested_keys((match[1] or match[2]).split("."), None)))
    if match := re.search(r"the longest has (\d+) tokens: raise it", error):
        found.append(Offer(match[0], nested_keys(["dataset", "max_length"], int(match[1]))))
    if "change the limit shown" in error:
        for key in re.findall(r"dataset\.limits\.(\w+)", error):
            found.append(Offer(f"limit {key}", nested_keys(["dataset", "limits", key], 0 if key[:3] == "min" else 1)))
    if match := re.search(r"it has ([\w, ]+); set (dataset\.\w+) or", error):
        found += [Offer(one, nested_keys(match[2].split("."), one)) for one in match[1].split(", ")]
    if match := re.search(r"has no column \w+; it has ([\w, ]+); use one of these", error):
        (key,) = re.findall(r"dataset\.split\.\w+", error)
        found += [Offer(one, nested_keys(key.split("."), one)) for one in match[1].split(", ")]
    if match := re.search(r"no (?:column|table) (\w+); it has .*; did you mean \"?([^?\"]*)\"?\?", error):
        corrected = json.loads(re.sub(rf"(?<![\w])(?<!\"){match[1]}(?!\w|\":)", match[2], json.dumps(keys)))
        corrected = json.loads(re.sub(rf'": "{match[1]}"', f'": "{match[2]}"', json.dumps(corrected)))
        found.append(Offer(match[0], corrected))
    return [(one.said, one.applied(keys), path) for one in found]


def _renamed(path: Path, name: str) -> Path:
    other = path.with_name(name)
    other.write_bytes(path.read_bytes())
    return other


def _file_fixes(case: dict[str, Any], path: Path) -> Fixes:
    """Files and folders that the message says to use, rename or rewrite."""
    error, keys = case["error"], {name: case[name] for name in ("model", "dataset", "trainer") if name in case}
    found: dict[str, Path] = {}
    if match := re.search(r"such as FILE(/[\w*.]+)", error):
        found[match[0]] = Path(f"{path}{match[1]}")
    if match := re.search(r"FILE: no such file; did you mean ([\w.]+)\?", error):
        found[match[0]] = FOLDER / match[1]
    if match := re.search(r"rename a file with one list to (\.\w+)|change its extension to (\.\w+)", error):
        found[match[0]] = _renamed(path, f"renamed{match[1] or match[2]}")
    if match := re.search(r"add the extension (\.\w+)", error):
        found[match[0]] = _renamed(path, f"{path.name}{match[1]}")
    if match := re.search(r"save the list under (\w+) to a separate file", error):
        found[match[0]] = path.with_name("separate.json")
        found[match[0]].write_text(json.dumps(json.loads(path.read_text())[match[1]]))
    if match := re.search(r"one object per line$|write the file as one list and rename it to \.json", error):
        whole, decoder, rows = path.read_text(), json.JSONDecoder(), []
        while whole := whole.strip():
            row, end = decoder.raw_decode(whole)
            rows, whole = [*rows, row], whole[end:]
        found[match[0]] = path.with_name("listed.json")
        found[match[0]].write_text(json.dumps(rows))
    if match := re.search(r"has the extension (\.\w+), but is not compressed like this; fix its name", error):
        found[match[0]] = _renamed(path, path.name.removesuffix(match[1]))
    if match := re.search(r"FILE:(\d+): .*(?:fix or remove the (?:line|row)|fix or remove it)$", error):
        found[match[0]] = _without_line(path, int(match[1]))
    if match := re.search(r"FILE:(\d+): this line is a hint for Excel; remove it", error):
        found[match[0]] = _without_line(path, 1)
    if match := re.search(r"remove white space around the names", error):
        head, _, rest = path.read_text().partition("\n")
        found[match[0]] = path.with_name("stripped.csv")
        found[match[0]].write_text(",".join(name.strip() for name in head.split(",")) + "\n" + rest)
    return [(said, keys, other) for said, other in found.items()]


def _without_line(path: Path, number: int) -> Path:
    lines = path.read_bytes().split(b"\n")
    other = path.with_name(f"shorter{path.suffix}")
    other.write_bytes(b"\n".join(lines[: number - 1] + lines[number:]))
    return other


BY_HAND = re.compile(
    r"(download|write|compress|export|save|use|read|give|add|omit|remove|rename|fix|close|unpack"
    r"|set model\.chat_template|set dataset\.encoding to|known extensions are|keys of a joined table must be"
    r"|files of one source need)[^;]*$|link is broken|first line must be a header"
)
"""Fixes of the rows or files that only a person can make; each message still ends with one."""


@pytest.fixture
def following(tmp_path: Path) -> Callable[[dict[str, Any]], Fixes]:
    """A function that gives the fixes of a case; its file is copied, so that it can be changed."""

    def fixes(case: dict[str, Any]) -> Fixes:
        name = case["file"]
        source = FOLDER / name
        path = tmp_path / "copy" / name
        path.parent.mkdir()
        if name in MADE:
            MADE[name](path)
        elif source.is_dir():
            shutil.copytree(source, path)
        elif source.is_file():
            shutil.copy(source, path)
        of_keys, of_files = _key_fixes(case, path), _file_fixes(case, path)
        if of_keys and of_files and "; remove it, and set" in case["error"]:  # two halves of one fix
            return [(said, keys, other) for _, keys, _ in of_keys for said, _, other in of_files]
        return [*of_keys, *of_files]

    return fixes


FAULTY = [case for case in CASES if "error" in case]


@pytest.mark.parametrize("case", FAULTY, ids=lambda case: case.get("name", case["file"]))
def test_the_advice_of_a_message_leads_to_success_or_to_another_problem(
    case: dict[str, Any], look: Look, following: Callable[[dict[str, Any]], Fixes]
) -> None:
    fixes = following(case)
    if not fixes:
        assert BY_HAND.search(case["error"]), f"what should a person do? {case['error']}"
    for said, keys, path in fixes:
        code, _, err = look({"file": case["file"], "path": path, **keys})
        assert code in (0, 2, 3), (said, err)
        assert code == 0 or _problem(err) != _problem(f"error: {case['error']}"), (said, err)


def _problem(message: str) -> str:
    """The problem of a message: without the place, the values, and the fix."""
    text = re.sub(r"\b(FILE|DIR)\S*|\S+\.(csv|jsonl?|tsv|parquet)\S*", "", message)
    return re.sub(r"[\d.,]+", "0", text).partition("; ")[0].strip()


def test_most_messages_about_data_have_a_fix_that_is_followed(
    following: Callable[[dict[str, Any]], Fixes], tmp_path: Path
) -> None:
    followed = 0
    for case in FAULTY:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        followed += bool(following(case))
    assert followed >= 45
