"""Training rows for what is measured before the first step: batches drawn by the seed, and the loss on them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peftcli.data.prepare import PreparedData
from peftcli.data.tokenize import IGNORED
from peftcli.model.classification import forward, head_of, make_batch
from peftcli.plan.plan import Plan
from peftcli.recipe.rules import CAUSAL

Inputs = Mapping[str, Tensor]


def drawn_rows(plan: Plan, count: int, batches: int) -> list[list[int]]:
    """Numbers of training rows for each batch, drawn by the seed of the recipe.

    Args:
        count: of all training rows.
        batches: at most.
    """
    order = np.random.default_rng(plan.seed).permutation(count)
    size = plan.batch.per_device
    return [order[first : first + size].tolist() for first in range(0, count, size)][:batches]


def reader(
    plan: Plan, data: PreparedData, tokenizer: PreTrainedTokenizerBase, model: Any
) -> tuple[Callable[[Sequence[int]], Inputs], Callable[[Any, Inputs], Tensor]]:
    """How rows become a batch, and a batch a loss.

    Args:
        model: the base, alone or with an adapter that changes nothing yet.
    """
    head = head_of(plan.base.labels, plan.base.problem, model, tokenizer)
    store = data.train.store.examples.select([head.column, "labels"])

    def read(rows: Sequence[int]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = store.take([int(data.train.rows[row]) for row in rows]).to_pydict()
        return columns

    if plan.task == CAUSAL:
        pad = tokenizer.pad_token_id or 0
        return (lambda rows: _on(model, filled(**read(rows), pad=pad))), (lambda one, batch: one(**batch).loss)

    def labelled(rows: Sequence[int]) -> Inputs:
        found = read(rows)
        return _on(model, make_batch(found[head.column], found["labels"], head))

    def loss(one: Any, batch: Inputs) -> Tensor:
        losses = head.losses(forward(one, dict(batch)), batch["labels"])
        return losses.sum() / head.targets(batch["labels"]).clamp(min=1)

    return labelled, loss


def filled(input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Rows filled up at their end.

    >>> filled([[5, 6], [7]], [[-100, 6], [7]], 0)["labels"].tolist()
    [[-100, 6], [7, -100]]
    """
    longest = max(len(row) for row in input_ids)

    def fill(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

    mask = fill([[1] * len(row) for row in input_ids], 0)
    return {"input_ids": fill(input_ids, pad), "attention_mask": mask, "labels": fill(labels, IGNORED)}


def _on(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(model.device) for name, value in batch.items()}
