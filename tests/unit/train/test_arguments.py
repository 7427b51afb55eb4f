"""Trainer arguments: what validate refuses, what the machine cannot serve, and that none of them ends in a bug."""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import SchedulerType
from transformers.optimization import get_scheduler
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from peftcli.errors import MachineError, RecipeError
from peftcli.plan import requirements
from peftcli.plan.gpus import find_gpu, machine_with
from peftcli.plan.requirements import OPTIMIZER_PACKAGES, check_hardware, check_packages
from peftcli.plan.smoke import REAL_MACHINE, smoke_notices, smoke_recipe
from peftcli.recipe.library_args import Argument, installed_arguments
from peftcli.recipe.load import load_recipe
from peftcli.recipe.optimizers import IMPOSSIBLE, OPTIMIZER_ARGUMENTS, TARGETED
from peftcli.recipe.schedulers import MEASURED, scheduler_parameters
from peftcli.recipe.schema import Recipe
from peftcli.recipe.signatures import parameters
from peftcli.recipe.trainer_args import OWNED
from peftcli.recipe.trainer_values import COMPILE_MODES, COMPILERS
from peftcli.run_dir import read_json
from peftcli.train.arguments import naming_arguments

Cli = Callable[..., int]
Write = Callable[..., Path]

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
VALIDATED = {"split": {"test_size": 0.25, "validation_size": 0.25, "seed": 1}}
SCHEDULER_KWARGS: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
    "warmup_stable_decay": {"num_decay_steps": 1},
}
"""What a scheduler cannot go without."""


@pytest.fixture
def recipe(write_recipe: Write) -> Callable[..., Recipe]:
    """A function that loads a recipe with these trainer arguments."""

    def load(**arguments: Any) -> Recipe:
        return load_recipe(write_recipe(trainer=arguments, dataset=VALIDATED)).recipe

    return load


def refused(write: Write, arguments: dict[str, Any]) -> str:
    path = write(trainer=arguments, dataset=VALIDATED)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"metric_for_best_model": "f1"}, "causal-lm has no such metric; use one of loss, perplexity"),
        ({"metric_for_best_model": "eval_exact_mach"}, "did you mean exact_match?"),
        ({"greater_is_better": True}, "would choose the worst loss, of which lower is better"),
        (
            {"metric_for_best_model": "exact_match", "greater_is_better": False},
            "would choose the worst exact_match, of which higher is better",
        ),
        ({"early_stopping_patience": 2}, "counts evaluations during training; add eval_strategy"),
        ({"early_stopping_threshold": 0.1, **EVALUATED}, "has no effect without early_stopping_patience"),
        ({"early_stopping_patience": 0, **EVALUATED}, "must be at least 1"),
        ({"early_stopping_patience": 1.5, **EVALUATED}, "must be a whole number"),
        ({"early_stopping_pacience": 2, **EVALUATED}, "did you mean trainer.early_stopping_patience?"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs min_lr or min_lr_rate; add lr_scheduler_kwargs"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0, "min_lr_rate": 0.1}},
            "allows one",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lrr": 1e-5, "min_lr": 1e-5}},
            "min_lrr is not an argument of cosine_with_min_lr; did you mean min_lr?",
        ),
        ({"lr_scheduler_kwargs": {"num_cycles": 1}}, "linear, which has none"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "x"}}, "must be a number"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": "num_cycles=1"}, "must be a mapping"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_warmup_steps": 1}}, "set trainer.warmup_steps"),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-8}, "less than learning_rate"),
        ({"lr_scheduler_type": "greedy"}, "add eval_strategy"),
        ({"lr_scheduler_type": "greedy", **EVALUATED, "lr_scheduler_kwargs": {"factor": 1.5}}, "less than 1"),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, "set save_strategy: epoch"),
        ({"load_best_model_at_end": True}, "add eval_strategy"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 3},
            "save_steps (3) to be a multiple of eval_steps (2)",
        ),
        ({"save_strategy": "best"}, "add eval_strategy"),
        ({"optim": "adamw_torch_xla"}, "runs on TPUs"),
        ({"optim": "lomo"}, "during the backward pass"),
        ({"optim": "galore_adamw"}, "add optim_target_modules"),
        ({"optim_target_modules": "all-linear"}, "has no effect"),
        ({"optim": "sgd", "optim_args": "momentum"}, "name=value"),
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, "did you mean momentum?"),
        ({"optim": "sgd", "optim_args": "momentum=x"}, "momentum must be a number"),
        ({"optim": "sgd", "optim_args": "nesterov=true"}, "needs a momentum"),
        ({"optim": "rmsprop_bnb", "optim_args": "alpha=0.9"}, "as strings"),
        ({"optim_args": "alpha=0.9"}, "has no arguments"),
        ({"dataloader_prefetch_factor": 2}, "add dataloader_num_workers"),
        ({"dataloader_persistent_workers": True}, "add dataloader_num_workers"),
        ({"activation_checkpointing_kwargs": {"use_reentrent": False}}, "did you mean use_reentrant?"),
        ({"activation_checkpointing_kwargs": {"selective": True}}, "does not work with PEFT models"),
        ({"accelerator_config": {"even_batch": True}}, "did you mean even_batches?"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, "gradient_accumulation_steps"),
        ({"torch_compile_backend": "inductr"}, "did you mean inductor?"),
        ({"torch_compile_mode": "fastest"}, "must be default"),
        ({"torch_compile_mode": "default", "torch_compile": False}, "remove one"),
        ({"debug": "overflow"}, "must be underflow_overflow"),
        ({"pad_to_multiple_of": "x"}, "a whole number or auto"),
        ({"ddp_backend": "hccl"}, "must be nccl, gloo or mpi"),
        ({"include_num_input_tokens_seen": "some"}, "must be all"),
        ({"liger_kernel_config": {"rope": True}}, "without use_liger_kernel"),
        ({"truncation_mode": "keep_end"}, "dataset.too_long"),
        ({"pad_token": "<pad>"}, "peftcli chooses the padding token"),
    ],
)
def test_what_cannot_train_is_refused_before_anything_is_loaded(
    write_recipe: Write, arguments: dict[str, Any], words: str
) -> None:
    said = refused(write_recipe, arguments)
    assert words in said and "recipe.yaml:" in said


