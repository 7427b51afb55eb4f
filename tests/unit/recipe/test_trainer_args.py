"""Arguments of a pasted trainer section that are keys of other sections: taken over, dropped, or refused."""

import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from peftcli.errors import RecipeError
from peftcli.recipe.dump import dump_recipe
from peftcli.recipe.load import Loaded, load_recipe
from peftcli.recipe.trainer_args import IDLE, MOVED, OWNED, PRECISION

START = "model: {name: 'tiny:llama'}\ndataset: {path: a.csv}\n"


def load(folder: Path, text: str, *overrides: str) -> Loaded:
    path = folder / "recipe.yaml"
    path.write_text(START + text, encoding="utf-8")
    return load_recipe(path, overrides)


def refused(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(folder, text, *overrides)
    return str(caught.value).replace(str(folder / "recipe.yaml"), "FILE")


VALIDATED = "dataset.split.validation_size=0.2"
"""Evaluation during training needs validation rows."""
VALUES = {
    "seed": ("7", 7, "8"),
    "output_dir": ("out", "out", "runs/x"),
    "run_name": ("try-1", "try-1", "other"),
    "report_to": ("wandb", ("wandb",), "[mlflow]"),
    "max_length": ("512", 512, "256"),
    "max_seq_length": ("512", 512, "256"),
    "eos_token": ("<|im_end|>", "<|im_end|>", "</s>"),
    "per_device_eval_batch_size": ("8", 8, "16"),
    "per_gpu_eval_batch_size": ("8", 8, "16"),
    "bf16": ("true", "bfloat16", "float16"),
    "fp16": ("true", "float16", "auto"),
}
"""Of each argument a value as it is pasted, the same where it ends up, and another one."""
HOMES = MOVED | dict.fromkeys(PRECISION, ("model", "dtype"))


def test_each_argument_that_moves_is_tried_below() -> None:
    assert VALUES.keys() == HOMES.keys()
    assert HOMES.keys() | IDLE.keys() <= OWNED.keys()


@pytest.mark.parametrize("name", VALUES)
def test_a_value_moves_to_the_key_that_has_its_meaning(tmp_path: Path, name: str) -> None:
    pasted, kept, _ = VALUES[name]
    home = ".".join(HOMES[name])
    loaded = load(tmp_path, f"trainer:\n  max_steps: 5\n  {name}: {pasted}\n")
    assert attrgetter(home)(loaded.recipe) == kept
    assert dict(loaded.recipe.trainer) == {"max_steps": 5}
    (notice,) = loaded.notices
    assert notice.startswith(f"{loaded.path}:5: trainer.{name} is used as {home}: ")
    stored = tmp_path / "stored.yaml"
    stored.write_text(dump_recipe(loaded.recipe, stored), encoding="utf-8")
    again = load_recipe(stored)
    assert attrgetter(home)(again.recipe) == kept and again.notices == ()


@pytest.mark.parametrize("name", VALUES)
def test_the_same_value_in_both_places_is_noted_and_another_one_refused(tmp_path: Path, name: str) -> None:
    pasted, kept, other = VALUES[name]
    home = ".".join(HOMES[name])
    same = "[wandb]" if name == "report_to" else kept
    section = f"trainer: {{max_steps: 5, {name}: '{pasted}'}}\n" if isinstance(kept, str) else ""
    section = section if section and name not in PRECISION else f"trainer: {{max_steps: 5, {name}: {pasted}}}\n"
    loaded = load(tmp_path, section, f"{home}={same}")
    assert loaded.notices == (f"{loaded.path}:3: trainer.{name} repeats {home} (--set {home}) and is ignored",)
    assert attrgetter(home)(loaded.recipe) == kept
    said = refused(tmp_path, section, f"{home}={other}")
    assert said.startswith(f"FILE:3: trainer.{name} = ") and said.endswith(f"(--set {home}); keep {home}")


def test_two_old_names_of_one_key_must_agree(tmp_path: Path) -> None:
    said = refused(tmp_path, "trainer:\n  per_device_eval_batch_size: 8\n  per_gpu_eval_batch_size: 4\n")
    assert said == (
        "FILE:5: trainer.per_gpu_eval_batch_size = 4 contradicts evaluation.batch_size = 8 (line 4); "
        "keep evaluation.batch_size"
    )


@pytest.mark.parametrize(
    ("value", "trackers"),
    [("none", ()), ("null", ()), ("[]", ()), ("[none]", ()), ("[wandb, tensorboard]", ("wandb", "tensorboard"))],
)
def test_report_to_names_trackers_in_any_form(tmp_path: Path, value: str, trackers: tuple[str, ...]) -> None:
    assert load(tmp_path, f"trainer: {{report_to: {value}}}\n").recipe.report.trackers == trackers


def test_an_unknown_tracker_is_wrong_at_its_own_line(tmp_path: Path) -> None:
    said = refused(tmp_path, "trainer:\n  report_to: [wandbb]\n")
    assert said.startswith("FILE:4: report.trackers[0] = ") and said.endswith("did you mean wandb?")


@pytest.mark.parametrize(
    ("section", "dtype"),
    [
        ("bf16: true, fp16: false", "bfloat16"),
        ("fp16: true, bf16: false", "float16"),
    ],
)
def test_of_two_precisions_the_one_that_is_on_counts(tmp_path: Path, section: str, dtype: str) -> None:
    assert load(tmp_path, f"trainer: {{{section}}}\n").recipe.model.dtype == dtype


def test_a_precision_that_is_off_is_dropped_only_where_another_dtype_is_chosen(tmp_path: Path) -> None:
    loaded = load(tmp_path, "trainer: {bf16: false}\n", "model.dtype=float32")
    assert loaded.recipe.model.dtype == "float32"
    assert loaded.notices[0].endswith("trainer.bf16: false is ignored: model.dtype is float32")
    for dtype in ("auto", "bfloat16"):
        said = refused(tmp_path, "trainer: {bf16: false}\n", f"model.dtype={dtype}")
        assert said == "FILE:3: trainer.bf16 cannot be set here: set model.dtype: float16 or float32"


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in IDLE.items() for value in values])
def test_a_value_that_asks_for_nothing_is_dropped_and_said(tmp_path: Path, name: str, value: Any) -> None:
    written = {None: "null", True: "true", False: "false", "": "''"}.get(value, value) if value != [] else "[]"
    loaded = load(tmp_path, f"trainer: {{max_steps: 5, {name}: {written}}}\n")
    assert dict(loaded.recipe.trainer) == {"max_steps": 5}
    assert loaded.recipe == load(tmp_path, "trainer: {max_steps: 5}\n").recipe
    assert "is ignored, because it is the default" in loaded.notices[0]


