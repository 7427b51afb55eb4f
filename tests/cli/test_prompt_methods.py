"""Prompt methods through the whole command line: trained, measured, asked, and refused by merge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftcli.run_dir import read_json

Cli = Callable[..., int]
Write = Callable[..., Path]
TEXT = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "the colour and the kind"}


@pytest.mark.numeric
@pytest.mark.parametrize(
    "adapter",
    [{"method": "prompt", **TEXT}, {"method": "p_tuning"}, {"method": "prefix", "num_virtual_tokens": 5}],
    ids=lambda adapter: str(adapter["method"]),
)
def test_a_prompt_is_trained_measured_and_asked_and_not_merged(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, capfd: Any, adapter: dict[str, Any]
) -> None:
    trainer = {"max_steps": 15, "learning_rate": 0.03, "logging_steps": 1, "per_device_train_batch_size": 8}
    path = write_recipe(adapter=None, trainer=trainer)
    recipe = path.read_text(encoding="utf-8") + f"adapter: {adapter}\n".replace("'", "")
    path.write_text(recipe, encoding="utf-8")
    assert run_cli("train", path, "--output-dir", "run") == 0
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["adapter"]["loss"] < metrics["base"]["loss"]
    assert run_cli("eval", "run") == 0
    assert read_json(tmp_path / "run" / "eval.json")["adapter"]["loss"] == pytest.approx(metrics["adapter"]["loss"])
    assert run_cli("generate", "run", "big apple 3 ->:", "old carrot 9 ->:") == 0
    capfd.readouterr()
    assert run_cli("merge", "run") == 4
    said = capfd.readouterr().err
    assert "cannot be merged" in said and "use the adapter unmerged" in said
    assert not (tmp_path / "run" / "merged").exists()
