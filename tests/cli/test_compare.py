"""`compare`: variants of recipes, runs that are there, fronts, doubts, learning curves and their report."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from peftcli.compare.results import best_of, pareto_front
from peftcli.compare.run import VariantRunner
from peftcli.compare.variants import Axis, Variant, check_variants, make_variants, read_axes, split_values
from peftcli.errors import RecipeError
from peftcli.plan.machine import Machine, ModelFacts
from peftcli.plan.optimizer import Trained
from peftcli.plan.plan import Decision
from peftcli.plan.planner import make_plan
from peftcli.progress import Silent
from peftcli.recipe.load import load_recipe
from peftcli.report.compare import make_comparison
from peftcli.report.markdown import render_markdown
from peftcli.results import CompareJson, VariantRow, save
from peftcli.run_dir import RunDir, read_json, write_json, write_text
from peftcli.summary import write_metrics
from peftcli.train.baseline import reuse_blocker

CPU = Machine("cpu", "a processor", None, native_bf16=False, arch_list=(), memory_bytes=16 * 2**30)
LINEAR = tuple(f"model.layers.0.{leaf}" for leaf in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
LINEAR += ("model.layers.0.mlp.down_proj",)
Write = Callable[..., Path]
Cli = Callable[..., int]


# --- variants


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("4,16, 64", ["4", "16", "64"]),
        ("[q_proj],[q_proj, v_proj]", ["[q_proj]", "[q_proj, v_proj]"]),
        ("{method: lora, r: 4},{method: ia3}", ["{method: lora, r: 4}", "{method: ia3}"]),
        ("\"a,b\",'c,d',e", ['"a,b"', "'c,d'", "e"]),
        ("[a],b]", ["[a]", "b]"]),
    ],
)
def test_values_are_split_at_commas_outside_brackets_and_quotes(text: str, values: list[str]) -> None:
    assert split_values(text) == values


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["adapter.r"], r"--vary adapter\.r: must have the form section\.key=value,value"),
        (["adapter.r="], r"must have the form"),
        (["adapter.r=4,,8"], r"must have the form"),
        (["=4,8"], r"must have the form"),
        (["adapter.r=4,4"], r"--vary adapter\.r: 4 is given twice; remove one"),
        (["adapter.r=4,8", "adapter.r=16,32"], r"--vary adapter\.r conflicts with --vary adapter\.r"),
        (["adapter={r: 4},{r: 8}", "adapter.alpha=1,2"], r"--vary adapter\.alpha conflicts with --vary adapter"),
    ],
)
def test_a_vary_that_cannot_be_read_says_why(texts: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_axes(texts)


def names_of(*texts: str, recipes: tuple[str, ...] = ("a.yaml",)) -> list[str]:
    return [one.name for one in make_variants([Path(name) for name in recipes], read_axes(texts), ())]


def test_the_matrix_is_the_product_and_its_names_are_words_a_folder_can_have() -> None:
    assert names_of("adapter.method=lora,ia3", "adapter.r=4,16") == ["lora-r4", "lora-r16", "ia3-r4", "ia3-r16"]
    assert names_of("adapter.target_modules=[q_proj],[q_proj,v_proj]") == ["q_proj", "q_proj-v_proj"]
    assert names_of("trainer.learning_rate=1e-3,0.005") == ["learning_rate-0.001", "learning_rate-0.005"]
    assert names_of("adapter.use_dora=true,false") == ["use_dora", "use_dora-false"]
    assert names_of("adapter={method: lora, r: 4},{method: ia3}") == ["lora-r4", "ia3"]
    assert names_of("model.name=../x/y z,/abs/é") == ["x-y-z", "abs"]
    assert names_of("dataset.max_train_samples=100,all") == ["rows-100", "rows-all"]
    assert names_of(recipes=("a.yaml", "sub/b.yaml", "other/a.yaml")) == ["a", "b", "a-2"]
    assert names_of("adapter.r=1,2", recipes=("a.yaml", "b.yaml")) == ["a-r1", "a-r2", "b-r1", "b-r2"]


def test_names_that_would_be_one_folder_are_kept_apart() -> None:
    assert names_of("dataset.prompt=a b,a-b,A b") == ["a-b", "a-b-2", "A-b-3"]


def test_all_rows_means_no_limit_and_each_run_has_the_name_of_its_variant() -> None:
    made = make_variants([Path("a.yaml")], read_axes(["dataset.max_train_samples=10,all"]), ["seed=1"])
    assert [one.overrides for one in made] == [
        ("seed=1", "dataset.max_train_samples=10", "name=rows-10"),
        ("seed=1", "dataset.max_train_samples=null", "name=rows-all"),
    ]
    named = make_variants([Path("a.yaml")], [Axis("adapter.r", ("1", "2"))], ["name=mine"])
    assert named[0].overrides == ("name=mine", "adapter.r=1")


def test_one_variant_alone_and_too_many_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"a comparison needs at least two variants; .*--vary adapter\.r=4,16"):
        make_variants([Path("a.yaml")], [], ())
    axes = [Axis(f"a.{number}", tuple("123456")) for number in range(3)]
    with pytest.raises(RecipeError, match="216 variants, but at most 200"):
        make_variants([Path("a.yaml")], axes, ())


def test_the_problems_of_all_variants_come_at_once_and_shared_ones_once(write_recipe: Write) -> None:
    recipe = write_recipe(trainer={"learning_rat": 1e-3})
    variants = make_variants([recipe], read_axes(["adapter.r=4,0", "adapter.dropout=0.1,2.0"]), ())
    with pytest.raises(RecipeError) as caught:
        check_variants(variants)
    said = str(caught.value)
    assert said.startswith("4 of 4 variants cannot be trained\nr4-dropout-0.1: ")
    assert said.count("did you mean trainer.learning_rate?") == 4
    assert "--vary adapter.r" in said and "--set adapter.r" not in said
    check_variants(make_variants([write_recipe()], read_axes(["adapter.r=4,8"]), ()))


def test_methods_with_different_keys_are_told_to_be_varied_whole(write_recipe: Write) -> None:
    recipe = write_recipe(quantization=None)
    with pytest.raises(
        RecipeError, match=r"adapter\.r has no effect with ia3(.|\n)*vary the whole section: --vary 'adapter="
    ):
        check_variants(make_variants([recipe], read_axes(["adapter.method=lora,ia3"]), ()))
    check_variants(make_variants([recipe], read_axes(["adapter={method: lora, r: 16},{method: ia3}"]), ()))


# --- fronts


def row(name: str, quality: float | None, cost: int | None, **more: Any) -> VariantRow:
    return VariantRow(**{"name": name, "status": "finished", "quality": quality, "adapter_bytes": cost} | more)


def test_the_front_holds_what_no_other_variant_beats_at_both() -> None:
    rows = [
        row("cheap", 0.2, 1),
        row("good", 0.9, 10),
        row("middle", 0.5, 5),
        row("beaten", 0.4, 6),
        row("dear", 0.9, 11),
    ]
    assert pareto_front(rows, "adapter_bytes", "higher") == ["cheap", "middle", "good"]
    assert pareto_front(rows, "adapter_bytes", "lower") == ["cheap"]


def test_equals_share_the_front_and_what_is_not_finished_or_not_measured_is_not_on_it() -> None:
    rows = [row("a", 0.5, 5), row("b", 0.5, 5), row("c", 0.9, None), row("d", 0.9, 1, status="failed")]
    assert pareto_front(rows, "adapter_bytes", "higher") == ["a", "b"]
    assert pareto_front(rows[:1], "adapter_bytes", "higher") == []


def test_the_best_of_a_column_is_named_unless_all_are_alike() -> None:
    rows = [row("a", 0.5, 5, loss=1.0), row("b", 0.7, 5, loss=0.5), row("c", 0.7, 5, loss=2.0)]
    assert best_of(rows, "higher") == {"quality": ["b", "c"], "loss": ["b"]}
    assert best_of(rows, "lower")["quality"] == ["a"]


# --- runs that are there


def sample_run(folder: Path, *, exact: float = 0.5, rows: int = 100, data: Path, **recipe: Any) -> Path:
    """A run as `train` leaves it, its figures made from its rank and its score."""
    rank = recipe.get("adapter", {}).get("r", 16)
    values = {"model": {"name": "tiny:llama"}, "dataset": {"path": str(data), "max_train_samples": rows}}
    values |= {"trainer": {"learning_rate": 5e-3}, **recipe}
    run = RunDir(folder)
    write_text(run.recipe, yaml.safe_dump({"name": folder.name, **values}))
    loaded = load_recipe(run.recipe).recipe
    facts = ModelFacts("m", "LlamaForCausalLM", 10**6, LINEAR, LINEAR, "lm_head", 2048)
    save(run.plan, make_plan(loaded, CPU, facts, lambda adapter: Trained(1000 * rank)).as_json())
    side = {"loss": 1 - exact / 2, "exact_match": exact}
    retention = {"path": "t.txt", "tokens": 10, "base_loss": 1.0, "adapter_loss": 1.0 + exact, "change": exact}
    train = {"steps": 6, "seconds": 10.0 + rank, "tokens_per_second": 900.0, "peak_memory_bytes": 10**9 + rank}
    answered = {"rows": 200, "generated_rows": 200, "base": {"loss": 2.0, "exact_match": 0.0}, "adapter": side}
    for path, value in (
        (run.train, {"status": "finished", **train}),
        (run.eval, answered | {"retention": retention | {"sha256": "aa"}}),
        (run.data, {"train_rows": rows, "fingerprint": {"train": f"{rows}", "test": "t"}, "cache": "reused"}),
        (run.environment, {"device": {"name": "a card", "count": 1}}),
    ):
        write_json(path, {"schema": 1, **value})
    write_text(run.log, "")
    run.adapter.mkdir(exist_ok=True)
    with (run.adapter / "adapter_model.safetensors").open("wb") as file:
        file.truncate(4000 * rank)
    write_metrics(run, [])
    return folder


@pytest.fixture
def three_runs(tmp_path: Path, things: Path) -> list[Path]:
    """Runs of rank 4, 16 and 64 that score 0.3, 0.5 and 0.52."""
    scores = {4: 0.3, 16: 0.5, 64: 0.52}
    return [
        sample_run(tmp_path / "runs" / f"r{r}", exact=exact, data=things, adapter={"r": r})
        for r, exact in scores.items()
    ]


def compared(folder: Path) -> Any:
    return read_json(folder / "compare.json")


def test_runs_that_are_there_are_compared_without_training(
    three_runs: list[Path], run_cli: Cli, capfd: Any, tmp_path: Path
) -> None:
    assert run_cli("compare", *three_runs) == 0
    said = capfd.readouterr().out
    found = compared(tmp_path / "runs" / "compare")
    assert found["status"] == "finished" and found["schema"] == 1 and found["doubts"] == []
    expected = {"key": "exact_match", "better": "higher", "rows": 200, "comparable": True, "rows_from": "test"}
    assert found["quality"] == expected
    by_name = {one["name"]: one for one in found["variants"]}
    assert by_name["r4"]["adapter_bytes"] == 16000 and by_name["r4"]["trainable_share"] == 4000 / 1_004_000
    assert by_name["r4"]["retention_change"] == 0.3 and by_name["r4"]["adapter_share"] == 0.004
    assert set(by_name["r4"]["best"]) >= {"adapter_bytes", "seconds", "retention_change", "trainable_parameters"}
    assert by_name["r64"]["best"] == ["quality", "loss"]
    assert found["fronts"]["adapter_bytes"] == ["r4", "r16", "r64"]
    assert "0.520 ★" in said and re.search(r"^adapter size +1 r4, 2 r16, 3 r64", said, re.M)
    assert said.splitlines()[-3].startswith("r64 has the best exact match, 0.520 on 200 held-out rows.")
    assert said.splitlines()[-1].endswith("peftcli train runs/r64 --set trainer.num_train_epochs=6")


def test_equal_scores_are_said_and_the_loss_decides(run_cli: Cli, capfd: Any, tmp_path: Path, things: Path) -> None:
    runs = [sample_run(tmp_path / f"r{r}", exact=0.0, data=things, adapter={"r": r}) for r in (4, 16)]
    for folder, loss in zip(runs, (1.668, 1.75), strict=True):
        evaluation = json.loads((folder / "eval.json").read_text())
        write_json(folder / "eval.json", evaluation | {"adapter": {"loss": loss, "exact_match": 0.0}})
        write_metrics(RunDir(folder), [])
    assert run_cli("compare", *runs, "--output-dir", "out") == 0
    said = capfd.readouterr().out
    assert "All variants have the same exact match (0.000). By loss, r4 is lowest (1.668)." in said
    assert "to train r4 further" in said and compared(tmp_path / "out")["fronts"] == {}


def test_runs_on_other_rows_have_no_ranking(run_cli: Cli, capfd: Any, tmp_path: Path, things: Path) -> None:
    runs = [sample_run(tmp_path / f"r{r}", exact=r / 100, data=things, adapter={"r": r}) for r in (4, 16)]
    data = json.loads((runs[0] / "data.json").read_text())
    write_json(runs[0] / "data.json", data | {"fingerprint": {"train": "100", "test": "other"}})
    assert run_cli("compare", *runs, "--output-dir", "out") == 0
    said = capfd.readouterr().out
    assert "The variants were scored on different held-out rows, so there is no ranking." in said
    assert "has the best" not in said and "further" not in said
    found = compared(tmp_path / "out")
    assert found["fronts"] == {} and found["quality"]["comparable"] is False
    assert all(not {"quality", "loss"} & set(one["best"]) for one in found["variants"])
    assert [one["rows"] for one in found["variants"]] == [200, 200]


def test_the_verdict_says_when_the_rows_do_not_settle_it(three_runs: list[Path], run_cli: Cli, tmp_path: Path) -> None:
    run_cli("compare", *three_runs, "--output-dir", "out")
    report = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    assert "r64 has the best exact match, 0.520 on 200 held-out rows. The difference is not significant" in report
    assert "interval of r16 overlaps its. The smallest adapter of these is that of r16" in report


def test_the_page_has_every_variant_every_front_and_no_address(
    three_runs: list[Path], run_cli: Cli, tmp_path: Path
) -> None:
    class Seen(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: list[str] = []
            self.text = ""

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.tags.append(tag)

        def handle_data(self, data: str) -> None:
            self.text += data

    run_cli("compare", *three_runs, "--output-dir", "out")
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    seen = Seen()
    seen.feed(page)
    assert seen.tags.count("svg") == 4 and "script" not in seen.tags and "http" not in page.replace("http-equiv", "")
    for words in ("1 r4", "2 r16", "3 r64", "Against adapter size", "Against forgetting", "out: comparison"):
        assert words in seen.text, words
    run_cli("compare", *three_runs, "--output-dir", "out")
    assert (tmp_path / "out" / "compare.html").read_text(encoding="utf-8") == page


def test_json_is_one_object_and_equals_the_file(
    three_runs: list[Path], run_cli: Cli, capfd: Any, tmp_path: Path
) -> None:
    assert run_cli("compare", *three_runs, "--output-dir", "out", "--json") == 0
    assert json.loads(capfd.readouterr().out) == compared(tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "change", "doubt"),
    [
        ("data.json", {"fingerprint": {"test": "u"}}, "not evaluated on the same held-out rows"),
        ("eval.json", {"generated_rows": 50}, "not evaluated on the same held-out rows"),
        ("environment.json", {"device": {"name": "another card", "count": 1}}, "did not run on the same device"),
        ("eval.json", {"retention": {"sha256": "bb"}}, "not measured on the same text"),
    ],
)
def test_what_makes_figures_not_comparable_is_said(
    three_runs: list[Path], run_cli: Cli, tmp_path: Path, file: str, change: dict[str, Any], doubt: str
) -> None:
    path = three_runs[0] / file
    write_json(path, json.loads(path.read_text()) | change)
    run_cli("compare", *three_runs, "--output-dir", "out")
    found = compared(tmp_path / "out")["doubts"]
    assert len(found) == 1 and doubt in found[0] and "r4 versus r16, r64" in found[0]
    assert doubt in (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")


def test_one_learning_rate_for_several_methods_is_said(run_cli: Cli, tmp_path: Path, things: Path) -> None:
    adapters: list[dict[str, Any]] = [{"method": "lora", "r": 4}, {"method": "ia3"}]
    runs = [sample_run(tmp_path / one["method"], data=things, adapter=one) for one in adapters]
    run_cli("compare", *runs, "--output-dir", "out")
    assert compared(tmp_path / "out")["doubts"] == [
        "All methods were trained with the learning rate 0.005; methods differ in their best learning "
        "rate, so this ranking may be unfair."
    ]


def test_runs_that_differ_in_their_rows_alone_make_a_learning_curve(
    run_cli: Cli, capfd: Any, tmp_path: Path, things: Path
) -> None:
    runs = [sample_run(tmp_path / f"n{n}", exact=n / 1000, rows=n, data=things) for n in (400, 10, 100)]
    runs.append(sample_run(tmp_path / "other", exact=0.9, rows=900, data=things, adapter={"r": 2}))
    run_cli("compare", *runs, "--output-dir", "out")
    curves = compared(tmp_path / "out")["curves"]
    assert [[point["rows"] for point in curve["points"]] for curve in curves] == [[10, 100, 400]]
    assert [point["variant"] for point in curves[0]["points"]] == ["n10", "n100", "n400"]
    curve = re.findall(r"^ +(10|100|400) +(0\.\d+) +n\1 *$", capfd.readouterr().out, re.M)
    assert curve == [("10", "0.010"), ("100", "0.100"), ("400", "0.400")]
    assert "## Learning curve" in (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")


def test_a_run_without_figures_is_a_row_and_no_point(three_runs: list[Path], run_cli: Cli, tmp_path: Path) -> None:
    (three_runs[1] / "metrics.json").unlink()
    assert run_cli("compare", *three_runs, "--output-dir", "out") == 0
    found = compared(tmp_path / "out")
    assert found["status"] == "unfinished"
    assert [one["status"] for one in found["variants"]] == ["finished", "not started", "finished"]
    assert found["variants"][1]["quality"] is None and "r16" not in found["fronts"]["adapter_bytes"]
    assert "‖ 2 of 3 finished" in (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")


def test_a_comparison_of_nothing_measured_says_so() -> None:
    nothing = make_comparison(CompareJson(name="a", status="unfinished"))
    assert "there is no ranking" in render_markdown(nothing)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/r4"], "a comparison needs at least two runs"),
        (["runs/r4", "runs"], "runs: this is a folder|runs/r4 is a run and other targets are recipes"),
        (["runs/r4", "runs/r16", "--vary", "adapter.r=1,2"], "--vary, --set and --smoke need recipes"),
        (["none.yaml", "--vary", "adapter.r=1,2"], "none.yaml: no such file"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    three_runs: list[Path], run_cli: Cli, capfd: Any, words: list[str], message: str
) -> None:
    assert run_cli("compare", *words) == 2
    assert re.search(message, capfd.readouterr().err)


def test_runs_of_one_name_in_two_folders_keep_apart(run_cli: Cli, tmp_path: Path, things: Path) -> None:
    runs = [sample_run(tmp_path / folder / "run", data=things) for folder in ("a", "b")]
    run_cli("compare", *runs, "--output-dir", "out")
    assert [one["name"] for one in compared(tmp_path / "out")["variants"]] == ["a-run", "b-run"]


# --- the figures of one base for several runs


STAMP = {"data.train": "x", "data.test": "t", "base": "b", "versions.torch": "2"}
DECISIONS = {"device": "cpu", "model.dtype": "float32", "model.attention": "sdpa"}


def lend(folder: Path, things: Path, **recipe: Any) -> RunDir:
    """A finished run that has measured its base."""
    run = RunDir(sample_run(folder, data=things, **recipe))
    evaluation = {"schema": 1, "base": {"loss": 2.0}, "baseline_seconds": 1.0, "samples": []}
    write_json(run.eval, evaluation)
    write_json(run.train, {"schema": 1, "status": "finished", "stamp": STAMP})
    decisions = [{"key": key, "value": value, "reason": ""} for key, value in DECISIONS.items()]
    write_json(run.plan, {"schema": 1, "decisions": decisions})
    return run


def borrower(tmp_path: Path, things: Path, **recipe: Any) -> Any:
    return load_recipe(RunDir(sample_run(tmp_path / "b", data=things, **recipe)).recipe).recipe


def planned(task: str = "causal-lm", **decided: str) -> Any:
    """The parts of a plan that are looked at."""
    decisions = [Decision(key, value, "") for key, value in (DECISIONS | decided).items()]
    return SimpleNamespace(task=task, evaluation=SimpleNamespace(baseline=True), decisions=decisions)


@pytest.mark.parametrize(
    ("recipe", "stamp", "decided", "reason"),
    [
        ({"adapter": {"r": 4}, "rows": 7, "trainer": {"learning_rate": 1e-4}}, {"data.train": "y"}, {}, None),
        ({"evaluation": {"rows": 5}}, {}, {}, "evaluation.rows: null -> 5"),
        ({"trainer": {"completion_only_loss": False}}, {}, {}, "trainer.completion_only_loss: not set -> false"),
        ({"seed": 7}, {}, {}, "seed: 42 -> 7"),
        ({}, {"data.test": "u"}, {}, "data.test differs"),
        ({}, {"versions.torch": "3"}, {}, "versions.torch differs"),
        ({}, {"base": None}, {}, "base differs"),
        ({}, {}, {"model.dtype": "bfloat16"}, "model.dtype: float32 -> bfloat16"),
    ],
)
def test_the_figures_of_a_base_are_taken_over_only_where_nothing_differs_that_they_depend_on(
    tmp_path: Path, things: Path, recipe: dict[str, Any], stamp: Any, decided: Any, reason: str | None
) -> None:
    source_run = lend(tmp_path / "a", things)
    asked = borrower(tmp_path, things, **recipe)
    plan = planned(**{"task": "causal-lm"} | decided)
    assert reuse_blocker(source_run, asked, plan, STAMP | stamp) == reason


def test_a_base_is_measured_anew_for_a_head_and_where_the_lender_has_not_measured_its_own(
    tmp_path: Path, things: Path
) -> None:
    source_run, asked = lend(tmp_path / "a", things), borrower(tmp_path, things)
    assert reuse_blocker(source_run, asked, planned("sequence-classification"), STAMP) == "the base includes a new head"
    source_run.train.unlink()
    assert reuse_blocker(source_run, asked, planned(), STAMP) == "its results are missing"
    with pytest.raises(RecipeError, match="not a run folder"):
        reuse_blocker(RunDir(tmp_path / "none"), asked, planned(), STAMP)


# --- training


def test_the_error_of_a_child_is_kept_whole_and_what_it_says_is_named(write_recipe: Write, tmp_path: Path) -> None:
    lines: list[str] = []

    class Heard(Silent):
        def note(self, text: str) -> None:
            lines.append(text)

    variant = Variant("bad", write_recipe(), (), ("adapter.r=0", "adapter.alpha=-1"))
    with VariantRunner() as children:
        code, error = children.train(variant, tmp_path / "bad", [], Heard())
    assert code == 2 and error is not None
    assert error.splitlines()[0].endswith("has 2 problems") and "adapter.alpha" in error and "adapter.r" in error
    assert lines[0].startswith("bad | error: ")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_variants_are_trained_once_failures_are_rows_and_the_base_is_measured_once(
    write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(trainer={"max_steps": 2})
    words = ("compare", recipe, "--vary", "adapter.target_modules=[q_proj],[v_proj],[k_proj]", "--output-dir", "out")
    (tmp_path / "out" / "k_proj").mkdir(parents=True)
    (tmp_path / "out" / "k_proj" / "thesis.txt").write_text("years of work")
    assert run_cli(*words) == 2
    said = capfd.readouterr()
    found = compared(tmp_path / "out")
    assert [one["status"] for one in found["variants"]] == ["finished", "finished", "failed"]
    assert [one["data_cache"] for one in found["variants"]][1] == "reused"
    assert found["variants"][2]["exit_code"] == 2 and "thesis.txt" in found["variants"][2]["error"]
    assert found["variants"][0]["base_quality"] == found["variants"][1]["base_quality"] is not None
    assert "reusing the baseline of q_proj" in said.err
    assert "1 of 3 variants failed; the exit code 2 is that of k_proj" in said.err
    assert "note: k_proj: failed, exit code 2" in said.out
    trained = (tmp_path / "out" / "q_proj" / "train.json").read_bytes()
    assert run_cli(*words) == 2
    assert (tmp_path / "out" / "q_proj" / "train.json").read_bytes() == trained
    said = capfd.readouterr().err
    assert f"finished earlier; remove {tmp_path / 'out' / 'q_proj'} to train it again" in said
    assert "--overwrite" not in said
    assert run_cli("compare", "out") == 0
    again = compared(tmp_path / "out")
    assert again["variants"][2]["error"] == found["variants"][2]["error"]
    assert [one["varied"] for one in again["variants"]] == [one["varied"] for one in found["variants"]]


def test_a_stop_ends_the_child_with_a_checkpoint_and_begins_no_other(write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe(trainer={"max_steps": 400}, evaluation={"baseline": False}, quantization=None)
    command = [
        sys.executable,
        "-m",
        "peftcli",
        "compare",
        str(recipe),
        "--vary",
        "adapter.r=2,4",
        "--output-dir",
        "out",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    log = tmp_path / "out" / "r2" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "stopped by SIGTERM with 0 of 2 variants finished; run the same command again to resume" in said
    assert [one["status"] for one in compared(tmp_path / "out")["variants"]] == ["stopped", "not started"]
    assert list((tmp_path / "out" / "r2" / "checkpoints").glob("checkpoint-*"))
