"""Merging a model that the GPU does not hold: rehearsed on the CPU, with stand-ins for the free memory of GPUs."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peftcli.merge import merge, placement
from peftcli.merge.placement import FreeMemory
from peftcli.model import load, scoring
from peftcli.plan.plan import Base
from peftcli.run_dir import read_json

Cli = Callable[..., int]
Write = Callable[..., Path]
LARGE = 2**50

trained_once = pytest.mark.xdist_group("one training, merged on small GPUs")


@pytest.fixture(scope="module")
def run(recipe_in: Write, cli_in: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with 12 test rows, two of which are run at once."""
    folder = tmp_path_factory.mktemp("small")
    recipe = recipe_in(folder, trainer={"max_steps": 3}, evaluation={"baseline": False, "batch_size": 2})
    assert cli_in(folder, "train", recipe, "--output-dir", "run") == 0
    return folder / "run"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What merged models were loaded with, and the models.

    Layers of the GPU are loaded on the CPU, and those of RAM wait on the disk: accelerate's hooks bring both into place
    in the same way.
    """
    loaded: list[Any] = []

    def stand_in(base: Base, *, max_memory: Mapping[int | str, int] | None = None, **given: Any) -> Any:
        asked = max_memory
        if max_memory is not None:
            # One number for all GPUs, since there is one CPU; what is over goes to the disk.
            gpus = sum(size for place, size in max_memory.items() if place != "cpu")
            max_memory = {"cpu": gpus}
        model = load.load_base(replace(base, device="cpu"), max_memory=max_memory, **given)
        loaded.append((asked, model))
        return model

    monkeypatch.setattr(merge, "load_base", stand_in)
    return loaded


def free(monkeypatch: pytest.MonkeyPatch, *gpus: int, ram: int = LARGE) -> None:
    monkeypatch.setattr(merge, "measure_free_memory", lambda **asked: FreeMemory(gpus, ram))


def merged_bytes(run: Path) -> int:
    return int(read_json(run / "plan.json")["model"]["bytes"])


@trained_once
def test_a_model_that_no_gpu_holds_is_compared_layer_by_layer_on_few_rows(
    run: Path, cli_in: Cli, loads: list[Any], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(placement, "FEW_ROWS", 5)
    # As 14.7 GiB are to an 8B, on a machine with 12.7 GB of RAM.
    free(monkeypatch, int(0.92 * merged_bytes(run)), ram=int(0.7 * merged_bytes(run)))
    monkeypatch.setattr(merge, "folding_bytes", lambda *asked: 0)
    assert cli_in(run.parent, "merge", run, "--output-dir", "few") == 0
    out, err = capfd.readouterr()
    assert "it is compared on the GPU and RAM, on the outputs for at most 5 rows and without generated answers" in err
    assert "merged into dequantized: logits: the first 2 of 5 rows took" in err and "so all take at most about" in err
    shown = " ".join(out.split())
    assert "Compared on 5 rows, " in shown
    assert "positions, on the GPU and RAM; not scored, since the GPUs here do not hold the merged model" in shown
    assert [set(asked) for asked, _ in loads] == [{0, "cpu"}]
    assert any(weight.device.type == "meta" for weight in loads[0][1].parameters()), "no layer waited elsewhere"
    found = read_json(run / "merge.json")
    assert (found["rows"], found["compared_on"], found["metrics"]) == (5, "the GPU and RAM", None)
    assert found["top1_agreement"] == 1.0 and found["met"]
    report = (run / "report.md").read_text(encoding="utf-8")
    assert "5 rows, " in report and "positions, on the GPU and RAM; not scored" in report


@trained_once
def test_two_gpus_hold_what_one_does_not_and_all_rows_are_compared(
    run: Path, cli_in: Cli, loads: list[Any], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    free(monkeypatch, *[int(0.92 * merged_bytes(run))] * 2)
    assert cli_in(run.parent, "merge", run, "--output-dir", "two") == 0
    assert "it is compared on 2 GPUs" in capfd.readouterr().err
    assert [set(asked) for asked, _ in loads] == [{0, 1}]
    found = read_json(run / "merge.json")
    assert (found["rows"], found["compared_on"]) == (12, "2 GPUs") and found["metrics"]["exact_match"] is not None


@trained_once
def test_where_a_place_runs_out_of_memory_the_next_one_is_taken(
    run: Path, cli_in: Cli, loads: list[Any], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    free(monkeypatch, LARGE)
    whole, tried = merge.load_base, []

    def full(base: Base, **given: Any) -> Any:
        tried.append(given.get("max_memory"))
        if len(tried) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(base, **given)

    monkeypatch.setattr(merge, "load_base", full)
    assert cli_in(run.parent, "merge", run, "--output-dir", "next") == 0
    assert "out of memory while the merged model was loaded on the GPU: CUDA out of memory" in capfd.readouterr().err
    assert read_json(run / "merge.json")["compared_on"] == "the CPU"
    assert tried[0] is None and "cpu" in tried[1] and tried[2] is None


@trained_once
@pytest.mark.parametrize("early", [True, False])
def test_without_room_a_merge_ends_with_code_5_and_leaves_nothing_behind(
    run: Path, cli_in: Cli, monkeypatch: pytest.MonkeyPatch, capfd: Any, early: bool
) -> None:
    before = sorted(path.name for path in run.iterdir())
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    if early:
        free(monkeypatch, merged_bytes(run) // 4, ram=merged_bytes(run) // 4)
        monkeypatch.setattr(merge, "folding_bytes", lambda *asked: 0)
    else:

        def full(*asked: Any) -> int:
            raise MemoryError

        monkeypatch.setattr(merge, "write_weights", full)
    assert cli_in(run.parent, "merge", run, "--output-dir", "nothing") == 5
    err = capfd.readouterr().err
    assert "Traceback" not in err and "the adapter is unchanged" in err
    assert ("could not be compared with the adapter" if early else "while the adapter was folded into its base") in err
    assert not list(run.parent.glob("nothing*"))
    assert sorted(path.name for path in run.iterdir()) == before
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_logits_of_chosen_positions_are_not_asked_of_a_model_on_several_gpus(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert scoring.takes_positions(model)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    assert not scoring.takes_positions(model)
