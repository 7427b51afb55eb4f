"""The estimated time of an evaluation, and the rows that are answered at once."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peftcli.plan.gpus import find_gpu, machine_with
from peftcli.plan.machine import Machine, ModelFacts
from peftcli.plan.memory.evaluation_time import EvaluationWork, pass_seconds
from peftcli.plan.memory.forecast import make_forecast, rows_of
from peftcli.plan.memory.model_shape import Linear, ModelDimensions, Norm
from peftcli.plan.memory.training_setup import TrainingSetup
from peftcli.plan.optimizer import Trained
from peftcli.plan.planner import make_plan
from peftcli.recipe.load import load_recipe
from peftcli.results import EvaluationTime, ForecastDisk

LAYERS = 32
LINEARS = (
    *(
        Linear(f"self_attn.{name}_proj", 4096, width, LAYERS)
        for name, width in zip("qkvo", (4096, 1024, 1024, 4096), strict=True)
    ),
    *(Linear(f"mlp.{name}_proj", 4096, 14336, LAYERS) for name in ("gate", "up")),
    Linear("mlp.down_proj", 14336, 4096, LAYERS),
)
NORM = Norm(4096, 2 * LAYERS, in_float32=True)
LLAMA_8B = ModelDimensions(
    4096, LAYERS, 4096, 1024, 32, 14336, 2, LAYERS, 128256, 8_030_261_248, LINEARS, (NORM,), NORM
)
NF4 = TrainingSetup(
    on_gpu=True,
    base_bytes=2,
    weight_bits=4.127,
    autocast=True,
    state_bytes=8.0,
    targets=LINEARS,
    r=16,
    trainable=41_943_040,
)
WORK = EvaluationWork(scored_tokens=None, answers=1000, at_once=64, prompt_tokens=200, new_tokens=256)


def planned(path: Path, more: str, machine: Machine, split: str = "") -> Any:
    path.write_text(
        "model: {name: org/model}\n"
        f"dataset:\n  path: a.csv\n  prompt: '{{a}}'\n  completion: '{{b}}'\n  max_length: 512\n{split}"
        f"quantization: {{bits: 4}}\n{more}",
        encoding="utf-8",
    )
    paths = tuple(f"model.layers.{block}.{linear.name}" for block in range(LAYERS) for linear in LINEARS)
    facts = ModelFacts("m", "LlamaForCausalLM", LLAMA_8B.parameters, paths, paths, "lm_head", 8192, shape=LLAMA_8B)
    return make_plan(load_recipe(path).recipe, machine, facts, lambda adapter: Trained(41_943_040))


def forecast(
    path: Path, more: str = "", gpu: str = "t4", data: dict[str, Any] | None = None, split: str = ""
) -> EvaluationTime:
    machine = machine_with(find_gpu(gpu))
    plan = planned(path, more, machine, split)
    found = make_forecast(plan, LLAMA_8B, machine, rows_of(plan, data), ForecastDisk(total=1))
    assert found is not None and found.time.evaluation is not None
    return found.time.evaluation


def test_a_gpu_answers_64_rows_at_once_and_processes_in_step_fewer(tmp_path: Path) -> None:
    file, t4 = tmp_path / "r.yaml", machine_with(find_gpu("t4"))
    assert planned(file, "", t4).evaluation_batch == 64
    assert planned(file, "evaluation: {batch_size: 5}", t4).evaluation_batch == 5
    two = replace(machine_with(find_gpu("a100-40"), 2), count=2)
    assert planned(file, "performance: {sharding: full}", two).evaluation_batch == 16
    assert planned(file, "trainer: {use_cpu: true}", t4).evaluation_batch == 128


def test_larger_batches_of_answers_take_less_time_on_a_gpu_that_unpacks_its_weights() -> None:
    t4 = find_gpu("t4")
    few, many = (pass_seconds(LLAMA_8B, NF4, t4, replace(WORK, at_once=rows)) for rows in (16, 64))
    # A step reads the weights whatever the batch, so four times as many rows save most of the time.
    assert 2 < few / many < 4
    # Of 0.055 to 0.12 s a step, as the bytes of the unpacked weights over the T4's bandwidth say.
    steps = 16 * 256
    assert 0.08 * steps < many < 0.25 * steps
    assert pass_seconds(LLAMA_8B, NF4, find_gpu("h100"), WORK) < many / 5
    assert pass_seconds(LLAMA_8B, NF4, t4, replace(WORK, processes=2)) == pytest.approx(many / 2)


def test_the_forecast_counts_passes_rows_and_memory(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    auto = forecast(file)
    assert (auto.estimated, auto.passes, auto.answered_rows, auto.scored_rows) == (True, 2, 500, None)
    assert auto.seconds == pytest.approx(2 * auto.pass_seconds) and auto.answer_tokens == 256
    assert forecast(file, "evaluation: {baseline: false}").passes == 1
    assert forecast(file, "evaluation: {rows: 50}").seconds < auto.seconds / 5
    data = {"train_rows": 90_000, "test_rows": 9937, "length": {"max": 512}, "tokens": {"train": 90_000 * 100}}
    whole = forecast(file, "evaluation: {rows: all}", data=data)
    assert (whole.answered_rows, whole.scored_rows) == (9937, 9937)
    assert forecast(file, data=data).answered_rows == 500
    # Keys and values of 64 rows of 4096 tokens take 34 GB: fewer are answered at once where memory does not hold them.
    long = "evaluation: {max_new_tokens: 3584}"
    assert forecast(file, long, "t4").answers_at_once < forecast(file, long, "h100").answers_at_once == 64


def test_the_forecast_counts_evaluations_during_training(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    data = {"train_rows": 800, "test_rows": 100, "length": {"max": 512}, "tokens": {"train": 800 * 100}}
    plain = forecast(file, data=data)
    split = "  split: {test_size: 100, validation_size: 50}\n"
    held_out = data | {"validation_rows": 50}

    def validated(trainer: str) -> EvaluationTime:
        return forecast(file, f"trainer: {{max_steps: 1000, {trainer}}}\n", data=held_out, split=split)

    last = validated("eval_strategy: no").seconds - plain.seconds  # the adapter, once on the validation rows
    assert plain.evaluations == 0 and 0 < last < plain.seconds
    losses = validated("eval_strategy: steps, eval_steps: 100")
    assert (losses.evaluations, losses.validation_rows) == (10, 50)
    assert losses.seconds - losses.during_seconds == pytest.approx(plain.seconds + last)
    best = "eval_strategy: steps, eval_steps: 100, save_steps: 100, load_best_model_at_end: true"
    answers = validated(f"{best}, metric_for_best_model: exact_match")
    assert answers.during_seconds > 2 * losses.during_seconds > 0
    assert validated("eval_strategy: epoch").evaluations == 10  # an epoch is 100 steps of 8 rows


def test_plan_prints_an_evaluation_time_that_is_labelled_as_an_estimate(
    write_recipe: Callable[..., Path], run_cli: Callable[..., int], capfd: Any
) -> None:
    assert run_cli("plan", write_recipe(), "--gpu", "t4") == 0
    line = " ".join(capfd.readouterr().out.split()).partition("Evaluation ")[2]
    assert line.startswith("at most about")
    assert "an estimate (base and adapter: up to 500 answers of up to 6 tokens" in line
    recipe = write_recipe(dataset={"split": {"test_size": 0}}, evaluation={"baseline": False})
    assert run_cli("plan", recipe, "--gpu", "t4", "--json") == 0
    assert json.loads(capfd.readouterr().out)["forecast"]["time"]["evaluation"] is None
