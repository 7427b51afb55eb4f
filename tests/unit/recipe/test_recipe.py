"""The recipe room: what YAML means, what is refused and how, and what a loaded recipe holds."""

import dataclasses
import os
import string
import subprocess
import sys
import warnings
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from peftcli.errors import RecipeError
from peftcli.recipe.dump import changed_keys, dump_recipe, fingerprint
from peftcli.recipe.fields import Gate, duration_text, parse_duration, parse_gate
from peftcli.recipe.library_args import installed_arguments
from peftcli.recipe.load import Loaded, load_recipe
from peftcli.recipe.messages import unknown_key
from peftcli.recipe.problems import Problems
from peftcli.recipe.template import render, template_columns
from peftcli.recipe.trainer_args import BOUNDS, OWNED, REMOVED, RENAMED, WHOLE_FROM_ONE
from peftcli.recipe.yaml import parse_yaml

SMALL = "model: {name: 'tiny:llama'}\ndataset: {path: rows.csv}\n"
FULL = """\
name: products
seed: 7
output_dir: runs/here
model: {name: ./base, revision: main, dtype: float16, attention: eager, chat_template: chat.jinja}
quantization: {bits: 4, type: fp4, double_quant: false, compute_dtype: float16}
adapter:
  {method: lora, r: 64, alpha: 16, dropout: 0.1, target_modules: [q_proj, v_proj], use_rslora: true,
   use_dora: true, modules_to_save: [lm_head], bias: none}
dataset:
  path: data/*.csv
  join: [{path: departments.csv, on: department_id}, {path: /data/more.csv, on: [a, b]}]
  prompt: "{product_name} ->:"
  completion: " {department}\\n"
  test: {path: test.csv}
  max_length: 512
  max_train_samples: 100
trainer:
  per_device_train_batch_size: 4
  learning_rate: 1e-05
  lr_scheduler_type: cosine
  lr_scheduler_kwargs: {num_cycles: 0.5}
  eval_strategy: no
evaluation: {batch_size: 8, max_new_tokens: 16, samples: 0, rows: 50, temperature: 0.7, top_p: 0.9,
  baseline: false}
gates: {exact_match: ">= 0.8", loss: "< 2"}
budget: {wall_clock: 8h30m, save_every: 90.5s}
report: {trackers: [wandb, tensorboard]}
"""


