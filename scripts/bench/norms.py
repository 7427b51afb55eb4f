"""Time the RMSNorm of Llama against torch's operator on this machine's CPU, forward and backward, interleaved.

    python scripts/bench/norms.py

On a CPU torch puts its operator together from others. The ratios decide whether `fused_norms` is worth it there.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from peftcli.model.fused_norms import _fused

SHAPES = ((256, 768), (1024, 768), (4096, 512))
"""Features and tokens."""
ROUNDS, CALLS = 15, 4


def seconds(call: Callable[[], None]) -> float:
    begun = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begun) / CALLS


def compare(features: int, tokens: int, dtype: torch.dtype) -> tuple[float, float]:
    """Median seconds of the module and of the operator."""
    module = LlamaRMSNorm(features).to(dtype).requires_grad_(False)
    inputs = torch.randn(1, tokens, features, dtype=dtype, requires_grad=True)
    coming = torch.randn(1, tokens, features, dtype=dtype)

    def run(norm: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        return lambda: torch.autograd.backward(norm(inputs), coming)

    both = run(module), run(lambda x: _fused(x, module.weight, module.variance_epsilon))
    found = [[seconds(call) for call in both] for _ in range(ROUNDS)]
    own, operator = (statistics.median(one) for one in zip(*found, strict=True))
    return own, operator


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for dtype in (torch.float32, torch.bfloat16):
        for features, tokens in SHAPES:
            own, operator = compare(features, tokens, dtype)
            print(
                f"{dtype!s:>15} {features:>5} x {tokens}: module {own * 1e3:.2f} ms, operator {operator * 1e3:.2f} "
                f"ms, {own / operator:.2f} times as fast"
            )


if __name__ == "__main__":
    main()