def test_every_scheduler_is_known_by_what_its_function_takes() -> None:
    import torch

    for kind in SchedulerType:
        takes = scheduler_parameters(kind.value)
        assert takes is not None, kind
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        kwargs = SCHEDULER_KWARGS.get(kind.value, {})
        get_scheduler(kind, optimizer, 0, 10, kwargs)
        needs = {name for name, (_, required) in takes.items() if required}
        assert needs <= kwargs.keys() <= takes.keys(), kind


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_a_scheduler_with_what_it_needs_is_valid(recipe: Any, kind: str) -> None:
    kwargs = SCHEDULER_KWARGS.get(kind)
    extra = EVALUATED if kind in MEASURED else {}
    given = {} if kwargs is None else {"lr_scheduler_kwargs": kwargs}
    assert recipe(lr_scheduler_type=kind, **given, **extra).trainer["lr_scheduler_type"] == kind


def test_what_one_stage_lacks_another_section_can_give(write_recipe: Write) -> None:
    floor = {"lr_scheduler_type": "cosine_with_min_lr"}
    stages = [{"name": "one", "trainer": floor}, {"name": "two", "trainer": {"lr_scheduler_type": "linear"}}]
    path = write_recipe(stages=stages, adapter=None)
    with pytest.raises(RecipeError, match="needs min_lr or min_lr_rate"):
        load_recipe(path)
    stages[1] = {"name": "two", "trainer": {"lr_scheduler_type": "cosine_with_min_lr"}}
    kwargs = {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    path = write_recipe(stages=stages, trainer=kwargs)
    assert load_recipe(path).recipe.stages[0].trainer["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}


def test_every_optimizer_is_free_or_impossible_or_has_its_package_named() -> None:
    names = {kind.value for kind in OptimizerNames}
    assert IMPOSSIBLE.keys() <= names
    own = ("adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop")  # of torch, transformers and bitsandbytes
    own += ("adamw_bnb", "adamw_8bit", "ademamix", "lion", "paged_")
    for name in names - IMPOSSIBLE.keys():
        assert name.startswith((*own, *OPTIMIZER_PACKAGES)), name
    for start in OPTIMIZER_ARGUMENTS:
        assert any(name.startswith(start) for name in names), start


def test_the_choices_for_compilation_are_those_of_torch_and_accelerate() -> None:
    from accelerate.utils.dataclasses import DynamoBackend
    from torch._dynamo import list_backends
    from torch._inductor import list_mode_options

    assert {name.upper() for name in COMPILERS} <= {backend.value for backend in DynamoBackend}
    assert set(COMPILERS) <= set(list_backends(None))
    assert set(list_mode_options()) <= set(COMPILE_MODES)  # an older torch has fewer


# The machine and the packages

ONLY_ON_GPU: list[dict[str, Any]] = [
    {"tf32": True},
    {"activation_offloading": True},
    {"activation_checkpointing_kwargs": {"offload": True}},
    {"use_liger_kernel": True},
    {"deepspeed": {"zero_optimization": {"stage": 2}}},
    {"ddp_backend": "nccl"},
    {"torch_compile_backend": "cudagraphs"},
]


@pytest.mark.parametrize("arguments", ONLY_ON_GPU)
def test_what_needs_a_gpu_is_refused_without_one(recipe: Any, arguments: dict[str, Any]) -> None:
    asked, l4 = recipe(**arguments), machine_with(find_gpu("l4"))
    check_hardware(asked, l4)
    cpu = replace(l4, device="cpu", capability=None, name="a processor")
    with pytest.raises(MachineError, match=rf"trainer\.{next(iter(arguments))}.*needs a CUDA GPU.*but this is a CPU"):
        check_hardware(asked, cpu)
    with pytest.raises(MachineError, match="use_cpu"):
        check_hardware(recipe(**arguments, use_cpu=True), l4)


def test_tf32_is_refused_for_a_card_before_ampere(write_recipe: Write, run_cli: Cli, capfd: Any) -> None:
    path = write_recipe(trainer={"tf32": True})
    assert run_cli("plan", path, "--gpu", "t4") == 4
    said = capfd.readouterr().err
    assert "tf32: true needs a CUDA GPU of sm_80 or later" in said and "Tesla T4 (sm_75)" in said
    assert run_cli("plan", path, "--gpu", "l4") == 0
    capfd.readouterr()
    assert run_cli("doctor", path) == 4
    found = [line for line in capfd.readouterr().out.splitlines() if line.startswith("plan ")]
    assert len(found) == 1 and " fail " in found[0] and "tf32" in found[0]


def test_every_missing_package_is_named_with_how_to_install_it(
    write_recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    asked = {"optim": "stable_adamw", "use_liger_kernel": True, "deepspeed": "ds.json"}
    path = write_recipe(trainer=asked, report={"trackers": ["wandb", "tensorboard"]})
    loaded = load_recipe(path)
    assert loaded.recipe.trainer["deepspeed"] == str(path.parent / "ds.json")
    with pytest.raises(MachineError) as caught:
        check_packages(loaded.recipe)
    lines = str(caught.value).splitlines()
    for line, package in zip(lines, ("torch-optimi", "liger-kernel", "deepspeed", "wandb", "tensorboard"), strict=True):
        assert f"pip install {package}, or" in line
    monkeypatch.setattr(requirements, "find_spec", lambda name: object())
    check_packages(loaded.recipe)


def test_a_rehearsal_leaves_out_what_only_the_real_machine_can_do(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, capfd: Any
) -> None:
    asked = {
        "tf32": True,
        "activation_offloading": True,
        "use_liger_kernel": True,
        "deepspeed": {"zero_optimization": {"stage": 2}},
        "torch_compile_backend": "inductor",
        "ddp_backend": "nccl",
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"offload": True, "use_reentrant": False},
    }
    path = write_recipe(trainer=asked)
    original = load_recipe(path).recipe
    notes = smoke_notices(original)
    assert all(any(f"trainer.{name}" in note for note in notes) for name in asked if name != "activation_checkpointing")
    small = smoke_recipe(original).trainer
    assert not small.keys() & REAL_MACHINE.keys()
    assert small["activation_checkpointing_kwargs"] == {"use_reentrant": False}
    assert run_cli("train", path, "--smoke") == 0
    said = capfd.readouterr().err
    assert "smoke: trainer.tf32 is ignored: it needs a GPU" in said


def test_a_rehearsal_keeps_the_evaluation_that_other_arguments_need(
    write_recipe: Write, run_cli: Cli, tmp_path: Path
) -> None:
    asked = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "save_strategy": "epoch"}
    path = write_recipe(trainer=asked | {"load_best_model_at_end": True}, dataset=VALIDATED)
    assert run_cli("train", path, "--smoke") == 0
    train = read_json(tmp_path / "runs" / "things-smoke" / "plan.json")["trainer"]
    assert (train["eval_strategy"], train["eval_steps"], train["save_steps"]) == ("steps", 3, 3)


# Errors of the libraries


def test_an_error_that_names_an_argument_is_one_of_the_recipe(write_recipe: Write, run_cli: Cli, capfd: Any) -> None:
    assert run_cli("train", write_recipe(trainer={"router_aux_loss_coef": 0.1})) == 2
    said = capfd.readouterr().err
    assert "error: trainer.router_aux_loss_coef = 0.1: rejected by the libraries:" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("problem", "given", "code", "name"),
    [
        (ValueError("`tf32` requires Ampere"), {"tf32": True}, 2, "trainer.tf32"),
        (ValueError("--tf32 requires Ampere"), {"tf32": True}, 2, "trainer.tf32"),
        (ImportError("You have set `use_liger_kernel`"), {"use_liger_kernel": True}, 4, "trainer.use_liger_kernel"),
        (KeyError("The `metric_for_best_model` is"), {"metric_for_best_model": "x"}, 2, "trainer.metric_for_best"),
    ],
)
def test_the_argument_is_found_in_the_words_of_an_error(
    problem: Exception, given: dict[str, Any], code: int, name: str
) -> None:
    with pytest.raises((RecipeError, MachineError)) as caught, naming_arguments(given | {"max_steps": 3}):
        raise problem
    assert caught.value.exit_code == code and str(caught.value).startswith(name)


