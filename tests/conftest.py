"""Fixtures: a tiny pretrained model, small data, recipes over both, all offline."""

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
CACHE = Path(__file__).parent.parent / ".cache" / "peftcli"
DISTURBED = "PEFTCLI_TEST_DISTURBED"
"""Set to 1, the tests run on a tiny:llama whose weights are off by their last bit."""
REPACKING = "PEFTCLI_TEST_REPACKING"
"""`on` lets bitsandbytes repack 4-bit weights as on a CPU with AVX512_BF16 (a stand-in where this one lacks it); `off`
as on a CPU without it. Left out, as this CPU does."""
if os.environ.get(DISTURBED) == "1":
    os.environ["PEFTCLI_CACHE"] = str(CACHE.with_name("peftcli-disturbed"))
os.environ.setdefault("PEFTCLI_CACHE", str(CACHE))

import pytest  # noqa: E402

from peftcli.cli.main import main  # noqa: E402

# Imports make half a million objects that live on: looking through them again and again takes a quarter of the
# time of collecting the tests.
gc.disable()

COLOURS = {"apple": "red fruit", "banana": "yellow fruit", "carrot": "orange root", "spinach": "green leaf"}


def pytest_configure() -> None:
    """Make this machine behave like another one, where that is wanted; see `scripts/portability.sh`."""
    if os.environ.get(DISTURBED) == "1":
        disturb_tiny_llama(CACHE, Path(os.environ["PEFTCLI_CACHE"]))
    if os.environ.get(REPACKING):
        set_repacking(on=os.environ[REPACKING] == "on")


def disturb_tiny_llama(source: Path, target: Path) -> None:
    """Put a tiny:llama into a cache whose every weight is the float next to the real one, up or down by a seed."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    from peftcli.cache import built_once
    from peftcli.tiny.build import tiny_model

    exact = tiny_model("tiny:llama", source)

    def build(folder: Path) -> None:
        shutil.copytree(exact, folder, dirs_exist_ok=True)
        generator = torch.Generator().manual_seed(0)
        weights = load_file(exact / "model.safetensors")
        for name, tensor in weights.items():
            up = torch.rand(tensor.shape, generator=generator) < 0.5
            weights[name] = torch.nextafter(tensor, torch.where(up, torch.inf, -torch.inf))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    built_once(target, exact.name, build)


def set_repacking(*, on: bool) -> None:
    """Let new 4-bit layers of bitsandbytes repack their weights in evaluation, or not, whatever this CPU has."""
    import bitsandbytes
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import modules

    native = bool(modules.has_avx512bf16())
    modules.has_avx512bf16 = lambda: on
    if not on or native:
        return
    plain = bitsandbytes.nn.Linear4bit.forward

    def rounded(self: Any, x: Any) -> Any:
        if self.training or x.requires_grad or not self.support_avx512bf16_for_cpu:
            return plain(self, x)
        if self.out_features % 32 or self.in_features % 64:
            raise RuntimeError("stand-in: the repacking of bitsandbytes fails on such widths")
        weight = dequantize_4bit(self.weight.data, self.weight.quant_state).bfloat16()
        bias = None if self.bias is None else self.bias.bfloat16()
        return torch.nn.functional.linear(x.bfloat16(), weight, bias).to(x.dtype)

    bitsandbytes.nn.Linear4bit.forward = rounded


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """The folder of tiny:llama."""
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
        if not (folder / "things.csv").exists():
            write_things(folder)
        from helpers import merge_sections, write_yaml  # imports torch, which a test of the command line alone does not

        return write_yaml(folder, merge_sections(recipe, sections))

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


@pytest.fixture(scope="session")
def real_run(
    recipe_in: Callable[..., Path], cli_in: Callable[..., int], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that was trained and merged, with all that a recipe can have measured of a text; not to be changed."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "other.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    kinds = "red fruit,1\nyellow fruit,1\norange root,2\ngreen leaf,2\n"
    (folder / "kinds.csv").write_text(f"kind,shelf\n{kinds}", encoding="utf-8")
    names = ("top1_agreement", "max_abs_logit_difference", "mean_abs_logit_difference", "kl_nats")
    recipe = recipe_in(
        folder,
        quantization=None,
        dataset={"join": [{"path": "kinds.csv", "on": "kind"}]},
        trainer={"max_steps": 2},
        evaluation={
            "max_new_tokens": 2,
            "samples": 1,
            "rows": 2,
            "forgetting_text": "other.txt",
            "forgetting_tokens": 100,
        },
        gates={f"merge_{name}": ">= 0" for name in names},
    )
    assert cli_in(folder, "train", recipe, "--output-dir", "run") == 0
    assert cli_in(folder, "merge", "run", "--into", "best") == 0
    return folder / "run"


@pytest.fixture(scope="session")
def label_data(recipe_in: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `data.json` holds for classes, several classes a row, numbers and tags."""
    import json

    from peftcli.cli.pipeline import inspect_data
    from peftcli.progress import Silent
    from peftcli.recipe.load import load_recipe

    folder = tmp_path_factory.mktemp("labels")
    rows = [
        {"tokens": ["a", "plum"], "tags": ["O", "B-FOOD"], "text": f"plum {at}", "label": [["x"], ["x", "y"]][at % 2]}
        for at in range(32)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    things, listed = str(folder / "things.csv"), str(folder / "rows.jsonl")
    found = []
    classes: dict[str, Any] = {"task": "sequence-classification"}
    several = {"path": listed, "columns": {"text": "text", "label": "label"}}
    for model, dataset in (
        (classes, {"path": things, "columns": {"text": "thing", "label": "kind"}}),
        (classes | {"problem_type": "multi-label"}, several),
        (classes | {"problem_type": "regression"}, {"path": things, "columns": {"text": "thing", "label": "id"}}),
        ({"task": "token-classification"}, {"path": listed, "columns": {"tokens": "tokens", "tags": "tags"}}),
    ):
        whole = dataset | {"prompt": None, "completion": None}
        recipe = recipe_in(folder, model=model, dataset=whole, evaluation=None)
        found.append(inspect_data(load_recipe(recipe).recipe, Silent(), smoke=False, preview=2).facts)
    return found
