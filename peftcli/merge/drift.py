"""How far a merged model is from the adapter that was trained, on real rows."""

from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel

from peftcli.data.tokenize import IGNORED
from peftcli.model.scoring import pad_right, rows_at_once, vocabulary_of
from peftcli.progress import Progress

KEPT_BYTES = 512 * 2**20
"""Of reference logits held for the comparison; rows beyond are not compared."""
MOST_ROWS = 2048
"""Rows beyond are not compared: the metrics of the merged model are over all of them."""


@dataclass(frozen=True)
class Drift:
    """Differences over the positions that predict a trained token.

    Attributes:
        rows, positions: what was compared.
        max_abs_logit_difference, mean_abs_logit_difference: over positions and vocabulary.
        kl_nats: mean over positions of KL(adapter || merged), None where the outputs are no probabilities.
        top1_agreement: share of positions with the same first choice.
    """

    rows: int
    positions: int
    max_abs_logit_difference: float
    mean_abs_logit_difference: float
    kl_nats: float | None
    top1_agreement: float


def rows_to_compare(table: pa.Table, vocabulary: int) -> pa.Table:
    """As many rows from the head as fit the memory set aside."""
    budget = KEPT_BYTES // (4 * vocabulary)
    used = 0
    for row, labels in enumerate(table.column("labels").to_pylist()):
        used += sum(label != IGNORED for label in labels[1:])
        if used > budget:
            return table.slice(0, max(row, 1))
    return table


@torch.inference_mode()
def trained_logits(
    model: PreTrainedModel, rows: pa.Table, *, pad_id: int, batch_rows: int, progress: Progress, what: str
) -> list[Tensor]:
    """Logits at the positions that predict a trained token.

    Args:
        rows: `input_ids` and `labels`.
        pad_id: token id that fills short rows; any id, since padding is masked.
        batch_rows: rows that go through together.

    Returns:
        For each row (N, V) float32 on the CPU, N its trained tokens.
    """
    ids, labels = rows.column("input_ids").to_pylist(), rows.column("labels").to_pylist()
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
    device = next(model.parameters()).device
    found: list[Tensor | None] = [None] * len(ids)
    progress.start(what, len(ids))
    vocabulary = vocabulary_of(model)
    done = 0
    while done < len(order):
        batch = order[done : done + rows_at_once(batch_rows, len(ids[order[done]]), vocabulary, device.type)]
        inputs, targets, mask = pad_right([ids[row] for row in batch], [labels[row] for row in batch], pad_id)
        output = model(input_ids=inputs.to(device), attention_mask=mask.to(device), use_cache=False)
        logits = output.logits[:, -inputs.shape[1] :]
        for place, row in enumerate(batch):
            chosen = (targets[place, 1:] != IGNORED).nonzero().squeeze(1)
            found[row] = logits[place, chosen.to(device)].float().cpu()
        done += len(batch)
        progress.advance(done)
    progress.end()
    return [one for one in found if one is not None]


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
