"""What a run folder may hold when a run begins in it, and what is never removed from it."""

import os
import shutil
from pathlib import Path

import pytest

from peftcli.errors import RecipeError
from peftcli.recipe.load import load_recipe
from peftcli.recipe.schema import Recipe
from peftcli.run_dir import RunDir, write_json, write_text
from peftcli.train import checkpoint
from peftcli.train.resume import open_run, write_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name: 'tiny:llama'}\ndataset: {path: rows.csv}\n")
    return load_recipe(path).recipe


@pytest.fixture
def run(tmp_path: Path, recipe: Recipe) -> RunDir:
    """A run folder with a recipe, a plan and a note of the user."""
    found = RunDir(tmp_path / "run")
    write_recipe(found, recipe)
    write_json(found.plan, {"schema": 1})
    (found.path / "notes.txt").write_text("mine")
    return found


def sealed(folder: Path, step: int) -> Path:
    """A checkpoint of made-up files."""
    staged = folder / checkpoint.STAGING / f"checkpoint-{step}"
    staged.mkdir(parents=True)
    for name in checkpoint.NEEDED:
        (staged / name).write_bytes(b"x" * step)
    checkpoint.seal(staged, step, {}, {})
    checkpoint.promote(staged, folder / staged.name)
    return folder / staged.name


def test_overwrite_removes_our_files_and_goes_on_beside_a_file_of_the_user(run: RunDir, recipe: Recipe) -> None:
    found = open_run(run, recipe, overwrite=True, resume=False)
    assert (found.finished, found.resume_from) == (False, None)
    assert sorted(path.name for path in run.path.iterdir()) == ["notes.txt"]


def test_a_folder_without_a_run_is_left_alone_even_with_overwrite(run: RunDir, recipe: Recipe) -> None:
    run.recipe.unlink()
    for overwrite in (False, True):
        with pytest.raises(RecipeError, match=r"not a peftcli run \(notes\.txt, plan\.json\)"):
            open_run(run, recipe, overwrite=overwrite, resume=False)
    assert sorted(path.name for path in run.path.iterdir()) == ["notes.txt", "plan.json"]


def test_a_folder_in_which_the_first_file_was_torn_by_a_kill_is_new(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "new")
    monkeypatch.setattr(os, "replace", lambda *_: None)  # as far as a process gets that is killed before it
    write_text(run.recipe, "model:")
    assert [path.name for path in run.path.iterdir()] != []
    open_run(run, recipe, overwrite=False, resume=False)
    assert list(run.path.iterdir()) == []


def test_a_file_of_the_user_with_a_dot_is_not_taken_for_a_torn_one(tmp_path: Path, recipe: Recipe) -> None:
    run = RunDir(tmp_path / "mine")
    run.path.mkdir()
    for name in (".notes.json.abcdefgh", ".recipe.yaml.swp", ".git"):
        (run.path / name).write_text("mine")
    with pytest.raises(RecipeError, match="not a peftcli run"):
        open_run(run, recipe, overwrite=False, resume=False)
    assert len(list(run.path.iterdir())) == 3


def test_of_a_checkpoint_that_was_moved_elsewhere_the_link_alone_is_removed(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    for step in (2, 4, 6):
        sealed(folder, step)
    shutil.move(folder / "checkpoint-2", elsewhere)
    (folder / "checkpoint-2").symlink_to(elsewhere)
    checkpoint.rotate(folder, 2, best=None)
    assert [step for step, _ in checkpoint.list_checkpoints(folder)] == [4, 6]
    assert (elsewhere / checkpoint.MANIFEST).is_file()
    (folder / "checkpoint-8.bad").symlink_to(elsewhere)
    (sealed(folder, 8) / "optimizer.pt").unlink()
    assert checkpoint.newest_valid(folder).step == 6
    assert (folder / "checkpoint-8.bad" / "optimizer.pt").exists() is False
    assert (elsewhere / checkpoint.MANIFEST).is_file()


def test_a_start_that_failed_before_its_first_checkpoint_takes_any_recipe(run: RunDir, recipe: Recipe) -> None:
    other = recipe.model_copy(update={"seed": 7, "trainer": {"optim": "sgd"}})
    run.plan.unlink()
    run.checkpoints.mkdir()
    found = open_run(run, other, overwrite=False, resume=False)
    assert (found.finished, found.resume_from, found.notes) == (False, None, ())  # no step was trained
    write_text(run.log, '{"step": 2, "loss": 1.0}\n')
    assert "step 0" in open_run(run, other, overwrite=False, resume=False).notes[0]
    sealed(run.checkpoints, 3)
    with pytest.raises(RecipeError, match="keys are stored in its checkpoints"):
        open_run(run, other, overwrite=False, resume=False)
