"""The share of the work of one process among several, and the putting together of what they found."""

import functools
import os
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist

M = TypeVar("M", bound=torch.nn.Module)
P = ParamSpec("P")
T = TypeVar("T")


def processes() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_divided(model: torch.nn.Module) -> bool:
    """Whether each process holds a part of the model, so that all must run it equally often and at the same time."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def leave_dividing_to_the_plan() -> None:
    """Forget that accelerate's configuration asks for FSDP, which the plan has heeded.

    transformers would leave the weights of all processes but the first unread, and accelerate divide them again.
    """
    os.environ.pop("ACCELERATE_USE_FSDP", None)


def without_gradients(work: Callable[Concatenate[M, P], T]) -> Callable[Concatenate[M, P], T]:
    """Let some work on a model, its first argument, build no graph.

    What torch gathers of a divided model in inference mode it could not gather again in training.
    """

    @functools.wraps(work)
    def quietly(model: M, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with torch.no_grad() if is_divided(model) else torch.inference_mode():
            return work(model, *args, **kwargs)

    return quietly


def my_share(rows: int, *, in_step: bool = False) -> list[int]:
    """Indices of the rows that this process takes: every n-th, so that the shares are alike.

    Args:
        in_step: all shares have equally many rows, the last one of some being a row of another process.
    """
    rank, count = processes()
    mine = list(range(rank, rows, count))
    if in_step and rows and len(mine) < -(-rows // count):
        mine.append(rank % rows)
    return mine


def gather(value: Any) -> list[Any]:
    """The value of every process, in the order of ranks, on every process."""
    _, count = processes()
    if count == 1:
        return [value]
    values: list[Any] = [None] * count
    dist.all_gather_object(values, value)
    return values


def leave_group() -> None:
    """Wait for all processes and take the group apart; a process that ends inside it can abort."""
    _, count = processes()
    if count > 1:
        dist.barrier()
        dist.destroy_process_group()


def interleave(shares: list[list[Any]]) -> list[Any]:
    """Undo `my_share`.

    >>> interleave([[0, 2, 4], [1, 3]])
    [0, 1, 2, 3, 4]
    """
    total = sum(len(share) for share in shares)
    return [shares[row % len(shares)][row // len(shares)] for row in range(total)]
