"""Recognizes out-of-memory errors and retries with smaller batches."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from peftcli.errors import MemoryExhausted
from peftcli.progress import Progress

T = TypeVar("T")
MOST_HALVINGS = 3
"""Of a micro-batch in training."""
EVALUATION_HALVINGS = 6
"""Of the rows that are evaluated at once: from 64 to a single one."""
FROM_THE_DRIVER = ("[CUDA]: out of memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
"""Messages of a RuntimeError if something other than torch's allocator ran out of memory: a Triton kernel, the CUDA
driver, the workspace of cuBLAS, cuDNN or cuSOLVER."""


def is_out_of_memory(problem: Exception) -> bool:
    """Whether an error means that the memory of the GPU or the machine is exhausted."""
    if isinstance(problem, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(problem):
        return True
    return isinstance(problem, RuntimeError) and any(text in str(problem) for text in FROM_THE_DRIVER)


def free_memory() -> None:
    """Return unused memory of a failed attempt to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Bytes that torch can still allocate on a GPU, with what its allocator holds and does not use."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + held)


def memory_said(device: torch.device) -> str:
    """The used and available memory, for messages."""
    if device.type != "cuda":
        return "the memory of this machine"
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device)
    return (
        f"the {total / 2**30:.1f} GiB of {torch.cuda.get_device_name(device)} "
        f"(peak {peak / 2**30:.1f} GiB, free {free / 2**30:.1f} GiB)"
    )


class ShrinkingBatches:
    """Batch size of a forward pass, halved when memory runs out."""

    def __init__(self, rows: int, what: str, progress: Progress, *, in_step: bool = False) -> None:
        """
        Args:
            rows: initial batch size.
            what: name of the work, for messages.
            in_step: other processes use the same size, so it cannot be halved only here.
        """
        self.rows = rows
        self._what = what
        self._progress = progress
        self._halvings = EVALUATION_HALVINGS if in_step else 0

    def attempt(self, taken: int, device: torch.device, work: Callable[[], T]) -> T | None:
        """Run the work; returns None if memory ran out and fewer rows must be used.

        Args:
            taken: number of rows of this attempt, which may be less than `rows`.

        Raises:
            MemoryExhausted: a single row does not fit, or the size was halved too often already.
        """
        try:
            return work()
        except (RuntimeError, MemoryError) as problem:
            if not is_out_of_memory(problem):
                raise
            said = str(problem)
        # Outside the except block, which keeps the tensors of the failed attempt alive.
        if taken == 1 or self._halvings >= EVALUATION_HALVINGS:
            raise MemoryExhausted(
                f"{self._what}: {taken} rows at once do not fit in {memory_said(device)} ({said[:120]}); lower "
                "evaluation.batch_size, evaluation.max_new_tokens or dataset.max_length, or set "
                "quantization: {bits: 4} if the base is not quantized"
            )
        self._halvings += 1
        self.rows = taken // 2
        free_memory()
        self._progress.note(f"{self._what}: out of memory; continuing with {self.rows} rows at once")
        return None
