"""How far a merged model with a head is from the adapter that was trained: by the outputs for real test rows."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from peftcli.merge.drift import Drift
from peftcli.model.classification import Head

SAME_NUMBER = 0.01
"""Of the spread of a regression's numbers: nearer ones count as the same."""


def compare_labels(head: Head, reference: Sequence[Tensor], merged: Sequence[Tensor]) -> Drift:
    """Compare the outputs of two models row by row.

    Args:
        head: what the outputs mean.
        reference, merged: (C,) of each row, of tagging (N, C) for its marked tokens.

    Returns:
        `top1_agreement` is the share of rows, or of marked tokens, that are given the same labels: of a regression a
        number within 1 % of the spread of all; it has no `kl_nats`.

    >>> compare_labels(Head(("a", "b"), "single-label"), [torch.tensor([0.0, 1.0])], [torch.tensor([0.0, 2.0])]).kl_nats
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


def _divergence(head: Head, before: Tensor, after: Tensor) -> float | None:
    if head.problem == "regression":
        return None
    if head.problem == "multi-label":
        # Each label is a choice between two, whose logits are those of the label and 0.
        before, after = (torch.stack([side, torch.zeros_like(side)], -1) for side in (before, after))
    logs = before.log_softmax(-1), after.log_softmax(-1)
    total = functional.kl_div(logs[1], logs[0], reduction="sum", log_target=True)
    return total.item() / before.shape[0]


def _same(head: Head, before: Tensor, after: Tensor) -> float:
    if head.problem == "regression":
        near = (before - after).abs() <= SAME_NUMBER * before.std(0, correction=0)
        return float(near.all(-1).double().mean())
    chosen = [head.chosen(one) for one in before], [head.chosen(one) for one in after]
    return float(sum(one == other for one, other in zip(*chosen, strict=True)) / len(chosen[0]))
