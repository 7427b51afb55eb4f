"""Figures of classes, numbers and tags: worked by hand, and equal to those of scikit-learn, scipy and seqeval."""

import json
import random
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as theirs
from seqeval.metrics import classification_report
from seqeval.metrics import f1_score as seqeval_f1

from peftcli.metrics.classification import classification_scores, multi_label_scores
from peftcli.metrics.regression import regression_scores
from peftcli.metrics.tagging import tagging_scores
from peftcli.recipe.fields import GATE_NAMES

NAMES = ["cat", "dog", "eel"]
TAGS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def drawn(seed: int, classes: int, rows: int = 200) -> tuple[list[int], list[int]]:
    draw = random.Random(seed)
    actual = [draw.randrange(classes) for _ in range(rows)]
    predicted = [one if draw.random() < 0.6 else draw.randrange(classes) for one in actual]
    return predicted, actual


# One class for each row


def test_two_classes_worked_by_hand() -> None:
    # Of 4 spam rows 3 are found; of 4 rows called spam 3 are.
    actual, predicted = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 0, 0, 0, 0, 0]
    scores = classification_scores(predicted, actual, ["ham", "spam"])
    assert (scores.accuracy, scores.precision, scores.recall, scores.f1) == (0.8, 0.75, 0.75, 0.75)
    assert (scores.f1_average, scores.positive_label) == ("binary", "spam")
    assert scores.confusion_matrix == [[5, 1], [1, 3]]
    ham, spam = scores.per_class
    assert (ham.precision, ham.recall, ham.support, ham.predicted) == (5 / 6, 5 / 6, 6, 6)
    assert (spam.label, spam.f1, spam.support) == ("spam", 0.75, 4)
    assert scores.averages["f1_macro"] == pytest.approx((5 / 6 + 0.75) / 2)


def test_the_positive_class_may_be_named() -> None:
    predicted, actual = drawn(1, 2)
    named = classification_scores(predicted, actual, ["ham", "spam"], positive_label="ham")
    assert named.positive_label == "ham"
    assert named.f1 == pytest.approx(theirs.f1_score(actual, predicted, pos_label=0))
    with pytest.raises(ValueError, match="there is no class egg; the classes are ham, spam"):
        classification_scores(predicted, actual, ["ham", "spam"], positive_label="egg")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_classes_equal_those_of_scikit_learn(seed: int, classes: int) -> None:
    predicted, actual = drawn(seed, classes)
    labels = [f"class {number}" for number in range(classes)]
    found = classification_scores(predicted, actual, labels).as_dict()
    assert found["accuracy"] == pytest.approx(theirs.accuracy_score(actual, predicted))
    for average in ("macro", "micro", "weighted"):
        for name, value in zip(("precision", "recall", "f1"), three(actual, predicted, average), strict=True):
            assert found[f"{name}_{average}"] == pytest.approx(value)
    headline = three(actual, predicted, "binary" if classes == 2 else "macro")
    assert [found[name] for name in ("precision", "recall", "f1")] == pytest.approx(headline)
    assert found["f1_average"] == ("binary" if classes == 2 else "macro")
    assert found["confusion_matrix"] == theirs.confusion_matrix(actual, predicted).tolist()
    report = theirs.classification_report(actual, predicted, target_names=labels, output_dict=True)
    for one in found["per_class"]:
        expected = report[one["label"]]
        assert [one["precision"], one["recall"], one["f1"], one["support"]] == pytest.approx(
            [expected[name] for name in ("precision", "recall", "f1-score", "support")]
        )


def three(actual: Any, predicted: Any, average: str) -> list[float]:
    *found, _ = theirs.precision_recall_fscore_support(actual, predicted, average=average, zero_division=0)
    return [float(value) for value in found]


def test_a_class_that_is_never_predicted_is_listed_and_counts_as_nought() -> None:
    scores = classification_scores([0, 0, 1, 1], [0, 2, 1, 2], NAMES)
    assert scores.never_predicted == ["eel"]
    eel = scores.per_class[2]
    assert (eel.precision, eel.recall, eel.f1) == (None, 0.0, 0.0)
    assert scores.f1 == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_a_class_that_no_row_has_and_no_row_is_given_has_no_figures_and_no_weight() -> None:
    scores = classification_scores([0, 1, 1], [0, 1, 0], NAMES)
    assert (scores.per_class[2].precision, scores.per_class[2].recall, scores.per_class[2].f1) == (None, None, None)
    assert scores.f1 == pytest.approx(theirs.f1_score([0, 1, 0], [0, 1, 1], average="macro"))
    assert scores.never_predicted == []


def test_a_positive_class_without_rows_has_no_figure_and_one_that_is_missed_has_nought() -> None:
    nothing = classification_scores([0, 0], [0, 0], ["ham", "spam"])
    assert (nothing.accuracy, nothing.precision, nothing.recall, nothing.f1) == (1.0, None, None, None)
    missed = classification_scores([0, 0], [0, 1], ["ham", "spam"])
    assert (missed.precision, missed.recall, missed.f1) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("call", [classification_scores, multi_label_scores])
