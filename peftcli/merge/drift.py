"""Compares the outputs of a merged model with those of its adapter on real test rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftcli.data.formats import LABELLED
from peftcli.data.prepare import PreparedData
from peftcli.data.tokenize import IGNORED
from peftcli.model.classification import TaskHead, output_names, row_logits, task_head
from peftcli.model.expected_time import ExpectedTime
from peftcli.model.load import input_device
from peftcli.model.oom import ShrinkingBatches
from peftcli.model.scoring import pad_right, rows_at_once, vocabulary_of
from peftcli.progress import Progress

LOGITS_BYTES = 512 * 2**20
"""Memory for reference logits; rows beyond it are not compared."""
MOST_ROWS = 2048
"""Maximum number of rows that are compared; the metrics of the merged model cover all rows."""

ROUNDING_MARGIN = 8.0
"""How much larger than the estimate of `rounding_limit` a difference may be."""

SAME_NUMBER = 0.01
"""Regression outputs that differ by less than this share of their standard deviation count as equal."""


@dataclass(frozen=True)
class Drift:
    """Differences over the positions that predict a trained token.

    Attributes:
        rows, positions: number of compared rows and positions.
        max_abs_logit_difference, mean_abs_logit_difference: over positions and vocabulary.
        kl_nats: mean of KL(adapter || merged) over positions, None if the outputs are not probabilities.
        top1_agreement: share of positions with the same first choice.
    """

    rows: int
    positions: int
    max_abs_logit_difference: float
    mean_abs_logit_difference: float
    kl_nats: float | None
    top1_agreement: float


@dataclass(frozen=True)
class Comparison:
    """The rows that are run through the adapter and each merged model.

    Attributes:
        data: its first test rows are used, or training rows if it has none.
        batch_rows: batch size.
    """

    data: PreparedData
    tokenizer: PreTrainedTokenizerBase
    batch_rows: int
    progress: Progress

    @cached_property
    def rows(self) -> pa.Table:
        """The rows to compare, up to the maximum."""
        return self.data.comparable(MOST_ROWS)

    @property
    def rows_from(self) -> str:
        """The split they come from: `test` or `training`."""
        return "test" if self.data.holds_out else "training"

    def logits(self, model: PreTrainedModel, what: str, most: int | None = None) -> list[Tensor]:
        """The logits of a model at the positions that count in the loss, for each row, float32 on the CPU.

        Args:
            most: maximum number of rows, from the first; the expected time is reported after the first batch. None for
                all rows.
        """
        rows = self.rows.slice(0, most)
        if self.data.format not in LABELLED:
            return self._of_text(model, rows, what, timed=most is not None)
        head = task_head(output_names(self.data), self.data.problem_type, model, self.tokenizer)
        ids, labels = (rows.column(name).to_pylist() for name in (head.column, "labels"))
        return row_logits(
            model,
            ids,
            labels if head.problem_type == "tagging" else None,
            head,
            batch_rows=self.batch_rows,
            progress=self.progress,
            what=f"{what}: labels",
            timed=most is not None,
        )

    def drift(self, reference: list[Tensor], merged: list[Tensor]) -> Drift:
        """The differences between the outputs of the adapter and of a merged model."""
        if self.data.format not in LABELLED:
            return compare(reference, merged)
        return compare_labels(TaskHead(output_names(self.data), self.data.problem_type or "tagging"), reference, merged)

    def _of_text(self, model: PreTrainedModel, rows: pa.Table, what: str, *, timed: bool) -> list[Tensor]:
        return trained_logits(
            model,
            rows_to_compare(rows, model.config.get_text_config().vocab_size),
            pad_id=self.tokenizer.pad_token_id or 0,
            batch_rows=self.batch_rows,
            progress=self.progress,
            what=f"{what}: logits",
            timed=timed,
        )


def rows_to_compare(table: pa.Table, vocabulary: int) -> pa.Table:
    """The first rows whose logits fit into `LOGITS_BYTES`."""
    budget = LOGITS_BYTES // (4 * vocabulary)
    used = 0
    for row, labels in enumerate(table.column("labels").to_pylist()):
        used += sum(label != IGNORED for label in labels[1:])
        if used > budget:
            return table.slice(0, max(row, 1))
    return table


@torch.inference_mode()
def trained_logits(
    model: PreTrainedModel,
    rows: pa.Table,
    *,
    pad_id: int,
    batch_rows: int,
    progress: Progress,
    what: str,
    timed: bool = False,
) -> list[Tensor]:
    """Logits at the positions that predict a trained token.

    Args:
        rows: `input_ids` and `labels`.
        pad_id: token id for padding; any id, since padding is masked.
        batch_rows: batch size; smaller if memory runs out.
        timed: report after the first batch how long all rows will take.

    Returns:
        (N, V) for each row with N trained tokens, float32 on the CPU.
    """
    ids, labels = rows.column("input_ids").to_pylist(), rows.column("labels").to_pylist()
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
    device = input_device(model)
    found: list[Tensor | None] = [None] * len(ids)
    progress.start(what, len(ids))
    vocabulary = vocabulary_of(model)
    fitting, done = ShrinkingBatches(batch_rows, what, progress), 0
    expected = ExpectedTime(what, len(ids), progress)
    tokens = sum(map(len, ids))
    while done < len(order):
        batch = order[done : done + rows_at_once(fitting.rows, len(ids[order[done]]), vocabulary, device.type)]
        inputs, targets, mask = pad_right([ids[row] for row in batch], [labels[row] for row in batch], pad_id)
        work = partial(_trained, model, inputs.to(device), mask.to(device), targets)
        logits = fitting.attempt(len(batch), device, work)
        if logits is None:
            expected.restart()
            continue
        for row, one in zip(batch, logits, strict=True):
            found[row] = one
        done += len(batch)
        if timed:
            expected.after(done, sum(len(ids[row]) for row in batch) / tokens)
        progress.advance(done)
    progress.end()
    return [one for one in found if one is not None]


def _trained(model: PreTrainedModel, inputs: Tensor, mask: Tensor, targets: Tensor) -> list[Tensor]:
    """For each row of a batch the logits that predict its trained tokens, float32 on the CPU."""
    logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits[:, -inputs.shape[1] :]
    chosen = [(labels[1:] != IGNORED).nonzero().squeeze(1).to(logits.device) for labels in targets]
    return [row[places].float().cpu() for row, places in zip(logits, chosen, strict=True)]


def compare(reference: list[Tensor], merged: list[Tensor]) -> Drift:
    """Compare two models' logits row by row.

    >>> compare([torch.zeros(2, 3)], [torch.zeros(2, 3)]).top1_agreement
    1.0
    """
    positions, largest, total, kl, agree = 0, 0.0, 0.0, 0.0, 0
    for before, after in zip(reference, merged, strict=True):
        difference = (before - after).abs()
        positions += before.shape[0]
        largest = max(largest, difference.max().item())
        total += difference.double().sum().item() / before.shape[1]
        log_before, log_after = before.double().log_softmax(-1), after.double().log_softmax(-1)
        kl += (log_before.exp() * (log_before - log_after)).sum().item()
        agree += int((before.argmax(-1) == after.argmax(-1)).sum())
    return Drift(len(reference), positions, largest, total / positions, kl / positions, agree / positions)


def rounding_limit(model: PreTrainedModel, dtype: torch.dtype, reference: Sequence[Tensor]) -> float:
    """The largest mean difference of logits that rounding explains between an adapter and its merge.

    A merge rounds each changed weight once, and its products are rounded apart from those of the adapter: a relative
    error of about u in each of the M matrices that a token passes, u being half of `torch.finfo(dtype).eps`. Errors of
    different matrices add up like a random walk, by sqrt(M). In float32 a product of n terms is accumulated in the
    same precision, which adds sqrt(n) (Higham and Mary 2019, doi:10.1137/18M1226312, probabilistic bound); narrower
    dtypes are accumulated in float32. `ROUNDING_MARGIN` covers what nonlinear layers amplify.

    Args:
        model: the base, for its matrices.
        dtype: of the computation and of the merged weights.
        reference: logits of the adapter, for their scale.

    Returns:
        In the unit of the logits.
    """
    # A factor of rank 0, which AdaLoRA may leave, has no terms.
    matrices = [weight for weight in model.parameters() if weight.dim() > 1 and weight.numel()]
    terms = max((weight[0].numel() // (weight.shape[1] if weight.dim() == 3 else 1) for weight in matrices), default=1)
    relative = ROUNDING_MARGIN * torch.finfo(dtype).eps / 2 * math.sqrt(max(len(matrices), 1))
    if dtype == torch.float32:
        relative *= math.sqrt(terms)
    squares = sum(float(one.double().square().sum()) for one in reference)
    return relative * math.sqrt(squares / max(1, sum(one.numel() for one in reference)))


def compare_labels(head: TaskHead, reference: Sequence[Tensor], merged: Sequence[Tensor]) -> Drift:
    """Compare the outputs of two models row by row.

    Args:
        head: the meaning of the outputs.
        reference, merged: (C,) for each row; for tagging (N, C) for its N labeled tokens.

    Returns:
        `top1_agreement` is the share of rows, or of labeled tokens, with the same prediction. For regression,
        predictions count as equal within 1 % of their standard deviation, and `kl_nats` is None.

    >>> one, other = [torch.tensor([0.0, 1.0])], [torch.tensor([0.0, 2.0])]
    >>> compare_labels(TaskHead(("a", "b"), "single-label"), one, other).kl_nats
    0.0...
    """
    before, after = (torch.cat([one if one.dim() == 2 else one[None] for one in side]) for side in (reference, merged))
    difference = (before - after).abs()
    return Drift(
        rows=len(reference),
        positions=before.shape[0],
        max_abs_logit_difference=difference.max().item(),
        mean_abs_logit_difference=difference.double().mean().item(),
        kl_nats=_divergence(head, before.double(), after.double()),
        top1_agreement=_same(head, before, after),
    )


def _divergence(head: TaskHead, before: Tensor, after: Tensor) -> float | None:
    if head.problem_type == "regression":
        return None
    if head.problem_type == "multi-label":
        # Each label is a binary choice with the logits (label, 0).
        before, after = (torch.stack([side, torch.zeros_like(side)], -1) for side in (before, after))
    logs = before.log_softmax(-1), after.log_softmax(-1)
    total = functional.kl_div(logs[1], logs[0], reduction="sum", log_target=True)
    return total.item() / before.shape[0]


def _same(head: TaskHead, before: Tensor, after: Tensor) -> float:
    if head.problem_type == "regression":
        near = (before - after).abs() <= SAME_NUMBER * before.std(0, correction=0)
        return float(near.all(-1).double().mean())
    chosen = [head.chosen(one) for one in before], [head.chosen(one) for one in after]
    return float(sum(one == other for one, other in zip(*chosen, strict=True)) / len(chosen[0]))
