"""The outputs of a model with a head: loss, predicted labels and metrics over rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from peftcli.data.image_processor import ImageProcessor
from peftcli.data.prepare import PreparedData
from peftcli.data.tokenize import IGNORED
from peftcli.data.values import SkipRow
from peftcli.errors import DataError
from peftcli.metrics.classification import classification_scores, multi_label_scores
from peftcli.metrics.regression import regression_scores
from peftcli.metrics.tagging import tagging_scores
from peftcli.metrics.threshold import best_threshold
from peftcli.model.distributed import gather, interleave, local_rows
from peftcli.model.expected_time import ExpectedTime
from peftcli.model.generation import Answer
from peftcli.model.load import input_device
from peftcli.model.oom import ShrinkingBatches
from peftcli.model.scoring import rows_alike
from peftcli.plan.heads import NUMBER
from peftcli.progress import Progress
from peftcli.recipe.schema import EvaluationSection

Row: TypeAlias = Sequence[int] | str
"""Token ids, or the path of an image."""
PIXELS = "pixel_values"
APPLIES = 0.5
"""Default probability from which a label is predicted in multi-label classification."""


@dataclass(frozen=True)
class TaskHead:
    """The meaning of a head's outputs.

    Attributes:
        names: names of the outputs, in order.
        problem_type: `single-label`, `multi-label`, `regression`, or `tagging`: a class per labeled token.
        pad: token id used for padding.
        separator: token id after the first text of a pair; None if the model does not distinguish the texts.
        images: loads the image files of the rows; None for tokens.
        threshold: probability from which a label is predicted in multi-label classification.
    """

    names: tuple[str, ...]
    problem_type: str
    pad: int = 0
    separator: int | None = None
    images: ImageProcessor | None = None
    threshold: float = APPLIES

    @property
    def column(self) -> str:
        """The column of the rows that the model reads: `input_ids`, or the paths in `image`."""
        return "input_ids" if self.images is None else "image"

    def losses(
        self, logits: Tensor, labels: Tensor, *, smoothing: float = 0.0, weights: Tensor | None = None
    ) -> Tensor:
        """The loss of each row, or of each token.

        Args:
            logits: (B, C), for tagging (B, T, C); any float dtype.
            labels: (B,) int64 for single-label; (B, C) float of 0 and 1, or of numbers; (B, T) int64 for tagging, with
                -100 for tokens without a label.
            smoothing: share of the weight spread over all classes.
            weights: (C,) float32, of the classes; only for single-label and tagging.

        Returns:
            (B,) or (B, T) float32: nats; for several labels their mean, for numbers the squared error; 0 without a
            label.
        """
        logits = logits.float()
        if self.problem_type == "regression":
            return functional.mse_loss(logits, labels.float(), reduction="none").mean(-1)
        if self.problem_type == "multi-label":
            return functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(-1)
        flat = functional.cross_entropy(
            logits.flatten(0, -2),
            labels.flatten(),
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=smoothing,
            weight=weights,
        )
        return flat.view(labels.shape)

    def targets(self, labels: Tensor) -> Tensor:
        """Number of rows, or tokens, with a label: (), int64."""
        if self.problem_type == "tagging":
            return (labels != IGNORED).sum()
        return torch.tensor(labels.shape[0], device=labels.device)

    def weight_sum(self, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Sum of the weights of the labels, by which a weighted loss is divided: (); without weights their number."""
        if weights is None:
            return self.targets(labels)
        return weights[labels[labels != IGNORED]].sum()

    def probabilities(self, logits: Tensor) -> Tensor:
        """The probability of each label, or the value of a regression: float32 in the shape of `logits`."""
        if self.problem_type == "regression":
            return logits.float()
        return logits.float().sigmoid() if self.problem_type == "multi-label" else logits.float().softmax(-1)

    def chosen(self, logits: Tensor) -> Any:
        """The predicted labels of one row.

        Args:
            logits: (C,), for tagging (N, C) at the labeled tokens.

        Returns:
            The index of a class, a list of them (also per labeled token), or the numbers of a regression.
        """
        if self.problem_type == "regression":
            return [float(value) for value in logits]
        if self.problem_type == "multi-label":
            return (self.probabilities(logits) >= self.threshold).nonzero().flatten().tolist()
        return logits.argmax(-1).tolist()

    def said(self, chosen: Any) -> str:
        """Predicted labels as text.

        >>> TaskHead(("ham", "spam"), "single-label").said(1), TaskHead(("a", "b"), "multi-label").said([0, 1])
        ('spam', 'a, b')
        """
        if self.problem_type == "regression":
            return ", ".join(f"{value:.6g}" for value in chosen)
        if self.problem_type == "tagging":
            return " ".join(self.names[number] for number in chosen)
        if self.problem_type == "multi-label":
            return ", ".join(self.names[number] for number in chosen)
        return self.names[int(chosen)]


