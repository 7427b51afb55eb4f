"""Odd values for every key of a recipe: whatever validate accepts trains a step or ends with one clear error."""

import random
from pathlib import Path

import pytest
from values import CODES, ENDLESS, keys, train, tried, validate_here, write
from workspace import Workspace

from peftcli.recipe.library_args import installed_arguments
from peftcli.recipe.schema import Recipe
from peftcli.recipe.trainer_args import OWNED

pytestmark = [
    pytest.mark.xdist_group("values"),
    pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning"),
]
SAMPLE, TRAINED, SEED = 60, 4, 5
TRAINED_PER_KEY = 3


@pytest.fixture
def ground(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    made = Workspace(tmp_path / "ground", tiny_llama)
    monkeypatch.chdir(made.folder)
    return made


def accepted(ground: Workspace, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The values that validate accepts; the others it refuses as it should."""
    found = []
    for key, text in pairs:
        write(ground, key, text)
        code, said = validate_here()
        assert code in (0, 2) and "Traceback" not in said and "\x1b" not in said, (key, text, said[-500:])
        if code == 0 and key not in ENDLESS:
            found.append((key, text))
    return found


def assert_trains(ground: Workspace, key: str, text: str) -> None:
    write(ground, key, text)
    ended = train(ground)
    assert ended.code in CODES and "Traceback" not in ended.err, (key, text, ended.code, ended.err[-800:])


def test_odd_values_of_any_key_end_well(ground: Workspace) -> None:
    chance = random.Random(SEED)
    fine = accepted(ground, chance.sample(tried(), SAMPLE))
    assert len(fine) >= TRAINED
    for key, text in fine[:TRAINED]:
        assert_trains(ground, key, text)


def test_every_section_and_argument_is_tried() -> None:
    tops = {key.split(".")[0] for key in keys()}
    # The items of lists of sections, and gates, have tests of their own.
    assert tops >= Recipe.model_fields.keys() - {"gates"}
    arguments = (installed_arguments() or {}).keys() - OWNED.keys()
    assert len(arguments) > 50 and sum(key.startswith("trainer.") for key in keys()) >= len(arguments) - 3


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted(keys()))
def test_odd_values_of_a_key_end_well(ground: Workspace, key: str) -> None:
    fine = accepted(ground, [pair for pair in tried() if pair[0] == key])
    for _, text in random.Random(key).sample(fine, min(TRAINED_PER_KEY, len(fine))):
        assert_trains(ground, key, text)
