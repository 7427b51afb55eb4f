"""Inputs in forms that people reported to other trainers: read right, or refused with advice that works."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from advice import offers

from peftcli.cli.pipeline import inspect_data
from peftcli.errors import DataError
from peftcli.progress import Silent
from peftcli.recipe.load import load_recipe

ROWS = 24
TEMPLATE = Path(__file__).parents[2] / "fixtures" / "broken_data" / "with_end.jinja"
CLASSES = {"task": "sequence-classification"}
Recipe = dict[str, Any]


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path) -> Callable[..., Recipe]:
    """A function that writes rows, from a function of their number, and gives a recipe over them."""

    def make(row: Callable[[int], Any], model: dict[str, Any] | None = None, **dataset: Any) -> Recipe:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row(at)) + "\n" for at in range(ROWS)))
        section = {"path": str(tmp_path / "rows.jsonl"), "max_length": 128, "limits": {"max_leaked": 1}} | dataset
        chats = {} if model else {"chat_template": str(TEMPLATE)}
        return {"model": {"name": str(tiny_llama)} | chats | (model or {}), "dataset": section}

    return make


@pytest.fixture
def look(tmp_path: Path) -> Callable[[Recipe], dict[str, Any]]:
    def run(given: Recipe) -> dict[str, Any]:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
        return inspect_data(load_recipe(tmp_path / "recipe.yaml").recipe, Silent(), smoke=False, preview=1).facts

    return run


def follow(given: Recipe, look: Any, message: str, at: int = 0) -> dict[str, Any]:
    """The facts after the fix that a message offers."""
    with pytest.raises(DataError, match=message) as caught:
        look(given)
    facts: dict[str, Any] = look(offers(str(caught.value), given)[at].applied(given))
    return facts


def trained(facts: dict[str, Any]) -> str:
    return "".join(part["text"] for part in facts["preview"][0]["parts"] if part["kind"] == "trained")


def turns(at: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"Ask {at}"}, {"role": "assistant", "content": f"It's {at}"}]


def test_classes_of_chats_offer_the_text_of_the_first_message(recipe: Any, look: Any) -> None:
    # ms-swift#3984
    given = recipe(lambda at: {"messages": turns(at)[:1], "label": [[0], [1], [0, 1]][at % 3]}, CLASSES)
    facts = follow(given, look, "for the first message in messages, set dataset.text: ")
    assert (facts["problem"], facts["classes"]) == ("multi-label", ["0", "1"])
    assert "Ask 0" in facts["preview"][0]["parts"][0]["text"]


@pytest.mark.parametrize("written", ["0,0,1", "0, 1, 1", "0 0 1", "0.0;0.0;1.0", "[0 0 1]", "[0. 0. 1.]", "0|1|1"])
@pytest.mark.parametrize("problem", ["auto", "multi-label"])
def test_zeros_and_ones_in_a_cell_are_positions(written: str, problem: str, recipe: Any, look: Any) -> None:
    # transformers#28526
    other = written.replace("0", "1", 1)
    given = recipe(
        lambda at: {"text": f"some {at}", "label": [written, other][at % 2]}, CLASSES | {"problem_type": problem}
    )
    facts = look(given)
    assert (facts["problem"], facts["classes"]) == ("multi-label", ["0", "1", "2"])
    counts = facts["labels"]["train"]
    assert counts["2"] == facts["train_rows"] > counts["0"] > 0


def test_two_numbers_in_a_cell_are_only_positions_if_the_recipe_says_so(recipe: Any, look: Any) -> None:
    def rows(at: int) -> dict[str, Any]:
        return {"text": f"some {at}", "label": ["0,1", "1,0", "0,0"][at % 3]}

    assert look(recipe(rows, CLASSES))["classes"] == ["0,0", "0,1", "1,0"]
    facts = look(recipe(rows, CLASSES | {"problem_type": "multi-label"}))
    assert facts["classes"] == ["0", "1"] and sum(facts["rows_without_class"].values()) == 8


def test_answers_in_objects_are_read_by_the_path_to_their_text(recipe: Any, look: Any) -> None:
    # LlamaFactory#4720
    def rows(at: int) -> dict[str, Any]:
        good, bad = ({"score": score, "answer": f"{day} {at}"} for score, day in ((1.0, "Monday"), (0.0, "Sunday")))
        return {"id": f"c{at}", "question": f"Which day {at}?", "pos_answer": good, "neg_answer": bad}

    facts = follow(recipe(rows), look, r"better and worse answers in pos_answer and neg_answer \(preference data\)")
    assert trained(facts).startswith("Monday")
    assert facts["sources"][0]["unread"] == {"id": "text", "neg_answer": "object"}


@pytest.mark.parametrize("lines", [False, True])
def test_rows_in_json_in_a_text_file_are_not_a_text(lines: bool, recipe: Any, look: Any, tmp_path: Path) -> None:
    # LlamaFactory#3018
    rows = [{"instruction": f"Ask {at}", "input": "", "output": f"It is {at}"} for at in range(ROWS)]
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1)
    (tmp_path / "rows.txt").write_text(text)
    given = recipe(lambda at: {}, path=str(tmp_path / "rows.txt"))
    facts = follow(given, look, "rows.txt: has rows in JSON, which would be trained as one text; set")
    assert (facts["rows"], facts["format"]) == (ROWS, "messages")
    whole = follow(given | {"dataset": given["dataset"] | {"split": {"test_size": 0}}}, look, "has rows in JSON", at=1)
    assert whole["format"] == "text"


def test_token_ids_are_named_as_such(recipe: Any, look: Any) -> None:
    # axolotl#1945
    given = recipe(lambda at: {"input_ids": [1, at], "attention_mask": [1, 1], "labels": [-100, at]})
    with pytest.raises(DataError, match=r"have token ids \(rows that were tokenized before\); use the texts or chats"):
        look(given)


@pytest.mark.parametrize("columns", [{"messages": "traj"}, None])
def test_chats_as_python_prints_them_are_chats(columns: Any, recipe: Any, look: Any) -> None:
    # unsloth#2095
    given = recipe(lambda at: {"traj": str([turns(at)[0], turns(at)[1] | {"mood": "kind"}])}, columns=columns)
    facts = look(given) if columns else follow(given, look, r"dataset: \{columns: \{messages: traj\}\}$")
    assert trained(facts).startswith("It's 0")
    assert facts["sources"][0]["unread_keys"] == {"traj[].mood": ROWS}


def test_questions_about_images_stop(recipe: Any, look: Any) -> None:
    # ms-swift#2682
    given = recipe(lambda at: {"query": f"Image-1: <image> and {at}", "images": [f"{at}.png"], "response": f"so {at}"})
    facts = follow(given, look, r"about images \(the column images, and <image> in their text\)")
    assert facts["sources"][0]["unread"] == {"images": "list"}


def test_ratings_of_turns_are_named(recipe: Any, look: Any) -> None:
    # alignment-handbook#142
    def rows(at: int) -> dict[str, Any]:
        answer = {"from": "gpt", "value": f"Yes {at}", "label": at % 2 == 0}
        return {"conversations": [{"from": "human", "value": f"Hi {at}"}, answer]}

    assert look(recipe(rows))["sources"][0]["unread_keys"] == {"conversations[].label": ROWS}


def test_an_example_for_rated_answers_keeps_the_good_ones(recipe: Any, look: Any) -> None:
    # trl#1116
    given = recipe(lambda at: {"prompt": f"Ask {at}", "answer": f"It is {at}", "is_good": at % 2 == 0})
    facts = follow(given, look, r"for example\n  dataset: \{prompt: .*, where: \{is_good: true\}\}$")
    assert facts["dropped"] == {"left out by dataset.where": ROWS // 2}


def test_an_example_for_nested_answers_has_their_path(recipe: Any, look: Any) -> None:
    # the form of SQuAD, and trl#3140
    def squad(at: int) -> dict[str, Any]:
        answers = {"answer_start": [6], "text": [f"place {at}"]}
        return {"id": str(at), "title": "T", "context": f"It is {at}.", "question": f"What {at}?", "answers": answers}

    assert trained(follow(recipe(squad), look, "do not match a known format")).startswith(" place")
    given = recipe(lambda at: {"sentence": f"I go {at}", "translation": f"Go {at}", "translation_extra": f"Go I {at}"})
    facts = follow(given, look, "do not match a known format")
    assert facts["sources"][0]["unread"] == {"translation_extra": "text"}
