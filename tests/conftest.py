"""Fixtures: a tiny pretrained model made once, small data, recipes over both, all offline."""

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

COLOURS = {"apple": "red fruit", "banana": "yellow fruit", "carrot": "orange root", "spinach": "green leaf"}


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """The folder of tiny:llama, pretrained at the first test run of a checkout."""
    from peftcli.tiny.build import tiny_model

    return tiny_model("tiny:llama")


@pytest.fixture
def things(tmp_path: Path) -> Path:
    """A CSV of 48 rows: thing, number and kind."""
    lines = ["id,thing,kind"]
    names = list(COLOURS)
    for number in range(48):
        name = names[number % 4]
        lines.append(f"{number:03d},{['big', 'small', 'old', 'new'][number // 4 % 4]} {name} {number},{COLOURS[name]}")
    path = tmp_path / "things.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_llama: Path, things: Path) -> Callable[..., Path]:
    """A function that writes a small recipe; keyword arguments replace or add sections."""

    def write(**sections: Any) -> Path:
        recipe: dict[str, Any] = {
            "name": "things",
            "model": {"name": str(tiny_llama)},
            "quantization": {"bits": 4},
            "adapter": {"r": 8},
            "dataset": {
                "path": str(things),
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
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def run_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a command line in a folder of its own and return the exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> int:
        return main([str(word) for word in words])

    return run
