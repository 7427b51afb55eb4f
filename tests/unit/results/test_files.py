"""The files of a run as dataclasses: each class has the keys that the code writes, no more and no less."""

import json
import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from peftcli.errors import DataError
from peftcli.metrics.classification import classification_scores, multi_label_scores
from peftcli.metrics.tagging import tagging_scores
from peftcli.plan.module_selection import Selection, choose_modules
from peftcli.results import (
    CompareJson,
    DataJson,
    EnvironmentJson,
    EvalJson,
    MergeJson,
    MetricsJson,
    PlanJson,
    RanksJson,
    Scores,
    TrainJson,
    load,
    load_or_default,
    save,
)
from peftcli.run_dir import read_json, write_json
from peftcli.train.adalora import RankAllocation
from peftcli.typed_json import WrongType, dump, parse

FILES: dict[str, type[Any]] = {
    "plan.json": PlanJson,
    "environment.json": EnvironmentJson,
    "data.json": DataJson,
    "train.json": TrainJson,
    "eval.json": EvalJson,
    "merge.json": MergeJson,
    "metrics.json": MetricsJson,
}
OF_CHATS = {
    *("template", "template_mismatch_rows", "template_mismatch_examples", "template_mismatch_fix"),
    *("context_only_rows", "context_only_examples", "context_only_fix"),
}
"""Keys of `data.json` that only rows with messages have; tests/unit/data/test_shown_answers.py covers them."""
NOT_IN_SAMPLES = {"Calibration", "EvaluationTime", "ForecastChange", "OutOfMemory", "HeldOutPair", "TemplateMismatch"}
"""What this short run has none of; their writers name the fields, so mypy or the constructor finds another one."""