def test_rows_and_predictions_must_pair(call: Any) -> None:
    for predicted, actual in (([], []), ([0], [0, 1])):
        with pytest.raises(ValueError, match="there must be one for each"):
            call(predicted, actual, NAMES)


# Several classes for each row


def test_sets_of_classes_worked_by_hand() -> None:
    # Wanted: {cat, dog}, {eel}, {}; given: {cat}, {eel, dog}, {}: two of three are right, and two of three are found.
    scores = multi_label_scores([[0], [2, 1], []], [[0, 1], [2], []], NAMES)
    assert scores.accuracy == pytest.approx(1 / 3)
    assert (scores.precision, scores.recall, scores.f1) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert (scores.f1_average, scores.confusion_matrix) == ("micro", None)
    assert [one.support for one in scores.per_class] == [1, 1, 1]


@pytest.mark.parametrize("seed", range(4))
def test_sets_of_classes_equal_those_of_scikit_learn(seed: int) -> None:
    draw = np.random.default_rng(seed)
    actual, predicted = draw.random((80, 4)) < 0.4, draw.random((80, 4)) < 0.4
    rows = [[np.flatnonzero(row).tolist() for row in table] for table in (predicted, actual)]
    found = multi_label_scores(rows[0], rows[1], [*NAMES, "fox"]).as_dict()
    for average in ("macro", "micro", "weighted", "samples"):
        for name, value in zip(("precision", "recall", "f1"), three(actual, predicted, average), strict=True):
            assert found[f"{name}_{average}"] == pytest.approx(value)
    assert found["accuracy"] == pytest.approx(theirs.accuracy_score(actual, predicted))


def test_no_class_anywhere_gives_no_figures() -> None:
    scores = multi_label_scores([[], []], [[], []], NAMES)
    assert (scores.accuracy, scores.f1, scores.averages["f1_samples"]) == (1.0, None, None)


# Numbers


def test_numbers_worked_by_hand() -> None:
    scores = regression_scores([1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 3.0, 5.0])
    # Errors -1, 0, 0, -1; the mean of the actual is 3, its variance 1.5.
    assert (scores.mse, scores.mae) == (0.5, 0.5)
    assert scores.r2 == pytest.approx(1 - 0.5 / 1.5)


@pytest.mark.parametrize("seed", range(3))
def test_numbers_equal_those_of_scikit_learn_and_scipy(seed: int) -> None:
    draw = np.random.default_rng(seed)
    actual = draw.integers(0, 6, 60).astype(float)
    predicted = np.round(actual + draw.normal(size=60), 1)  # with ties on both sides
    scores = regression_scores(predicted.tolist(), actual.tolist())
    assert scores.mse == pytest.approx(theirs.mean_squared_error(actual, predicted))
    assert scores.mae == pytest.approx(theirs.mean_absolute_error(actual, predicted))
    assert scores.r2 == pytest.approx(theirs.r2_score(actual, predicted))
    assert scores.pearson == pytest.approx(scipy.stats.pearsonr(actual, predicted)[0])
    assert scores.spearman == pytest.approx(scipy.stats.spearmanr(actual, predicted)[0])


def test_a_constant_side_has_no_correlation() -> None:
    flat = regression_scores([2.0, 2.0], [1.0, 3.0])
    assert (flat.pearson, flat.spearman, flat.r2) == (None, None, 0.0)
    same = regression_scores([1.0, 3.0], [2.0, 2.0])
    assert (same.pearson, same.r2, same.mae) == (None, None, 1.0)
    tenths = regression_scores([0.1] * 3, [0.3, 0.1, 0.2])  # their mean is not exactly 0.1
    assert (tenths.pearson, tenths.spearman) == (None, None)
    with pytest.raises(ValueError, match="one for each"):
        regression_scores([], [])


# Tags


def test_tags_worked_by_hand() -> None:
    actual = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-PER"]]
    predicted = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "B-PER"]]
    scores = tagging_scores(predicted, actual, TAGS)
    # Four of six words are right. Entities: wanted 3, given 4, right LOC and the second PER.
    assert scores.accuracy == pytest.approx(4 / 6)
    assert (scores.entity_precision, scores.entity_recall) == (2 / 4, 2 / 3)
    assert scores.entity_f1 == pytest.approx(2 * 2 / (4 + 3))
    # Words with another tag than O: wanted 4, given 4, right 3.
    assert (scores.precision, scores.recall, scores.f1) == (3 / 4, 3 / 4, 3 / 4)
    # Words within an entity: wanted 4, given 4, in common 3.
    assert (scores.token_entity_precision, scores.token_entity_recall) == (3 / 4, 3 / 4)
    assert [(one.label, one.support, one.predicted) for one in scores.per_entity] == [("LOC", 1, 2), ("PER", 2, 2)]
    assert scores.never_predicted == ["I-PER"]
    assert scores.f1_average == "micro, without O"


