"""What the libraries print reaches no terminal, whichever command loads them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HOOK = '''
import os, sys
from importlib.machinery import PathFinder

class Announce:
    """Writes a line to stderr for each library that is imported, as bitsandbytes does where `kernels` is missing."""

    def find_spec(self, name, path=None, target=None):
        if name not in {libraries!r}:
            return None
        spec = PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module

        def announced(module):  # only what is imported, not what is looked for
            os.write(2, f"LIBRARY {{name}} was imported\\n".encode())
            with open(os.environ["ANNOUNCED"], "a") as file:
                file.write(name + "\\n")
            run(module)

        spec.loader.exec_module = announced
        return spec

sys.meta_path.insert(0, Announce())
'''
LIBRARIES = ("torch", "transformers", "bitsandbytes", "peft", "trl", "datasets", "accelerate")
CHATTER = ("LIBRARY ", "Failed to load", "kernels", "Warning", "WARNING", "it/s]")
"""Of the import hook, of bitsandbytes, of Python's warnings, of the libraries' loggers and of tqdm."""

Ran = tuple[int, str, list[str]]


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ran]:
    """Run a command whose libraries write to stderr when they are imported; returns code, stderr and the libraries."""
    folder = tmp_path_factory.mktemp("talkative")
    (folder / "sitecustomize.py").write_text(HOOK.format(libraries=LIBRARIES), encoding="utf-8")

    def run(place: Path, *words: object) -> Ran:
        announced = place / "announced.txt"
        announced.unlink(missing_ok=True)
        found = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [sys.executable, "-m", "peftcli", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            cwd=place,
            env=os.environ | {"PYTHONPATH": found, "ANNOUNCED": str(announced)},
        )
        imported = announced.read_text(encoding="utf-8").split() if announced.is_file() else []
        return done.returncode, done.stderr, imported

    return run


@pytest.fixture(scope="module")
def trained(
    talkative: Callable[..., Ran], recipe_in: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The folder of a recipe and its run in NF4, and what its training wrote to stderr."""
    folder = tmp_path_factory.mktemp("nf4")
    recipe = recipe_in(folder, trainer={"max_steps": 2})
    code, said, imported = talkative(folder, "train", recipe, "--output-dir", "run")
    assert code == 0, said
    assert "bitsandbytes" in imported
    return folder, said


def test_training_shows_no_line_of_a_library(trained: tuple[Path, str]) -> None:
    assert not [line for line in trained[1].splitlines() if any(word in line for word in CHATTER)]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("data", "recipe.yaml"), marks=pytest.mark.slow),
        pytest.param(("plan", "recipe.yaml"), marks=pytest.mark.slow),
        pytest.param(("doctor", "recipe.yaml"), marks=pytest.mark.slow),
        ("eval", "run"),
        ("merge", "run", "--output-dir", "merged"),
        ("generate", "run", "big apple 1"),
        ("generate", "run", "--file", "prompts.txt"),
        pytest.param(
            ("compare", "recipe.yaml", "--vary=adapter.r=4,8", "--set=trainer.max_steps=1", "--output-dir=both"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=" ".join,
)
def test_no_other_command_shows_a_line_of_a_library(
    talkative: Callable[..., Ran], trained: tuple[Path, str], words: tuple[str, ...]
) -> None:
    folder, _ = trained
    (folder / "prompts.txt").write_text("big apple 1\nold carrot 2\n", encoding="utf-8")
    code, said, imported = talkative(folder, *words)
    assert code == 0, said
    assert "torch" in imported or words[0] == "data"
    assert not [line for line in said.splitlines() if any(word in line for word in CHATTER)]


def test_an_error_of_a_command_that_loads_libraries_is_all_that_is_shown(
    talkative: Callable[..., Ran], trained: tuple[Path, str]
) -> None:
    code, said, _ = talkative(trained[0], "generate", "nowhere/at/all", "big apple 1")
    assert code != 0
    assert len(said.splitlines()) == 1 and said.startswith("error: ")
