"""Rows with labels: what a class is, which number it gets, which token carries the tag of a word, and what is lost."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peftcli.data.label_stats import label_warnings
from peftcli.data.label_tokenize import align_words, takes_words
from peftcli.data.prepare import PreparedData, prepare
from peftcli.data.preview import sample_rows
from peftcli.data.tokenize import IGNORED
from peftcli.errors import DataError
from peftcli.plan.plan import LossMask
from peftcli.progress import Silent
from peftcli.recipe.schema import DatasetSection
from peftcli.report.data import data_section
from peftcli.report.load import Stages
from peftcli.report.terminal import print_blocks
from peftcli.results import DataJson
from peftcli.typed_json import parse

SHARED = Path(__file__).parents[4] / "shared"
needs_data = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the shared data are not on this machine")
SEQUENCE = LossMask(True, True, (), 32, "sequence-classification")
TOKENS = replace(SEQUENCE, task="token-classification")
WORDS = "the a an old new cat dog eel york went to see ##s ##ing ##er play walk , . ! 0 1 2 3 4 5 6 7 8 9"
Prepare = Callable[..., PreparedData]


@pytest.fixture(scope="module")
def bert() -> Any:
    """A tokenizer of word pieces, as encoders have it."""
    vocabulary = {piece: number for number, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split()])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    made.decoder = decoders.WordPiece()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Any:
    """A tokenizer on bytes, as decoders have it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def prepared(bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """A function from the keys of a dataset section to its data, with a cache of its own."""
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))

    def make(
        rule: LossMask = SEQUENCE, tokenizer: Any = bert, problem_type: str = "auto", smoke: bool = False, **keys: Any
    ) -> PreparedData:
        section = DatasetSection.model_validate(keys)
        return prepare(section, tokenizer, replace(rule, problem_type=problem_type), 0, Silent(), smoke=smoke)

    return make


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., str]:
    """A function that writes rows as JSON lines."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def animals(count: int = 40, kinds: str = "cat dog", **more: Callable[[int], Any]) -> list[dict[str, Any]]:
    """Rows that differ, each with one of the kinds as its label."""
    names = kinds.split()
    digits = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
    return [
        {
            "text": f"the {names[number % len(names)]} {digits[number // 10 % 10]} {digits[number % 10]}",
            "label": names[number % len(names)],
            **{name: make(number) for name, make in more.items()},
        }
        for number in range(count)
    ]


def labelled(data: PreparedData) -> dict[str, list[Any]]:
    """The label of each text of both sides, as the store gives it."""
    found = {}
    for side in (data.train, data.test_split):
        rows = side.store.examples.take(side.rows).to_pydict()
        found |= dict(zip(rows["text"], rows["labels"], strict=True))
    return found


# Classes


def test_classes_of_text_are_sorted_and_each_row_has_the_number_of_its_own(prepared: Prepare, file: Any) -> None:
    data = prepared(path=file(animals(kinds="dog cat eel")))
    assert (data.format, data.problem_type, data.labels) == ("classification", "single-label", ("cat", "dog", "eel"))
    found = labelled(data)
    assert len(found) == 40
    assert all(data.labels[label[0]] in text and len(label) == 1 for text, label in found.items())
    assert data.facts["classes"] == ["cat", "dog", "eel"]
    assert sum(data.facts["labels"]["train"].values()) == data.facts["train_rows"]
    assert sum(data.facts["labels"]["test"].values()) == data.facts["test_rows"]


def test_numbers_of_classes_do_not_depend_on_the_order_of_rows_or_on_the_split(prepared: Prepare, file: Any) -> None:
    rows = animals(kinds="dog cat eel")
    first = prepared(path=file(rows))
    turned = prepared(path=file(rows[::-1], "turned.jsonl"), split={"test_size": 0.5, "seed": 9})
    assert first.labels == turned.labels
    assert labelled(first) == labelled(turned)


def test_whole_numbers_are_classes_in_their_order(prepared: Prepare, file: Any) -> None:
    data = prepared(path=file([row | {"label": 8 + number % 4} for number, row in enumerate(animals())]))
    assert data.labels == ("8", "9", "10", "11")
    floats = prepared(path=file([row | {"label": float(n % 2)} for n, row in enumerate(animals())], "floats.jsonl"))
    assert (floats.problem_type, floats.labels) == ("single-label", ("0", "1"))
    truths = prepared(path=file([row | {"label": n % 2 == 0} for n, row in enumerate(animals())], "truths.jsonl"))
    assert truths.labels == ("false", "true")


def test_a_test_file_shares_the_classes_of_the_training_file(prepared: Prepare, file: Any) -> None:
    train = file(animals(kinds="dog eel"))
    test = file(animals(12, kinds="ant cat eel dog"), "test.jsonl")
    data = prepared(path=train, test={"path": test})
    assert data.labels == ("ant", "cat", "dog", "eel")
    assert [data.labels[label[0]] for label in data.test.column("labels").to_pylist()] == [
        "ant",
        "cat",
        "eel",
        "dog",
    ] * 3
    assert data.test.column("reference").to_pylist() == ["ant", "cat", "eel", "dog"] * 3
    assert all(data.labels[label[0]] in text for text, label in labelled(data).items())
    assert data.facts["absent_classes"] == {"train": ["ant", "cat"], "test": []}
    assert (
        "the training split has no row of 2 classes, such as ant, cat, so it cannot be learned"
        in data.facts["warnings"]
    )
    assert data.facts["labels"]["train"] == {"dog": 20, "eel": 20, "ant": 0, "cat": 0}


def test_given_classes_keep_their_order_and_may_have_no_row(prepared: Prepare, file: Any) -> None:
    data = prepared(path=file(animals()), labels=["eel", "dog", "cat"])
    assert data.labels == ("eel", "dog", "cat")
    assert all(data.labels[label[0]] in text for text, label in labelled(data).items())


def test_a_class_that_is_not_among_the_given_ones_is_refused_with_its_place(prepared: Prepare, file: Any) -> None:
    rows = animals()
    rows[20]["label"] = "yak"
    with pytest.raises(
        DataError, match=r"rows.jsonl:21: label is yak, not one of the 2 classes \(cat, dog\); add it to"
    ):
        prepared(path=file(rows), labels=["cat", "dog"])


def test_numbers_may_stand_for_the_given_classes(prepared: Prepare, file: Any) -> None:
    path = file([row | {"label": number % 2} for number, row in enumerate(animals())])
    data = prepared(path=path, labels=["cat", "dog"])
    assert data.labels == ("cat", "dog")
    assert all(data.labels[label[0]] in text for text, label in labelled(data).items())
    with pytest.raises(DataError, match=r"rows.jsonl:1: label is 0, not one of the 2 classes \(1, 2\)"):
        prepared(path=path, labels=["1", "2"])


def test_rows_without_a_label_are_left_out_and_counted(prepared: Prepare, file: Any) -> None:
    rows = animals()
    rows[3]["label"], rows[7]["label"], rows[11]["label"], rows[12]["text"] = None, " ", ["cat"], " "
    facts = prepared(path=file(rows), problem_type="single-label", limits={"max_dropped": 0.2}).facts
    assert facts["dropped"] == {
        "with label null": 1,
        "with label empty": 1,
        "with label not a single class (a list)": 1,
        "with an empty text": 1,
    }
    assert facts["dropped_examples"]["with label empty"] == ["rows.jsonl:8"]


def test_one_class_alone_is_refused(prepared: Prepare, file: Any) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl: all rows have the same label \(cat\)"):
        prepared(path=file(animals(kinds="cat")))


def test_a_column_with_a_value_of_its_own_in_each_row_holds_no_classes(prepared: Prepare, file: Any) -> None:
    with pytest.raises(DataError, match="label has 60 distinct values in 60 rows, too many for classes"):
        prepared(path=file([row | {"label": f"name {number}"} for number, row in enumerate(animals(60))]))


def test_texts_with_two_labels_are_counted_with_their_places(prepared: Prepare, file: Any) -> None:
    rows = [*animals(), {"text": "The cat 0  0", "label": "dog"}]
    data = prepared(path=file(rows), test={"path": file(animals(4), "test.jsonl")})
    assert data.facts["conflicting_rows"] == 1
    assert data.facts["conflicting_examples"] == [{"row": "rows.jsonl:41", "first": "rows.jsonl:1"}]
    assert data.facts["leaked_prompts"] == 4


def test_warnings_say_what_a_figure_would_hide(prepared: Prepare, file: Any) -> None:
    rows = animals(100, kinds="cat")
    rows[0]["label"], rows[1]["label"] = "Cat", "dog"
    data = prepared(path=file(rows), test={"path": file(animals(8, kinds="cat"), "test.jsonl")})
    said = " | ".join(label_warnings(data.facts))
    assert "the test split has no row of 2 classes, such as Cat, dog, so it is not evaluated" in said
    assert "classes differ only in case or white space (Cat, cat)" in said
    assert "100.0% of the test rows have the same class" in said
    assert data.facts["majority_share"] == {"train": 0.98, "test": 1.0}


# Which columns


def test_text_may_be_a_template_with_the_label_in_a_column(prepared: Prepare, file: Any) -> None:
    path = file(animals(kind=lambda number: f"kind {number % 3}", size=lambda number: number))
    data = prepared(path=path, text="{size} {text}", columns={"label": "kind"})
    assert data.labels == ("kind 0", "kind 1", "kind 2")
    texts = data.train.store.examples.column("text").to_pylist()
    assert texts[:2] == ["0 the cat 0 0", "1 the dog 0 1"]


def test_two_texts_are_written_as_the_tokenizer_writes_pairs(prepared: Prepare, bert: Any, file: Any) -> None:
    rows = [
        {"premise": f"the cat {number % 10}", "hypothesis": f"a dog {number % 7} went", "label": number % 3}
        for number in range(40)
    ]
    for keys in ({}, {"columns": {"text": "premise", "text_pair": "hypothesis"}}):
        data = prepared(path=file(rows), limits={"max_leaked": 1.0}, **keys)
        first = data.train.store.examples.slice(0, 1).to_pylist()[0]
        assert (first["text"], first["text_pair"]) == ("the cat 0", "a dog 0 went")
        assert first["input_ids"] == bert("the cat 0", "a dog 0 went")["input_ids"]
        assert data.test.column("prompt")[0].as_py().count("\n") == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "a", "label": "x", "category": "y"},
            "the label could be in label and category; set dataset.c",
        ),
        (
            {"text": "a", "review": "b", "label": "x"},
            "the text could be in text and review; set dataset.columns",
        ),
        ({"text": "a", "stars": 3}, "no column has a usual name for the label; it has text, stars; set"),
        ({"body": "a", "label": 3}, "no column has a usual name for the text; it has body, label"),
        (
            {"premise": "a", "hypothesis": "b", "sentence1": "c", "sentence2": "d", "label": 1},
            "the text pair could be in premise and hypothesis and sentence1 and sentence2",
        ),
    ],
)
def test_columns_that_may_mean_several_things_are_refused(
    prepared: Prepare, file: Any, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepared(path=file([row] * 4))


def test_usual_names_are_known_whatever_their_case(prepared: Prepare, file: Any) -> None:
    rows = [{"Review": row["text"], "Sentiment": row["label"], "id": number} for number, row in enumerate(animals())]
    data = prepared(path=file(rows))
    assert data.facts["sources"][0]["read_as"] == "Review with the class in Sentiment"


def test_a_column_that_is_missing_names_its_key(prepared: Prepare, file: Any) -> None:
    with pytest.raises(DataError, match=r"no column lable; it has text, label; did you mean label"):
        prepared(path=file(animals()), columns={"label": "lable"})
    with pytest.raises(DataError, match="the column label is the label and also part of the text"):
        prepared(path=file(animals()), text="{text} {label}", columns={"label": "label"})


def test_a_parquet_file_brings_the_names_of_its_classes(prepared: Prepare, tmp_path: Path) -> None:
    import datasets

    rows = animals()
    names = datasets.ClassLabel(names=["dog", "cat", "eel"])
    labels = [names.str2int(row["label"]) for row in rows]
    labels[5] = -1
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    table = datasets.Dataset.from_dict({"text": [row["text"] for row in rows], "label": labels}, features=features)
    table.to_parquet(tmp_path / "rows.parquet")
    data = prepared(path=str(tmp_path / "rows.parquet"))
    assert data.labels == ("dog", "cat", "eel")
    assert data.facts["dropped"] == {"with no label (-1)": 1}
    assert all(data.labels[label[0]] in text for text, label in labelled(data).items())


# Several classes, and numbers


@pytest.mark.parametrize(
    "write",
    [
        lambda names: names,
        lambda names: json.dumps(names),
        lambda names: "|".join(names),
        lambda names: ", ".join(names),
    ],
    ids=["lists", "json", "bars", "commas"],
)
def test_lists_of_classes_are_read_however_they_are_written(prepared: Prepare, file: Any, write: Any) -> None:
    sets: list[list[str]] = [["eel", "cat"], ["dog"], ["cat", "dog", "eel"], []]
    rows = [row | {"label": write(sets[number % 4])} for number, row in enumerate(animals())]
    data = prepared(path=file(rows), problem_type="multi-label")
    assert (data.problem_type, data.labels) == ("multi-label", ("cat", "dog", "eel"))
    assert list(labelled(data).values()).count([0, 2]) == 10
    assert sorted(map(tuple, labelled(data).values()))[::10] == [(), (0, 1, 2), (0, 2), (1,)]
    assert sum(data.facts["rows_without_class"].values()) == 10
    assert any(said.startswith("10 rows have no class; the model") for said in data.facts["warnings"])
    assert set(data.test.column("reference").to_pylist()) <= {"eel, cat", "dog", "cat, dog, eel", ""}


def test_lists_are_several_classes_unless_the_recipe_says_otherwise(prepared: Prepare, file: Any) -> None:
    rows = [row | {"label": [row["label"]]} for row in animals()]
    assert prepared(path=file(rows)).problem_type == "multi-label"


@pytest.mark.parametrize("kind", [int, float, bool])
@pytest.mark.parametrize("write", [list, json.dumps, str], ids=["lists", "json", "python"])
def test_multi_hot_labels_are_the_classes_that_are_not_zero(
    prepared: Prepare, file: Any, kind: Any, write: Any
) -> None:
    hot = [[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]]
    rows = [row | {"label": write([kind(one) for one in hot[number % 4]])} for number, row in enumerate(animals())]
    data = prepared(path=file(rows), labels=["cat", "dog", "eel"])
    assert data.labels == ("cat", "dog", "eel"), "a class that no row has is a class too"
    assert sorted(map(tuple, labelled(data).values()))[::10] == [(), (0,), (0, 1), (1,)]
    assert prepared(path=file(rows)).labels == ("0", "1", "2")


def test_two_positions_are_a_zero_or_one_for_each_class(prepared: Prepare, file: Any) -> None:
    rows = [row | {"label": [[0, 1], [1, 0]][number % 2]} for number, row in enumerate(animals())]
    assert sorted(map(tuple, labelled(prepared(path=file(rows))).values()))[::20] == [(0,), (1,)]
    assert (
        sorted(map(tuple, labelled(prepared(path=file(rows), labels=["a", "b", "c"])).values()))[::39] == [(0, 1)] * 2
    )


def test_ids_of_classes_are_no_switches(prepared: Prepare, file: Any) -> None:
    sets: list[list[int]] = [[0], [1], [0, 2], []]
    rows = [row | {"label": sets[number % 4]} for number, row in enumerate(animals())]
    data = prepared(path=file(rows), labels=["cat", "dog", "eel"])
    assert sorted(map(tuple, labelled(data).values()))[::10] == [(), (0,), (0, 2), (1,)]


def test_a_row_that_lacks_a_switch_is_dropped_and_its_ones_are_no_classes(prepared: Prepare, file: Any) -> None:
    rows = [row | {"label": [1.0, 0.0, float(number % 2)]} for number, row in enumerate(animals())]
    rows[3]["label"], rows[4]["label"] = [1.0, None, 0.0], [1.0, 0.0]
    data = prepared(path=file(rows), limits={"max_dropped": 0.1})
    assert data.facts["dropped"] == {"with label not a 0 or 1 for each class": 2}
    assert data.labels == ("0", "1", "2")


def test_labels_of_several_classes_that_are_neither_names_nor_switches_are_refused(
    prepared: Prepare, file: Any
) -> None:
    rows = [row | {"label": [1.0, 0.0, number % 2 / 2]} for number, row in enumerate(animals())]
    with pytest.raises(DataError, match=r"rows.jsonl: label has 0.5 in a list; .*round probabilities to 0 and 1"):
        prepared(path=file(rows))
    rows = [row | {"label": [1.0, 0.0, number % 2]} for number, row in enumerate(animals())]
    with pytest.raises(DataError, match=r"for each of 3 classes, but dataset.labels names 2 \(a, b\); name all 3"):
        prepared(path=file(rows), labels=["a", "b"])


def test_a_list_as_python_prints_it_is_a_list_of_classes(prepared: Prepare, file: Any) -> None:
    rows = [row | {"label": str([row["label"], "pet"])} for row in animals()]
    data = prepared(path=file(rows))
    assert (data.problem_type, data.labels) == ("multi-label", ("cat", "dog", "pet"))


def test_two_signs_that_may_part_classes_are_refused(prepared: Prepare, file: Any) -> None:
    rows = [row | {"label": "cat, wild|dog" if number else "cat"} for number, row in enumerate(animals())]
    with pytest.raises(DataError, match=r"label has \| and ,, which could both separate classes"):
        prepared(path=file(rows), problem_type="multi-label")
    data = prepared(path=file(rows), problem_type="multi-label", labels=["cat", "cat, wild", "dog"])
    assert [1, 2] in labelled(data).values()


def test_numbers_with_decimals_are_a_regression(prepared: Prepare, file: Any) -> None:
    rows = [row | {"label": number / 4} for number, row in enumerate(animals())]
    rows[5]["label"], rows[6]["label"] = "much", None
    data = prepared(path=file(rows), limits={"max_dropped": 0.1})
    assert (data.problem_type, data.labels) == ("regression", ())
    assert labelled(data)["the dog 0 1"] == [0.25]
    assert str(data.train.store.examples.schema.field("labels").type) == "large_list<item: float>"
    assert data.facts["dropped"] == {"with label not a number": 1, "with label null": 1}
    assert data.facts["labels"] is None and data.facts["numbers"]["of"] == "label"
    spread = data.facts["numbers"]["train"]
    assert 0 <= spread["min"] <= spread["median"] <= spread["max"] <= 9.75
    assert data.test.column("reference")[0].as_py() == repr(data.test.column("labels")[0].as_py()[0])


def test_whole_numbers_far_apart_may_be_either_and_are_refused(prepared: Prepare, file: Any) -> None:
    path = file([row | {"label": number * 3} for number, row in enumerate(animals())])
    with pytest.raises(
        DataError, match=r"whole numbers from 0 to 117, which may be classes or quantities; set model.prob"
    ):
        prepared(path=path)
    assert prepared(path=path, problem_type="regression").labels == ()


def test_test_rows_are_read_as_the_training_rows_are(prepared: Prepare, file: Any) -> None:
    train = file([row | {"label": number / 4} for number, row in enumerate(animals())])
    test = file([row | {"label": number} for number, row in enumerate(animals(6))], "test.jsonl")
    data = prepared(path=train, test={"path": test})
    assert data.test.column("labels").to_pylist() == [[float(number)] for number in range(6)]


# Long texts


def test_a_long_text_is_cut_as_the_tokenizer_cuts_it(prepared: Prepare, bert: Any, file: Any) -> None:
    rows = animals()
    rows[4]["text"] = "cat " * 50
    path = file(rows)
    data = prepared(path=path, rule=replace(SEQUENCE, max_length=10))
    stored = data.train.store.examples.column("input_ids")[4].as_py()
    assert stored == bert("cat " * 50, truncation=True, max_length=10)["input_ids"]
    assert (len(stored), stored[0], stored[-1]) == (10, bert.cls_token_id, bert.sep_token_id)
    assert (data.facts["truncated_rows"], data.facts["truncated_examples"]) == (1, ["rows.jsonl:5"])
    assert "1 row is truncated at 10 tokens (first rows.jsonl:5)" in data.facts["warnings"]
    dropped = prepared(path=path, rule=replace(SEQUENCE, max_length=10), too_long="drop")
    assert dropped.facts["dropped"] == {"longer than max_length 10": 1}


@pytest.mark.parametrize("limit", [4, 7, 9])
def test_long_pairs_are_cut_as_the_tokenizer_cuts_them(prepared: Prepare, bert: Any, file: Any, limit: int) -> None:
    texts = [(f"the cat {number} " * 3, "a dog") for number in range(10)]
    rows = [{"text": one, "text_pair": two, "label": len(one) % 2} for one, two in texts]
    data = prepared(path=file(rows), rule=replace(SEQUENCE, max_length=limit), labels=["a", "b"])
    expected = [bert(*pair, truncation=True, max_length=limit)["input_ids"] for pair in texts]
    assert data.train.store.examples.column("input_ids").to_pylist() == expected


def test_a_length_that_only_special_tokens_would_fill_is_refused(prepared: Prepare, file: Any) -> None:
    with pytest.raises(DataError, match=r"dataset.max_length 2 only has space for special tokens; raise it"):
        prepared(path=file(animals()), rule=replace(SEQUENCE, max_length=2))


def test_limits_of_rows_with_labels_speak_of_reading(prepared: Prepare, file: Any) -> None:
    rows = [row | {"text": row["text"] + " cat" * 20} for row in animals()]
    (said,) = prepared(path=file(rows), rule=replace(SEQUENCE, max_length=10), limits={"max_leaked": 1.0}).crossed[:1]
    assert "so their end is not read" in said


# Tags


def tagged(words: str, tags: str) -> dict[str, Any]:
    return {"tokens": words.split(), "tags": tags.split()}


def sentences(count: int = 20) -> list[dict[str, Any]]:
    return [
        tagged(f"the cats went to new york {number % 10} {number // 10}", "O B-ANIMAL O O B-PLACE I-PLACE O O")
        for number in range(count)
    ]


def test_the_first_token_of_a_word_carries_its_tag(prepared: Prepare, bert: Any, file: Any) -> None:
    data = prepared(path=file(sentences()), rule=TOKENS)
    assert (data.format, data.problem_type) == ("tagging", None)
    assert data.labels == ("O", "B-ANIMAL", "B-PLACE", "I-PLACE")
    row = data.train.store.examples.slice(0, 1).to_pylist()[0]
    assert bert.convert_ids_to_tokens(row["input_ids"])[:5] == ["[CLS]", "the", "cat", "##s", "went"]
    assert row["labels"] == [IGNORED, 0, 1, IGNORED, 0, 0, 2, 3, 0, 0, IGNORED]
    test = data.test.to_pylist()[0]
    assert len(test["words"]) == 8 and test["words"][4:6] == ["new", "york"]
    assert test["reference"] == "O B-ANIMAL O O B-PLACE I-PLACE O O"
    assert test["prompt"] == " ".join(test["words"]) and test["prompt_ids"] == test["input_ids"]


def test_alignment_is_that_of_the_tokenizer_for_lists_of_words(bert: Any) -> None:
    words = ["the", "walking", "dogs", ",", "", "!!", "york"]
    (found,) = align_words([words], bert)
    encoded = bert([words], is_split_into_words=True)
    assert found.ids == encoded["input_ids"][0]
    ids, seen = encoded.word_ids(0), set()
    expected = []
    for word in ids:
        expected.append(None if word in seen else word)
        seen.add(word)
    assert found.words == expected
    assert (found.lead, found.tail) == (1, 1)


def test_a_tokenizer_on_bytes_reads_words_with_the_spaces_between_them(llama: Any) -> None:
    words = ["The", "walking", "", "dogs", "New", "York", "!"]
    (found,) = align_words([words], llama)
    assert found.ids == llama("The walking  dogs New York !")["input_ids"]
    assert [word for word in found.words if word is not None] == [0, 1, 3, 4, 5, 6]
    for at, word in enumerate(found.words):
        if word is not None:
            assert words[word].startswith(llama.decode([found.ids[at]]).strip())
    assert takes_words(llama) is False


def test_tags_of_a_decoder_stand_at_the_words_they_belong_to(prepared: Prepare, llama: Any, file: Any) -> None:
    data = prepared(path=file(sentences()), rule=replace(TOKENS, max_length=64), tokenizer=llama)
    row = data.train.store.examples.slice(0, 1).to_pylist()[0]
    assert [label for label in row["labels"] if label != IGNORED] == [0, 1, 0, 0, 2, 3, 0, 0]
    assert data.facts["words"]["silent"] == 0


def test_words_without_a_token_are_counted_and_a_row_of_them_is_left_out(prepared: Prepare, file: Any) -> None:
    rows = [*sentences(), tagged("x y", "O O"), {"tokens": ["", "\u200d"], "tags": ["O", "O"]}]
    rows[20] = {"tokens": ["the", "", "cat"], "tags": ["O", "O", "B-ANIMAL"]}
    facts = prepared(path=file(rows), rule=TOKENS).facts
    assert facts["words"]["silent"] == 1
    assert facts["dropped"] == {"with no word that has a token": 1}
    assert "1 word has no token, so no tag is learned for it" in facts["warnings"]


def test_words_and_tags_that_do_not_pair_are_counted(prepared: Prepare, file: Any) -> None:
    rows = sentences()
    rows[1]["tags"], rows[2]["tags"], rows[3]["tokens"] = ["O"], None, []
    rows[4] = {"tokens": "the cat", "tags": "O B-ANIMAL"}
    rows[5] = {"tokens": '["the", "cat"]', "tags": '["O", "B-ANIMAL"]'}
    facts = prepared(path=file(rows), rule=TOKENS, limits={"max_dropped": 0.5}).facts
    assert facts["dropped"] == {
        "with different numbers of tags and tokens": 1,
        "with tags null": 1,
        "without words in tokens": 1,
    }


def test_a_cut_keeps_the_special_tokens_and_counts_the_tags_it_loses(prepared: Prepare, bert: Any, file: Any) -> None:
    data = prepared(path=file(sentences()), rule=replace(TOKENS, max_length=7), limits={"max_truncated": 1.0})
    row = data.train.store.examples.slice(0, 1).to_pylist()[0]
    assert len(row["input_ids"]) == 7 and row["input_ids"][-1] == bert.sep_token_id
    assert row["labels"] == [IGNORED, 0, 1, IGNORED, 0, 0, IGNORED]
    words = data.facts["words"]
    assert (words["words"], words["tagged"], words["cut"], words["cut_tagged"]) == (160, 60, 80, 40)
    assert data.facts["truncated_rows"] == 20
    assert any("80 words are truncated at max_length, 40 with a tag" in said for said in data.facts["warnings"])


def test_a_long_row_may_be_split_between_words_and_loses_nothing(prepared: Prepare, bert: Any, file: Any) -> None:
    data = prepared(path=file(sentences()), rule=replace(TOKENS, max_length=7), too_long="split")
    rows = data.train.store.examples.to_pylist()
    assert len(rows) == 40 and data.facts["words"]["cut"] == 0 and data.facts["truncated_rows"] == 0
    first, second = rows[:2]
    assert bert.decode(first["input_ids"]) == "[CLS] the cats went to [SEP]"
    assert bert.decode(second["input_ids"]) == "[CLS] new york 0 0 [SEP]"
    assert [label for row in (first, second) for label in row["labels"] if label != IGNORED] == [0, 1, 0, 0, 2, 3, 0, 0]
    sides = [{data.train.store.places([row])[0] for row in side.rows} for side in (data.train, data.test_split)]
    assert not sides[0] & sides[1]
    assert data.facts["conflicting_rows"] == 0


def test_entities_are_counted_and_tags_that_continue_nothing_are_named(prepared: Prepare, file: Any) -> None:
    rows = [*sentences(), tagged("the cat went", "O I-ANIMAL O"), tagged("new york", "B-PLACE I-ANIMAL")]
    data = prepared(path=file(rows), rule=TOKENS)
    words = data.facts["words"]
    assert words["entities"] == {"ANIMAL": 22, "PLACE": 21}
    assert (words["odd_tags"], words["odd_tag_examples"]) == (2, ["rows.jsonl:21", "rows.jsonl:22"])
    assert any(said.startswith("2 tags continue an entity that has not started") for said in data.facts["warnings"])
    plain = [tagged("the cat went", "O ANIMAL O") for _ in range(20)]
    assert prepared(path=file(plain, "plain.jsonl"), rule=TOKENS, limits={"max_leaked": 1}).facts["words"][
        "entities"
    ] == {"ANIMAL": 20}


def test_a_conll_file_gives_tags_that_the_test_file_shares(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("the O\ncats B-Y\n\n" + "".join(f"a O\ndog{n} B-Y\n\n" for n in range(9)))
    (tmp_path / "b.conll").write_text("the O\nyork B-X\neel B-Y\n")
    data = prepared(path=str(tmp_path / "a.conll"), rule=TOKENS, test={"path": str(tmp_path / "b.conll")})
    assert data.labels == ("O", "B-X", "B-Y")
    assert data.test.column("labels").to_pylist() == [[IGNORED, 0, 1, 2, IGNORED]]
    assert data.facts["absent_classes"]["train"] == ["B-X"]
    assert data.facts["labels"]["total"] == {"train": 20, "test": 3}


def test_numbered_tags_take_the_given_names(prepared: Prepare, file: Any) -> None:
    rows = [{"tokens": ["the", "cat", "york"], "ner_tags": [0, 1, 2], "id": n} for n in range(20)]
    data = prepared(path=file(rows), rule=TOKENS, labels=["O", "B-A", "B-B"], limits={"max_leaked": 1})
    assert data.labels == ("O", "B-A", "B-B")
    assert data.facts["words"]["entities"] == {"A": 20, "B": 20}
    with pytest.raises(DataError, match="with ner_tags below 0"):
        prepared(path=file([{"tokens": ["a"], "ner_tags": [-100]}] * 4, "b.jsonl"), rule=TOKENS)


# What is shown, kept and rehearsed


def test_a_preview_shows_the_label_behind_the_text(prepared: Prepare, bert: Any, file: Any) -> None:
    data = prepared(path=file(animals()))
    row = sample_rows(data.train, bert, SEQUENCE, None, 1)[0]
    assert [part["kind"] for part in row["parts"]] == ["prompt", "trained"]
    assert row["trained"] is None
    name = data.labels[data.train.store.examples.column("labels")[int(data.train.rows[0])].as_py()[0]]
    assert row["parts"][1]["text"] == f" -> {name}"


def test_a_preview_shows_tags_at_their_words_and_what_is_cut(prepared: Prepare, bert: Any, file: Any) -> None:
    rule = replace(TOKENS, max_length=9)
    data = prepared(path=file(sentences()), rule=rule)
    parts = sample_rows(data.train, bert, rule, None, 1)[0]["parts"]
    assert "".join(part["text"] for part in parts).startswith(
        "[CLS] the cats/B-ANIMAL went to new/B-PLACE york/I-PLACE [SEP] 2 tokens truncated"
    )
    assert [part["kind"] for part in parts] == ["prompt", "trained", "prompt", "trained", "prompt", "dropped"]


def test_rows_are_prepared_anew_for_another_reading_of_the_labels(prepared: Prepare, file: Any) -> None:
    path = file([row | {"label": number % 5} for number, row in enumerate(animals())])
    assert prepared(path=path).labels == ("0", "1", "2", "3", "4")
    assert prepared(path=path, problem_type="regression").labels == ()
    assert prepared(path=path, labels=["a", "b", "c", "d", "e"]).labels == ("a", "b", "c", "d", "e")
    assert prepared(path=path).facts["cache"] == "reused"


@pytest.mark.parametrize("rule", [SEQUENCE, TOKENS])
def test_a_smoke_run_makes_up_rows_with_labels(prepared: Prepare, rule: LossMask) -> None:
    data = prepared(
        name="somebody/reviews", rule=rule, smoke=True, test={"hub_split": "test"}, limits={"max_leaked": 1}
    )
    assert len(data.labels) == 2 and data.test.num_rows == 48
    named = prepared(name="somebody/reviews", rule=rule, smoke=True, labels=["O", "B-x", "I-x"])
    assert named.labels == ("O", "B-x", "I-x")


def test_a_smoke_run_goes_on_where_the_first_rows_have_one_class(prepared: Prepare, file: Any) -> None:
    data = prepared(path=file([*animals(60, kinds="cat"), *animals(60, kinds="dog")]), smoke=True)
    assert data.labels == ("cat", "other")


def test_the_terminal_shows_labels_numbers_words_and_entities(
    prepared: Prepare, file: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row | {"label": number / 4} for number, row in enumerate(animals())]
    numbers = shown(prepared(path=file(rows)).facts, capsys)
    assert re.search(r"^label +Min +Median +Max +Mean +Std", numbers, re.MULTILINE)
    assert "Trained or scored" not in numbers and "end token" not in numbers
    words = shown(prepared(path=file(sentences(), "tags.jsonl"), rule=TOKENS).facts, capsys)
    assert re.search(r"^Entities: ANIMAL +20 *$", words, re.MULTILINE)
    assert re.search(r"^O +\d+ +#+ +62\.5 % +62\.5 %", words, re.MULTILINE)
    conflicting = [*animals(), {"text": "the cat 0 0", "label": "dog"}]
    classes = shown(prepared(path=file(conflicting, "c.jsonl"), split={"test_size": 1, "seed": 3}).facts, capsys)
    assert "Text of an earlier row, another label" in classes


def shown(facts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    section = data_section(Stages(data=parse(DataJson, json.loads(json.dumps(facts)))))
    assert section is not None
    print_blocks(section.blocks, Console(width=160, color_system=None))
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("evaluation", "labels", "message"),
    [
        ({"positive_label": "egg"}, {}, "evaluation.positive_label is egg, but the classes are even and odd"),
        (
            {"positive_label": "odd"},
            {"labels": ["even", "odd", "egg"]},
            "needs exactly two classes, but the rows have 3",
        ),
    ],
)
def test_a_positive_label_must_be_one_of_two_classes(
    run_cli: Any, tiny_llama: Path, file: Any, tmp_path: Path, capsys: Any, evaluation: Any, labels: Any, message: str
) -> None:
    rows = [{"text": f"row {number}", "label": ("even", "odd")[number % 2]} for number in range(20)]
    recipe = {
        "model": {"name": str(tiny_llama), "task": "sequence-classification"},
        "dataset": {"path": file(rows), "max_length": 16, **labels},
        "trainer": {"max_steps": 1},
        "evaluation": evaluation,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert run_cli("train", tmp_path / "recipe.yaml") == 2
    assert message in capsys.readouterr().err


# Real data


@needs_data
def test_sst2_has_two_classes_and_every_row(prepared: Prepare) -> None:
    folder = SHARED / "data" / "sst2"
    data = prepared(path=str(folder / "train_6000.tsv"), csv={"quote": "none"}, test={"path": str(folder / "dev.tsv")})
    assert data.labels == ("0", "1")
    assert data.facts["labels"]["train"] == {"1": 3371, "0": 2629}
    assert data.facts["labels"]["test"] == {"1": 444, "0": 428}
    assert data.facts["dropped_rows"] == 0


@needs_data
def test_wnut17_has_its_thirteen_tags(prepared: Prepare) -> None:
    folder = SHARED / "data" / "wnut17"
    data = prepared(
        path=str(folder / "wnut17train.conll"),
        test={"path": str(folder / "emerging.test.annotated"), "file_format": "conll"},
        rule=TOKENS,
        limits={"max_truncated": 1.0},
    )
    assert (data.facts["train_rows"], data.facts["test_rows"], len(data.labels)) == (3394, 1287, 13)
    assert data.labels[0] == "O" and data.facts["words"]["odd_tags"] == 0
    assert data.facts["words"]["entities"]["person"] == 660 + 429
