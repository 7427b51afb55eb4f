"""Smoke runs: any recipe, on a CPU, without network, saying what they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftcli.rundir import read_json

Cli = Callable[..., int]


@pytest.mark.parametrize(
    ("model", "dataset", "adapter", "architecture"),
    [
        ("meta-llama/Llama-3.1-70B", {"name": "org/data", "text": "{title}: {body}"}, {}, "LlamaForCausalLM"),
        ("Qwen/Qwen3-32B", {"name": "org/chats"}, {"use_dora": True}, "Qwen3ForCausalLM"),
        (
            "google/gemma-2-27b",
            {"name": "org/qa", "prompt": "{q}", "completion": " {a}"},
            {"r": 64},
            "Gemma2ForCausalLM",
        ),
        ("openai-community/gpt2-xl", {"name": "org/t", "columns": {"text": "body"}}, {}, "GPT2LMHeadModel"),
    ],
)
def test_any_model_and_a_hub_data_set_are_rehearsed_offline(
    run_cli: Cli,
    tmp_path: Path,
    capfd: Any,
    model: str,
    dataset: dict[str, Any],
    adapter: dict[str, Any],
    architecture: str,
) -> None:
    recipe = {
        "name": "large",
        "model": {"name": model, "dtype": "bfloat16", "attention": "flash_attention_2"},
        "quantization": {"bits": 4},
        "adapter": adapter,
        "dataset": dataset | {"max_length": 8192},
        "trainer": {"num_train_epochs": 3, "gradient_accumulation_steps": 16, "optim": "paged_adamw_8bit"},
        "gates": {"exact_match": ">= 0.99"},
    }
    (tmp_path / "large.yaml").write_text(yaml.safe_dump(recipe))
    assert run_cli("train", "large.yaml", "--smoke") == 0
    said = capfd.readouterr()
    assert f"smoke: {model} is replaced by a tiny random" in said.err
    assert "the numbers say nothing about the real model" in said.out
    run = tmp_path / "runs" / "large-smoke"
    assert read_json(run / "plan.json")["model"]["architecture"] == architecture
    assert "made-up rows" in read_json(run / "data.json")["sources"][0]["path"]
    assert read_json(run / "metrics.json")["smoke"] is True
    assert "SMOKE" in (run / "report.md").read_text().upper()
    assert not (tmp_path / "runs" / "large").exists()


def test_the_stand_in_has_the_module_names_of_a_config_at_hand(run_cli: Cli, tmp_path: Path, tiny_llama: Path) -> None:
    from transformers import MistralConfig

    folder = tmp_path / "real"
    MistralConfig(hidden_size=4096, num_hidden_layers=40).save_pretrained(folder)
    recipe = {
        "model": {"name": str(folder)},
        "dataset": {"name": "org/data", "text": "{body}"},
        "adapter": {"target_modules": ["gate_proj", "o_proj"]},
    }
    (tmp_path / "mistral.yaml").write_text(yaml.safe_dump(recipe))
    assert run_cli("train", "mistral.yaml", "--smoke") == 0
    plan = read_json(tmp_path / "runs" / "mistral-smoke" / "plan.json")
    assert plan["model"]["architecture"] == "MistralForCausalLM"
    assert {target["name"] for target in plan["targets"]} == {"gate_proj", "o_proj"}


def test_a_wrong_target_is_found_by_a_smoke_run(run_cli: Cli, tmp_path: Path, capfd: Any) -> None:
    recipe = {
        "model": {"name": "meta-llama/Llama-3.1-70B"},
        "dataset": {"name": "org/data", "text": "{body}"},
        "adapter": {"target_modules": ["q_proj", "vproj"]},
    }
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(recipe))
    assert run_cli("train", "wrong.yaml", "--smoke") == 2
    assert "[vproj]; nearest: v_proj" in capfd.readouterr().err
