"""Estimates how long a GPU takes to evaluate a model: the loss of the test rows, and their generated answers.

A step of generation reads all weights once for all answers of a batch, so few large batches are faster. Quantized
weights are unpacked in every step, whatever the batch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from peftcli.plan.answered_rows import AUTO_ROWS, answered_count
from peftcli.plan.evaluations import ANSWER_METRICS, MOST_ANSWERS
from peftcli.plan.gpus import GPU
from peftcli.plan.memory.estimate import MicroBatchMemory, weight_bytes
from peftcli.plan.memory.model_shape import ModelDimensions
from peftcli.plan.memory.step_time import LAUNCH_SECONDS, WRITTEN_BYTES
from peftcli.plan.memory.training_setup import TrainingSetup
from peftcli.plan.plan import Plan
from peftcli.recipe.best_model import metric_name
from peftcli.results import EvaluationTime
from peftcli.tasks.registry import TASKS

LONGEST_AUTO_ANSWER = 256
"""Tokens; `evaluation.max_new_tokens: auto` does not go beyond."""
FREE_RATIO = 0.8
"""Share of the memory beside the weights that keys and values may fill."""


@dataclass(frozen=True)
class EvaluationWork:
    """What one model is evaluated on.

    Attributes:
        scored_tokens: tokens of all rows whose loss is computed, None where the test rows were not read.
        answers: generated answers at most.
        at_once: of them, in each process.
        prompt_tokens: of an answer's prompt at most.
        new_tokens: of an answer at most.
        processes: that share the rows, each on a GPU of its own.
    """

    scored_tokens: float | None
    answers: int
    at_once: int
    prompt_tokens: float
    new_tokens: int
    processes: int = 1


@dataclass(frozen=True)
class HeldOutRows:
    """The rows that are evaluated, and the steps between evaluations during training.

    Attributes:
        test, validation: numbers of rows; None where the data were not read.
        mean: tokens of a row.
        steps: of the training; None if unknown.
        epoch_steps: of an epoch; None if unknown.
    """

    test: int | None
    validation: int | None
    mean: float
    steps: int | None = None
    epoch_steps: int | None = None


def evaluation_time(
    plan: Plan, load: MicroBatchMemory, gpu: GPU | None, memory: int | None, rows: HeldOutRows
) -> EvaluationTime | None:
    """What the forecast says of evaluation; None where no row is held out or the GPU's speed is not known.

    Args:
        memory: bytes of the GPU.
    """
    during = evaluations_during(plan.trainer, rows.steps, rows.epoch_steps)
    if gpu is None or not (plan.dataset.holds_out or during):
        return None
    test_rows = rows.test if plan.dataset.holds_out else 0
    work = evaluation_work(plan, load, memory or 0, test_rows, rows.mean)
    passes = 1 + plan.evaluation.baseline
    seconds = pass_seconds(load.shape, load.setting, gpu, work)
    validation = replace(
        work,
        scored_tokens=None if rows.validation is None else rows.validation * rows.mean,
        answers=_answers_during(plan, rows.validation),
    )
    one = pass_seconds(load.shape, load.setting, gpu, validation) if during else 0.0
    last = replace(validation, answers=_answers(plan, rows.validation)) if plan.dataset.validates else None
    seconds_last = 0.0 if last is None else pass_seconds(load.shape, load.setting, gpu, last)
    return EvaluationTime(
        evaluations=during,
        validation_rows=rows.validation,
        during_seconds=during * one,
        passes=passes,
        scored_rows=test_rows,
        answered_rows=work.answers,
        answers_at_once=work.at_once,
        answer_tokens=work.new_tokens,
        pass_seconds=seconds,
        seconds=passes * seconds + during * one + seconds_last,
    )


def evaluations_during(trainer: Mapping[str, Any], steps: int | None, epoch_steps: int | None) -> int:
    """Number of evaluations during a training; 0 if it is unknown.

    Source: `DefaultFlowCallback` of transformers.

    >>> evaluations_during({"eval_strategy": "steps", "eval_steps": 50, "eval_delay": 100}, 320, None)
    5
    >>> evaluations_during({"eval_strategy": "epoch"}, 25, 10)
    3
    """
    strategy = str(trainer.get("eval_strategy", "no"))
    if strategy == "no" or steps is None:
        return 0
    delay = float(trainer.get("eval_delay") or 0)
    if strategy == "epoch":
        return max(0, math.ceil(steps / epoch_steps) - max(0, math.ceil(delay) - 1)) if epoch_steps else 0
    every = float(trainer.get("eval_steps") or trainer["logging_steps"])
    every = max(1, math.ceil(steps * every) if every < 1 else int(every))
    return sum(step >= delay for step in range(every, steps + 1, every))


def _answers_during(plan: Plan, rows: int | None) -> int:
    if not TASKS[plan.task].generates or metric_name(plan.trainer) not in ANSWER_METRICS:
        return 0
    return min(MOST_ANSWERS, MOST_ANSWERS if rows is None else rows)


def evaluation_work(
    plan: Plan, load: MicroBatchMemory, memory: int, test_rows: int | None, mean: float
) -> EvaluationWork:
    """What base and adapter are evaluated on; of rows that were not read, the most that it can be."""
    asked = plan.evaluation.max_new_tokens
    new = asked if isinstance(asked, int) else min(LONGEST_AUTO_ANSWER, plan.labels.max_length)
    room = FREE_RATIO * max(0.0, memory - weight_bytes(load.shape, load.setting))
    fitting = int(room / (cache_bytes(load.shape, load.setting) * (mean + new)))
    scored = None if test_rows is None else test_rows * mean
    at_once = max(1, min(plan.evaluation_batch, fitting))
    return EvaluationWork(scored, _answers(plan, test_rows), at_once, mean, new, plan.batch.processes)


def _answers(plan: Plan, test_rows: int | None) -> int:
    if not TASKS[plan.task].generates:
        return 0
    if plan.dataset.text is not None:  # plain text has no right answer, so only the samples are shown
        return plan.evaluation.samples
    size = plan.dataset.split.test_size
    rows = test_rows if test_rows is not None else size if isinstance(size, int) and plan.dataset.test is None else None
    if rows is not None:
        return answered_count(plan.evaluation, rows)
    asked = plan.evaluation.rows
    return asked if isinstance(asked, int) else AUTO_ROWS


def cache_bytes(shape: ModelDimensions, setting: TrainingSetup) -> int:
    """Bytes of the keys and values that a token of a prompt or an answer keeps."""
    return 2 * shape.layers * shape.keys * setting.width


def pass_seconds(shape: ModelDimensions, setting: TrainingSetup, gpu: GPU, work: EvaluationWork) -> float:
    """Seconds to evaluate one model once."""
    head = 2 * shape.vocabulary * shape.hidden
    forward = 2 * (shape.active + setting.trainable)
    read = ((work.scored_tokens or 0.0) + work.answers * work.prompt_tokens) / work.processes
    batches = -(-work.answers // (work.at_once * work.processes))
    attended = work.at_once * (work.prompt_tokens + work.new_tokens / 2)
    kept = attended * cache_bytes(shape, setting) / gpu.bandwidth
    products = work.at_once * (forward + head) / gpu.flops
    step = max(products, _weights_seconds(shape, setting, gpu), shape.layers * LAUNCH_SECONDS / 3) + kept
    return read * (forward + head) / gpu.flops + batches * work.new_tokens * step


def _weights_seconds(shape: ModelDimensions, setting: TrainingSetup, gpu: GPU) -> float:
    """Seconds to read all weights once, and to write and read what is unpacked."""
    unpacked = 0 if setting.weight_bits is None else 2 * WRITTEN_BYTES * shape.quantizable
    return (weight_bytes(shape, setting) + unpacked) / gpu.bandwidth
