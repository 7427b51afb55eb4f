"""Fixtures: a tiny pretrained model made once, small data, recipes over both, all offline."""

import contextlib
import functools
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch is imported anywhere: several test processes share few cores, and spinning threads starve each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("PEFTCLI_CACHE", str(Path(__file__).parent.parent / ".cache" / "peftcli"))

import pytest
import yaml

from peftcli.cli.app import main

# Imports make half a million objects that live on: looking through them again and again takes a quarter of the
# time of collecting the tests.
gc.disable()

COLOURS = {"apple": "red fruit", "banana": "yellow fruit", "carrot": "orange root", "spinach": "green leaf"}


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """The folder of tiny:llama, pretrained at the first test run of a checkout."""
    from peftcli.tiny.build import tiny_model

    return tiny_model("tiny:llama")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Let the groups of xdist hold: xdist 3.8 writes them where pytest 9.2 does not look for the id of a test."""
    for item in items:
        if hasattr(item, "_nodeid") and hasattr(item, "_id"):
            item._id = type(item._id).parse(item._nodeid)


def pytest_collection_finish() -> None:
    """Let the garbage collector leave alone what the imports made: Trainer calls it after each training."""
    gc.collect()
    gc.freeze()
    gc.enable()


def write_things(folder: Path) -> Path:
    """A CSV of 48 rows: thing, number and kind."""
    lines = ["id,thing,kind"]
    names = list(COLOURS)
    for number in range(48):
        name = names[number % 4]
        lines.append(f"{number:03d},{['big', 'small', 'old', 'new'][number // 4 % 4]} {name} {number},{COLOURS[name]}")
    path = folder / "things.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def things(tmp_path: Path) -> Path:
    """A CSV of 48 rows: thing, number and kind."""
    return write_things(tmp_path)


@pytest.fixture(scope="session")
def recipe_in(tiny_llama: Path) -> Callable[..., Path]:
    """A function that writes a small recipe and its data into a folder; keyword arguments replace or add sections."""

    def write(folder: Path, **sections: Any) -> Path:
        recipe: dict[str, Any] = {
            "name": "things",
            "model": {"name": str(tiny_llama)},
            "quantization": {"bits": 4},
            "adapter": {"r": 8},
            "dataset": {
                "path": str(folder / "things.csv"),
                "prompt": "{thing} ->:",
                "completion": " {kind}",
                "split": {"test_size": 0.25, "seed": 1},
                "max_length": 64,
            },
            "trainer": {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 5e-3, "logging_steps": 1},
            "evaluation": {"max_new_tokens": 6, "samples": 2},
        }
        for name, value in sections.items():
            if value is None:
                recipe.pop(name, None)
            elif isinstance(value, dict) and isinstance(recipe.get(name), dict):
                recipe[name] = recipe[name] | value
            else:
                recipe[name] = value
        if not (folder / "things.csv").exists():
            write_things(folder)
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_recipe(recipe_in: Callable[..., Path], things: Path) -> Callable[..., Path]:
    """A function that writes a small recipe; keyword arguments replace or add sections."""
    return functools.partial(recipe_in, things.parent)


@pytest.fixture(scope="session")
def cli_in() -> Callable[..., int]:
    """Run a command line in the folder that is named first, and return the exit code."""

    def run(folder: Path, *words: object) -> int:
        with contextlib.chdir(folder):
            return main([str(word) for word in words])

    return run


@pytest.fixture
def run_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a command line in a folder of its own and return the exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> int:
        return main([str(word) for word in words])

    return run
