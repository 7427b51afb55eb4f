"""Evaluations during training: their answers, the metric that chooses the best step, and early stopping."""

import math
from collections.abc import Mapping
from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from peftcli.model.evaluate import answer_figures, answer_rows, answered_rows, decoding_for, router_silent
from peftcli.plan.evaluations import ANSWER_METRICS, MOST_ANSWERS
from peftcli.progress import Silent
from peftcli.recipe.best_model import LOWER_IS_BETTER, metric_name
from peftcli.results import BestStep
from peftcli.train.step import StepTrainer


class EarlyStopping(EarlyStoppingCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """transformers' early stopping; a resumed run continues its count.

    Attributes:
        stopped: whether it has ended the training.
    """

    def __init__(self, patience: int, threshold: float, *, restarts: bool) -> None:
        """
        Args:
            restarts: a finished run is trained further, so the count starts again.
        """
        super().__init__(patience, threshold)
        self.stopped = False
        self._restarts = restarts

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # transformers restores callbacks only together, and from classes that it can import by their name.
        stored = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(stored, Mapping) and state.global_step and not self._restarts:
            self.early_stopping_patience_counter = int(stored["attributes"]["early_stopping_patience_counter"])
        super().on_train_begin(args, state, control, **kwargs)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        super().on_evaluate(args, state, control, metrics, **kwargs)
        self.stopped = self.early_stopping_patience_counter >= self.early_stopping_patience


def best_step(trainer: StepTrainer) -> BestStep | None:
    """The step with the best metric of the evaluations during training; None if none was chosen."""
    state, plan = trainer.state, trainer.setup.plan
    if state.best_global_step in (None, 0) or state.best_metric is None or not math.isfinite(state.best_metric):
        return None
    name = metric_name(plan.trainer)
    return BestStep(
        step=state.best_global_step,
        metric=name,
        value=float(state.best_metric),
        greater_is_better=name not in LOWER_IS_BETTER,
        kept=bool(plan.trainer.get("load_best_model_at_end")) and state.best_model_checkpoint is not None,
        rows_from="test" if plan.evaluates_test_rows else "validation",
    )


def answer_metrics(trainer: StepTrainer) -> dict[str, float | None]:
    """The metrics of answers to some validation rows, if the best step is chosen by one; empty otherwise."""
    plan, data = trainer.setup.plan, trainer.setup.data
    if metric_name(plan.trainer) not in ANSWER_METRICS:
        return {}
    asked, tokenizer = data if plan.evaluates_test_rows else data.scored_on_validation(), trainer.setup.tokenizer
    rows = answered_rows(plan.evaluation, asked, plan.seed)[:MOST_ANSWERS]
    decoding = decoding_for(plan.evaluation, asked, tokenizer, plan.seed)
    with router_silent(trainer.model), trainer.compute_loss_context_manager():
        answers = answer_rows(
            trainer.model,
            tokenizer,
            asked,
            rows,
            decoding,
            batch_rows=plan.evaluation_batch,
            progress=Silent(),
            what="answers",
        )
    references = asked.test.column("reference").take(rows).to_pylist()
    chats = asked.format == "messages"
    return {**answer_figures(answers, references, chats=chats)} if answers else {}
