"""A stop and a resume on this GPU: the same bits with deterministic algorithms, and how far apart without them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from workbench import added

from gpu.conftest import Gpu
from peftcli.run_dir import RunDir, read_json

pytestmark = pytest.mark.gpu
Record = Callable[[Mapping[str, Any]], None]
Write = Callable[..., Path]
Cli = Callable[..., int]

STOPPED_EARLY = 75
SPREADS = 4
"""A resumed run may be so many times as far from an unbroken one as two unbroken ones are from each other: both are
one draw of the same distribution, of whose width one draw tells little."""
ROUNDED = 1e-3
"""Distance that is always allowed where two unbroken runs happened to have the same bits, of the update."""


class StopAt(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Asks in the middle of a step for a stop at its end, as a person does with a STOP file."""

    def __init__(self, step: int, run: Path) -> None:
        self._step, self._run = step, run

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step + 1 == self._step:
            (self._run / "STOP").touch()


def adapter(run: RunDir) -> dict[str, Tensor]:
    return dict(load_file(run.adapter / "adapter_model.safetensors"))


def distance(found: RunDir, wanted: RunDir) -> float:
    """Root mean square of the difference of LoRA's second matrices, which begin at 0, as a share of their own."""
    one, other = (
        {name: value.double() for name, value in adapter(run).items() if "lora_B" in name} for run in (found, wanted)
    )
    off = sum(float((one[name] - other[name]).square().sum()) for name in other)
    return float((off / sum(float(value.square().sum()) for value in other.values())) ** 0.5)


def unbroken(cli_in: Cli, recipe: Path, folder: Path) -> RunDir:
    assert cli_in(folder.parent, "train", recipe, "--output-dir", folder, "--num-processes", "1") == 0
    return RunDir(folder)


def broken(cli_in: Cli, recipe: Path, folder: Path, step: int) -> RunDir:
    """A run that is stopped after a step and resumed."""
    with added(StopAt(step, folder)):
        code = cli_in(folder.parent, "train", recipe, "--output-dir", folder, "--num-processes", "1")
    assert code == STOPPED_EARLY
    run = unbroken(cli_in, recipe, folder)
    assert read_json(run.train)["resumed_from_step"] == step
    return run


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(
    gpu: Gpu, record: Record, recipe_in: Write, cli_in: Cli, tmp_path: Path, deterministic: bool
) -> None:
    recipe = recipe_in(
        tmp_path,
        model={"dtype": gpu.trained_dtype},
        adapter={"r": 8, "dropout": 0.1},
        trainer={
            "max_steps": gpu.scale.steps * 2 // 3,
            "per_device_train_batch_size": 8,
            **({"full_determinism": True} if deterministic else {}),
        },
        evaluation={"baseline": False, "rows": 2, "max_new_tokens": 2},
    )
    try:
        first, second = (unbroken(cli_in, recipe, tmp_path / name) for name in ("first", "second"))
        resumed = broken(cli_in, recipe, tmp_path / "resumed", gpu.scale.steps // 3)
    finally:
        torch.use_deterministic_algorithms(False)
    spread, off = distance(second, first), distance(resumed, first)
    attention = read_json(first.train)["batching"]["attention"]
    record({"spread": spread, "resumed": off, "attention": attention})
    if deterministic or gpu.rehearsal:
        assert all(torch.equal(value, adapter(resumed)[name]) for name, value in adapter(first).items())
        assert spread == 0
    assert off <= max(ROUNDED, SPREADS * spread)
