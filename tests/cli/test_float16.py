"""float16: a model that overflows it is refused before training, and a base without a loss stops a run."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from float16 import train_in_float16
from safetensors.torch import load_file, save_file

from peftcli.errors import Diverged
from peftcli.plan.plan import Decision
from peftcli.run_dir import read_json
from peftcli.train.step import MOST_SKIPPED_STEPS, NanGuard

Cli = Callable[..., int]
Write = Callable[..., Path]


@pytest.fixture
def float16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plan float16 and train in it with a gradient scaler, as on a T4."""
    decision = Decision("model.dtype", "float16", "as on a T4")
    monkeypatch.setattr("peftcli.plan.choices.choose_dtype", lambda *given: decision)
    real = transformers.Trainer.create_accelerator_and_postprocess
    train_in_float16()
    yield
    transformers.Trainer.create_accelerator_and_postprocess = real


@pytest.fixture
def scaled_base(tiny_llama: Path, tmp_path: Path) -> Callable[[float], Path]:
    """A function that writes a base whose first block writes so many times as much into the residual stream."""

    def write(factor: float) -> Path:
        folder = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.mlp.down_proj.weight"] *= factor
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write


def train(write_recipe: Write, run_cli: Cli, base: Path, **sections: Any) -> int:
    made: dict[str, Any] = {"model": {"name": str(base)}, "quantization": None, "trainer": {"max_steps": 3}}
    return run_cli("train", write_recipe(**(made | sections)), "--output-dir", "run")


def test_a_model_that_overflows_float16_is_refused_before_the_first_step(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, capfd: Any, scaled_base: Callable[[float], Path], float16: None
) -> None:
    base = scaled_base(2.0**15)
    assert torch.cat([one.flatten() for one in load_file(base / "model.safetensors").values()]).abs().max() < 65504
    assert train(write_recipe, run_cli, base) == 4
    said = capfd.readouterr().err
    assert "before training, the loss of the first row is nan in float16" in said
    assert "set model.dtype: float32" in said
    assert not (tmp_path / "run" / "eval.json").exists() and not (tmp_path / "run" / "log.jsonl").exists()


def test_the_same_model_trains_in_float32(
    write_recipe: Write, run_cli: Cli, scaled_base: Callable[[float], Path]
) -> None:
    assert train(write_recipe, run_cli, scaled_base(2.0**15)) == 0


def test_a_model_within_float16_trains_in_it(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, tiny_llama: Path, float16: None
) -> None:
    assert train(write_recipe, run_cli, tiny_llama) == 0
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["adapter"]["loss"] < metrics["base"]["loss"]


@pytest.mark.parametrize(
    ("evaluation", "rows"),
    [({}, "the test rows"), ({"baseline": False, "forgetting_text": "text.txt"}, "evaluation.forgetting_text")],
)
def test_a_base_whose_loss_is_not_finite_stops_the_run_with_a_sentence(
    write_recipe: Write,
    run_cli: Cli,
    tmp_path: Path,
    capfd: Any,
    scaled_base: Callable[[float], Path],
    evaluation: dict[str, Any],
    rows: str,
) -> None:
    (tmp_path / "text.txt").write_text("The cat sat on the mat and looked at the dog.\n" * 20)
    base = scaled_base(float("nan"))
    assert train(write_recipe, run_cli, base, evaluation=evaluation) == 6
    assert f"the loss of {base} before training on {rows} is nan in float32" in capfd.readouterr().err
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_an_adapter_whose_loss_is_not_finite_ends_the_run_with_a_sentence(
    write_recipe: Write,
    run_cli: Cli,
    tmp_path: Path,
    tiny_llama: Path,
    capfd: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where float16, without the autocast of training, overflows in the last evaluation."""

    def spoil(model: torch.nn.Module, dtype: str) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(float("inf"))

    monkeypatch.setattr("peftcli.train.run.downcast_saved_modules", spoil)
    assert train(write_recipe, run_cli, tiny_llama) == 6
    assert "the loss of the adapter after training on the test rows is nan in float32" in capfd.readouterr().err
    assert (tmp_path / "run" / "adapter").is_dir() and read_json(tmp_path / "run" / "train.json")["steps"] == 3


def test_steps_that_no_scale_helps_name_float16() -> None:
    guard = NanGuard()
    for step in range(1, MOST_SKIPPED_STEPS):
        guard.check(step, 1.0, float("inf"), scaled=True, random_baseline="")
    with pytest.raises(
        Diverged, match=r"inf for 30 steps.*at every scale; this model overflows float16.*model\.dtype: float32"
    ):
        guard.check(MOST_SKIPPED_STEPS, 1.0, float("inf"), scaled=True, random_baseline="")
    with pytest.raises(
        Diverged, match=r"lower trainer\.learning_rate, trainer\.weight_decay or trainer\.max_grad_norm"
    ):
        NanGuard().check(1, 1.0, float("inf"), scaled=False, random_baseline="")
    with pytest.raises(Diverged, match=r"the loss is nan.*overflows float16 .maximum 65504"):
        NanGuard().check(1, float("nan"), 1.0, scaled=True, random_baseline="")
