"""A run works wherever its folder, its base model and its data are moved, and says what it cannot find."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_things

from peftcli.cli.main import main
from peftcli.data.input_files import content_hash, point_to
from peftcli.errors import DataError
from peftcli.run_dir import read_json

Cli = Callable[..., int]
TOLERANCE = 1e-6
"""Nats: the same rows in the same batches on the same machine."""


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a base, data, a recipe and a run; not to be changed."""
    project = tmp_path_factory.mktemp("place") / "project"
    shutil.copytree(tiny_llama, project / "models" / "base")
    (project / "data").mkdir()
    write_things(project / "data")
    kinds = "red fruit,1\nyellow fruit,1\norange root,2\ngreen leaf,2\n"
    (project / "data" / "kinds.csv").write_text(f"kind,shelf\n{kinds}")
    recipe = {
        "name": "things",
        "model": {"name": "./models/base"},
        "adapter": {"r": 4},
        "dataset": {
            "path": "data/things.csv",
            "join": [{"path": "data/kinds.csv", "on": "kind"}],
            "prompt": "{thing} ->:",
            "completion": " {shelf}",
            "max_length": 64,
        },
        "trainer": {"per_device_train_batch_size": 8, "max_steps": 2, "learning_rate": 5e-3},
        "evaluation": {"max_new_tokens": 2, "samples": 1, "baseline": False},
    }
    (project / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(project / "recipe.yaml"), "--output-dir", str(project / "runs" / "things")]) == 0
    return project


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Any:
    """The project at another place, with nothing left at the first one."""
    away = trained.rename(trained.with_name("away"))
    copy = tmp_path / "new" / "project"
    shutil.copytree(away, copy)
    yield copy
    away.rename(trained)


def loss(run_cli: Cli, capfd: pytest.CaptureFixture[str], *words: object) -> float:
    capfd.readouterr()
    assert run_cli("eval", *words, "--no-base", "--json") == 0
    found = json.loads(capfd.readouterr().out)["adapter"]["loss"]
    assert isinstance(found, float)
    return found