def test_the_argument_is_found_by_who_reads_it() -> None:
    def create_scheduler() -> None:
        raise TypeError("unsupported operand")

    with pytest.raises(RecipeError, match="lr_scheduler_type"), naming_arguments({"lr_scheduler_type": "cosine"}):
        create_scheduler()
    with pytest.raises(TypeError), naming_arguments({"max_steps": 3}):
        create_scheduler()


def test_another_error_stays_what_it_is() -> None:
    for problem in (RuntimeError("shapes debug and optim differ"), OSError("max_steps"), MachineError("max_steps")):
        with pytest.raises(type(problem)), naming_arguments({"max_steps": 3, "debug": "", "optim": "sgd"}):
            raise problem


# What the libraries announce


def test_what_the_next_trl_takes_away_is_told(write_recipe: Write, run_cli: Cli, capfd: Any) -> None:
    old = {
        "gradient_checkpointing": False,
        "use_liger_kernel": True,
        "label_smoothing_factor": 0.1,
        "loss_type": "chunked_nll",
        "packing_strategy": "bfd-requeue",
    }
    notices = "\n".join(load_recipe(write_recipe(trainer=old)).notices)
    for words in (
        "gradient_checkpointing is now activation_checkpointing",
        "use_liger_kernel is deprecated",
        "label_smoothing_factor is deprecated",
        '"chunked_nll" is now nll',
        '"bfd-requeue" is now bfd_split',
    ):
        assert words in notices


