"""Renamed keys and values: a recipe of a user is told the new name, the copy in a run folder is read as it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftcli.errors import RecipeError
from peftcli.recipe.dump import changed_keys, dump_recipe
from peftcli.recipe.earlier_names import RENAMED_KEYS, RENAMED_VALUES
from peftcli.recipe.fields import GATE_NAMES
from peftcli.recipe.load import load_recipe, load_run_recipe
from peftcli.recipe.schema import Recipe

Write = Callable[..., Path]

KEYS = [
    ("performance", "without", [], "performance.disable"),
    ("model", "problem", "regression", "model.problem_type"),
    ("dataset", "limits", {"dropped": 0.5}, "dataset.limits.max_dropped"),
    ("dataset", "limits", {"truncated": 0.5}, "dataset.limits.max_truncated"),
    ("dataset", "limits", {"leaked": 0.5}, "dataset.limits.max_leaked"),
    ("dataset", "limits", {"eos_trained": 0.5}, "dataset.limits.min_eos_trained"),
    ("evaluation", "retention", "text.txt", "evaluation.forgetting_text"),
    ("evaluation", "retention_tokens", 200, "evaluation.forgetting_tokens"),
    ("gates", "retention_loss", "< 3", "gates.forgetting_loss"),
    ("gates", "retention_change", "< 3", "gates.forgetting_change"),
]
VALUES = [
    ("batching", "flat", "padding_free"),
    ("disable", ["head"], "fused_loss"),
    ("disable", ["products"], "fused_lora"),
    ("disable", ["casts"], "skip_adapter_casts"),
    ("disable", ["figures"], "deferred_metrics"),
]
OLD: dict[str, Any] = {
    "dataset": {"limits": {"dropped": 0.5, "truncated": 0.4, "leaked": 0.3, "eos_trained": 0.2}},
    "performance": {"batching": "flat", "without": ["head", "products", "casts", "figures"]},
    "evaluation": {"retention": "text.txt", "retention_tokens": 200},
    "gates": {"retention_loss": "< 9", "loss": "< 9", "retention_change": "< 8"},
}
NEW: dict[str, Any] = {
    "dataset": {"limits": {"max_dropped": 0.5, "max_truncated": 0.4, "max_leaked": 0.3, "min_eos_trained": 0.2}},
    "performance": {
        "batching": "padding_free",
        "disable": ["fused_loss", "fused_lora", "skip_adapter_casts", "deferred_metrics"],
    },
    "evaluation": {"forgetting_text": "text.txt", "forgetting_tokens": 200},
    "gates": {"forgetting_loss": "< 9", "loss": "< 9", "forgetting_change": "< 8"},
}


@pytest.mark.parametrize(("section", "key", "value", "new"), KEYS, ids=[row[3] for row in KEYS])
def test_an_earlier_key_is_refused_with_its_new_name(
    write_recipe: Write, section: str, key: str, value: Any, new: str
) -> None:
    old = f"{section}.{key}" + (f".{next(iter(value))}" if isinstance(value, dict) else "")
    with pytest.raises(RecipeError) as refused:
        load_recipe(write_recipe(**{section: {key: value}}))
    (line,) = [line for line in str(refused.value).splitlines() if f" {old} " in line]
    assert line.endswith(f"; did you mean {new}?")


@pytest.mark.parametrize(("key", "value", "new"), VALUES, ids=[row[2] for row in VALUES])
def test_an_earlier_value_is_refused_with_its_new_name(write_recipe: Write, key: str, value: Any, new: str) -> None:
    with pytest.raises(RecipeError, match=rf"performance\.{key}.*; did you mean {new}\?$"):
        load_recipe(write_recipe(performance={key: value}))


def test_every_name_of_the_tables_is_tried_above_and_its_new_name_exists() -> None:
    assert sorted(RENAMED_KEYS.values()) == sorted(row[3] for row in KEYS)
    tried = [row[2] for row in VALUES]
    assert sorted(new for names in RENAMED_VALUES.values() for new in names.values()) == sorted(tried)
    for new in RENAMED_KEYS.values():
        section, _, key = new.partition(".")
        if section == "gates":
            assert key in GATE_NAMES
            continue
        model: Any = Recipe
        for part in new.split(".")[:-1]:
            model = model.model_fields[part].annotation
        assert new.rpartition(".")[2] in model.model_fields


def test_the_copy_in_a_run_folder_is_read_with_its_earlier_names(write_recipe: Write) -> None:
    dataset = yaml.safe_load(write_recipe().read_text())["dataset"]
    new = load_recipe(write_recipe(**NEW | {"dataset": dataset | NEW["dataset"]}))
    path = write_recipe(**OLD | {"dataset": dataset | OLD["dataset"]})
    found = load_run_recipe(path)
    assert found.of_run and not changed_keys(new.recipe, found.recipe)
    assert [gate.name for gate in found.recipe.gates] == ["forgetting_loss", "loss", "forgetting_change"]
    assert dump_recipe(found.recipe, path) == dump_recipe(new.recipe, path)
    with pytest.raises(RecipeError, match=r"did you mean performance\.disable"):
        load_recipe(path)


def test_the_problem_type_of_a_run_is_read_with_its_earlier_name(write_recipe: Write) -> None:
    model = yaml.safe_load(write_recipe().read_text())["model"] | {"task": "sequence-classification"}
    dataset = {"path": "things.csv", "prompt": None, "completion": None}
    path = write_recipe(model=model | {"problem": "regression"}, dataset=dataset, evaluation=None)
    assert load_run_recipe(path).recipe.model.problem_type == "regression"


def test_overrides_of_a_run_have_the_names_of_today(write_recipe: Write) -> None:
    path = write_recipe(performance={"without": ["head"]})
    assert load_run_recipe(path, ["performance.disable=[fused_lora]"]).recipe.performance.disable == ("fused_lora",)
    with pytest.raises(RecipeError, match=r"did you mean performance\.disable"):
        load_run_recipe(path, ["performance.without=[head]"])


def test_a_fault_below_an_earlier_key_is_at_its_line(write_recipe: Write) -> None:
    path = write_recipe(dataset={"limits": {"dropped": 5}})
    line = next(at for at, text in enumerate(path.read_text().splitlines(), 1) if "dropped" in text)
    with pytest.raises(RecipeError, match=rf"recipe\.yaml:{line}: dataset\.limits\.max_dropped = 5"):
        load_run_recipe(path)


def test_both_names_of_a_key_in_a_run_are_a_mistake(write_recipe: Write) -> None:
    path = write_recipe(performance={"without": ["head"], "disable": []})
    with pytest.raises(RecipeError, match=r"did you mean performance\.disable"):
        load_run_recipe(path)