def load(folder: Path, text: str, *overrides: str, name: str = "recipe.yaml") -> Loaded:
    """Write a recipe and load it."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def refused(folder: Path, text: str, *overrides: str) -> str:
    """The message for a recipe that cannot be loaded, with FILE for its path."""
    with pytest.raises(RecipeError) as caught:
        load(folder, text, *overrides)
    return str(caught.value).replace(str(folder / "recipe.yaml"), "FILE")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("5e-5", 5e-5),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1", -1),
        ("+3", 3),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2025-11-02", "2025-11-02"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("'1'", "1"),
        ('"null"', "null"),
        ("[no, 1e-3]", ["no", 1e-3]),
        ("{on: off}", {"on": "off"}),
        ("=", "="),
        ("0b1", "0b1"),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text: str, value: Any) -> None:
    got = parse_yaml(f"key: {text}", Problems("r.yaml"))[0]
    assert got == {"key": value}
    assert type(got["key"]) is type(value)


def test_an_octal_look_alike_is_read_as_decimal_and_noted(tmp_path: Path) -> None:
    loaded = load(tmp_path, SMALL + "adapter: {r: 010}\n")
    assert loaded.recipe.adapter.r == 10
    assert "adapter.r = 010 means 10" in loaded.notices[0]


def test_the_safe_loader_of_pyyaml_stays_as_it_was(tmp_path: Path) -> None:
    load(tmp_path, SMALL)
    assert yaml.safe_load("a: 2e-4\nb: no") == {"a": "2e-4", "b": False}


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALL.encode())
    assert load_recipe(path).recipe.model.name == "tiny:llama"


def test_utf_16_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(SMALL.encode("utf-16"))
    with pytest.raises(RecipeError, match=r":1: the file is UTF-16; save it as UTF-8$"):
        load_recipe(path)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(f"k{i}: [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n" for i in range(9)),
        "a: &a [*a]\n",
        "a: " + "[" * 3000 + "]" * 3000,
        "a: " + "{b: " * 3000 + "1" + "}" * 3000,
        "- " * 3000 + "x",
        "a: " + "x" * 1_000_001,
    ],
    ids=["alias bomb", "cycle", "deep lists", "deep mappings", "deep blocks", "more than 1 MB"],
)
def test_a_hostile_file_is_refused(tmp_path: Path, text: str) -> None:
    refused(tmp_path, text)  # a file that is expanded first takes all memory, or hours


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "products.yaml").write_text(SMALL)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "prodcts.yaml")
    path = tmp_path / "prodcts.yaml"
    assert str(caught.value) == f"{path}: no such file; did you mean {tmp_path / 'products.yaml'}?"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such file; the folder .*nowhere does not exist either"):
        load_recipe(tmp_path / "nowhere" / "r.yaml")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="this is a folder; pass the recipe's YAML file in it"):
        load_recipe(tmp_path)


def test_all_problems_are_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = (
        "model: {name: 'tiny:llama'}\ndataset:\n  path: rows.csv\n  path: other.csv\n"
        "trainer: {max_steps: 4.7}\nadapter: {lora_r: 8, dropout: 1.5}\n"
    )
    assert refused(tmp_path, text, "seed=-1") == (
        "FILE has 5 problems\n"
        "  FILE:4: dataset.path is set twice; the first is on line 3\n"
        "  FILE:5: trainer.max_steps = 4.7: must be a whole number\n"
        "  FILE:6: adapter.lora_r is not a recipe key; did you mean adapter.r?\n"
        "  FILE:6: adapter.dropout = 1.5: must be less than 1\n"
        "  --set seed: seed = -1: must be at least 0"
    )


def test_the_smallest_recipe_has_every_default(tmp_path: Path) -> None:
    recipe = load(tmp_path, SMALL, name="my products.v2.yaml").recipe
    assert recipe.name == "my-products.v2"
    assert recipe.seed == 42
    assert recipe.quantization is None
    assert (recipe.adapter.r, recipe.adapter.alpha, recipe.adapter.target_modules) == (16, 32.0, "all-linear")
    assert recipe.dataset.split.test_size == 0.2
    assert dict(recipe.trainer) == {}
    assert recipe.gates == ()


def test_a_full_recipe_holds_what_was_written(tmp_path: Path) -> None:
    recipe = load(tmp_path, FULL).recipe
    assert recipe.quantization is not None and recipe.quantization.type == "fp4"
    assert recipe.adapter.target_modules == ("q_proj", "v_proj")
    assert [join.on for join in recipe.dataset.join] == [("department_id",), ("a", "b")]
    assert recipe.dataset.completion == " {department}\n"
    assert recipe.trainer["learning_rate"] == 1e-5
    assert recipe.trainer["eval_strategy"] == "no"
    assert recipe.gates == (Gate("exact_match", ">=", 0.8), Gate("loss", "<", 2.0))
    assert (recipe.budget.wall_clock, recipe.budget.save_every) == (30600.0, 90.5)


def test_a_recipe_cannot_be_changed(tmp_path: Path) -> None:
    recipe = load(tmp_path, FULL).recipe
    with pytest.raises(ValidationError):
        recipe.seed = 1
    with pytest.raises(ValidationError):
        recipe.adapter.r = 1
    assert isinstance(recipe.trainer, MappingProxyType)


def test_a_value_of_zero_is_a_value(tmp_path: Path) -> None:
    text = SMALL + "seed: 0\nevaluation: {samples: 0, temperature: 0}\ntrainer: {max_grad_norm: 0}\n"
    recipe = load(tmp_path, text).recipe
    assert (recipe.seed, recipe.evaluation.samples, recipe.trainer["max_grad_norm"]) == (0, 0, 0)


def test_paths_are_relative_to_the_file_and_absolute_afterwards(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    recipe = load(tmp_path, FULL).recipe
    assert recipe.model.name == str(tmp_path / "base")
    assert recipe.model.chat_template == str(tmp_path / "chat.jinja")
    assert recipe.dataset.path == str(tmp_path / "data/*.csv")
    assert [join.path for join in recipe.dataset.join] == [
        str(tmp_path / "departments.csv"),
        "/data/more.csv",
    ]
    assert recipe.dataset.test is not None and recipe.dataset.test.path == str(tmp_path / "test.csv")
    assert recipe.output_dir == "runs/here"


def test_a_model_is_a_folder_when_it_is_there_and_a_hub_id_otherwise(tmp_path: Path) -> None:
    (tmp_path / "org" / "base").mkdir(parents=True)
    text = "model: {name: org/base}\ndataset: {path: rows.csv}\n"
    assert load(tmp_path, text).recipe.model.name == str(tmp_path / "org" / "base")
    assert load(tmp_path, text.replace("org/base", "org/other")).recipe.model.name == "org/other"
    assert load(tmp_path, text.replace("org/base", "~/base")).recipe.model.name == os.path.expanduser("~/base")


def test_a_relative_recipe_path_gives_absolute_data_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(SMALL)
    assert load_recipe(Path("recipe.yaml")).recipe.dataset.path == str(tmp_path / "rows.csv")


@pytest.mark.parametrize("text", [SMALL, FULL, FULL.replace("90.5s", "10min"), SMALL + "quantization: null\n"])
def test_a_dumped_recipe_loads_as_an_equal_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "base").mkdir()
    recipe = load(tmp_path, text, "trainer.warmup_steps=0.03").recipe
    target = tmp_path / "runs" / "products" / "recipe.yaml"
    target.parent.mkdir(parents=True)
    target.write_text(dump_recipe(recipe, target), encoding="utf-8")
    again = load_recipe(target).recipe
    assert again == recipe
    assert fingerprint(again) == fingerprint(recipe)
    assert dump_recipe(again, target) == target.read_text(encoding="utf-8")


def test_a_dump_keeps_relative_paths_relative_and_absolute_ones_absolute(tmp_path: Path) -> None:
    recipe = load(tmp_path, FULL).recipe
    text = dump_recipe(recipe, tmp_path / "runs" / "a" / "recipe.yaml")
    assert "path: ../../data/*.csv" in text
    assert "path: /data/more.csv" in text
    assert str(tmp_path) not in text


def test_a_dump_holds_only_what_was_given_or_differs(tmp_path: Path) -> None:
    recipe = load(tmp_path, SMALL + "adapter: {r: 16}\n").recipe
    assert dump_recipe(recipe, tmp_path / "r.yaml") == (
        "name: recipe\nmodel:\n  name: tiny:llama\nadapter:\n  r: 16\ndataset:\n  path: rows.csv\n"
    )


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_any_text_survives_a_dump(tmp_path: Path, text: str) -> None:
    recipe = load(tmp_path, SMALL).recipe
    kept = recipe.model_copy(update={"model": recipe.model.model_copy(update={"eos_token": text.replace("\0", "0")})})
    try:
        again = load(tmp_path, dump_recipe(kept, tmp_path / "recipe.yaml")).recipe
    except RecipeError as error:
        assert "secret" in str(error)
        return
    assert again.model.eos_token == kept.model.eos_token


def test_overrides_lay_over_the_file_and_make_sections(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        SMALL,
        "adapter.r=8",
        "trainer.learning_rate=2e-4",
        "trainer.lr_scheduler_type=cosine",
        "trainer.lr_scheduler_kwargs.num_cycles=2",
        f"dataset.path={tmp_path}/other.csv",
        "gates.exact_match=>= 0.8",
        "adapter.target_modules=[q_proj, v_proj]",
        "quantization={}",
        "budget.wall_clock=10min",
    ).recipe
    assert (recipe.adapter.r, recipe.trainer["learning_rate"]) == (8, 2e-4)
    assert recipe.trainer["lr_scheduler_kwargs"] == {"num_cycles": 2}
    assert recipe.dataset.path == str(tmp_path / "other.csv")
    assert recipe.gates == (Gate("exact_match", ">=", 0.8),)
    assert recipe.adapter.target_modules == ("q_proj", "v_proj")
    assert recipe.quantization is not None
    assert recipe.budget.wall_clock == 600


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.r=0", "--set adapter.r: adapter.r = 0: must be at least 1"),
        (
            "adapter.lora_r=8",
            "--set adapter.lora_r: adapter.lora_r is not a recipe key; did you mean adapter.r?",
        ),
        ("adapter.r", "--set adapter.r: must have the form section.key=value"),
        ("=3", "--set : must have the form section.key=value"),
        ("adapter..r=3", "--set adapter..r: must have the form section.key=value"),
        ("seed.x=3", "--set seed.x: seed is a single value, so it has no keys to set; set seed itself"),
        ("adapter.r=[1", "--set adapter.r: the list opened with [ is never closed with ]"),
        (
            "adapter.r=*x",
            "--set adapter.r: *x refers to an anchor that is not defined above it; write &x before the value that it "
            "refers to",
        ),
        (
            "trainer.save_only_model=true",
            "--set trainer.save_only_model: trainer.save_only_model cannot be set here: checkpoints must be "
            "resumable; remove it",
        ),
        (
            "dataset.name=a/b",
            "--set dataset.name: dataset.name excludes dataset.path (line 2); "
            "rows come from files, the Hub or a database; keep one",
        ),
    ],
)
def test_a_faulty_override_is_named_as_such(tmp_path: Path, override: str, message: str) -> None:
    assert refused(tmp_path, SMALL + "seed: 1\n", override) == message


def test_an_override_given_twice_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, SMALL, "seed=1", "seed=2") == "--set seed: is given twice; remove one"


def test_an_override_mends_a_fault_of_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, SMALL + "adapter: {r: 0}\n", "adapter.r=4").recipe.adapter.r == 4
    assert load(tmp_path, SMALL + "adapter:\n", "adapter.r=4").recipe.adapter.r == 4


TOKENS = [
    "hf_" + "aB3" * 12,
    "sk-" + "a1" * 24,
    "sk-proj-" + "Zz9_" * 12,
    "AKIA" + "ABCD1234EFGH5678",
    "ghp_" + "a" * 36,
]


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize(
    "place",
    [
        "model.revision={}",
        "trainer.hub_token={}",
        "nonsense={}",
        "dataset.join=[{}]",
        "{}=1",
        "{}",
        "gates.loss={}",
    ],
)
def test_a_secret_is_refused_and_never_shown(tmp_path: Path, token: str, place: str) -> None:
    message = refused(tmp_path, SMALL, place.format(token))
    assert token[:24] not in message
    assert token[-8:] not in message


def test_a_wandb_key_is_refused_under_a_key_that_says_so(tmp_path: Path) -> None:
    key = "0123456789abcdef" * 2 + "01234567"
    assert key not in refused(tmp_path, SMALL + f"report: {{wandb_api_key: {key}}}\n")
    commit = f"model: {{name: a/b, revision: '{key}', trust_remote_code: true}}\ndataset: {{path: rows.csv}}\n"
    assert load(tmp_path, commit).recipe.model.revision == key


@pytest.mark.parametrize("text", ["risk-adjusted-portfolio-optimization.csv", "hf_models/llama-base-of-the-year"])
def test_ordinary_names_are_no_secrets(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, SMALL, f"dataset.path={text}").recipe.dataset.path == str(Path(text).absolute())


@pytest.mark.parametrize(
    ("given", "kept", "notice"),
    [
        (
            "evaluation_strategy: steps",
            {"eval_strategy": "steps"},
            'evaluation_strategy is now eval_strategy; "steps"',
        ),
        (
            "warmup_ratio: 0.03",
            {"warmup_steps": 0.03},
            "warmup_ratio is now warmup_steps (below 1 it is a share of the steps); 0.03 is used",
        ),
        (
            "group_by_length: true",
            {"train_sampling_strategy": "group_by_length"},
            '"group_by_length" is used',
        ),
        ("group_by_length: false", {"train_sampling_strategy": "random"}, '"random" is used'),
        (
            "gradient_checkpointing: false",
            {"activation_checkpointing": False},
            "activation_checkpointing; false",
        ),
        ("no_cuda: true", {"use_cpu": True}, "no_cuda is now use_cpu; true is used"),
        ("adafactor: true", {"optim": "adafactor"}, "adafactor is now optim"),
        ("adafactor: false", {}, "was removed and is ignored"),
        (
            "per_gpu_train_batch_size: 4",
            {"per_device_train_batch_size": 4},
            "is now per_device_train_batch_size",
        ),
        ("save_safetensors: true", {}, "save_safetensors was removed and is ignored"),
        ("use_mps_device: true", {}, "use_mps_device was removed and is ignored"),
        ("packing_strategy: bfd-requeue", {"packing_strategy": "bfd_split"}, "is now bfd_split"),
        ("loss_type: chunked_nll", {"loss_type": "nll"}, "is now nll"),
    ],
)
def test_a_renamed_argument_is_translated_and_told(
    tmp_path: Path, given: str, kept: dict[str, Any], notice: str
) -> None:
    loaded = load(tmp_path, SMALL + f"trainer:\n  {given}\n")
    assert dict(loaded.recipe.trainer) == kept
    told = loaded.notices[0]
    assert told.startswith(f"{loaded.path}:4: trainer.")
    assert notice in told


def test_a_constant_schedule_with_a_warm_up_is_noted(tmp_path: Path) -> None:
    loaded = load(tmp_path, SMALL + "trainer:\n  lr_scheduler_type: constant\n  warmup_ratio: 0.1\n")
    assert "use constant_with_warmup" in loaded.notices[-1]


def test_the_arguments_read_from_source_are_those_of_sftconfig() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.trainer_utils import SchedulerType
        from transformers.training_args import OptimizerNames
        from trl import SFTConfig
    arguments = installed_arguments()
    assert arguments is not None
    assert set(arguments) == {field.name for field in dataclasses.fields(SFTConfig)}
    assert list(arguments["lr_scheduler_type"].choices) == [member.value for member in SchedulerType]
    assert list(arguments["optim"].choices) == [member.value for member in OptimizerNames]


def test_the_tables_of_trainer_names_agree_with_the_installed_version() -> None:
    arguments = installed_arguments()
    assert arguments is not None
    assert {rule.new for rule in RENAMED.values()} <= set(arguments)
    assert set(BOUNDS) <= set(arguments)
    assert set(WHOLE_FROM_ONE) <= set(arguments)
    assert not set(OWNED) & (set(RENAMED) | set(REMOVED))


def test_without_trl_the_trainer_section_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcli.recipe.trainer_args.installed_arguments", lambda: None)
    loaded = load(tmp_path, SMALL + "trainer: {anything: 1}\n")
    assert dict(loaded.recipe.trainer) == {"anything": 1}
    assert "trainer is not checked" in loaded.notices[0]


def test_loading_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(FULL)
    code = (
        "import sys; from pathlib import Path; from peftcli.recipe.load import load_recipe; "
        "from peftcli.recipe.dump import dump_recipe; "
        f"r = load_recipe(Path({str(tmp_path / 'recipe.yaml')!r})).recipe; dump_recipe(r, Path('x.yaml')); "
        "print([m for m in sys.modules if m.partition('.')[0] in "
        "('torch', 'transformers', 'trl', 'datasets', 'peft', 'accelerate', 'numpy', 'bitsandbytes')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        (("lora_r",), "adapter.r"),
        (("adapter", "lora_alpha"), "adapter.alpha"),
        (("model_name_or_path",), "model.name"),
        (("output-dir",), "output_dir"),
        (("epochs",), "trainer.num_train_epochs"),
        (("max_seq_length",), "dataset.max_length"),
        (("adapter", "R"), "adapter.r"),
        (("model", "learning_rate"), "trainer.learning_rate"),
        (("eval",), "evaluation"),
        (("dataset", "split", "test_sise"), "dataset.split.test_size"),
        (("dataset", "pat"), "dataset.path"),
        (("gradient_accumulation_step",), "trainer.gradient_accumulation_steps"),
    ],
)
def test_an_unknown_key_names_the_nearest(path: tuple[str, ...], meant: str) -> None:
    assert unknown_key(path).endswith(f"did you mean {meant}?")


def test_template_values_are_never_templates() -> None:
    row = {"a": "{b} {0.__class__} {{", "b": 2, "column with spaces": None}
    assert render("{a}|{b}|{{x}}|{column with spaces}", row) == "{b} {0.__class__} {{|2|{x}|None"
    assert template_columns("{a}{{b}}{c}") == ["a", "c"]
    with pytest.raises(KeyError):
        render("{missing}", row)


@pytest.mark.parametrize("template", ["{", "}", "{a", "a}", "{}", "{ }", "{a[0]}", "{a!r}", "{a:>3}", "{{{a"])
def test_a_template_with_more_than_plain_columns_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"character|column|brackets|templates do not support"):
        template_columns(template)


@pytest.mark.parametrize("text", ["", "90", "1.5", "m", "-1s", "0s", "1x", "30m8h", "1h 30m", "1e3s", "9" * 400 + "d"])
def test_a_duration_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"unit|duration"):
        parse_duration(text)


@given(st.floats(min_value=0.001, max_value=1e9))
def test_a_duration_is_written_as_it_is_read(seconds: float) -> None:
    assert parse_duration(duration_text(seconds)) == pytest.approx(seconds)


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([">=", "<=", ">", "<"]))
def test_a_gate_is_written_as_it_is_read(limit: float, operator: str) -> None:
    gate = Gate("loss", operator, limit)
    assert parse_gate("loss", gate.text) == gate


def test_a_gate_holds_its_limit() -> None:
    assert [Gate("loss", op, 1.0).met(1.0) for op in (">=", "<=", ">", "<")] == [True, True, False, False]


def test_changed_keys_name_old_and_new_value(tmp_path: Path) -> None:
    old = load(tmp_path, SMALL + "trainer: {learning_rate: 1e-4}\n").recipe
    new = load(tmp_path, SMALL + "adapter: {r: 64, alpha: 32}\ntrainer: {max_steps: 3}\n").recipe
    assert changed_keys(old, old) == []
    assert changed_keys(old, new) == [
        "adapter.r: 16 -> 64",
        "trainer.learning_rate: 0.0001 -> not set",
        "trainer.max_steps: not set -> 3",
    ]
    assert fingerprint(old) != fingerprint(new)


SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["yes", "{a}", "{", ">= 1", "8h", "~nobody/x", "a\0b", "\ud800", "hf_" + "a" * 30, "", "auto", "../x"]
    ),
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["path", "on", "text", "a", "r", "name"]), inner, max_size=3)
    ),
    max_leaves=5,
)


def keys_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a nested value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((*path, key), *keys_of(item, (*path, key)))]


BASE: dict[str, Any] = parse_yaml(FULL, Problems("full"))[0]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(keys_of(BASE)), value=VALUES, key=st.text(string.printable, max_size=8))
def test_a_mutated_recipe_loads_or_is_refused_and_nothing_else(
    tmp_path: Path, place: tuple[Any, ...], value: Any, key: str
) -> None:
    values = parse_yaml(FULL, Problems("full"))[0]
    holder = values
    for part in place[:-1]:
        holder = holder[part]
    holder[place[-1]] = value
    if isinstance(holder, dict) and key:
        holder[key] = value
    text = yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass")
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    try:
        loaded = load_recipe(path)
    except RecipeError as error:
        assert "Input should" not in str(error) and "pydantic" not in str(error)
        assert "is not a valid value" not in str(error)
        return
    path.write_text(dump_recipe(loaded.recipe, path), encoding="utf-8")
    assert load_recipe(path).recipe == loaded.recipe


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, len(FULL)), insert=st.text(max_size=6), length=st.integers(0, 5))
def test_a_torn_file_loads_or_is_refused_and_nothing_else(tmp_path: Path, cut: int, insert: str, length: int) -> None:
    text = FULL[:cut] + insert + FULL[cut + length :]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_recipe(path)
    except RecipeError as error:
        assert str(error)