def output_names(data: PreparedData) -> tuple[str, ...]:
    """Names of the outputs that a head for these rows needs."""
    return tuple(data.labels) or (NUMBER,)


def task_head(
    names: tuple[str, ...],
    problem_type: str | None,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    threshold: float | str | None = None,
) -> TaskHead:
    """The head of a loaded model; without a problem type it tags tokens.

    Args:
        threshold: of multi-label classification; the default if it is not a number.
    """
    applies = threshold if isinstance(threshold, float) else APPLIES
    if isinstance(tokenizer, ImageProcessor):
        return TaskHead(names, problem_type or "single-label", images=tokenizer, threshold=applies)
    kinds = getattr(model.config.get_text_config(), "type_vocab_size", 0) or 0
    told = kinds > 1 and "token_type_ids" in tokenizer.model_input_names
    return TaskHead(
        names=names,
        problem_type=problem_type or "tagging",
        pad=tokenizer.pad_token_id or 0,
        separator=tokenizer.sep_token_id if told else None,
        threshold=applies,
    )


def make_batch(ids: Sequence[Row], labels: Sequence[Sequence[float]] | None, head: TaskHead) -> dict[str, Tensor]:
    """Right-padded rows as model inputs.

    Args:
        ids: token ids of each row, or the path of its image.
        labels: as stored; None for rows to predict.

    Returns:
        `input_ids` and `attention_mask` (B, T) int64, `token_type_ids` if the model distinguishes two texts, and
        `labels`; for images `pixel_values` (B, 3, H, W) float32, and one token each, which is only used for counting.
    """
    if head.images is not None:
        return _image_batch([str(path) for path in ids], labels, head)
    longest = max(len(row) for row in ids)
    inputs = torch.full((len(ids), longest), head.pad, dtype=torch.int64)
    mask = torch.zeros((len(ids), longest), dtype=torch.int64)
    for number, row in enumerate(ids):
        inputs[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[number, : len(row)] = 1
    batch = {"input_ids": inputs, "attention_mask": mask}
    if head.separator is not None:
        batch["token_type_ids"] = segments(inputs, mask, head.separator)
    if labels is not None:
        batch["labels"] = targets_of(labels, head, longest)
    return batch


def _image_batch(paths: Sequence[str], labels: Sequence[Sequence[float]] | None, head: TaskHead) -> dict[str, Tensor]:
    assert head.images is not None  # the rows are images
    try:
        pixels = head.images.pixels(paths)
    except SkipRow as reason:
        raise DataError(f"an image changed during the run: a row {reason}; run again") from reason
    ones = torch.ones((len(paths), 1), dtype=torch.int64)
    batch = {PIXELS: pixels, "input_ids": torch.zeros_like(ones), "attention_mask": ones}
    return batch if labels is None else batch | {"labels": targets_of(labels, head, 1)}


def segments(inputs: Tensor, mask: Tensor, separator: int) -> Tensor:
    """Index of the text of each token: 0 up to the first separator, 1 after it, 0 in padding.

    Args:
        inputs, mask: (B, T) int64.

    >>> ids = torch.tensor([[2, 7, 3, 8, 3, 0]])
    >>> segments(ids, (ids != 0).long(), 3).tolist()
    [[0, 0, 0, 1, 1, 0]]
    """
    ended = (inputs == separator).cumsum(1)
    behind = functional.pad(ended[:, :-1], (1, 0))
    return behind.clamp(max=1) * mask


def targets_of(labels: Sequence[Sequence[float]], head: TaskHead, longest: int) -> Tensor:
    """The labels of rows as needed by the loss.

    Args:
        labels: as stored.
        longest: tokens of the longest row, only used for tagging.
    """
    if head.problem_type == "single-label":
        return torch.tensor([int(row[0]) for row in labels], dtype=torch.int64)
    if head.problem_type == "regression":
        return torch.tensor([list(row) for row in labels], dtype=torch.float32)
    if head.problem_type == "multi-label":
        switches = np.zeros((len(labels), len(head.names)), dtype=np.float32)
        for number, row in enumerate(labels):
            switches[number, [int(one) for one in row]] = 1.0
        return torch.from_numpy(switches)
    targets = torch.full((len(labels), longest), IGNORED, dtype=torch.int64)
    for number, row in enumerate(labels):
        targets[number, : len(row)] = torch.tensor([int(one) for one in row], dtype=torch.int64)
    return targets


def forward(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The outputs for a batch; for tagging, without those of virtual tokens."""
    if PIXELS in batch:
        weights = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
        outputs: Tensor = model(pixel_values=batch[PIXELS].to(weights)).logits
        return outputs
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs).logits
    return logits[:, -inputs["input_ids"].shape[1] :] if logits.dim() == 3 else logits


@dataclass(frozen=True)
class LabelMetrics:
    """The metrics of one model with labels.

    Attributes:
        loss: nats per row or tagged word; for several labels their mean; for numbers the mean squared error.
        figures: accuracy and all other metrics, by the names of `metrics.json`.
    """

    loss: float
    figures: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The metrics in the form of `metrics.json`."""
        return {"loss": self.loss, **self.figures}


@torch.inference_mode()
def row_logits(
    model: Any,
    ids: Sequence[Row],
    marks: Sequence[Sequence[float]] | None,
    head: TaskHead,
    *,
    batch_rows: int,
    progress: Progress,
    what: str,
    timed: bool = False,
) -> list[Tensor]:
    """The outputs of a model for rows, in order.

    Args:
        model: in any mode; the mode is restored.
        ids: token ids of each row, or the path of its image.
        marks: for tagging, a label per token, or -100 if its output is not needed.
        batch_rows: batch size; the result does not depend on it.
        what: name of the task for `progress`.
        timed: report after the first batch how long all rows will take.

    Returns:
        For each row float32 on the CPU: (C,), for tagging (N, C) at the labeled tokens.
    """
    found: list[Tensor | None] = [None] * len(ids)
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
    device = input_device(model)
    was_training = model.training
    model.eval()
    progress.start(what, len(ids))
    fitting, done = ShrinkingBatches(batch_rows, what, progress), 0
    expected = ExpectedTime(what, len(ids), progress)
    while done < len(order):
        longest = 1 if head.images is not None else len(ids[order[done]])
        rows = order[done : done + rows_alike(fitting.rows, longest, device.type)]
        batch = {name: value.to(device) for name, value in make_batch([ids[row] for row in rows], None, head).items()}
        logits = fitting.attempt(len(rows), device, partial(forward, model, batch))
        if logits is None:
            expected.restart()
            continue
        for row, one in zip(rows, logits.float().cpu(), strict=True):
            wanted = [place for place, mark in enumerate(marks[row]) if mark != IGNORED] if marks is not None else None
            found[row] = one if wanted is None else one[wanted]
        done += len(rows)
        if timed:
            expected.after(done, done / len(ids))
        progress.advance(done)
    progress.end()
    model.train(was_training)
    return [one for one in found if one is not None]


def evaluate_labels(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    evaluation: EvaluationSection,
    *,
    batch_rows: int,
    progress: Progress,
    what: str,
) -> tuple[LabelMetrics, list[Answer]]:
    """Evaluate a model with a head on all test rows; processes share the rows and all get the full result."""
    head = task_head(output_names(data), data.problem_type, model, tokenizer, threshold=evaluation.threshold)
    ids, labels = (data.test.column(name).to_pylist() for name in (head.column, "labels"))
    mine = local_rows(len(ids))
    outputs = row_logits(
        model,
        [ids[row] for row in mine],
        [labels[row] for row in mine] if head.problem_type == "tagging" else None,
        head,
        batch_rows=batch_rows,
        progress=progress,
        what=f"{what}: labels",
    )
    logits: list[Tensor] = interleave(gather(outputs))
    chosen = [head.chosen(one) for one in logits]
    figures = label_figures(head, chosen, labels, positive=evaluation.positive_label)
    answers = [Answer(head.said(one), finished=True) for one in chosen]
    return LabelMetrics(label_loss(head, logits, labels), figures), answers


def tune_threshold(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    *,
    batch_rows: int,
    progress: Progress,
) -> tuple[float, float]:
    """The threshold with the best micro F1 on the validation rows, and that F1; processes share the rows.

    Args:
        data: with validation rows that have any number of classes.
    """
    head = task_head(output_names(data), data.problem_type, model, tokenizer)
    rows = data.scored_on_validation().test
    ids, labels = (rows.column(name).to_pylist() for name in (head.column, "labels"))
    mine = [ids[row] for row in local_rows(len(ids))]
    what = "validation rows: labels"
    outputs = row_logits(model, mine, None, head, batch_rows=batch_rows, progress=progress, what=what)
    logits = torch.stack(interleave(gather(outputs)))
    return best_threshold(head.probabilities(logits).numpy(), targets_of(labels, head, 1).numpy() > 0)


def predicted_and_actual(head: TaskHead, logits: Tensor, labels: Tensor) -> tuple[list[Any], list[list[float]]]:
    """The predicted labels of a batch as `TaskHead.chosen` returns them, and those of the rows as stored.

    Args:
        logits: (B, C), for tagging (B, T, C).
        labels: as `targets_of` makes them.
    """
    logits, labels = logits.float().cpu(), labels.cpu()
    if head.problem_type == "tagging":
        marked = labels != IGNORED
        pairs = [(row[where], own[where]) for row, own, where in zip(logits, labels, marked, strict=True)]
        return [head.chosen(row) for row, _ in pairs], [own.tolist() for _, own in pairs]
    chosen = [head.chosen(row) for row in logits]
    if head.problem_type == "multi-label":
        return chosen, [row.nonzero().flatten().tolist() for row in labels]
    return chosen, [row.reshape(-1).tolist() for row in labels]


def label_loss(head: TaskHead, logits: Sequence[Tensor], labels: Sequence[Sequence[float]]) -> float:
    """Mean loss over all rows, or all labeled tokens, with equal weight.

    Args:
        logits: as `row_logits` returns them.
        labels: as stored.
    """
    if head.problem_type == "tagging":
        marked = [int(one) for row in labels for one in row if one != IGNORED]
        losses = head.losses(torch.cat(list(logits)), torch.tensor(marked))
    else:
        losses = head.losses(torch.stack(list(logits)), targets_of(labels, head, 1))
    return float(losses.double().mean())


def label_figures(
    head: TaskHead, chosen: Sequence[Any], labels: Sequence[Sequence[float]], *, positive: str | None = None
) -> dict[str, Any]:
    """Compare predicted labels with those of the rows.

    Args:
        chosen: as `TaskHead.chosen` returns them.
        labels: as stored.
        positive: `evaluation.positive_label`.
    """
    if head.problem_type == "regression":
        return regression_scores([one[0] for one in chosen], [row[0] for row in labels]).as_dict()
    if head.problem_type == "multi-label":
        return multi_label_scores(chosen, [[int(one) for one in row] for row in labels], head.names).as_dict()
    if head.problem_type == "single-label":
        actual = [int(row[0]) for row in labels]
        return classification_scores(chosen, actual, head.names, positive_label=positive).as_dict()
    named = [[head.names[number] for number in row] for row in chosen]
    actual_tags = [[head.names[int(one)] for one in row if one != IGNORED] for row in labels]
    return tagging_scores(named, actual_tags, head.names).as_dict()
