"""Data of another task stop with what they are, and the key that the message names reads them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftcli.cli.pipeline import inspect_data
from peftcli.errors import DataError
from peftcli.progress import Silent
from peftcli.recipe.load import load_recipe

Facts = dict[str, Any]
Look = Callable[..., Facts]
ANSWERS = ("Gladly.", "No.")
ASK: dict[str, Any] = {"role": "user", "content": "Help me with "}


@pytest.fixture
def look(tmp_path: Path, tiny_llama: Path) -> Look:
    """A function that writes 24 rows and gives the facts about them; it fills # with the number of the row."""

    def run(row: dict[str, Any], model: dict[str, Any] | None = None, **dataset: Any) -> Facts:
        lines = [json.dumps(row).replace("#", str(at)) for at in range(24)]
        (tmp_path / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))
        template = {"chat_template": str(CHATS)} if "chat" in json.dumps([row, dataset]) else {}
        recipe = {
            "model": {"name": str(tiny_llama)} | template | (model or {}),
            "dataset": {"path": "rows.jsonl", "max_length": 256, **dataset},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return inspect_data(load_recipe(tmp_path / "recipe.yaml").recipe, Silent(), smoke=False, preview=2).facts

    return run


CHATS = Path(__file__).parents[2] / "fixtures" / "broken_data" / "with_end.jinja"


def chat(*contents: Any, role: str = "role", content: str = "content") -> list[dict[str, Any]]:
    """A chat of the user and the assistant; `kind` makes the fixture use a chat template."""
    speakers = ("user", "assistant") if role == "role" else ("human", "gpt")
    return [{role: speakers[at % 2], content: one, "kind": "chat"} for at, one in enumerate(contents)]


def turn(content: str, role: str = "role", key: str = "content", speaker: str = "assistant") -> dict[str, Any]:
    return {role: speaker, key: content, "kind": "chat"}


def advised(message: str) -> list[Facts]:
    """The keys of `dataset` that a message offers, each as a section of its own."""
    flow = yaml.safe_load
    offers = [flow(found) for found in re.findall(r"dataset: (\{.*?\})(?=$|[;,]| )(?![^{]*\}\")", message)]
    offers += [
        {key: flow(value)} for key, value in re.findall(r"dataset\.(\w+): (\{[^}]*\}|\[[^]]*\]|\"[^\"]*\")", message)
    ]
    return offers


PREFERENCES: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Ask #", "chosen": "Good #", "rejected": "Bad #"},
    "question": {"system": "Be kind.", "question": "Ask #", "chosen": "Good #", "rejected": "Bad #"},
    "instruction": {"instruction": "Ask", "input": "#", "chosen": "Good #", "rejected": "Bad #"},
    "response_j": {"qid": 1, "question": "Ask #", "response_j": "Good #", "response_k": "Bad #"},
    "whole chats": {"chosen": chat("Ask #", "Good #"), "rejected": chat("Ask #", "Bad #")},
    "prompt and whole chats": {"prompt": "Ask #", "chosen": chat("Ask #", "Good #"), "rejected": chat("Ask #", "Bad")},
    "prompt and answers": {"prompt": chat("Ask #"), "chosen": [turn("Good #")], "rejected": [turn("Bad #")]},
    "text and answers": {"prompt": "Ask #", "chosen": [turn("Good #")], "rejected": [turn("Bad #")]},
    "sharegpt": {
        "conversations": chat("Ask #", role="from", content="value"),
        "chosen": turn("Good #", "from", "value", "gpt"),
        "rejected": turn("Bad #", "from", "value", "gpt"),
    },
    "texts alone": {"chosen": "Ask: # Good", "rejected": "Ask: # Bad"},
}


@pytest.mark.parametrize("row", PREFERENCES.values(), ids=PREFERENCES)
def test_preference_data_stop_and_the_advice_trains_the_better_answers(row: dict[str, Any], look: Look) -> None:
    with pytest.raises(DataError, match=r"\(preference data\), and peftcli has no preference tuning; ") as caught:
        look(row)
    (keys,) = advised(str(caught.value))
    facts = look(row, **keys)
    assert facts["train_rows"] + facts["test_rows"] == 24
    text = "".join(part["text"] for shown in facts["preview"] for part in shown["parts"])
    assert "Good" in text and "Bad" not in text
    assert "Ask" in text
    assert any(name in facts["sources"][0]["unread"] for name in ("rejected", "response_k"))


