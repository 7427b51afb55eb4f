"""The loss of a head with class weights is that of torch.nn.CrossEntropyLoss, in whatever parts it is computed."""

import pytest
import torch

from peftcli.data.tokenize import IGNORED
from peftcli.model.classification import TaskHead
from peftcli.plan.label_loss import balanced_weights

WEIGHTS = torch.tensor([0.5, 2.0, 4.0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("problem_type", ["single-label", "tagging"])
def test_the_weighted_loss_is_that_of_torch(problem_type: str, smoothing: float) -> None:
    torch.manual_seed(0)
    head = TaskHead(("a", "b", "c"), problem_type)
    shape = (8,) if problem_type == "single-label" else (8, 5)
    logits, labels = torch.randn(*shape, 3), torch.randint(0, 3, shape)
    if problem_type == "tagging":
        labels[torch.rand(shape) < 0.4] = IGNORED
    plain = torch.nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=smoothing)
    expected = plain(logits.flatten(0, -2), labels.flatten())
    total = head.weight_sum(labels, WEIGHTS)
    parts = [
        head.losses(logits[rows], labels[rows], smoothing=smoothing, weights=WEIGHTS).sum() / total
        for rows in (slice(0, 3), slice(3, 8))
    ]
    # Sums of at most 40 float32 terms in another order.
    torch.testing.assert_close(sum(parts), expected, rtol=40 * 2**-23, atol=0)


def test_without_weights_the_loss_is_divided_by_the_number_of_labels() -> None:
    labels = torch.tensor([[0, IGNORED], [2, 1]])
    assert int(TaskHead(("a", "b", "c"), "tagging").weight_sum(labels, None)) == 3


@pytest.mark.parametrize("counts", [[3, 1], [10, 20, 30], [5, 0, 15]])
def test_balanced_weights_give_each_class_the_same_share(counts: list[int]) -> None:
    weights = balanced_weights(counts)
    shares = [weight * count for weight, count in zip(weights, counts, strict=True) if count]
    assert shares == pytest.approx([sum(counts) / len(shares)] * len(shares))
