"""The shipped recipes: valid, runnable, and what they say is so."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from peftcli.cli.recipes import find_recipe
from peftcli.errors import RecipeError
from peftcli.recipe.load import load_recipe
from peftcli.recipe.schema import Recipe
from peftcli.run_dir import read_json

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_valid_without_a_notice(name: str) -> None:
    assert load_recipe(find_recipe(name)).notices == ()


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_runs_from_end_to_end_as_a_smoke_run(
    name: str, run_cli: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("train", name, "--smoke") == 0
    assert "smoke run" in capfd.readouterr().out
    run = tmp_path / "runs" / f"{load_recipe(find_recipe(name)).recipe.name}-smoke"
    metrics = read_json(run / "metrics.json")
    assert metrics["smoke"] is True and metrics["status"] == "finished"
    assert metrics["adapter"]["loss"] < metrics["base"]["loss"]
    assert run_cli("merge", run) == 0
    assert run_cli("generate", run, "one") == 0


def test_the_exercise_keeps_its_hyper_parameters() -> None:
    recipe = load_recipe(find_recipe("products-llama2-7b")).recipe
    adapter = recipe.adapter
    assert (adapter.r, adapter.alpha, adapter.dropout, adapter.bias) == (64, 16, 0.1, "none")
    assert tuple(adapter.target_modules) == ("q_proj", "v_proj")
    expected = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "optim": "paged_adamw_32bit",
        "save_steps": 10,
        "logging_steps": 1,
        "learning_rate": 2e-4,
        "max_grad_norm": 0.3,
        "max_steps": 120,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "group_by_length",
    }
    assert dict(recipe.trainer) == expected
    assert (recipe.dataset.split.test_size, recipe.dataset.split.seed, recipe.dataset.max_length) == (0.2, 42, 512)


def test_the_trainable_parameters_of_the_exercise_on_the_real_shape(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    from peftcli.model.inspect import inspect_model, trainable_counter

    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    facts = inspect_model("org/llama-2-7b", config)
    recipe = load_recipe(find_recipe("products-llama2-7b")).recipe
    assert facts.parameters == 6_738_415_616
    assert trainable_counter("org/llama-2-7b", config, "causal-lm")(recipe.adapter).parameters == 33_554_432


def test_every_key_of_the_schema_is_read_outside_the_recipe_room() -> None:
    code = "".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "peftcli").rglob("*.py")
        if "recipe" not in path.parts[-2:][0]
    )
    for section, field in Recipe.model_fields.items():
        assert re.search(rf"\b{section}\b", code), section
        for key in getattr(field.annotation, "model_fields", {}):
            assert re.search(rf"\.{key}\b|\"{key}\"", code), f"{section}.{key} is read by nobody"


def test_a_name_that_is_no_recipe_lists_those_that_ship() -> None:
    with pytest.raises(RecipeError, match=r"bundled are .*quickstart"):
        find_recipe("quickstrat")