OTHERS = sorted(OWNED.keys() - HOMES.keys())


@pytest.mark.parametrize("name", OTHERS)
def test_what_no_key_means_is_refused_with_the_place_to_write_it(tmp_path: Path, name: str) -> None:
    assert (
        refused(tmp_path, f"trainer: {{{name}: 3.5}}\n") == f"FILE:3: trainer.{name} cannot be set here: {OWNED[name]}"
    )


def test_a_section_that_is_missing_or_no_section_is_reported_once(tmp_path: Path) -> None:
    said = refused(tmp_path, "evaluation: 3\ntrainer: {per_device_eval_batch_size: 8}\n")
    assert said == "FILE:3: evaluation must be a section of keys, not 3"
    path = tmp_path / "none.yaml"
    path.write_text("model: {name: m}\ntrainer: {max_length: 8}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r":1: dataset is missing; add at least dataset: \{path: \.\.\.\}$"):
        load_recipe(path)


def test_a_stage_cannot_change_what_all_stages_share(tmp_path: Path) -> None:
    stages = "stages:\n" + "".join(
        f"  - {{name: s{number}, trainer: {{{name}: {values[0]}}}}}\n"
        for number, (name, values) in enumerate(VALUES.items())
    )
    lines = refused(tmp_path, stages.split("  - {name: s9")[0]).split("\n  ")[1:]
    assert [line.split(" cannot be set in a stage")[0] for line in lines] == [
        f"FILE:{number}: trainer.{name}" for number, name in enumerate([*VALUES][:9], start=4)
    ]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("eval_steps: 10", "trainer.eval_steps has no effect without eval_strategy; add eval_strategy: steps"),
        (
            "eval_steps: 10, eval_strategy: epoch",
            "trainer.eval_steps has no effect with eval_strategy: epoch; set eval",
        ),
        ("eval_delay: 5", "trainer.eval_delay has no effect without eval_strategy; add eval_strategy: steps"),
        ("save_steps: 10, save_strategy: epoch", "trainer.save_steps has no effect with save_strategy: epoch"),
        (
            "logging_steps: 5, logging_strategy: epoch",
            "trainer.logging_steps has no effect with logging_strategy: epoch",
        ),
        ("max_steps: 5, num_train_epochs: 3", "trainer.num_train_epochs has no effect with max_steps: 5"),
        ("packing_strategy: bfd", "trainer.packing_strategy has no effect without packing: true"),
        ("optim: sgd, adam_beta2: 0.95", "trainer.adam_beta2 has no effect with optim: sgd"),
        ("optim: adafactor, adam_epsilon: 1e-6", "trainer.adam_epsilon has no effect with optim: adafactor"),
    ],
)
def test_an_argument_that_the_libraries_accept_and_do_not_use_is_said(tmp_path: Path, section: str, said: str) -> None:
    (notice,) = load(tmp_path, f"trainer: {{{section}}}\n", VALIDATED).notices
    assert notice.startswith(f"{tmp_path / 'recipe.yaml'}:3: {said}")


