"""Test rows through a model with a head: its outputs, the loss, the figures of the labels, and the labels as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peftcli.data.prepare import PreparedData
from peftcli.data.tokenize import IGNORED
from peftcli.metrics.classification import classification_scores, multi_label_scores
from peftcli.metrics.regression import regression_scores
from peftcli.metrics.tagging import tagging_scores
from peftcli.model.answer import Answer
from peftcli.model.label import Head, Row, forward, head_of, make_batch, output_names, targets_of
from peftcli.model.memory import Shrinking
from peftcli.model.score import rows_alike
from peftcli.model.shards import gather, interleave, my_share
from peftcli.progress import Progress
from peftcli.recipe.schema import EvaluationSection


@dataclass(frozen=True)
class LabelMetrics:
    """The metrics of one model that gives labels.

    Attributes:
        loss: nats per row or tagged word, of several labels their mean; of numbers the mean squared error.
        figures: accuracy and all else, by the names of `metrics.json`.
    """

    loss: float
    figures: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The figures as `metrics.json` holds them."""
        return {"loss": self.loss, **self.figures}


@torch.inference_mode()
def row_logits(
    model: Any,
    ids: Sequence[Row],
    marks: Sequence[Sequence[float]] | None,
    head: Head,
    *,
    batch_rows: int,
    progress: Progress,
    what: str,
) -> list[Tensor]:
    """The outputs of a model for rows, in their order.

    Args:
        model: in evaluation mode or not; it is put back as it was.
        ids: token ids of each row, or the path of its image.
        marks: of tagging, for each token a label, or -100 where its output is not wanted.
        batch_rows: rows of one forward pass; the result does not depend on it.
        what: name of the stretch for `progress`.

    Returns:
        For each row float32 on the CPU: (C,), of tagging (N, C) at the marked tokens.
    """
    found: list[Tensor | None] = [None] * len(ids)
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    progress.start(what, len(ids))
    fitting, done = Shrinking(batch_rows, what, progress), 0
    while done < len(order):
        longest = 1 if head.images is not None else len(ids[order[done]])
        rows = order[done : done + rows_alike(fitting.rows, longest, device.type)]
        batch = {name: value.to(device) for name, value in make_batch([ids[row] for row in rows], None, head).items()}
        logits = fitting.attempt(len(rows), device, partial(forward, model, batch))
        if logits is None:
            continue
        for row, one in zip(rows, logits.float().cpu(), strict=True):
            wanted = [place for place, mark in enumerate(marks[row]) if mark != IGNORED] if marks is not None else None
            found[row] = one if wanted is None else one[wanted]
        done += len(rows)
        progress.advance(done)
    progress.end()
    model.train(was_training)
    return [one for one in found if one is not None]


def measure_labels(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    evaluation: EvaluationSection,
    *,
    batch_rows: int,
    progress: Progress,
    what: str,
) -> tuple[LabelMetrics, list[Answer]]:
    """Measure a model with a head on all test rows; several processes share the rows and all get the whole result."""
    head = head_of(output_names(data), data.problem, model, tokenizer)
    ids, labels = (data.test.column(name).to_pylist() for name in (head.column, "labels"))
    mine = my_share(len(ids))
    outputs = row_logits(
        model,
        [ids[row] for row in mine],
        [labels[row] for row in mine] if head.problem == "tagging" else None,
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


def label_loss(head: Head, logits: Sequence[Tensor], labels: Sequence[Sequence[float]]) -> float:
    """Mean loss over all rows, or all marked tokens, each weighing the same.

    Args:
        logits: as `row_logits` returns them.
        labels: as the store holds them.
    """
    if head.problem == "tagging":
        marked = [int(one) for row in labels for one in row if one != IGNORED]
        losses = head.losses(torch.cat(list(logits)), torch.tensor(marked))
    else:
        losses = head.losses(torch.stack(list(logits)), targets_of(labels, head, 1))
    return float(losses.double().mean())


def label_figures(
    head: Head, chosen: Sequence[Any], labels: Sequence[Sequence[float]], *, positive: str | None = None
) -> dict[str, Any]:
    """The figures of chosen labels against those of the rows.

    Args:
        chosen: as `Head.chosen` returns them.
        labels: as the store holds them.
        positive: `evaluation.positive_label`.
    """
    if head.problem == "regression":
        return regression_scores([one[0] for one in chosen], [row[0] for row in labels]).as_dict()
    if head.problem == "multi-label":
        return multi_label_scores(chosen, [[int(one) for one in row] for row in labels], head.names).as_dict()
    if head.problem == "single-label":
        actual = [int(row[0]) for row in labels]
        return classification_scores(chosen, actual, head.names, positive_label=positive).as_dict()
    named = [[head.names[number] for number in row] for row in chosen]
    actual_tags = [[head.names[int(one)] for one in row if one != IGNORED] for row in labels]
    return tagging_scores(named, actual_tags, head.names).as_dict()
