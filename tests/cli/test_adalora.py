"""AdaLoRA allocates: ranks end unequal at the sum that was asked for, and a stop changes none of them."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from float16 import train_in_float16
from safetensors.torch import load_file

from peftcli.adapters.build import peft_config
from peftcli.plan.adalora import RankSchedule, rank_schedule
from peftcli.recipe.schema import AdapterSection
from peftcli.run_dir import read_json
from peftcli.train.adalora import RankAllocation

Cli = Callable[..., int]
Write = Callable[..., Path]
ADALORA = {"method": "adalora", "r": 4, "dropout": 0.1}
TRAINER = {"max_steps": 20, "per_device_train_batch_size": 8, "save_steps": 6, "save_total_limit": 10}


def train(write_recipe: Write, run_cli: Cli, *words: object, **sections: Any) -> int:
    made = {"adapter": ADALORA, "trainer": TRAINER, "quantization": None, **sections}
    return run_cli("train", write_recipe(**made), "--output-dir", "run", *words)


@pytest.mark.numeric
def test_ranks_end_unequal_reload_merge_and_go_on_after_a_stop_to_the_same_bits(
    write_recipe: Write, run_cli: Cli, tmp_path: Path
) -> None:
    assert train(write_recipe, run_cli) == 0
    run = tmp_path / "run"
    found = read_json(run / "ranks.json")
    last = found["ranks"][-1]
    assert found["first"] == 6 and set(found["ranks"][0]) == {6}
    assert len(set(last)) > 1 and sum(last) == 4 * len(found["modules"])
    config = read_json(run / "adapter" / "adapter_config.json")
    assert sorted(sum(kept) for kept in config["rank_pattern"].values()) == sorted(last)
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    assert sum(len(value) for name, value in stored.items() if name.endswith("lora_E")) == sum(last)
    assert "Rank of each module" in (run / "report.html").read_text(encoding="utf-8")

    loss = read_json(run / "metrics.json")["adapter"]["loss"]
    assert run_cli("eval", "run") == 0
    assert read_json(run / "eval.json")["adapter"]["loss"] == pytest.approx(loss, abs=1e-5)

    for stop in (6, 18):  # while the ranks move, and after
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        shutil.copytree(run, tmp_path / "again")
        for name in ("adapter", "train.json", "eval.json", "metrics.json", "ranks.json"):
            place = tmp_path / "again" / name
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        for folder in (tmp_path / "again" / "checkpoints").iterdir():
            if int(folder.name.rpartition("-")[2]) > stop:
                shutil.rmtree(folder)
        assert run_cli("train", tmp_path / "recipe.yaml", "--output-dir", "again", "--resume") == 0
        again = tmp_path / "again"
        assert (again / "ranks.json").read_bytes() == (run / "ranks.json").read_bytes()
        weights = [folder / "adapter" / "adapter_model.safetensors" for folder in (run, again)]
        assert weights[0].read_bytes() == weights[1].read_bytes()

    assert run_cli("merge", "run") == 0
    assert read_json(run / "merge.json")["max_abs_logit_difference"] <= 1e-3


def wrapped(tiny_llama: Path, adapter: AdapterSection) -> Any:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), peft_config(adapter, "causal-lm"))


@pytest.mark.numeric
def test_the_regularizer_is_the_one_that_peft_adds_to_its_own_loss(tiny_llama: Path) -> None:
    adapter = AdapterSection(method="adalora", r=4, target_modules=("q_proj",))
    model = wrapped(tiny_llama, adapter).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        theirs = model(input_ids=ids, labels=ids).loss
        ranks = RankAllocation(model, adapter, None)
        ours = model(input_ids=ids, labels=ids).loss + ranks.regularizer()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.numeric
def test_the_gradient_of_the_regularizer_is_the_same_in_one_piece_and_in_several(
    write_recipe: Write, run_cli: Cli, tmp_path: Path
) -> None:
    weights = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = TRAINER | {"max_steps": 4, "per_device_train_batch_size": batch}
        trainer |= {"gradient_accumulation_steps": accumulation, "optim": "sgd", "learning_rate": 0.1}
        adapter = ADALORA | {"dropout": 0.0, "orth_reg_weight": 5.0, "init_r": 5, "tinit": 3, "tfinal": 0}
        performance = {"batching": "padded"}
        assert (
            train(write_recipe, run_cli, "--overwrite", adapter=adapter, trainer=trainer, performance=performance) == 0
        )
        weights.append(load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-5, rtol=1e-4)


def test_the_schedule_follows_the_steps_and_refuses_one_that_leaves_none(
    write_recipe: Write, run_cli: Cli, capfd: Any
) -> None:
    adapter = AdapterSection(method="adalora", r=4)
    assert rank_schedule(adapter, 100) == RankSchedule(10, 30)
    late = ADALORA | {"tinit": 15, "tfinal": 5}
    assert run_cli("plan", write_recipe(adapter=late, trainer=TRAINER, quantization=None)) == 2
    assert "leave none of the 20 steps to change the ranks; lower one of them" in capfd.readouterr().err
    assert run_cli("plan", write_recipe(adapter=ADALORA | {"init_r": 4}, quantization=None)) == 2
    assert "adapter.init_r = 4 must be larger than adapter.r = 4" in capfd.readouterr().err


def test_a_row_of_the_history_is_kept_for_each_step_of_a_short_run(
    write_recipe: Write, run_cli: Cli, tmp_path: Path
) -> None:
    assert train(write_recipe, run_cli, trainer=TRAINER | {"max_steps": 10}, adapter=ADALORA) == 0
    assert read_json(tmp_path / "run" / "ranks.json")["steps"] == list(range(11))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] < 8, "the regularizer is no part of the loss that is shown"


@pytest.fixture
def float16() -> Iterator[Callable[[float], None]]:
    """A function that lets trainings compute in float16, with a gradient scaler that begins with some scale."""
    real = transformers.Trainer.create_accelerator_and_postprocess
    yield train_in_float16
    transformers.Trainer.create_accelerator_and_postprocess = real


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
@pytest.mark.parametrize("scale", [2.0**22, 2.0**31], ids=["first steps", "steps to the fixed ranks"])
def test_steps_that_float16_overflows_in_leave_the_allocation_finite(
    write_recipe: Write,
    run_cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    float16: Callable[[float], None],
    optim: str,
    scale: float,
) -> None:
    skipped: list[bool] = []
    allocate = RankAllocation.on_optimizer_step

    def record(self: RankAllocation, *given: Any, **more: Any) -> None:
        gradients = [one.grad for one in self._model.parameters() if one.grad is not None]
        skipped.append(not all(one.isfinite().all() for one in gradients))
        allocate(self, *given, **more)
        assert all(one.isfinite().all() for one in self._allocator.ipt.values())

    monkeypatch.setattr(RankAllocation, "on_optimizer_step", record)
    float16(scale)
    assert train(write_recipe, run_cli, trainer=TRAINER | {"optim": optim}) == 0
    fixing = 20 - rank_schedule(AdapterSection(**ADALORA), 20).settled
    assert skipped[0] and not skipped[-1], skipped
    assert skipped[fixing - 1] == (scale > 2.0**30)
    found = read_json(tmp_path / "run" / "ranks.json")
    assert sum(found["ranks"][-1]) == 4 * len(found["modules"]) < sum(found["ranks"][0])