@pytest.mark.parametrize("quantized", [True, False])
def test_a_training_uses_nothing_that_the_libraries_call_deprecated(
    write_recipe: Write, run_cli: Cli, quantized: bool
) -> None:
    path = write_recipe(
        quantization={"bits": 4} if quantized else None,
        dataset=VALIDATED,
        trainer={"activation_checkpointing": True, "max_steps": 2, "save_steps": 1, **EVALUATED},
    )
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert run_cli("train", path) == 0
    ours = ("transformers", "trl", "peft", "accelerate")
    told = [
        f"{one.filename}: {one.message}"
        for one in heard
        if issubclass(one.category, FutureWarning | DeprecationWarning)
        and any(name in one.filename for name in ours)
        and "is_gradient_checkpointing" not in str(one.message)  # read by PEFT itself, in PeftModel.__init__
    ]
    assert told == []


# Whatever validate accepts

CODES = {0, 2, 3, 4, 5, 6, 7}
NUMBERS = {"int": [1, 2, 7], "float": [0.5, 1, 2.0, 1e-6], "bool": [True, False], "none": [None]}
TEXTS = {"lr_scheduler_type": [kind.value for kind in SchedulerType], "optim": [kind.value for kind in OptimizerNames]}
TEXTS |= {"optim_args": ["momentum=0.9", "alpha=0.5,beta3=0.99", "x"], "debug": ["", "underflow_overflow", "x"]}
TEXTS |= {"metric_for_best_model": ["loss", "f1"], "torch_compile_backend": ["x"], "torch_compile_mode": ["x"]}
TEXTS |= {"pad_to_multiple_of": ["auto", "8"], "include_num_input_tokens_seen": ["all", "no"]}
MAPPINGS: dict[str, list[Any]] = {
    "lr_scheduler_kwargs": [{"num_cycles": 2}, {"min_lr_rate": 0.1}, {"num_decay_steps": 2}, {"power": 2.0}, {"x": 1}],
    "activation_checkpointing_kwargs": [{"every_n_layers": 2}, {"use_reentrant": True}, {"offload": True}],
    "accelerator_config": [{"even_batches": False}, {"split_batches": True}, {"use_seedable_sampler": False}],
    "liger_kernel_config": [{"rope": True}],
}
SLOW = {"torch_compile": [False], "dataloader_num_workers": [0], "full_determinism": [False]}
"""Arguments that take long to serve, or change the whole process, only with the values that do not."""