@pytest.fixture(scope="module")
def validated(
    recipe_in: Callable[..., Path], cli_in: Callable[..., int], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that chose its best step with validation rows."""
    folder = tmp_path_factory.mktemp("validated")
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    recipe = recipe_in(
        folder,
        dataset={"split": {"test_size": 0.25, "validation_size": 0.25, "seed": 1}},
        trainer=evaluated | {"max_steps": 2, "early_stopping_patience": 2},
        evaluation={"baseline": False, "rows": 2},
    )
    assert cli_in(folder, "train", recipe, "--output-dir", "run") == 0
    return folder / "run"


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_a_run_wrote_is_the_same_after_reading_and_writing(
    real_run: Path, validated: Path, name: str
) -> None:
    for run in (real_run, validated):
        if (run / name).exists():
            value = read_json(run / name)
            assert dump(parse(FILES[name], value)) == value


def test_the_data_of_every_task_are_the_same_after_reading_and_writing(label_data: list[dict[str, Any]]) -> None:
    for facts in label_data:
        assert dump(parse(DataJson, facts)) == json.loads(json.dumps(facts)) | {"ends_with": None}


@pytest.mark.parametrize(
    "scores",
    [
        classification_scores([0, 1], [0, 0], ["cat", "dog"]),
        multi_label_scores([[0], [1]], [[0, 1], [2]], ["cat", "dog", "eel"]),
        tagging_scores([["O", "B-X"]], [["O", "B-X"]], ["O", "B-X"]),
    ],
)
def test_scores_of_labels_are_the_same_after_reading_and_writing(scores: Any) -> None:
    value = json.loads(json.dumps(scores.as_dict()))
    made = dump(parse(Scores, value))
    assert made == {key: part for key, part in value.items() if part is not None or key in made}


def seen_keys(hint: Any, value: Any, seen: dict[type, set[str]]) -> None:
    """Collect the keys that the objects of each dataclass have in a file."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is types.UnionType:
        for part in arguments:
            seen_keys(part, value, seen)
    elif origin is tuple and isinstance(value, list):
        for one in value:
            seen_keys(arguments[0], one, seen)
    elif is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        known = {one.name for one in fields(hint) if "other_keys" not in one.metadata}
        seen.setdefault(hint, set()).update(known & value.keys())
        for name, part in get_type_hints(hint).items():
            seen_keys(part, value.get(name), seen)


def all_classes(hint: Any) -> set[type]:
    found = {part for one in get_args(hint) for part in all_classes(one)}
    if is_dataclass(hint) and isinstance(hint, type):
        found |= {hint, *(part for one in get_type_hints(hint).values() for part in all_classes(one))}
    return found


def test_every_field_is_a_key_that_something_writes(
    real_run: Path, validated: Path, label_data: list[dict[str, Any]], tmp_path: Path
) -> None:
    history = [{"step": step, "ranks": [step, 2]} for step in (1, 2)]
    allocation = SimpleNamespace(_config=SimpleNamespace(init_r=6, target_r=4), modules=["a", "b"], history=history)
    RankAllocation.write(allocation, tmp_path / "ranks.json")  # type: ignore[arg-type]
    chosen = choose_modules({"a.q": 2.0, "a.v": 1.0}, {"a.q": 10, "a.v": 10}, 1000, 0.01, 4)
    save(tmp_path / "selection.json", chosen.as_json())
    found: list[tuple[type, Any]] = [(kind, read_json(real_run / name)) for name, kind in FILES.items()]
    found += [(kind, read_json(validated / name)) for name, kind in FILES.items() if (validated / name).exists()]
    found += [(DataJson, facts) for facts in label_data]
    found += [(RanksJson, read_json(tmp_path / "ranks.json")), (Selection, read_json(tmp_path / "selection.json"))]
    found += [
        (Scores, json.loads(json.dumps(one.as_dict())))
        for one in (
            classification_scores([0, 1], [0, 0], ["cat", "dog"]),
            tagging_scores([["O", "B-X"]], [["O", "B-X"]], ["O", "B-X"]),
        )
    ]
    seen: dict[type, set[str]] = {}
    for kind, value in found:
        seen_keys(kind, value, seen)
    classes = {one for kind, _ in found for one in all_classes(kind)}
    assert {one.__name__ for one in classes - seen.keys()} <= NOT_IN_SAMPLES
    written_elsewhere = {
        **{"EvalJson": {"merged", "seconds"}, "Sample": {"merged"}},  # by `eval` of a merged model
        "DataSource": {"share", "train_rows", "mixed_rows"},  # of several sources
        "DataJson": OF_CHATS,
    }
    for kind, keys in seen.items():
        expected = {one.name for one in fields(kind) if "other_keys" not in one.metadata}
        assert expected - keys <= written_elsewhere.get(kind.__name__, set()), kind


def test_a_comparison_is_the_same_after_reading_and_writing(
    real_run: Path, cli_in: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(real_run, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints", "merged"))
    assert cli_in(tmp_path, "compare", real_run, "other", "--output-dir", "both", "--json") == 0
    value = read_json(tmp_path / "both" / "compare.json")
    assert dump(parse(CompareJson, value)) == value == json.loads(capfd.readouterr().out)


def test_an_unknown_key_is_ignored_at_every_depth(real_run: Path, tmp_path: Path) -> None:
    def with_more(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: with_more(part) for key, part in value.items()} | {"of_a_later_version": [{"a": None}]}
        return [with_more(part) for part in value] if isinstance(value, list) else value

    value = read_json(real_run / "plan.json")
    more = with_more(value) | {"trainer": value["trainer"]}  # whose keys are names of arguments
    more["forecast"]["memory_bytes"].pop("of_a_later_version")  # whose keys are names of parts
    write_json(tmp_path / "plan.json", more)
    assert load(PlanJson, tmp_path / "plan.json") == load(PlanJson, real_run / "plan.json")


def test_train_json_of_schema_1_has_its_optimizations_under_an_earlier_name(real_run: Path, tmp_path: Path) -> None:
    value = read_json(real_run / "train.json")
    assert value["schema"] == 2 and value["optimizations"]
    write_json(tmp_path / "train.json", value | {"schema": 1, "levers": value.pop("optimizations")})
    before, now = load(TrainJson, tmp_path / "train.json"), load(TrainJson, real_run / "train.json")
    assert before is not None and replace(before, schema=2) == now


def test_a_forecast_of_schema_1_has_its_suggestions_and_gpu_under_earlier_names(tmp_path: Path) -> None:
    change = {"keys": ["adapter.r=8"], "total_bytes": 5, "fits": True}
    write_json(tmp_path / "now.json", {"schema": 2, "forecast": {"suggestions": [change], "time": {"gpu": "t4"}}})
    write_json(tmp_path / "before.json", {"schema": 1, "forecast": {"mends": [change], "time": {"card": "t4"}}})
    before, now = load(PlanJson, tmp_path / "before.json"), load(PlanJson, tmp_path / "now.json")
    assert before is not None and now is not None and now.forecast is not None
    assert now.forecast.suggestions[0].fits and now.forecast.time.gpu == "t4"
    assert before.forecast == now.forecast


def test_an_out_of_memory_step_of_schema_1_has_its_micro_batches_under_an_earlier_name() -> None:
    before = parse(TrainJson, {"out_of_memory": [{"step": 3, "pieces": 4}]})
    assert before.out_of_memory[0].micro_batches == 4


def test_a_missing_key_and_null_give_the_default(tmp_path: Path) -> None:
    write_json(tmp_path / "plan.json", {"schema": 2, "name": None, "targets": None, "batch": {"effective": None}})
    assert load(PlanJson, tmp_path / "plan.json") == PlanJson()
    assert load(PlanJson, tmp_path / "none.json") is None
    assert load_or_default(PlanJson, tmp_path / "none.json") == PlanJson()


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text('{"schema": 1, "adapter": {"loss": NaN}, "seconds": Infinity}')
    found = load_or_default(EvalJson, tmp_path / "eval.json")
    assert found.seconds is None and found.adapter is not None and found.adapter.figure("loss") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has schema None"),
        ('{"schema": 3}', "has schema 3, but this peftcli reads schema 2"),
        ('{"schema": 1, "steps": "6"}', "steps is '6', but a whole number is expected; run the stage"),
        ('{"schema": 1, "steps": true}', "steps is True, but a whole number is expected"),
        ('{"schema": 1, "calibration": {"seconds": []}}', r"calibration.seconds is \[\], but a number is expected"),
    ],
)
def test_a_file_that_is_not_right_is_a_data_error_that_names_it(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load(TrainJson, path)
    assert str(caught.value).startswith(str(path)) and caught.value.exit_code == 3


def test_a_field_without_default_must_be_there() -> None:
    with pytest.raises(WrongType, match="kind is missing"):
        parse(Selection, {"batches": 1})
