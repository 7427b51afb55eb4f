"""What the report says of classes: which are taken for which, how each fares, and what stands in the data."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from peftcli.metrics.classification import classification_scores, multi_label_scores
from peftcli.metrics.regression import regression_scores
from peftcli.metrics.tagging import tagging_scores
from peftcli.report.blocks import Collapsed, Notices, Section, Table
from peftcli.report.build import make_report
from peftcli.report.html import render_page
from peftcli.report.load import Stages
from peftcli.report.markdown import render_markdown
from peftcli.report.metrics import classes_section, metric_table, primary_metric
from peftcli.results import DataJson, MetricsJson, PlanJson
from peftcli.typed_json import parse

NAMES = ["ham", "spam"]


def stages(
    task: str = "sequence-classification",
    data: dict[str, Any] | None = None,
    merge: dict[str, Any] | None = None,
    **sides: dict[str, Any],
) -> Stages:
    return Stages(
        plan=PlanJson(name="spam"),
        metrics=parse(MetricsJson, {"task": task, "merge": merge, **sides}),
        data=None if data is None else parse(DataJson, data),
    )


def section(**sides: Any) -> Section:
    found = classes_section(stages(**sides))
    assert found is not None
    return found


def tables(found: Section) -> list[Table]:
    """The tables of a section, the folded ones too."""
    opened = [block.table if isinstance(block, Collapsed) else block for block in found.blocks]
    return [block for block in opened if isinstance(block, Table)]


def listed(scores: Any) -> dict[str, Any]:
    """Scores as `eval.json` holds them."""
    found: dict[str, Any] = json.loads(json.dumps(scores.as_dict()))
    return found


def spam(**more: Any) -> dict[str, Any]:
    actual, predicted = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 0, 0, 0, 0, 0]
    return {"loss": 0.4} | listed(classification_scores(predicted, actual, NAMES)) | more


def test_the_matrix_has_actual_classes_in_lines_with_their_shares() -> None:
    found = section(adapter=spam())
    matrix = next(table for table in tables(found) if table.columns[0].startswith("Actual"))
    assert matrix.columns == ("Actual ↓ predicted →", "ham", "spam")
    assert [[cell.text for cell in row] for row in matrix.rows] == [
        ["ham", "5 · 83.3 %", "1 · 16.7 %"],
        ["spam", "1 · 25.0 %", "3 · 75.0 %"],
    ]
    assert matrix.rows[1][2].shade == 0.75 and matrix.rows[0][0].shade is None
    assert "Precision, recall and F1 are those of the class spam." in found.lead


def test_each_class_has_its_line_and_what_nothing_defines_is_a_dash() -> None:
    scores = classification_scores([0, 0, 1], [0, 2, 1], ["cat", "dog", "eel", "fox"]).as_dict()
    found = section(adapter=scores)
    classes = next(table for table in tables(found) if table.columns[0] == "Class")
    lines = {row[0].text: [cell.text for cell in row[1:]] for row in classes.rows}
    assert lines["cat"] == ["0.500", "1.000", "0.667", "1", "2"]
    assert lines["eel"] == ["–", "0.000", "0.000", "1", "0"]
    assert lines["fox"] == ["–", "–", "–", "0", "0"]
    assert "Never predicted, though held-out rows have it: eel." in [
        item for block in found.blocks if isinstance(block, Notices) for item in block.items
    ]
    assert "macro averages" in found.lead


def test_many_classes_show_their_most_frequent_mistakes() -> None:
    names = [f"kind {number}" for number in range(30)]
    actual = [number % 30 for number in range(300)]
    predicted = [3 if number == 7 else number for number in actual]
    found = section(adapter=classification_scores(predicted, actual, names).as_dict())
    mistakes = next(table for table in tables(found) if table.columns[0] == "Actual")
    assert [cell.text for cell in mistakes.rows[0]] == ["kind 7", "kind 3", "10", "100 %"]
    assert not any(table.columns[0].startswith("Actual ↓") for table in tables(found))


def test_entities_come_before_the_tags_of_words() -> None:
    tags = ["O", "B-LOC", "I-LOC"]
    scores = tagging_scores([["B-LOC", "O", "O"]], [["B-LOC", "I-LOC", "O"]], tags).as_dict()
    found = section(task="token-classification", adapter=scores)
    assert tables(found)[0].columns[0] == "Entity"
    assert [cell.text for cell in tables(found)[0].rows[0]] == ["LOC", "0.000", "0.000", "0.000", "1", "1"]
    assert [block.title for block in found.blocks if isinstance(block, Collapsed)] == ["Figures of each tag"]


def test_sets_of_classes_have_no_matrix_and_say_how_they_are_averaged() -> None:
    found = section(adapter=multi_label_scores([[0], [1]], [[0, 1], [1]], NAMES).as_dict())
    assert not any(table.columns[0].startswith("Actual") for table in tables(found))
    averages = next(table for table in tables(found) if table.columns[0] == "Average")
    assert [row[0].text.split(" ")[0] for row in averages.rows] == ["macro", "micro", "weighted", "samples"]


def test_numbers_have_no_classes_but_figures_with_a_direction() -> None:
    made = stages(adapter={"loss": 0.5} | regression_scores([1.0, 2.0, 4.0], [1.0, 2.0, 3.0]).as_dict())
    assert classes_section(made) is None
    metric = primary_metric(made.metrics)
    assert metric is not None and metric.key == "pearson"
    table = metric_table(made)
    assert table is not None
    assert [row[0].text for row in table.rows] == [
        "Loss per row ↓",
        "Mean squared error ↓",
        "Mean absolute error ↓",
        "Pearson correlation ↑",
        "Spearman correlation ↑",
        "R squared ↑",
    ]


def test_the_results_name_the_loss_of_the_task_and_leave_averages_to_the_classes() -> None:
    table = metric_table(stages(base=spam(accuracy=0.5), adapter=spam()))
    assert table is not None
    titles = [row[0].text for row in table.rows]
    assert titles[0] == "Loss per row ↓" and "F1, macro ↑" in titles
    assert not any("precision_macro" in title for title in titles)
    assert "Precision, recall and F1 are those of the class spam." in table.note


def test_page_and_markdown_hold_the_matrix_and_no_text_of_a_class_becomes_markup() -> None:
    scores = classification_scores([0, 1, 1], [0, 1, 0], ["<b>ham</b>", "a|b"]).as_dict()
    report = make_report(stages(adapter=scores))
    page, text = render_page(report), render_markdown(report)
    assert "<b>ham" not in page and "&lt;b&gt;ham" in page
    assert re.search(r'<td class="number" style="--shade: 50" dir="auto">1 · 50.0 %</td>', page)
    assert "| &lt;b&gt;ham&lt;/b&gt; | 1 · 50.0 % | 1 · 50.0 % |" in text
    assert 'href="#classes"' in page


@pytest.mark.parametrize("matrix", [None, [[1]], [[1, 2], [3]], [[1, -2], [3, 4]], [[1, 2]]])
def test_a_matrix_that_is_not_square_is_not_drawn(matrix: Any) -> None:
    found = section(adapter=spam(confusion_matrix=matrix))
    assert not any(table.columns[0].startswith("Actual") for table in tables(found))


def test_the_data_of_labelled_rows_are_told_without_end_tokens(tmp_path: Path) -> None:
    data = {
        "format": "tagging",
        "rows": 20,
        "train_rows": 16,
        "test_rows": 4,
        "conflicting_rows": 1,
        "conflicting_examples": [{"row": "a.conll:9", "first": "a.conll:1"}],
        "labels": {"of": "tags", "distinct": 2, "train": {"O": 90, "B-X": 10}, "test": {"O": 30, "B-X": 0}}
        | {"total": {"train": 100, "test": 30}},
        "words": {"words": 130, "tagged": 10, "silent": 2, "cut": 0, "entities": {"X": 10}},
    }
    text = render_markdown(make_report(stages(task="token-classification", data=data, adapter=spam())))
    assert "| O | 90 | 90.0 % | 100 % |" in text
    assert "| Without a token of their own | 2 | 1.5 % |" in text
    assert "| Entities: X | 10 |" in text
    assert "| Text of an earlier row, another label | 1 | 6.2 % |" in text
    assert "| Text of an earlier row, another label | a.conll:9 | a.conll:1 |" in text
    assert "end token" not in text


def test_nothing_is_said_per_token_where_rows_have_labels() -> None:
    merged = {"merge": {"top1_agreement": 1.0}}
    made = stages(data={"format": "classification", "rows": 4}, base=spam(accuracy=0.5), adapter=spam(), **merged)
    head = render_markdown(make_report(made)).partition("## Merge")[0]
    assert "per token" not in head and "per trained token" not in head
    assert "next token" not in head and "same label as the adapter" in head


def test_the_spread_of_numbers_is_told() -> None:
    side = {"min": 0.0, "median": 2.5, "max": 5.0, "mean": 2.4, "deviation": 1.5}
    data = {"format": "classification", "train_rows": 8, "numbers": {"of": "stars", "train": side, "test": side}}
    text = render_markdown(make_report(stages(data=data, adapter=spam())))
    assert "| stars | Least | Median | Most | Mean | Deviation |" in text
    assert "| Training | 0 | 2.5 | 5 | 2.4 | 1.5 |" in text
