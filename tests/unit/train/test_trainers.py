"""The trainer's own loss against TRL's, and the figures that stay on the device until they are logged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import trainer_of
from trl import SFTConfig, SFTTrainer

from peftcli.adapters.build import peft_config
from peftcli.model.load import load_base
from peftcli.tiny.build import tiny_model
from peftcli.train.trainers import DeferredTrainer

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
    {"input_ids": [9, 8, 7], "labels": [-100, 8, 7]},
    {"input_ids": [11, 12, 13, 14], "labels": [-100, 12, 13, 14]},
    {"input_ids": [21, 22], "labels": [-100, 22]},
]


def made(kind: type[SFTTrainer], folder: Path, **more: Any) -> Any:
    torch.manual_seed(0)
    settings = {"per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "report_to": [], **more}
    arguments = SFTConfig(
        output_dir=str(folder), use_cpu=True, save_strategy="no", disable_tqdm=True, bf16=False, **settings
    )
    return kind(model=str(tiny_model("tiny:llama")), args=arguments, train_dataset=Dataset.from_list(ROWS))


def batch(trainer: Any) -> dict[str, Any]:
    return dict(trainer.data_collator(ROWS))


@pytest.mark.numeric
@pytest.mark.parametrize("count", [None, torch.tensor(17)])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_loss_is_that_of_trl_to_the_bit(tmp_path: Path, mode: str, count: Any) -> None:
    losses = []
    for kind in (SFTTrainer, DeferredTrainer):
        trainer = made(kind, tmp_path)
        getattr(trainer.model, mode)()
        losses.append(trainer.compute_loss(trainer.model, batch(trainer), num_items_in_batch=count).detach())
    assert torch.equal(*losses)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's word on what smoothing costs
def test_another_loss_is_computed_by_trl(tmp_path: Path) -> None:
    plain, other = made(DeferredTrainer, tmp_path), made(DeferredTrainer, tmp_path, loss_type="dft")
    trl = made(SFTTrainer, tmp_path, loss_type="dft")
    losses = [one.compute_loss(one.model, batch(one)).item() for one in (plain, other, trl)]
    assert losses[1] == losses[2] != losses[0]
    smoothed, trl = (made(kind, tmp_path, label_smoothing_factor=0.1) for kind in (DeferredTrainer, SFTTrainer))
    losses = [one.compute_loss(one.model, batch(one)).item() for one in (smoothed, trl, plain)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.numeric
def test_the_logged_figures_are_those_of_trl(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    settings = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2}
    recipe = write_recipe(trainer=settings, quantization=None, performance={"batching": "padded"})
    ours = trainer_of(recipe, tmp_path)
    plan = ours.setup.plan
    theirs = SFTTrainer(
        model=load_base(plan.base),
        args=SFTConfig(output_dir=str(tmp_path / "trl"), **plan.trainer),
        train_dataset=ours.train_dataset,
        processing_class=ours.setup.tokenizer,
        peft_config=peft_config(plan.adapter, plan.task),
    )
    theirs.model.load_state_dict(ours.model.state_dict())
    logged = []
    for trainer in (ours, theirs):
        trainer.train()
        logged.append([row for row in trainer.state.log_history if "loss" in row])
    names = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
    assert len(logged[0]) == 2
    for mine, expected in zip(*logged, strict=True):
        assert [mine[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-5)


def test_between_two_logs_no_figure_is_fetched_from_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = {}
    plain = torch.Tensor.item
    for kind in (SFTTrainer, DeferredTrainer):
        trainer = made(kind, tmp_path)
        inputs = batch(trainer)
        calls: list[int] = []

        def item(tensor: torch.Tensor, calls: list[int] = calls) -> Any:
            calls.append(1)
            return plain(tensor)

        monkeypatch.setattr(torch.Tensor, "item", item)
        trainer.compute_loss(trainer.model, inputs)
        monkeypatch.setattr(torch.Tensor, "item", plain)
        fetched[kind] = len(calls)
    assert fetched[SFTTrainer] > 0
    assert fetched[DeferredTrainer] == 0