def test_a_run_that_moved_alone_finds_what_stayed(
    trained: Path, tmp_path: Path, run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "else" / "where" / "renamed"
    shutil.copytree(trained / "runs" / "things", run)
    before = read_json(run / "metrics.json")["adapter"]["loss"]
    assert loss(run_cli, capfd, run) == pytest.approx(before, abs=TOLERANCE)
    assert run_cli("merge", run) == 0
    assert run_cli("train", trained / "recipe.yaml", "--output-dir", run) == 0
    assert "already finished" in capfd.readouterr().err


def test_one_message_names_all_that_is_missing_and_the_options_point_to_it(
    project: Path, tmp_path: Path, run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "alone"
    shutil.move(project / "runs" / "things", run)
    before = read_json(run / "metrics.json")["adapter"]["loss"]
    for command in ("eval", "merge"):
        capfd.readouterr()
        assert run_cli(command, run) == 4
        first, *lines = capfd.readouterr().err.splitlines()
        assert first.startswith(f"error: {run}: files of this run were moved or removed")
        assert [line.split(":")[0].strip() for line in lines] == [
            "the base model",
            "dataset.path",
            "dataset.join[0].path",
        ]
        assert [line.rpartition("; ")[2] for line in lines] == ["pass --model PATH", *["pass --data PATH"] * 2]
    assert run_cli("eval", run, "--model", project / "models" / "base") == 3
    assert "the base model" not in capfd.readouterr().err
    relative = ("new/project/models/base", "new/project/data")
    found = loss(run_cli, capfd, run, "--model", relative[0], "--data", relative[1])
    assert found == pytest.approx(before, abs=TOLERANCE)
    assert run_cli("merge", run, "--set", f"model.name={relative[0]}", "--data", relative[1]) == 0
    assert run_cli("generate", run, "big apple 4") == 4
    assert "pass its new location with --model" in capfd.readouterr().err
    for words in (("--model", relative[0]), ("--set", f"model.name={relative[0]}")):
        assert run_cli("generate", run, "big apple 4", *words) == 0


def test_a_project_that_moved_works_and_resumes(project: Path, run_cli: Cli, capfd: pytest.CaptureFixture[str]) -> None:
    run = project / "runs" / "things"
    before = read_json(run / "metrics.json")["adapter"]["loss"]
    assert loss(run_cli, capfd, run) == pytest.approx(before, abs=TOLERANCE)
    assert run_cli("train", project / "recipe.yaml", "--output-dir", run) == 0
    assert "already finished" in capfd.readouterr().err


def test_a_run_behind_a_link_is_the_same_run(
    trained: Path, tmp_path: Path, run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    project, scratch = tmp_path / "home" / "project", tmp_path / "a" / "deeper" / "scratch"
    shutil.copytree(trained, project, ignore=shutil.ignore_patterns("runs"))
    scratch.mkdir(parents=True)
    (project / "runs").symlink_to(scratch)
    assert run_cli("train", project / "recipe.yaml", "--output-dir", project / "runs" / "x") == 0
    losses = [loss(run_cli, capfd, place / "x") for place in (project / "runs", scratch)]
    assert losses[0] == pytest.approx(losses[1], abs=TOLERANCE)
    inputs = {one["key"]: one for one in read_json(scratch / "x" / "inputs.json")["inputs"]}
    assert inputs["dataset.path"]["beside"] == "../../../../home/project/data/things.csv"
    moved = tmp_path / "all"
    moved.mkdir()
    for part in ("home", "a"):
        shutil.move(tmp_path / part, moved / part)  # only the relative paths still lead there
    assert loss(run_cli, capfd, moved / "a/deeper/scratch/x") == pytest.approx(losses[0], abs=TOLERANCE)


def test_another_base_is_refused_and_other_rows_are_named(
    trained: Path, tmp_path: Path, run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    run, other = trained / "runs" / "things", tmp_path / "other"
    shutil.copytree(trained / "models" / "base", other)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(other)).save_pretrained(other)
    assert run_cli("generate", run, "x", "--model", other) == 4
    assert "its weights differ from those at training" in capfd.readouterr().err
    text = (trained / "data" / "things.csv").read_text()
    (tmp_path / "things.csv").write_text(text + "999,new apple 999,red fruit\n")
    before = (run / "eval.json").read_bytes()
    assert run_cli("eval", run, "--no-base", "--data", "things.csv") == 0
    error = capfd.readouterr().err
    assert "things.csv differs from the things.csv that was trained on" in error and "1 rows are new" in error
    assert (run / "eval.json").read_bytes() == before


@pytest.mark.parametrize("command", ["eval", "merge", "generate"])
def test_a_key_of_the_trained_adapter_cannot_be_set(
    trained: Path, run_cli: Cli, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    more = ["x"] if command == "generate" else []
    assert run_cli(command, trained / "runs" / "things", *more, "--set", "adapter.r=8") == 2
    assert "--set adapter.r: " in capfd.readouterr().err


def test_a_path_on_the_command_line_is_expanded(
    trained: Path, tmp_path: Path, run_cli: Cli, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WORK", str(trained))
    recipe, more = (
        "$WORK/recipe.yaml",
        ("--set", "trainer.save_steps=1", "--set", "dataset.path=${WORK}/data/things.csv"),
    )
    (tmp_path / "~").mkdir()  # as an earlier version made it
    assert run_cli("train", recipe, "--output-dir", "~/x", *more) == 0
    assert (tmp_path / "home/x/checkpoints/checkpoint-2").is_dir() and not list((tmp_path / "~").iterdir())
    (tmp_path / "home" / "prompts.txt").write_text("big apple 4\n")
    capfd.readouterr()
    assert run_cli("generate", "~/x", "--file", "~/prompts.txt") == 0
    for words in (("report", "~/x"), ("compare", "~/x", "$WORK/runs/things", "--output-dir", "~/compared")):
        assert run_cli(*words) == 0
    assert (tmp_path / "home/compared/compare.html").is_file()
    assert run_cli("report", "$NO_SUCH_VARIABLE/x") == 2
    assert "RUN $NO_SUCH_VARIABLE/x: the environment variable NO_SUCH_VARIABLE is not set" in capfd.readouterr().err


def test_options_match_files_by_their_names(tmp_path: Path) -> None:
    written = {("dataset", "path"): "/gone/rows.csv", ("dataset", "join", 0, "path"): "/gone/kinds.csv"}
    for name in ("rows.csv", "kinds.csv", "other.csv"):
        (tmp_path / name).write_text("a\n")
    both = {key: str(tmp_path / Path(path).name) for key, path in written.items()}
    assert point_to(written, [str(tmp_path)]) == both
    assert point_to(written, [str(tmp_path / "kinds.csv")]) == {
        ("dataset", "join", 0, "path"): both[("dataset", "join", 0, "path")]
    }
    assert point_to(written, [str(tmp_path / "other.csv")]) == {("dataset", "path"): str(tmp_path / "other.csv")}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no rows\.csv and no kinds\.csv; pass the file itself"):
        point_to(written, [str(tmp_path / "empty")])
    with pytest.raises(DataError, match="no such file or folder"):
        point_to(written, [str(tmp_path / "absent")])


def test_the_hash_of_a_file_does_not_depend_on_its_name(tmp_path: Path) -> None:
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    one.write_text("a\n")
    two.write_text("a\n")
    first = content_hash(str(one))
    assert first is not None and first == content_hash(str(two))
    two.write_text("b\n")
    assert content_hash(str(two)) != first and content_hash(str(tmp_path / "absent.csv")) is None
    assert content_hash(str(tmp_path)) == content_hash(str(tmp_path / "*.csv"))
