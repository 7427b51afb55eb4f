"""peftcli's loss head and TRL's on this GPU: values, gradients and how long each takes."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from gpu.conftest import Gpu
from peftcli.model.fused_loss import _Scores

pytestmark = pytest.mark.gpu
Record = Callable[[Mapping[str, Any]], None]

TILE = 32768
"""Words of a tile, as TRL's trainer has it."""
ROUNDOFFS = {"bfloat16": 2.0**-9, "float16": 2.0**-12}
ROUNDINGS = 8
"""Of a logit and of a gradient, together: the logits are rounded once, their gradient once, and the sum over words is
made in float32 or rounded once more for each tile."""
WARM, TIMED = 2, 5


def inputs(gpu: Gpu, dtype: str, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (tokens, width), a frozen head (words, width) and targets (tokens,); logits of deviation 3."""
    drawn = torch.Generator(gpu.name).manual_seed(0)
    tokens, width = gpu.scale.head_tokens, gpu.scale.head_width
    kind: dict[str, Any] = {"device": gpu.name, "generator": drawn}
    hidden = torch.randn((tokens, width), **kind).to(getattr(torch, dtype))
    weight = (torch.randn((vocabulary, width), **kind) * 3 / width**0.5).to(getattr(torch, dtype))
    return hidden, weight, torch.randint(0, vocabulary, (tokens,), **kind)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    found: Tensor = _Scores.apply(hidden, weight, None, targets)[0]  # type: ignore[no-untyped-call]  # torch
    return found


def of_trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    wanted = ("entropy", "is_top1")
    found: Tensor = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TILE, None, 1.0, wanted)[0]
    return found


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and the gradient of their sum, in float32, some rows after the other."""
    values, gradients = [], []
    for part, target in zip(hidden.split(256), targets.split(256), strict=True):
        wide = part.float().requires_grad_()
        scores = (wide @ weight.float().T).log_softmax(-1).gather(1, target[:, None])[:, 0]
        gradients.append(torch.autograd.grad(scores.sum(), wide)[0])
        values.append(scores.detach())
    return torch.cat(values), torch.cat(gradients)


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def milliseconds(work: Callable[[], Any], gpu: Gpu) -> float:
    """Of one call, median."""
    taken = []
    for number in range(WARM + TIMED):
        if not gpu.rehearsal:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        if not gpu.rehearsal:
            torch.cuda.synchronize()
        if number >= WARM:
            taken.append(1000 * (time.perf_counter() - begun))
    return sorted(taken)[TIMED // 2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("large", [False, True], ids=["small vocabulary", "large vocabulary"])
def test_both_heads_give_the_values_and_gradients_of_float32(gpu: Gpu, record: Record, dtype: str, large: bool) -> None:
    if dtype not in gpu.dtypes:
        pytest.skip("this GPU has no bfloat16")
    if large and len(gpu.scale.vocabularies) == 1:
        pytest.skip("one vocabulary is enough at this scale")
    vocabulary = gpu.scale.vocabularies[-1 if large else 0]
    hidden, weight, targets = inputs(gpu, dtype, vocabulary)
    values, gradients = exact(hidden, weight, targets)
    found: dict[str, Any] = {"vocabulary": vocabulary, "tokens": len(hidden)}
    for name, head in (("ours", ours), ("trl", of_trl)):
        leaf = hidden.clone().requires_grad_()

        def both(head: Any = head, leaf: Tensor = leaf) -> Tensor:
            leaf.grad = None
            scores: Tensor = head(leaf, weight, targets)
            torch.autograd.backward(scores.sum())
            return scores.detach()

        scores = both()
        assert leaf.grad is not None
        found[name] = {"values": distance(scores, values), "gradients": distance(leaf.grad, gradients)}
        found[name]["milliseconds"] = milliseconds(both, gpu)
        record(found)
    for name in ("ours", "trl"):
        assert found[name]["values"] <= ROUNDINGS * ROUNDOFFS[dtype], name
        assert found[name]["gradients"] <= ROUNDINGS * ROUNDOFFS[dtype], name
