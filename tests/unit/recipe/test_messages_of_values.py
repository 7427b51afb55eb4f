"""Messages for single values say what is there, what is allowed and the fix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftcli.errors import RecipeError
from peftcli.recipe.fields import GATE_NAMES
from peftcli.recipe.gates import RANGES
from peftcli.recipe.load import load_recipe

TEXT = "model: {name: tiny:llama, revision: 012}\nadapter: {r: 8}\ndataset: {path: a.csv, text: '{a}'}\n"


@pytest.fixture
def said(tmp_path: Path) -> Callable[..., str]:
    """The message for a recipe with some overrides."""

    def message(*overrides: str, text: str = TEXT.replace(", revision: 012", "")) -> str:
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(RecipeError) as problem:
            load_recipe(tmp_path / "r.yaml", overrides)
        return str(problem.value)

    return message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=99999999999", "seed = 99999999999: must be less than 4294967296"),
        ("seed=" + "9" * 5000, "--set seed: seed is a whole number of 5000 digits, which is too large"),
        ("adapter.r=", "--set adapter.r: adapter.r has an empty value; give a value (is a shell variable unset?)"),
        ("name=" + "a" * 300, "has 300 characters, and a folder name of a run has at most 100"),
        ("name=模型-é", "which may have ASCII letters (a-z, A-Z), digits"),
        ("trainer.optim=adamww", "did you mean adamw_torch?"),
        ("gates.exact_match=>= 8", 'can never be met: exact_match is 0 to 1; write a share, such as ">= 0.08"'),
        ("gates.loss=< 0", "can never be met: loss is at least 0; change the limit"),
        ("dataset.path=$NO_SUCH_VARIABLE/x.csv", "the environment variable NO_SUCH_VARIABLE is not set"),
        ("dataset.text={a} b", "put text that starts with { or [ in quotes"),
    ],
)
def test_a_value_is_explained(said: Callable[..., str], override: str, expected: str) -> None:
    assert expected in said(override)


def test_a_number_that_should_be_text_is_quoted_as_written(said: Callable[..., str]) -> None:
    assert 'model.revision = 012: must be text; put it in quotes: "012"' in said(text=TEXT)
    assert 'model.revision = 1.10: must be text; put it in quotes: "1.10"' in said("model.revision=1.10", text=TEXT)


def test_a_leading_zero_is_noted_with_the_key(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(TEXT.replace(", revision: 012", ""))
    notices: Any = load_recipe(tmp_path / "r.yaml", ["trainer.max_steps=012"]).notices
    assert notices == (
        "--set trainer.max_steps: trainer.max_steps = 012 means 12 (YAML 1.2: a leading 0 is not octal)",
    )


def test_the_ranges_are_those_of_metrics_with_a_gate() -> None:
    assert set(RANGES) <= set(GATE_NAMES)
