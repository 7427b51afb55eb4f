"""The table of methods and what a recipe may say of them, checked before anything is loaded."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftcli.errors import RecipeError
from peftcli.methods.base import LEFT_OUT
from peftcli.methods.registry import METHODS
from peftcli.recipe.dump import changed_keys, dump_recipe
from peftcli.recipe.library_args import method_arguments
from peftcli.recipe.load import load_recipe
from peftcli.recipe.schema import Recipe

Cli = Callable[..., int]
ROOT = Path(__file__).parents[3]


def load(tmp_path: Path, adapter: dict[str, Any], **sections: Any) -> Recipe:
    path = tmp_path / "recipe.yaml"
    recipe = {"model": {"name": "tiny:llama"}, "adapter": adapter, "dataset": {"path": "rows.jsonl"}, **sections}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    return load_recipe(path).recipe


def fault(tmp_path: Path, adapter: dict[str, Any], **sections: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, adapter, **sections)
    return str(caught.value)


def test_every_type_of_the_installed_peft_is_offered_or_left_out_with_a_reason() -> None:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    offered = {method.config for method in METHODS.values()}
    own = {method.config for method in METHODS.values() if method.peft_module is None}
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        name = str(kind.value)
        assert (config.__name__ in offered) != (name in LEFT_OUT), name
    assert len(offered - own) >= 30


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.peft_module is not None])
def test_the_arguments_read_from_the_source_are_those_of_the_class(name: str) -> None:
    import dataclasses

    import peft

    method = METHODS[name]
    shared = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    fields = {field.name for field in dataclasses.fields(getattr(peft, method.config))} - shared
    known = method_arguments(name)
    assert known is not None and set(known) == (fields | set(method.arguments)) - set(method.unsupported_arguments)
    assert set(method.argument_names.values()) <= set(known) and set(method.must_divide) <= set(known)
    assert set(method.defaults) <= {*known, "r", "alpha", "dropout"}


@pytest.mark.parametrize("name", list(METHODS))
def test_the_defaults_of_a_method_make_a_recipe_that_comes_back_from_its_own_text(tmp_path: Path, name: str) -> None:
    recipe = load(tmp_path, {"method": name})
    row = METHODS[name]
    for key in ("r", "alpha", "dropout"):
        assert getattr(recipe.adapter, key) == (row.defaults[key] if key in row.argument_names else None)
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe, again), encoding="utf-8")
    assert yaml.safe_load(again.read_text(encoding="utf-8"))["adapter"] == {"method": name}
    assert changed_keys(recipe, load_recipe(again).recipe) == []


def test_arguments_stand_flat_in_a_recipe_and_in_what_is_written_of_it(tmp_path: Path) -> None:
    recipe = load(tmp_path, {"method": "vera", "r": 64, "projection_prng_key": 7})
    assert recipe.adapter.arguments == {"projection_prng_key": 7}
    written = yaml.safe_load(dump_recipe(recipe, tmp_path / "again.yaml"))["adapter"]
    assert written == {"method": "vera", "r": 64, "projection_prng_key": 7}
    other = load(tmp_path, {"method": "vera", "r": 64, "projection_prng_key": 8})
    assert changed_keys(recipe, other) == ["adapter.projection_prng_key: 7 -> 8"]


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"method": "ia3", "r": 8}, "adapter.r has no effect with ia3, which has no rank; remove it"),
        ({"method": "vera", "alpha": 8}, "adapter.alpha has no effect with vera, which has no scal"),
        ({"method": "prompt", "target_modules": ["q_proj"]}, "adapter.target_modules has no effect with prompt"),
        ({"method": "adalora", "use_dora": True}, "adapter.use_dora has no effect with adalora, which is not LoRA"),
        ({"method": "vera", "projection_key": 1}, "is not a recipe key; did you mean adapter.projection_prng_key?"),
        ({"method": "lora", "projection_prng_key": 1}, "is an argument of randlora, vera and pvera, not of lora"),
        ({"method": "vera", "d_initial": "low"}, 'adapter.d_initial = "low": must be a number'),
        ({"method": "verra"}, 'adapter.method = "verra": is not a method; did you mean vera?'),
        ({"method": "dora"}, "is not a method; did you mean lora?"),
        ({"method": "poly"}, "is not offered: each row must say which task it belongs to"),
        ({"method": "lora", "init_lora_weights": "pisa"}, "did you mean pissa?"),
        ({"method": "lora", "init_lora_weights": "loftq"}, "needs a quantized base model; add `quantization"),
        ({"method": "lora", "init_lora_weights": "pissa", "use_dora": True}, "pissa excludes adapter.use_dora"),
        ({"method": "lora", "loraplus_lr_ratio": 0.5}, "adapter.loraplus_lr_ratio = 0.5: must be at least 1"),
        ({"method": "lora", "megatron_core": "x"}, "adapter.megatron_core cannot be set: recipes do not support it"),
        ({"method": "lora", "fan_in_fan_out": True}, "adapter.fan_in_fan_out cannot be set: it is read from"),
        ({"method": "lora", "arguments": {"r": 1}}, "adapter.arguments is not a recipe key"),
        ({"method": "prompt", "prompt_tuning_init": "text"}, "did you mean TEXT?"),
    ],
)
def test_a_key_that_a_method_does_not_take_is_refused_with_the_mend(
    tmp_path: Path, adapter: dict[str, Any], said: str
) -> None:
    assert said in fault(tmp_path, adapter)


@pytest.mark.parametrize(
    ("method", "sections", "said"),
    [
        (
            "prompt",
            {"trainer": {"packing": True}},
            "trainer.packing excludes adapter.method prompt: virtual tokens must be",
        ),
        (
            "p_tuning",
            {"performance": {"batching": "padding_free"}},
            "performance.batching: padding_free excludes adapter.method p_tun",
        ),
        ("prefix", {"trainer": {"activation_checkpointing": True}}, "activation_checkpointing excludes"),
        ("prompt", {"gates": {"merge_top1_agreement": ">= 0.9"}}, "gates.merge_top1_agreement can never be met"),
        ("loha", {"quantization": {"bits": 4}}, "adapter.method loha does not work on 4-bit weights"),
        ("prompt", {"model": {"name": "x", "task": "sequence-classification"}}, "is not supported by"),
    ],
)
def test_what_excludes_a_method_is_refused_before_anything_is_loaded(
    tmp_path: Path, method: str, sections: dict[str, Any], said: str
) -> None:
    assert said in fault(tmp_path, {"method": method}, **sections)


def test_methods_prints_the_table_one_row_or_json_and_knows_a_misspelt_name(run_cli: Cli, capfd: Any) -> None:
    assert run_cli("methods") == 0
    out = capfd.readouterr().out
    assert all(f"\n{name} " in out for name in METHODS) and all(kind in out for kind in LEFT_OUT)
    assert run_cli("methods", "prefix") == 0
    out = capfd.readouterr().out
    assert "num_virtual_tokens" in out and "activation checkpointing" in out
    assert run_cli("methods", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert [row["name"] for row in found["methods"]] == list(METHODS) and found["left_out"]
    assert run_cli("methods", "verra") == 2
    assert "did you mean vera?" in capfd.readouterr().err


def test_the_table_is_light() -> None:
    code = "import sys; import peftcli.cli.methods; sys.exit(any(m in sys.modules for m in ('torch', 'peft')))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("batching", ["auto", "padded"])
def test_a_prompt_is_planned_in_padded_batches_and_a_prefix_without_checkpointing(
    write_recipe: Callable[..., Path], run_cli: Cli, capfd: Any, batching: str
) -> None:
    recipe = write_recipe(adapter=None, performance={"batching": batching})
    assert run_cli("plan", recipe, "--set", "adapter.method=prefix", "--gpu", "l4", "--json") == 0
    decisions = {row["key"]: row for row in json.loads(capfd.readouterr().out)["decisions"]}
    assert decisions["batching"]["value"] == "padded" and "keys and values" in decisions["batching"]["reason"]
    checkpointing = decisions["activation checkpointing"]
    assert checkpointing["value"] == "off" and "second time" in checkpointing["reason"]
