"""`pack`: a run in one file that gives the same figures elsewhere, and names nothing of the machine that wrote it."""

import getpass
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_things

from peftcli.cli.main import main
from peftcli.pack.private import Private
from peftcli.run_dir import read_json

Cli = Callable[..., int]
USER, HOST = "annika", "workbench7"
TOLERANCE = 1e-5
"""Nats: the same rows in the same batches and float32 on the same machine; only the rows' padding may differ."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a user, with a project in which a run was trained and merged; not to be changed."""
    return tmp_path_factory.mktemp("machine") / "home" / USER


@pytest.fixture(scope="module")
def run(home: Path, tiny_llama: Path) -> Path:
    """A run with a base model and data of its own."""
    project = home / "work" / "fruit"
    project.mkdir(parents=True)
    shutil.copytree(tiny_llama, project / "models" / "base")
    write_things(project)
    recipe = {
        "name": "fruit",
        "model": {"name": "./models/base"},
        "adapter": {"r": 4},
        "dataset": {"path": "things.csv", "prompt": "{thing} ->:", "completion": " {kind}", "max_length": 64},
        "trainer": {"per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 5e-3},
        "evaluation": {"max_new_tokens": 4, "samples": 2},
    }
    (project / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        assert main(["train", str(project / "recipe.yaml"), "--output-dir", "runs/fruit"]) == 0
        assert main(["merge", "runs/fruit"]) == 0
    return project / "runs" / "fruit"


@pytest.fixture
def on_machine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are run by that user on a machine with a name."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(getpass, "getuser", lambda: USER)
    monkeypatch.setattr(platform, "node", lambda: f"{HOST}.example.org")


def elsewhere(folder: Path, *words: object) -> str:
    """The output of a command in another folder, under another home and with an empty cache."""
    other = {"HOME": str(folder / "home"), "PEFTCLI_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "peftcli", *map(str, words)],
        cwd=folder,
        env=os.environ | other,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def bytes_by_name(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("on_machine")
def test_an_archive_gives_the_figures_of_the_run_elsewhere(
    run: Path, tmp_path: Path, run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    original = tmp_path / "original"
    shutil.copytree(run.parent.parent, original)
    here = original / "runs" / "fruit"
    asked = ("big carrot 2", "new spinach 15")
    capfd.readouterr()
    assert run_cli("generate", here, *asked) == 0
    answers = capfd.readouterr().out
    archive = tmp_path / "fruit.tar.gz"
    assert run_cli("pack", here, "--with-test-rows", "--with-base", "--output", archive) == 0
    assert "test rows   10 in the archive" in capfd.readouterr().out
    before = read_json(here / "metrics.json")
    shutil.rmtree(original)
    away = run.parent.parent.rename(run.parent.parent.with_name("gone"))
    try:
        other = tmp_path / "other"
        other.mkdir()
        with tarfile.open(archive) as packed:
            packed.extractall(other, filter="data")
        report = elsewhere(other, "report", "fruit", "--json")
        scores = json.loads(elsewhere(other, "eval", "fruit", "--json"))
        merge = json.loads(elsewhere(other, "merge", "fruit", "--json"))
        assert elsewhere(other, "generate", "fruit", *asked) == answers
    finally:
        away.rename(run.parent.parent)
    for kind in ("base", "adapter"):
        assert json.loads(report)[kind] == before[kind]
        assert scores[kind]["loss"] == pytest.approx(before[kind]["loss"], abs=TOLERANCE)
        assert scores[kind]["exact_match"] == before[kind]["exact_match"]
    assert merge["metrics"]["loss"] == pytest.approx(before["merged"]["loss"], abs=TOLERANCE)
    assert merge["top1_agreement"] == before["merge"]["top1_agreement"]


@pytest.mark.usefixtures("on_machine")
def test_an_archive_names_nothing_of_the_machine(run: Path, tmp_path: Path, run_cli: Cli) -> None:
    environment = read_json(run / "environment.json")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    environment["command"] += f" --set trainer.logging_dir=/srv/{USER}/tb on {HOST} by {USER}@{HOST}"
    (copy / "environment.json").write_text(json.dumps(environment))
    assert str(run.parent.parent) in (copy / "adapter" / "adapter_config.json").read_text()
    for output in (tmp_path / "one.tar.gz", "two.tar.gz", tmp_path / "one.zip", "two.zip"):
        assert run_cli("pack", copy, "--with-test-rows", "--merged", "--output", output) == 0
    assert run_cli("pack", copy, "--output", tmp_path / "adapter.tar.gz") == 0
    for ending in ("tar.gz", "zip"):
        assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"two.{ending}").read_bytes()
    for name in ("one.tar.gz", "adapter.tar.gz"):
        with tarfile.open(tmp_path / name) as packed:
            packed.extractall(tmp_path / name.removesuffix(".tar.gz"), filter="data")
    with zipfile.ZipFile(tmp_path / "one.zip") as packed_zip:
        packed_zip.extractall(tmp_path / "zip")
    assert bytes_by_name(tmp_path / "zip") == bytes_by_name(tmp_path / "one")
    for place in ("one", "adapter"):
        for file, content in bytes_by_name(tmp_path / place).items():
            for private in (USER, HOST, str(tmp_path), str(run.parent.parent), os.environ["HOME"]):
                assert private.encode() not in content, (file, private)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("on_machine")
def test_a_packed_run_without_its_base_says_what_it_needs(
    run: Path, tmp_path: Path, run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("pack", run) == 0
    out = capfd.readouterr().out
    assert "base, not in the archive: copy it, and pass it with --model" in out
    assert "peftcli eval fruit --model PATH --data PATH" in out
    with tarfile.open(tmp_path / "fruit.tar.gz") as packed:
        packed.extractall(tmp_path, filter="data")
    described = read_json(tmp_path / "fruit" / "pack.json")
    assert described["base"]["weights_sha256"] == read_json(run / "adapter" / "peftcli.json")["base"]["weights_sha256"]
    assert run_cli("eval", "fruit") == 4
    error = capfd.readouterr().err
    assert "the base model: not at" in error and "pass --model PATH" in error
    assert "dataset.path: not at" in error and "pass --data PATH" in error
    project = run.parent.parent
    command = ("eval", "fruit", "--no-base", "--json", "--model", project / "models" / "base", "--data", project)
    assert run_cli(*command) == 0
    loss = json.loads(capfd.readouterr().out)["adapter"]["loss"]
    assert loss == pytest.approx(read_json(run / "metrics.json")["adapter"]["loss"], abs=TOLERANCE)
    shutil.copy(project / "things.csv", tmp_path / "fruit")
    shutil.copytree(project / "models" / "base", tmp_path / "base")
    assert run_cli("eval", "fruit", "--no-base") == 0  # found by their names in and beside the run


@pytest.mark.usefixtures("on_machine")
def test_a_test_row_with_a_private_path_is_refused(
    run: Path, tmp_path: Path, run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    project = tmp_path / "project"
    shutil.copytree(run.parent.parent, project, ignore=shutil.ignore_patterns("runs"))
    text = (project / "things.csv").read_text().replace("big", f"/u/{USER}/big")
    (project / "things.csv").write_text(text)
    assert run_cli("train", project / "recipe.yaml", "--output-dir", "run") == 0
    capfd.readouterr()
    assert run_cli("pack", "run", "--with-test-rows") == 3
    error = capfd.readouterr().err
    assert error.startswith("error: test.jsonl:") and "mask it in the data, or pack without --with-test-rows" in error
    assert not (tmp_path / "run.tar.gz").exists() and not list(tmp_path.glob(".*"))
    assert run_cli("pack", "run") == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["run.yaml"], 2, "not a run folder"),
        (["RUN", "--output", "a.rar"], 2, "unknown file extension; use .tar.gz, .tgz, .zip"),
        (["RUN", "--output", "$NO_SUCH_VARIABLE/a.zip"], 2, "the environment variable NO_SUCH_VARIABLE is not set"),
    ],
)
def test_wrong_command_lines(
    run: Path, run_cli: Cli, capfd: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    assert run_cli("pack", *(str(run) if word == "RUN" else word for word in words)) == code
    assert said in capfd.readouterr().err


def private(**changes: Any) -> Private:
    given = {"paths": {"/data/annika/run": "run", "/home/annika": "~"}, "user": "annika", "hosts": ("pc7",)}
    return Private(**given | changes)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/home/annika/a.csv", "~/a.csv"),
        ("/home/annika2/a.csv", "/home/annika2/a.csv"),
        ("at /data/annika/run. It", "at run. It"),
        ("/data/annika/run.old", "/data/USER/run.old"),
        ("at /data/annika/run, on pc7", "at run, on HOST"),
        ("annika@pc7:/srv/annika/x", "USER@HOST:/srv/USER/x"),
        ("Annika and annika eat; apc7, pc77", "Annika and annika eat; apc7, pc77"),
    ],
)
def test_private_words_are_replaced(text: str, clean: str) -> None:
    assert private().clean(text) == clean
    assert private().clean(clean) == clean
    assert bool(private().leaks(text.encode(), "a.txt")) == (text != clean)


def test_other_paths_are_shortened_in_what_holds_no_rows() -> None:
    text = "peftcli train /srv/x/recipe.yaml --set dataset.path=/srv/y/rows.csv https://a.org/b c/d"
    short = "peftcli train recipe.yaml --set dataset.path=rows.csv https://a.org/b c/d"
    assert private().clean(text, all_paths=True) == short


def test_weights_are_searched_for_long_paths_only() -> None:
    assert not private(paths={"/root": "~"}).leaks(b"\xff/root/\xff annika@pc7", "weights")
    assert private().leaks(b"\xff/home/annika/x\xff", "weights")
