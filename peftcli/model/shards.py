"""The share of the work of one process among several, and the putting together of what they found."""

from typing import Any

import torch.distributed as dist


def processes() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def my_share(rows: int) -> list[int]:
    """Indices of the rows that this process takes: every n-th, so that the shares are alike."""
    rank, count = processes()
    return list(range(rank, rows, count))


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
