"""Token-weighted loss and accuracy of a model over tokenized rows, whatever the batch size."""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from peftcli.data.tokenize import IGNORED
from peftcli.metrics.language import Metrics, perplexity
from peftcli.model.distributed import gather, is_fsdp, local_rows, without_gradients
from peftcli.model.oom import ShrinkingBatches
from peftcli.progress import Progress

LOGIT_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
"""Bytes of float32 logits that may exist at once; a CPU is as fast with fewer."""
CPU_TOKENS = 2048
"""Tokens of a batch on a CPU: larger ones only add padding."""


@dataclass(frozen=True)
class Sums:
    """Sums over rows; divide once, at the end."""

    nll: float
    tokens: int
    correct: int

    def metrics(self) -> Metrics:
        loss = self.nll / self.tokens
        return Metrics(loss=loss, perplexity=perplexity(loss), token_accuracy=self.correct / self.tokens)


def completion_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the negative log-likelihood of the trained tokens.

    Sums, not means: a mean of batch means would overweight short batches.

    Args:
        logits: (N, V), any float dtype; row n predicts label n.
        labels: (N,), int64; -100 marks a token that is ignored.

    Returns:
        nll: (), float64, nats.
        tokens: (), int64.
        correct: (), int64, tokens with the highest probability.
    """
    chosen = labels != IGNORED
    losses = torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
    correct = (logits.argmax(-1) == labels) & chosen
    return losses.double().sum(), chosen.sum(), correct.sum()


@without_gradients
def score(
    model: torch.nn.Module,
    rows: pa.Table,
    *,
    pad_id: int,
    batch_rows: int,
    progress: Progress,
    what: str,
    repeated: int = 0,
) -> Sums:
    """Run every row through the model once.

    Args:
        model: in any mode; the mode is restored.
        rows: `input_ids` and `labels`.
        pad_id: token id used for padding; any id, because padding is masked.
        batch_rows: batch size; the result does not depend on it.
        what: name of the task for `progress`.
        repeated: number of rows at the end that are run only to keep processes in step, and not counted.
    """
    ids, labels = rows.column("input_ids").to_pylist(), rows.column("labels").to_pylist()
    for row in range(len(ids) - repeated, len(ids)):
        labels[row] = [IGNORED] * len(labels[row])
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
    device = next(model.parameters()).device
    nll, tokens, correct = 0.0, 0, 0
    was_training = model.training
    model.eval()
    progress.start(what, len(ids))
    vocabulary = vocabulary_of(model)
    done = 0
    in_step = is_fsdp(model)
    fitting = ShrinkingBatches(batch_rows, what, progress, in_step=in_step)
    while done < len(order):
        count = rows_at_once(fitting.rows, len(ids[order[done]]), vocabulary, device.type)
        batch = order[done : done + (min(gather(count)) if in_step else count)]
        inputs, targets, mask = pad_right([ids[row] for row in batch], [labels[row] for row in batch], pad_id)
        score_these = partial(_score_batch, model, inputs.to(device), targets.to(device), mask.to(device))
        sums = fitting.attempt(len(batch), device, score_these)
        if sums is None:
            continue
        nll, tokens, correct = nll + sums[0], tokens + sums[1], correct + sums[2]
        done += len(batch)
        progress.advance(done)
    progress.end()
    model.train(was_training)
    return Sums(nll, tokens, correct)


def score_shared(
    model: torch.nn.Module, rows: pa.Table, *, pad_id: int, batch_rows: int, progress: Progress, what: str
) -> list[Sums]:
    """`score` on rows shared across the processes; returns the sums of all."""
    count = rows.num_rows
    mine = local_rows(count, in_step=is_fsdp(model))
    repeated = len(mine) - len(local_rows(count))
    table = rows.take(pa.array(mine, pa.int64()))
    return gather(
        score(model, table, pad_id=pad_id, batch_rows=batch_rows, progress=progress, what=what, repeated=repeated)
    )


def _score_batch(model: torch.nn.Module, inputs: Tensor, labels: Tensor, mask: Tensor) -> tuple[float, int, int]:
    # Position t predicts token t + 1; logits are needed only for positions that predict a trained token of some row.
    targets = labels[:, 1:]
    wanted = (targets != IGNORED).any(0).nonzero().squeeze(1)
    if takes_positions(model):
        logits = model(input_ids=inputs, attention_mask=mask, use_cache=False, logits_to_keep=wanted).logits
    else:
        logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
        logits = logits[:, -inputs.shape[1] :][:, wanted]
    flat, flat_targets = logits.flatten(0, 1), targets[:, wanted].flatten()
    chunk = max(1, LOGIT_BYTES[flat.device.type] // (4 * flat.shape[-1]))
    totals = [0.0, 0, 0]
    for first in range(0, flat.shape[0], chunk):
        part, labels_part = flat[first : first + chunk], flat_targets[first : first + chunk]
        for number, value in enumerate(completion_nll(part, labels_part)):
            totals[number] += value.item()
    return totals[0], int(totals[1]), int(totals[2])


def rows_at_once(batch_rows: int, longest: int, vocabulary: int, device: str) -> int:
    """Number of rows whose logits fit in the reserved memory, at most `batch_rows` and at least one.

    >>> rows_at_once(16, longest=1024, vocabulary=152_064, device="cuda")
    3
    """
    fitting = 4 * LOGIT_BYTES[device] // (2 * longest * vocabulary)
    return max(1, min(rows_alike(batch_rows, longest, device), fitting))


def rows_alike(batch_rows: int, longest: int, device: str) -> int:
    """Number of rows per batch when sorted by length: at most `batch_rows` and at least one.

    >>> rows_alike(128, longest=400, device="cpu"), rows_alike(128, longest=400, device="cuda")
    (5, 128)
    """
    return max(1, min(batch_rows, CPU_TOKENS // max(1, longest))) if device == "cpu" else batch_rows


def vocabulary_of(model: Any) -> int:
    """Size of the logits."""
    return int(model.config.get_text_config().vocab_size)


def takes_positions(model: Any) -> bool:
    """Whether the model can compute logits for selected positions only."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return False  # virtual tokens shift the positions
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return False  # its last layers may be on another GPU than the positions
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward: Any = type(base).forward  # that of the instance may be wrapped
    return "logits_to_keep" in inspect.signature(forward).parameters


def pad_right(rows: list[list[int]], labels: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded input ids, labels and attention mask of rows, each (B, T) int64."""
    longest = max(len(row) for row in rows)
    inputs = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    targets = torch.full((len(rows), longest), IGNORED, dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for number, (row, row_labels) in enumerate(zip(rows, labels, strict=True)):
        inputs[number, : len(row)] = torch.tensor(row)
        targets[number, : len(row)] = torch.tensor(row_labels)
        mask[number, : len(row)] = 1
    return inputs, targets, mask