@pytest.mark.parametrize(
    "section",
    [
        "eval_steps: 10, eval_strategy: steps, eval_delay: 1",
        "save_steps: 10",
        "logging_steps: 5",
        "max_steps: -1, num_train_epochs: 3",
        "packing_strategy: bfd, packing: true",
        "optim: adamw_torch, adam_beta2: 0.95",
    ],
)
def test_an_argument_that_is_used_gets_no_notice(tmp_path: Path, section: str) -> None:
    assert load(tmp_path, f"trainer: {{{section}}}\n", VALIDATED).notices == ()


def test_the_notice_of_a_stage_names_its_own_argument_only(tmp_path: Path) -> None:
    text = "trainer: {eval_strategy: epoch}\nstages: [{name: a, trainer: {eval_steps: 5}}, {name: b}]\n"
    notices = load(tmp_path, text, VALIDATED).notices
    assert [notice.partition(": ")[2][:36] for notice in notices] == ["trainer.eval_steps has no effect wit"]


@pytest.mark.parametrize("optimizer", sorted({"sgd", "adagrad", "rmsprop", "adafactor"}))
def test_transformers_gives_these_optimizers_no_arguments_of_adam(tmp_path: Path, optimizer: str) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    model = torch.nn.Linear(2, 2)
    arguments = TrainingArguments(str(tmp_path), optim=optimizer, adam_beta2=0.123, adam_epsilon=0.123, use_cpu=True)
    options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)[1]
    assert "0.123" not in repr(options)


def _followed(folder: Path, trainer: str) -> int:
    """Add what the messages about a trainer section ask for, until there are none; gives the number of messages."""
    for count in range(4):
        try:
            load(folder, f"trainer:\n{trainer}", VALIDATED)
        except RecipeError as problem:
            (name, value) = re.findall(r"(?:; add|; use) (\w+)(?:: (\{.*\}|[\w-]+))?", str(problem))[-1]
            key = name if value else "optim"
            kept = [line for line in trainer.splitlines() if not line.strip().startswith(f"{key}:")]
            trainer = "\n".join([*kept, f"  {key}: {value or name}"])
        else:
            return count
    raise AssertionError(f"the advice has no end: {trainer}")


def test_the_advice_for_every_scheduler_and_optimizer_ends_in_a_valid_recipe(tmp_path: Path) -> None:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    asked = {kind.value: _followed(tmp_path, f"  lr_scheduler_type: {kind.value}") for kind in SchedulerType}
    needs = {"cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "reduce_lr_on_plateau", "greedy"}
    assert {name for name, count in asked.items() if count} == needs
    asked = {one.value: _followed(tmp_path, f"  optim: {one.value}") for one in OptimizerNames}
    assert asked["galore_adamw"] == asked["lomo"] == 1 and asked["adamw_torch"] == asked["sgd"] == 0