@pytest.mark.parametrize("seed", range(6))
def test_entities_equal_those_of_seqeval_whatever_the_tags_follow(seed: int) -> None:
    draw = random.Random(seed)
    actual = [[draw.choice(TAGS) for _ in range(draw.randrange(1, 9))] for _ in range(60)]
    predicted = [[tag if draw.random() < 0.7 else draw.choice(TAGS) for tag in row] for row in actual]
    scores = tagging_scores(predicted, actual, TAGS)
    report = classification_report(actual, predicted, output_dict=True, zero_division=0)
    assert scores.entity_f1 == pytest.approx(seqeval_f1(actual, predicted))
    micro = report["micro avg"]
    assert (scores.entity_precision, scores.entity_recall) == pytest.approx((micro["precision"], micro["recall"]))
    for one in scores.per_entity:
        expected = [report[one.label][name] for name in ("precision", "recall", "f1-score", "support")]
        assert [one.precision, one.recall, one.f1, one.support] == pytest.approx(expected)
    flat = [[tag for row in rows for tag in row] for rows in (actual, predicted)]
    learned = three_of(flat[0], flat[1], labels=TAGS[1:], average="micro")
    assert [scores.precision, scores.recall, scores.f1] == pytest.approx(learned)
    inside = [[tag != "O" for tag in tags] for tags in flat]
    assert scores.token_entity_f1 == pytest.approx(theirs.f1_score(inside[0], inside[1]))


def three_of(actual: Any, predicted: Any, **how: Any) -> list[float]:
    *found, _ = theirs.precision_recall_fscore_support(actual, predicted, zero_division=0, **how)
    return [float(value) for value in found]


@pytest.mark.parametrize(
    ("tags", "actual", "predicted"),
    [
        (["O", "SRC", "TGT"], ["SRC", "SRC", "O", "TGT"], ["SRC", "SRC", "O", "O"]),
        (["O", "I-SRC", "I-TGT"], ["I-SRC", "I-SRC", "O", "I-TGT"], ["I-SRC", "I-SRC", "O", "O"]),
        (["O", "B-S", "E-S", "S-T"], ["B-S", "E-S", "O", "S-T"], ["B-S", "E-S", "O", "O"]),
        (["O", "B-S", "L-S", "U-T"], ["B-S", "L-S", "O", "U-T"], ["B-S", "L-S", "O", "O"]),
        (["O", "B", "I"], ["B", "I", "O", "B"], ["B", "I", "O", "O"]),
    ],
)
def test_every_notation_of_tags_gives_the_same_entities(
    tags: list[str], actual: list[str], predicted: list[str]
) -> None:
    scores = tagging_scores([predicted], [actual], tags)
    assert (scores.entity_precision, scores.entity_recall) == (1.0, 0.5)
    assert sum(one.support for one in scores.per_entity) == 2


def test_neighbours_in_bilou_are_two_entities() -> None:
    tags = ["O", "U-PER"]
    scores = tagging_scores([["U-PER", "U-PER"]], [["U-PER", "U-PER"]], tags)
    assert scores.per_entity[0].support == 2


def test_parts_of_speech_have_no_entities() -> None:
    scores = tagging_scores([["NOUN", "VERB"]], [["NOUN", "NOUN"]], ["NOUN", "VERB"])
    assert (scores.accuracy, scores.f1, scores.f1_average) == (0.5, 0.5, "micro")
    assert (scores.entity_f1, scores.token_entity_f1, scores.per_entity) == (None, None, [])


def test_rows_without_any_entity_have_no_entity_figures() -> None:
    empty = tagging_scores([["O", "O"]], [["O", "O"]], TAGS)
    assert (empty.accuracy, empty.f1, empty.entity_f1, empty.token_entity_f1) == (1.0, None, None, None)
    missed = tagging_scores([["O", "O"]], [["O", "B-PER"]], TAGS)
    assert (missed.entity_precision, missed.entity_recall, missed.entity_f1) == (0.0, 0.0, 0.0)


def test_a_row_needs_a_tag_for_each_word() -> None:
    with pytest.raises(ValueError, match="different number of predictions than words"):
        tagging_scores([["O"]], [["O", "O"]], TAGS)


# What is written


@pytest.mark.parametrize(
    "scores",
    [
        classification_scores([0, 1, 2], [0, 1, 1], NAMES),
        multi_label_scores([[0], [1]], [[0], [1, 2]], NAMES),
        regression_scores([1.0, 2.0], [1.0, 3.0]),
        tagging_scores([["O", "B-PER"]], [["O", "B-PER"]], TAGS),
    ],
)
def test_every_figure_can_be_written_and_watched_by_a_gate(scores: Any) -> None:
    found = scores.as_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    figures = {name for name, value in found.items() if isinstance(value, int | float)}
    assert figures <= set(GATE_NAMES)
