"""The trainers: TRL's SFTTrainer for language models, and one for models with a head.

Both evaluate weighted by tokens or labels, count exactly, and write atomic checkpoints.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor
from transformers import TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

from peftcli.adapters.build import peft_config
from peftcli.data.tokenize import IGNORED
from peftcli.errors import RecipeError
from peftcli.metrics.language import perplexity
from peftcli.model.classification import (
    TaskHead,
    forward,
    label_figures,
    make_batch,
    predicted_and_actual,
    task_head,
)
from peftcli.model.distributed import gather
from peftcli.model.fused_loss import replace_broken_loss, score_targets
from peftcli.model.heads import freeze_statistics
from peftcli.model.load import DTYPES
from peftcli.model.new_tokens import expose_output_bias
from peftcli.train.evaluations import answer_metrics
from peftcli.train.step import StepTrainer, TrainerSetup

SMOOTHED = ("single-label", "tagging")
"""Problem types that support label smoothing."""


class DeferredTrainer(SFTTrainer):  # type: ignore[misc]  # trl ships no types
    """SFTTrainer that keeps its metrics on the device until they are logged.

    TRL fetches entropy, accuracy and tokens after each micro-batch, and gathers each of them from all processes; the
    device then waits for Python, and the processes for each other.

    Attributes:
        defers: False leaves it to TRL.
    """

    defers = True

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss: over the tokens of a step, or of a micro-batch if no count is given.

        Source: `SFTTrainer.compute_loss`, bit-identical; other kinds of loss are computed there.
        """
        if return_outputs or not self._is_plain():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**{**inputs, "use_cache": False}, fused_lm_head=True)
        count = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = -outputs.log_probs.sum() / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # because gradients are averaged
        sums = [outputs.label_mask.sum(), outputs.entropy.detach().sum(), outputs.is_top1.sum()]
        mode = "train" if model.training else "eval"
        self._metrics[mode]["sums"].append(torch.stack([one.float() for one in sums]))
        return loss

    def _is_plain(self) -> bool:
        """Whether the loss is the plain mean negative log-likelihood of the tokens."""
        return (
            self.defers
            and self.args.loss_type == "nll"
            and self.label_smoother is None
            and self.compute_loss_func is None
            and not self.aux_loss_enabled
            and self.accelerator.parallelism_config is None
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Fetch the sums since the last log from all processes, and log the resulting metrics."""
        figures = self._metrics["train" if self.model.training else "eval"]
        figures.pop("num_tokens", None)  # counted by the step
        sums = figures.pop("sums", None)
        if sums:
            tokens, entropy, right = self.accelerator.reduce(torch.stack(sums).sum(0), "sum").tolist()
            figures["entropy"] = [entropy / max(tokens, 1.0)]
            figures["mean_token_accuracy"] = [right / max(tokens, 1.0)]
        super().log(logs, start_time)


class Trainer(StepTrainer, DeferredTrainer):
    """SFTTrainer; the training step, the loss and the loop are TRL's."""

    def __init__(self, setup: TrainerSetup, **kwargs: Any) -> None:
        super().__init__(setup, **kwargs)
        self._choose_loss()
        self.defers = "deferred_metrics" in self.optimizations

    def _choose_loss(self) -> None:
        """Use the fused loss if the plan has it, or if TRL's loss fails its check on this GPU."""
        base = self.model.get_base_model()
        expose_output_bias(base)
        if "fused_loss" in self.optimizations and not score_targets(base):
            self.optimizations -= {"fused_loss"}
            self.notes.append("fused loss disabled: the output layer is sharded or not a plain Linear")
        if "fused_loss" in self.optimizations:
            return
        replaced = replace_broken_loss(base, self.args.device, DTYPES[self.setup.plan.base.dtype])
        if replaced is None:
            return
        problem, ours = replaced
        if ours:
            self.optimizations |= {"fused_loss"}
        instead = "peftcli's fused loss" if ours else "TRL's loss without Triton, which is slower,"
        self.notes.append(f"TRL's Triton kernels for the loss failed their check: {problem}; {instead} is used instead")

    def targets(self, labels: Tensor) -> Tensor:
        """The number of trained tokens; the first token of a row is not predicted."""
        return (labels[..., 1:] != IGNORED).sum()

    def evaluate_batch(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The mean negative log-likelihood, and the trained tokens and those with the highest probability: (2,)."""
        if self._is_plain():
            loss = self.prediction_step(self.model, inputs, prediction_loss_only=True)[0]
            return loss, self._metrics["eval"]["sums"][-1][[0, 2]]
        # TRL's loss has terms of the training, such as label smoothing, and its accuracy counts repeated rows.
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self.model(**{**inputs, "use_cache": False}, fused_lm_head=True)
        counted = torch.stack([outputs.label_mask.sum().float(), outputs.is_top1.sum().float()])
        return -outputs.log_probs.sum() / counted[0].clamp(min=1), counted

    def task_metrics(self, loss: float, seen: Sequence[Tensor]) -> dict[str, float | None]:
        """Perplexity and token accuracy, and the metrics of answers if one of them chooses the best step."""
        counted = torch.stack([torch.zeros(2, device=self.args.device), *seen]).double().sum(0)
        tokens, right = self.accelerator.reduce(counted, "sum").tolist()
        accuracy = right / tokens if tokens else None
        return {"perplexity": perplexity(loss), "token_accuracy": accuracy, **answer_metrics(self)}

    def random_baseline(self) -> str:
        """The loss of guessing uniformly among all tokens."""
        vocabulary = self.model.config.get_text_config().vocab_size
        return f" (random guessing among {vocabulary} tokens has {math.log(vocabulary):.3f})"

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the adapter folder gets a model card with the metrics of this run."""


def evaluated_rows(setup: TrainerSetup, columns: list[str]) -> Dataset | None:
    """The validation rows, which are evaluated during training; None without.

    A run that an earlier version started without validation rows is still evaluated on its test rows when it resumes.
    """
    data = setup.data
    if data.validates:
        return Dataset(data.validation_split.store.examples.select(columns)).select(data.validation_split.rows)
    if setup.plan.evaluates_test_rows and data.holds_out:
        return Dataset(data.test.select(columns))
    return None


def make_trainer(setup: TrainerSetup, checkpoints: Path, model: Any) -> Trainer:
    """Build TRL's trainer from a plan; TRL wraps the model with the adapter.

    Args:
        checkpoints: folder for the checkpoints.
        model: the loaded base.
    """
    plan, data = setup.plan, setup.data
    arguments = SFTConfig(output_dir=str(checkpoints), **plan.trainer)
    # Several visible GPUs without a launcher would mean nn.DataParallel, which TRL refuses; the plan uses one.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return Trainer(
        setup,
        model=model,
        args=arguments,
        train_dataset=Dataset(data.train.store.examples.select(["input_ids", "labels"])).select(data.train.rows),
        eval_dataset=evaluated_rows(setup, ["input_ids", "labels"]),
        processing_class=setup.tokenizer,
        peft_config=peft_config(plan.adapter, plan.task, tokenizer=plan.base.path),
    )


class HeadTrainer(transformers.Trainer):  # type: ignore[misc]  # transformers' trainer is untyped
    """The trainer of transformers with the loss of a head.

    Attributes:
        head: the task head.
    """

    loss_is_scaled_for_ga = True  # by the rows or tokens of the whole step
    aux_loss_enabled = False

    def __init__(self, head: TaskHead, class_weights: Sequence[float] = (), **kwargs: Any) -> None:
        """
        Args:
            class_weights: of the training loss, by class id; empty without.
        """
        super().__init__(**kwargs)
        self.head = head
        weights = torch.tensor(list(class_weights), dtype=torch.float32, device=self.args.device)
        self.class_weights = weights if len(weights) else None
        self.counts = "tokens" if head.images is None else "images"

    def targets(self, labels: Tensor) -> Tensor:
        """The number of rows, or of tokens with a label."""
        return self.head.targets(labels)

    def _get_num_items_in_batch(self, batch_samples: Sequence[Any], device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        labels = [batch["labels"].to(device) for batch in batch_samples]
        mine = torch.stack([self.head.weight_sum(one, self.class_weights) for one in labels]).sum().to(device)
        total: Tensor = self.accelerator.reduce(mine, "sum")
        return total

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a micro-batch as its part of the step's mean; without a count, the mean of the micro-batch.

        With class weights it is the weighted mean, as of `torch.nn.CrossEntropyLoss(weight=...)`; the mean of an
        evaluation is unweighted.
        """
        logits = forward(model, inputs)
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        weights = self.class_weights if model.training else None
        losses = self.head.losses(logits, inputs["labels"], smoothing=smoothing, weights=weights)
        own = self.head.weight_sum(inputs["labels"], weights) if num_items_in_batch is None else num_items_in_batch
        count = torch.as_tensor(own)
        loss = losses.sum() / torch.where(count > 0, count, 1)  # a batch of tags may have no label
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # because gradients are averaged
        return (loss, {"logits": logits}) if return_outputs else loss

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The mean loss of a micro-batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None


class LabelTrainer(StepTrainer, HeadTrainer):
    """The trainer of a head, with the shared parts of all trainers."""

    targets = HeadTrainer.targets

    def evaluate_batch(self, inputs: dict[str, Any]) -> tuple[Tensor, tuple[list[Any], list[list[float]]]]:
        """The mean loss, without class weights or label smoothing, and the predicted and the actual labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(self.model, inputs, return_outputs=True)
        return loss.detach(), predicted_and_actual(self.head, outputs["logits"], inputs["labels"])

    def task_metrics(self, loss: float, seen: Sequence[tuple[list[Any], list[list[float]]]]) -> dict[str, float | None]:
        """The metrics of the final evaluation that are numbers."""
        pairs = [pair for one in gather(list(seen)) for pair in one]
        chosen, labels = ([value for pair in pairs for value in pair[side]] for side in (0, 1))
        figures = label_figures(self.head, chosen, labels, positive=self.setup.plan.evaluation.positive_label)
        return {name: value for name, value in figures.items() if value is None or isinstance(value, int | float)}


def make_label_trainer(setup: TrainerSetup, checkpoints: Path, model: Any) -> LabelTrainer:
    """Add the adapter of a plan to a model with a head, and build its trainer.

    Args:
        checkpoints: folder for the checkpoints.
        model: the loaded base, with its head.

    Raises:
        RecipeError: an argument does not apply to this kind of labels.
    """
    plan, data, tokenizer = setup.plan, setup.data, setup.tokenizer
    head = task_head(plan.base.labels, plan.base.problem_type, model, tokenizer, threshold=plan.base.threshold)
    arguments = TrainingArguments(
        output_dir=str(checkpoints), remove_unused_columns=False, label_names=["labels"], **plan.trainer
    )
    if arguments.label_smoothing_factor and head.problem_type not in SMOOTHED:
        raise RecipeError(
            f"trainer.label_smoothing_factor = {arguments.label_smoothing_factor}: needs classes, but the labels are "
            f"{head.problem_type}; remove it"
        )
    arguments._n_gpu = min(arguments.n_gpu, 1)
    set_seed(plan.seed)  # the adapter is initialized randomly
    wrapped = get_peft_model(model, peft_config(plan.adapter, plan.task, tokenizer=plan.base.path))
    if arguments.activation_checkpointing:
        wrapped.enable_input_require_grads()
    freeze_statistics(wrapped)
    columns = list(dict.fromkeys(["input_ids", head.column, "labels"]))

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return make_batch([row[head.column] for row in rows], [row["labels"] for row in rows], head)

    return LabelTrainer(
        setup,
        head=head,
        class_weights=plan.class_weights if isinstance(plan.class_weights, tuple) else (),
        model=wrapped,
        args=arguments,
        data_collator=collate,
        train_dataset=Dataset(data.train.store.examples.select(columns)).select(data.train.rows),
        eval_dataset=evaluated_rows(setup, columns),
        processing_class=tokenizer if head.images is None else head.images.processor,
    )