def values_of(argument: Argument) -> list[Any]:
    """Values to try for an argument: of each of its types, some that are refused among them."""
    if argument.name in SLOW:
        return SLOW[argument.name]
    values: list[Any] = [*argument.choices, *TEXTS.get(argument.name, []), *MAPPINGS.get(argument.name, [])]
    values += [value for kind in sorted(argument.kinds) for value in NUMBERS.get(kind, [])]
    return values or ["x"]


TRIED = [
    (name, value)
    for name, argument in sorted((installed_arguments() or {}).items())
    if name not in OWNED
    for value in values_of(argument)
]


def test_every_argument_of_the_installed_trainer_is_tried() -> None:
    assert {name for name, _ in TRIED} == {field.name for field in dataclasses.fields(SFTConfig)} - OWNED.keys()


SMALL: dict[str, Any] = {
    "dataset": VALIDATED,
    "adapter": {"r": 2, "target_modules": ["q_proj"]},
    "quantization": None,
    "evaluation": {"rows": 1, "max_new_tokens": 1, "baseline": False},
}


def ends_well(write: Write, cli: Cli, folder: Path, arguments: dict[str, Any]) -> int:
    """The exit code of a training with these arguments."""
    path = write(folder, trainer={"max_steps": 2, "per_device_train_batch_size": 4, **arguments}, **SMALL)
    if cli(folder, "validate", path) != 0:
        return 2
    return cli(folder, "train", path, "--overwrite", "--output-dir", folder / "run")


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(picked=st.lists(st.sampled_from(TRIED), min_size=1, max_size=4, unique_by=lambda pair: pair[0]))
def test_no_accepted_arguments_end_in_a_bug(
    recipe_in: Write, cli_in: Cli, tmp_path: Path, picked: list[tuple[str, Any]]
) -> None:
    assert ends_well(recipe_in, cli_in, tmp_path, dict(picked)) in CODES


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), TRIED)
def test_no_accepted_argument_ends_in_a_bug(
    recipe_in: Write, cli_in: Cli, tmp_path: Path, name: str, value: Any
) -> None:
    given = {name: value}
    if name == "lr_scheduler_type":
        given |= EVALUATED if value in MEASURED else {}
        given |= {"lr_scheduler_kwargs": SCHEDULER_KWARGS[value]} if value in SCHEDULER_KWARGS else {}
    if name == "optim" and value.startswith(TARGETED):
        given["optim_target_modules"] = "all-linear"
    assert ends_well(recipe_in, cli_in, tmp_path, given) in CODES


def test_a_signature_is_read_also_where_a_comment_follows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.py").write_text(
        "class A:\n    def __init__(\n        self, x: int, y: float = 0.1\n    ):  # noqa: D107\n        ...\n"
    )
    monkeypatch.setattr("peftcli.recipe.signatures.package_folder", lambda package: tmp_path)
    found = parameters("noted", "m.py", "__init__", "A")
    assert found is not None and [name for name, (_, required) in found.items() if required] == ["self", "x"]
