"""Comparisons with derived tolerances, and exact 4-bit products for references.

Two code paths that compute the same thing (padded or padding-free, one process or two, fused or not) add the same
numbers in another order, and each CPU has kernels of its own. So bits are compared only between two runs of one path on
one machine; everything else is compared by the functions below.

It imports nothing of peftcli, so that a script that stands for a user of plain PEFT can use it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

LOSS_TOLERANCE = 1e-5
"""Nats by which the losses of two equal trainings may differ, per step.

A loss of a few nats is a mean of float32 log-probabilities, each rounded at 2^-24 of its size and summed over at most a
few hundred products: about 1e-6. The weights that follow differ too (see `UPDATE_TOLERANCE`), but mostly where the
gradient is near zero, which hardly moves the loss. Measured between padded and padding-free batches: up to 1.4e-6.
"""
UPDATE_TOLERANCE = 0.02
"""Largest root mean square of the difference of two equal trainings' weights, as a share of that of their update.

Adam divides each gradient by its own size, so a weight whose gradient is smaller than its rounding error d moves by up
to the learning rate in either direction, whatever the two paths agree on elsewhere. Among gradients of scale s about
d/s of the weights are so close to zero; with d/s = 1e-5 to 1e-4 in float32, the root mean square is sqrt(d/s), 0.3 % to
1 %. A row left out, counted twice or scaled wrongly gives more than 10 %.
"""


def without_repacking(model: torch.nn.Module) -> torch.nn.Module:
    """The model, its 4-bit layers kept from the kernel that rounds to bfloat16.

    On a CPU with AVX512_BF16, bitsandbytes 0.50 packs the weights of a 4-bit layer again in its first evaluation, for a
    kernel whose products are rounded to bfloat16 (logits are up to 3e-2 off) and which fails on widths below 64.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def update_distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """Root mean square of `found - expected`, as a share of that of `expected - start`, over all tensors.

    Args:
        start: tensors before the training; a name that it lacks started at zero, as LoRA's B matrices do.
    """
    assert found.keys() == expected.keys()
    off = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
    moved = sum(float((expected[name] - start.get(name, 0.0)).double().square().sum()) for name in expected)
    assert moved > 0, "nothing was trained"
    return float((off / moved) ** 0.5)


def assert_same_adapter(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Two adapters of LoRA are results of the same training, by their B matrices, which start at zero."""
    found, expected = ({name: value for name, value in one.items() if "lora_B" in name} for one in (found, expected))
    distance = update_distance(found, expected, {})
    assert distance <= UPDATE_TOLERANCE, f"the updates differ by {distance:.2%}"


def assert_same_losses(found: Sequence[float], expected: Sequence[float]) -> None:
    """Two trainings had the same loss at every step."""
    assert found == pytest.approx(expected, abs=LOSS_TOLERANCE)


def assert_same_metrics(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Two evaluations of the same model gave the same figures.

    Perplexity is the exponential of the loss, so its relative difference is the loss's absolute one.
    """
    assert found == pytest.approx(expected, abs=LOSS_TOLERANCE, rel=LOSS_TOLERANCE)


def assert_same_effect(found: Tensor, expected: Tensor, base: Tensor) -> None:
    """Two trained models answer alike: their logits differ by little of what the training changed in the base's."""
    distance = update_distance({"logits": found}, {"logits": expected}, {"logits": base})
    assert distance <= UPDATE_TOLERANCE, f"the effects of the adapters differ by {distance:.2%}"


def assert_close_logits(found: Tensor, expected: Tensor, **tolerance: Any) -> None:
    """Two float32 computations of the same logits agree.

    Logits of the tiny models are sums of at most 1,000 products, about 10 in all: 10 x 2^-24 x sqrt(1000) is 2e-5, and
    each of a few layers adds its own. The default of 1e-4 is five times that.
    """
    torch.testing.assert_close(found, expected, **({"atol": 1e-4, "rtol": 1e-4} | tolerance))
