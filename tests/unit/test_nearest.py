"""The one comparison behind every "did you mean"."""

from pathlib import Path

import pytest

import peftcli
from peftcli.errors import RecipeError
from peftcli.methods.registry import METHODS
from peftcli.nearest import nearest, nearest_names
from peftcli.recipe.library_args import installed_arguments
from peftcli.recipe.load import load_recipe


@pytest.mark.parametrize("name", [name for name in METHODS if len(name) > 3])
def test_two_swapped_letters_of_a_method_are_one_mistake(name: str) -> None:
    for place in range(len(name) - 1):
        swapped = name[:place] + name[place + 1] + name[place] + name[place + 2 :]
        assert nearest(swapped, METHODS) == name


def test_a_swapped_method_is_suggested_by_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {name: m}\ndataset: {path: a, text: '{a}'}\nadapter: {method: lroa}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r'adapter\.method = "lroa": is not a method; did you mean lora\?'):
        load_recipe(path)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("LEARNING-RATE", "learning_rate"),
        ("device_train_batch_size", "per_device_train_batch_size"),
        ("learing_rate_scheduler_type", "lr_scheduler_type"),
        ("warmpu_steps", "warmup_steps"),
        ("zzz", None),
        ("", None),
    ],
)
def test_case_hyphens_missing_parts_and_typos_are_forgiven(word: str, meant: str | None) -> None:
    arguments = installed_arguments()
    assert arguments is not None
    assert nearest(word, arguments) == meant


def test_several_names_come_with_the_nearest_first() -> None:
    assert nearest_names("q_prj", ["v_proj", "mlp", "q_proj"], most=2) == ["q_proj", "v_proj"]
    assert nearest("q_prj", []) is None


def test_nothing_in_the_package_compares_names_in_another_way() -> None:
    folder = Path(peftcli.__file__).parent
    sources = {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}
    others = [name for name, text in sources.items() if "difflib" in text or "rapidfuzz" in text]
    assert sorted(set(others) - {"doctor/packages.py"}) == ["nearest.py"]
