"""Anchors, aliases and merge keys of YAML: read within limits, with every problem at the line where it was written."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from peftcli import nearest
from peftcli.errors import RecipeError
from peftcli.nearest import nearest_names
from peftcli.recipe.dump import dump_recipe, fingerprint
from peftcli.recipe.load import Loaded, load_recipe
from peftcli.recipe.problems import MOST_SHOWN, Problems
from peftcli.recipe.yaml import MAX_ADDED, MAX_DEPTH, VALUE_SIZE, parse_yaml

START = "model: {name: 'tiny:llama'}\ndataset: {path: a.csv}\n"
STAGES = """\
model: {name: 'tiny:llama'}
dataset:
  sources:
    - {path: a.csv, columns: &columns {text: a}}
    - {path: b.csv, columns: *columns}
adapter: &adapter
  r: &rank 8
  alpha: *rank
stages:
  - name: one
    trainer: &slow {learning_rate: 1e-4, max_steps: 5}
  - name: two
    adapter: {<<: *adapter, r: 4}
    trainer:
      <<: [{max_steps: 7}, *slow]
      warmup_steps: 1
  - name: three
    adapter: *adapter
"""


def load(folder: Path, text: str) -> Loaded:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def messages(folder: Path, text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(folder, text)
    return str(caught.value).replace(str(folder / "recipe.yaml"), "FILE").split("\n  ")


def read(text: str) -> Any:
    problems = Problems("FILE")
    value, _ = parse_yaml(text, problems)
    problems.raise_if_any()
    return value


def test_aliases_stand_for_what_they_repeat_and_a_run_folder_holds_them_written_out(tmp_path: Path) -> None:
    recipe = load(tmp_path, STAGES).recipe
    assert (recipe.adapter.r, recipe.adapter.alpha) == (8, 8)
    one, two, three = recipe.stages
    assert two.adapter is not None and (two.adapter.r, two.adapter.alpha) == (4, 8)
    assert three.adapter == recipe.adapter
    assert one.trainer == {"learning_rate": 1e-4, "max_steps": 5}
    assert two.trainer == {"learning_rate": 1e-4, "max_steps": 7, "warmup_steps": 1}
    stored = tmp_path / "recipe-of-the-run.yaml"
    stored.write_text(dump_recipe(recipe, stored), encoding="utf-8")
    assert not any(mark in stored.read_text(encoding="utf-8") for mark in ("&", "*", "<<"))
    assert fingerprint(load_recipe(stored).recipe) == fingerprint(recipe)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: &x {k: 1}\nb: {<<: *x, k: 2}", {"k": 2}),
        ("a: &x {k: 1}\nb: {k: 2, <<: *x}", {"k": 2}),
        ("a: [&x {k: 1}, &y {k: 2, l: 3}]\nb: {<<: [*x, *y]}", {"k": 1, "l": 3}),
        ("a: &both [{k: 1}, {k: 2, l: 3}]\nb: {<<: *both}", {"k": 1, "l": 3}),
        ("a: &x {k: {l: 1, m: 2}}\nb: {<<: *x, k: {l: 3}}", {"k": {"l": 3}}),
        ("a: &x {k: 1}\nc: &y {<<: *x, l: 2}\nb: {<<: *y}", {"k": 1, "l": 2}),
        ("a: &x 1\nc: &x 2\nb: {k: *x}", {"k": 2}),
        ("a: &x\nb: {k: *x}", {"k": None}),
        ("a: &x {k: 1}\nb: {'<<': *x}", {"<<": {"k": 1}}),
    ],
    ids=["explicit", "order", "list", "alias of a list", "shallow", "twice", "newest anchor", "null", "quoted"],
)
def test_a_merge_takes_what_the_mapping_does_not_set_itself(text: str, value: Any) -> None:
    assert read(text)["b"] == value


def test_no_two_places_share_a_value() -> None:
    found = read("a: &x {k: [1]}\nb: *x\nc: {<<: *x}")
    found["b"]["k"].append(2)
    assert found == {"a": {"k": [1]}, "b": {"k": [1, 2]}, "c": {"k": [1]}}


def test_a_problem_in_a_repeated_block_is_at_the_line_where_it_was_written(tmp_path: Path) -> None:
    text = STAGES.replace("&rank 8", "&rank 0").replace("max_steps: 5", "max_stepz: 5").replace("{text: a}", "{txt: a}")
    assert [line.partition(" ")[0] + " " + line.split()[1] for line in messages(tmp_path, text)[1:]] == [
        "FILE:4: dataset.sources[0].columns.txt",
        "FILE:4: dataset.sources[1].columns.txt",
        "FILE:7: adapter.r",
        "FILE:7: stages[2].adapter.r",
        "FILE:8: adapter.alpha",
        "FILE:8: stages[1].adapter.alpha",
        "FILE:8: stages[2].adapter.alpha",
        "FILE:11: trainer.max_stepz",
    ]


def test_a_repeated_single_value_is_wrong_where_it_is_repeated(tmp_path: Path) -> None:
    text = START + "seed: &n -3\nadapter:\n  r: 8\n  dropout: *n\n"
    assert [line.split(" = ")[0] for line in messages(tmp_path, text)[1:]] == [
        "FILE:3: seed",
        "FILE:6: adapter.dropout",
    ]


def test_aliases_of_an_override_stay_in_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(START, encoding="utf-8")
    assert load_recipe(path, ["adapter={r: &n 4, alpha: *n}"]).recipe.adapter.alpha == 4
    with pytest.raises(
        RecipeError, match=r"--set adapter\.alpha: \*n refers to an anchor that is not defined above it"
    ):
        load_recipe(path, ["adapter.r=&n 4", "adapter.alpha=*n"])


def levels(first: str, template: str, count: int) -> str:
    """Anchors a0 to aN, each made from the one before."""
    rest = (f"a{number}: &a{number} " + template.replace("X", f"*a{number - 1}") for number in range(1, count))
    return "\n".join([f"a0: &a0 {first}", *rest]) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (levels("[x]", "[X,X,X,X,X,X,X,X,X]", 10), "more than 1,000,000 characters"),
        (levels("{x: 1}", "{a: X, b: X, c: X, d: X, e: X, f: X, g: X, h: X, i: X}", 10), "more than"),
        (levels("{x: 1}", "{<<: X, y: [X, X, X, X, X, X, X, X, X]}", 10), "more than"),
        ("a: &a " + "x" * 200_000 + "\nb: [*a, *a, *a, *a, *a, *a]\n", "more than"),
        ("a: &a\nb: [" + "*a," * (MAX_ADDED // VALUE_SIZE + 1) + "]\n", "more than"),
        (levels("[x]", "[X]", MAX_DEPTH + 1), "nested more than 50 levels deep"),
        ("a: &a [*a]\n", "*a is inside the value that it refers to"),
        ("a: &a {b: {<<: *a}}\n", "*a is inside the value that it refers to"),
    ],
    ids=["lists", "mappings", "merges", "long text", "many", "depth", "cycle", "cycle of a merge"],
)
def test_what_would_grow_without_end_is_refused_before_it_is_written_out(
    tmp_path: Path, text: str, message: str
) -> None:
    assert any(message in line for line in messages(tmp_path, START + text))


def test_many_unknown_aliases_beside_many_anchors_are_counted(tmp_path: Path) -> None:
    anchors = ", ".join(f"&a{number} 1" for number in range(20_000))
    aliases = ", ".join(f"*b{number}" for number in range(20_000))
    lines = messages(tmp_path, START + f"a: [{anchors}]\nb: [{aliases}]\n")
    assert lines[0] == "FILE has 20002 problems" and lines[-1] == "and 19992 more"


def test_the_limits_leave_room_for_what_people_write() -> None:
    many = MAX_ADDED // VALUE_SIZE // 2
    assert len(read("a: &a\nb: [" + "*a," * many + "]\n")["b"]) == many
    deep: Any = read(levels("[x]", "[X]", MAX_DEPTH - 2))[f"a{MAX_DEPTH - 3}"]
    depth = 0
    while isinstance(deep, list):
        deep, depth = deep[0], depth + 1
    assert depth == MAX_DEPTH - 2


def test_at_most_ten_problems_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    wrong = "".join(f"wrong_{number}: 1\n" for number in range(22))
    lines = messages(tmp_path, START + wrong)
    assert lines[0] == "FILE has 22 problems"
    assert [line.split()[0] for line in lines[1:11]] == [f"FILE:{number}:" for number in range(3, 13)]
    assert lines[11:] == ["and 12 more"]
    ten = messages(tmp_path, START + "".join(wrong.splitlines(keepends=True)[:10]))
    assert len(ten) == 11 and "more" not in ten[-1]


@pytest.mark.parametrize("section", ["", "dataset", "trainer", "adapter", "gates"])
def test_only_problems_that_are_shown_are_compared_with_other_names(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def counted(word: str, names: Iterable[str], **options: Any) -> list[str]:
        compared.append(word)
        return nearest_names(word, names, **options)

    monkeypatch.setattr(nearest, "nearest_names", counted)
    wrong = "".join(f"  lerning_rate_{number}: 1\n" for number in range(1000))
    if section == "dataset":
        text = f"model: {{name: 'tiny:llama'}}\ndataset:\n  path: a.csv\n{wrong}"
    else:
        text = START + (f"{section}:\n{wrong}" if section else wrong.replace("  ", ""))
    lines = messages(tmp_path, text)
    assert lines[0] == "FILE has 1000 problems" and lines[-1] == "and 990 more"
    assert 0 < len(compared) <= 2 * MOST_SHOWN  # among the names of the section, then among all
