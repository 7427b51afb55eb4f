"""Whole trainings of a tiny real model on this GPU: each precision, padding-free beside padded, and as on a T4."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gpu.conftest import Gpu
from peftcli.run_dir import RunDir, read_json, read_log

pytestmark = pytest.mark.gpu
Record = Callable[[Mapping[str, Any]], None]
Write = Callable[..., Path]
Cli = Callable[..., int]

TOLERANCES = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-4}
"""Mean difference of the losses of two equal trainings, as a share of the loss.

A logit is rounded at 2^-9 of its size in bfloat16, 2^-12 in float16: of logits about 10, errors of 0.02 and 0.0025 in
each, which are independent, so that the mean over the hundred trained tokens of a step is a tenth of that. The weights
drift apart by as much again over some tens of steps.
"""
FEWEST_STEPS = 5
"""Of both trainings before one of them skips a step that the other takes; the scaler of float16 decides on its own."""
KINDS = {
    "16 bit": (None, False),
    "nf4": ({"bits": 4}, False),
    "int8": ({"bits": 8}, False),
    "16 bit as on a T4": (None, True),
    "nf4 as on a T4": ({"bits": 4}, True),
}


def dtype_of(gpu: Gpu, as_t4: bool) -> str:
    return "float16" if as_t4 and not gpu.rehearsal else gpu.trained_dtype


def train(cli_in: Cli, recipe: Path, folder: Path, *words: str) -> RunDir:
    assert cli_in(folder.parent, "train", recipe, "--output-dir", folder, "--num-processes", "1", *words) == 0
    return RunDir(folder)


def steps_of(run: RunDir) -> list[dict[str, Any]]:
    return [row for row in read_log(run.log) if "loss" in row]


def skipped(run: RunDir) -> list[int]:
    """Steps whose gradient was not finite, which the gradient scaler left out."""
    return [row["step"] for row in steps_of(run) if row["grad_norm"] is None]


def same_losses(runs: list[RunDir], tolerance: float) -> float:
    """Mean difference of the losses, as a share, while both trainings take the same steps."""
    apart = set(skipped(runs[0])) ^ set(skipped(runs[1]))
    last = min(apart, default=10**9)
    losses = [[row["loss"] for row in steps_of(run) if row["step"] <= last] for run in runs]
    assert len(losses[0]) == len(losses[1]) >= FEWEST_STEPS
    off = sum(abs(one - other) for one, other in zip(*losses, strict=True)) / sum(losses[0])
    assert off <= tolerance, losses
    return off


@pytest.mark.parametrize("kind", KINDS)
def test_padding_free_and_padded_batches_learn_the_same(
    gpu: Gpu, record: Record, t4: Callable[[bool], Any], recipe_in: Write, cli_in: Cli, tmp_path: Path, kind: str
) -> None:
    quantization, as_t4 = KINDS[kind]
    dtype = dtype_of(gpu, as_t4)
    recipe = recipe_in(
        tmp_path,
        model={"dtype": dtype},
        quantization=quantization,
        trainer={"max_steps": gpu.scale.steps, "per_device_train_batch_size": 8, "learning_rate": 1e-3},
        evaluation={"baseline": False, "rows": 2, "max_new_tokens": 2},
    )
    with t4(as_t4):
        runs = [
            train(cli_in, recipe, tmp_path / name, "--set", f"performance.batching={name}")
            for name in ("padding_free", "padded")
        ]
    facts = [read_json(run.train) for run in runs]
    plan = read_json(runs[0].plan)
    record(
        {
            "dtype": dtype,
            "attention": facts[0]["batching"]["attention"],
            "rejected": facts[0]["batching"]["rejected_kernels"],
            "skipped": [skipped(run) for run in runs],
            "seconds": [one["seconds"] for one in facts],
            "losses": [facts[0]["first_loss"], facts[0]["last_loss"]],
        }
    )
    assert [one["batching"]["kind"] for one in facts] == ["padding_free", "padded"]
    if not gpu.rehearsal:
        assert facts[0]["batching"]["attention"] == ["efficient" if dtype == "float16" and as_t4 else "flash"]
    chosen = {name: plan["trainer"][name] for name in ("fp16", "bf16")}
    assert chosen == {"fp16": dtype == "float16", "bf16": dtype == "bfloat16"}
    record({"loss_difference": same_losses(runs, TOLERANCES[dtype])})
    assert facts[0]["last_loss"] < facts[0]["first_loss"]


@pytest.mark.parametrize("as_t4", [False, True], ids=["native", "as on a T4"])
def test_adalora_learns_ranks_from_averages_that_are_finite(
    gpu: Gpu, record: Record, t4: Callable[[bool], Any], recipe_in: Write, cli_in: Cli, tmp_path: Path, as_t4: bool
) -> None:
    """With float16 the scaler finds its scale by steps that overflow, whose gradients must not reach the averages."""
    recipe = recipe_in(
        tmp_path,
        model={"dtype": dtype_of(gpu, as_t4)},
        quantization=None,
        adapter={"method": "adalora", "r": 3, "init_r": 6},
        trainer={"max_steps": gpu.scale.steps, "save_steps": gpu.scale.steps // 2},
        evaluation={"baseline": False, "rows": 2, "max_new_tokens": 2},
    )
    with t4(as_t4):
        run = train(cli_in, recipe, tmp_path / "run")
    folder = run.checkpoints / f"checkpoint-{gpu.scale.steps // 2}"
    averages = load_file(folder / "ranks.safetensors")
    broken = [name for name, value in averages.items() if not torch.isfinite(value).all()]
    ranks = read_json(run.ranks)
    record({"skipped": skipped(run), "not_finite": len(broken), "of": len(averages), "ranks": ranks["ranks"][-1]})
    assert averages and not broken
    assert sum(ranks["ranks"][-1]) < sum(ranks["ranks"][0])
