"""Each file of fixtures/broken_recipes/ holds one fault; its first line is the message that the user must see."""

from pathlib import Path

import pytest

from peftcli.errors import RecipeError
from peftcli.recipe.load import load_recipe

FOLDER = Path(__file__).parents[2] / "fixtures" / "broken_recipes"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_broken_recipe_gets_exactly_its_message(path: Path) -> None:
    first = path.read_bytes().splitlines()[0].decode("utf-8", "replace")
    assert first.startswith("# expect: "), "the first line names the message"
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).replace(str(path), "FILE") == first.removeprefix("# expect: ")
    assert "\n" not in str(caught.value), "one fault, one line"
    assert caught.value.exit_code == 2


def test_there_are_enough_broken_recipes() -> None:
    assert len(FILES) >= 35