RATED: dict[str, tuple[dict[str, Any], str]] = {
    "chats": ({"messages": chat("Ask #", "Good #")}, "label"),
    "completions": ({"prompt": "Ask #", "completion": "Good #"}, "label"),
    "instructions": ({"instruction": "Ask #", "output": "Good #"}, "kto_tag"),
    "questions": ({"question": "Ask #", "answer": "Good #"}, "liked"),
}


@pytest.mark.parametrize(("row", "name"), RATED.values(), ids=RATED)
@pytest.mark.parametrize("values", [(True, False), ("True", "False"), (1, 0)], ids=["booleans", "texts", "numbers"])
def test_rated_answers_stop_and_the_good_ones_can_be_trained(
    row: dict[str, Any], name: str, values: tuple[Any, Any], look: Look, tmp_path: Path
) -> None:
    name = "label" if type(values[0]) is int else name  # a number in a column of another name may be anything
    rows = row | {name: "BY TURNS"}

    def mixed(**keys: Any) -> Facts:
        lines = [json.dumps(rows).replace("#", str(at)) for at in range(24)]
        lines = [one.replace('"BY TURNS"', json.dumps(values[at % 2])) for at, one in enumerate(lines)]
        (tmp_path / "mixed.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return look(rows, **({"path": "mixed.jsonl"} | keys))

    with pytest.raises(DataError, match=rf"the column {name} says whether an answer is good \(KTO data\)") as caught:
        mixed()
    filtered, ignored = advised(str(caught.value))
    kept, whole = mixed(**filtered), mixed(**ignored)
    assert kept["train_rows"] + kept["test_rows"] == 12
    assert kept["dropped"] == {"left out by dataset.where": 12}
    assert kept["sources"][0]["unread"] == {}, "a column that selects rows is read"
    assert whole["train_rows"] + whole["test_rows"] == 24
    assert list(whole["sources"][0]["unread"]) == [name]


def test_a_label_that_is_no_rating_is_only_named(look: Look) -> None:
    row = {"prompt": "Ask #", "completion": "Good #", "label": "sports", "score": 0.5, "ok": True}
    facts = look(row)
    assert facts["sources"][0]["unread"] == {"label": "text", "score": "number", "ok": "true/false"}


MEDIA: dict[str, tuple[dict[str, Any], str]] = {
    "marks": ({"messages": chat("<image>What is it? #", "A cat"), "images": ["1.jpg"]}, "images"),
    "no marks": ({"messages": chat("What is it? #", "A cat"), "image": "1.jpg"}, "image"),
    "sharegpt": (
        {"conversations": chat("<video>Hm? #", "A", role="from", content="value"), "videos": ["1.mp4"]},
        "videos",
    ),
    "speech": ({"audio": {"path": "1.wav"}, "text": "what was said #"}, "audio"),
    "captions": ({"image": "1.png", "text": "a cat on a mat #"}, "image"),
}


@pytest.mark.parametrize(("row", "name"), MEDIA.values(), ids=MEDIA)
def test_texts_about_images_and_sounds_stop(row: dict[str, Any], name: str, look: Look) -> None:
    with pytest.raises(DataError, match=rf"its rows are about \w+ \(the column {name}.*reads only text") as caught:
        look(row)
    (keys,) = advised(str(caught.value))
    facts = look(row, **keys)
    assert list(facts["sources"][0]["unread"]) == [name]
    marked = "<" in json.dumps(row)
    assert any("which is trained as text" in said for said in facts["warnings"]) == marked


def test_an_empty_column_of_images_is_no_reason_to_stop(look: Look) -> None:
    facts = look({"messages": chat("Ask #", "A cat"), "images": []})
    assert facts["sources"][0]["unread"] == {"images": "list"}


def test_chats_with_image_parts_stop(look: Look) -> None:
    parts = [{"type": "image", "image": "1.jpg"}, {"type": "text", "text": "What is it? #"}]
    with pytest.raises(DataError, match=r"about images \(parts of the type image in messages\)"):
        look({"messages": chat(parts, "A cat")})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "1.png", "label": "cat"}, r"an image and its label \(classification\); set model\.task: image-cl"),
        ({"prompt": "a #", "completions": ["b", "c"], "labels": [True, False]}, "a label for each step of an answer"),
        ({"anchor": "a #", "positive": "b", "negative": "c"}, r"texts that match \(for an embedding model\)"),
        ({"text": "a #", "label": 1}, "model.task: sequence-classification"),
    ],
    ids=["images", "steps", "embeddings", "classes"],
)
def test_the_data_of_other_tasks_say_what_they_are(row: dict[str, Any], said: str, look: Look) -> None:
    with pytest.raises(DataError, match=said) as caught:
        look(row)
    for keys in advised(str(caught.value)):
        assert look(row, **keys)["train_rows"] > 0
