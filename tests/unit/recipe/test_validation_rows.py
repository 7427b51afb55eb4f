"""`dataset.split.validation_size` and `dataset.validation`: what needs them, and what excludes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftcli.errors import RecipeError
from peftcli.recipe.load import load_recipe, load_run_recipe

Write = Callable[..., Path]
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
BEST = EVALUATED | {"load_best_model_at_end": True}


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"trainer": EVALUATED}, "trainer.eval_strategy"),
        ({"trainer": BEST}, "trainer.eval_strategy"),
        ({"trainer": {"evaluation_strategy": "epoch"}}, "trainer.evaluation_strategy"),
        ({"trainer": EVALUATED, "dataset": {"split": {"test_size": 0}}}, "trainer.eval_strategy"),
        (
            {"stages": [{"name": "a", "trainer": {"eval_strategy": "epoch"}}, {"name": "b"}]},
            "stages[0].trainer.eval_strategy",
        ),
    ],
)
def test_an_evaluation_during_training_needs_validation_rows(
    write_recipe: Write, sections: dict[str, Any], key: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(**sections))
    said = str(caught.value)
    assert f"{key} needs validation rows" in said and "add dataset.split.validation_size: 0.1" in said
    assert said.count("needs validation rows") == 1


@pytest.mark.parametrize("size", [0, 0.2])
def test_validation_rows_do_not_depend_on_test_rows(write_recipe: Write, size: float) -> None:
    split = {"test_size": size, "validation_size": 4, "group": "kind"}
    recipe = load_recipe(write_recipe(trainer=BEST, dataset={"split": split})).recipe
    assert recipe.dataset.validates and recipe.dataset.holds_out == bool(size)


def test_the_recipe_of_an_earlier_run_is_read_without_them(write_recipe: Write) -> None:
    assert load_run_recipe(write_recipe(trainer=BEST)).recipe.trainer["load_best_model_at_end"] is True


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (
            {"split": {"validation_size": 4}, "validation": {"path": "things.csv"}},
            "validation rows are split off or have their own source",
        ),
        (
            {"split": {"test_size": 4, "validation_size": 4}, "test": {"path": "things.csv"}},
            "test rows are split off or have their own source",
        ),
        ({"split": {"seed": 1}, "test": {"path": "things.csv"}}, "test rows are split off or have their own source"),
        ({"validation": {"hub_split": "dev"}}, "dataset.validation has no source; set dataset.validation.path"),
        ({"val_set_size": 0.1}, "did you mean dataset.split.validation_size?"),
        ({"split": {"validation_size": 1.5}}, "must be a share between 0 and 1"),
    ],
)
def test_rows_have_one_source(write_recipe: Write, dataset: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said.replace("?", r"\?")):
        load_recipe(write_recipe(dataset=dataset))


def test_a_test_file_allows_validation_rows_from_the_training_file(write_recipe: Write) -> None:
    dataset = {"split": {"validation_size": 4, "seed": 1}, "test": {"path": "things.csv"}}
    assert load_recipe(write_recipe(dataset=dataset, trainer=BEST)).recipe.dataset.validates
