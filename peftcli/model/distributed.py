"""Splits work among processes and gathers their results."""

import functools
import itertools
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from peftcli.errors import PeftcliError

M = TypeVar("M", bound=torch.nn.Module)
P = ParamSpec("P")
T = TypeVar("T")
ENDED_BY = "peftcli/ended-by"
"""Key in torch's store."""
POLL_SECONDS = 0.2
_turns = itertools.count()


def rank_and_world_size() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_fsdp(model: torch.nn.Module) -> bool:
    """Whether the model is sharded, so that all processes must run it together and equally often."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def disable_accelerate_fsdp() -> None:
    """Disable FSDP in accelerate's configuration, because the plan handles it.

    Otherwise transformers would load the weights in the first process only, and accelerate would shard them again.
    """
    os.environ.pop("ACCELERATE_USE_FSDP", None)


def without_gradients(work: Callable[Concatenate[M, P], T]) -> Callable[Concatenate[M, P], T]:
    """Run some work on a model, its first argument, without building a graph.

    torch cannot gather sharded parameters for training again if they were gathered in inference mode.
    """

    @functools.wraps(work)
    def quietly(model: M, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with torch.no_grad() if is_fsdp(model) else torch.inference_mode():
            return work(model, *args, **kwargs)

    return quietly


def local_rows(rows: int, *, in_step: bool = False) -> list[int]:
    """Indices of the rows of this process: every n-th row, so that the shares are similar.

    Args:
        in_step: all shares have equally many rows; the last row of some is a copy of another process's row.
    """
    rank, count = rank_and_world_size()
    mine = list(range(rank, rows, count))
    if in_step and rows and len(mine) < -(-rows // count):
        mine.append(rank % rows)
    return mine


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank, on every process."""
    _, count = rank_and_world_size()
    if count == 1:
        return [value]
    values: list[Any] = [None] * count
    dist.all_gather_object(values, value)
    return values


def from_first(work: Callable[[], T]) -> T:
    """Run some work only in the first process, and return its result in every process.

    Raises:
        PeftcliError: what the work raised, in every process.
    """
    rank, count = rank_and_world_size()
    if count == 1:
        return work()
    outcome: list[T | PeftcliError | None] = [None]
    if rank == 0:
        try:
            outcome = [work()]
        except PeftcliError as problem:
            problem.in_all = True
            outcome = [problem]
    dist.broadcast_object_list(outcome, src=0)
    found = outcome[0]
    if isinstance(found, PeftcliError):
        raise found
    return found  # type: ignore[return-value]  # None only where T has it


def in_all(work: Callable[[], T]) -> T:
    """Run some work in every process, and fail in all of them if it fails in one.

    Raises:
        PeftcliError: of the first process that failed.
    """
    made: T | None = None
    problem: PeftcliError | None = None
    try:
        made = work()
    except PeftcliError as raised:
        problem = raised
    problem = next((one for one in gather(problem) if one is not None), None)
    if problem is not None:
        problem.in_all = True
        raise problem
    return made  # type: ignore[return-value]  # None only where T has it


def contact_was_lost(problem: BaseException) -> bool:
    """Whether an error means that another process has exited, does not respond or is unreachable."""
    # gloo's errors have no type of their own.
    return isinstance(problem, dist.DistError) or (isinstance(problem, RuntimeError) and "gloo" in str(problem))


def tell_others(problem: PeftcliError) -> None:
    """Publish the error that ends this process, for the others to read after losing contact."""
    with suppress(dist.DistError):  # the process that hosts the store has exited too
        _store().set(ENDED_BY, f"process {rank_and_world_size()[0]}: {problem}")


def told_by_other() -> str | None:
    """The error that ended another process; None if it was not published."""
    with suppress(dist.DistError):
        if _store().check([ENDED_BY]):
            return str(_store().get(ENDED_BY).decode())
    return None


def first_of_machine_first(work: Callable[[], T], *, is_first: bool) -> T:
    """Let one process of each machine do some work first, so that the others on it find the result in the cache.

    The others poll torch's store instead of a collective: one of NCCL would abort training after `trainer.ddp_timeout`.

    Args:
        is_first: this is that process of its machine.
    """
    if rank_and_world_size()[1] == 1:
        return work()
    key = f"peftcli/turn/{next(_turns)}/{os.environ.get('GROUP_RANK', '0')}"
    if not is_first:
        while not _store().check([key]):
            time.sleep(POLL_SECONDS)
        return work()
    try:
        return work()
    finally:
        _store().set(key, "over")  # if it failed, the others will fail too


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def destroy_process_group() -> None:
    """Wait for all processes and destroy the group; a process that exits within it can abort."""
    _, count = rank_and_world_size()
    if count > 1:
        dist.barrier()
        dist.destroy_process_group()


def interleave(shares: list[list[Any]]) -> list[Any]:
    """Undo `local_rows`.

    >>> interleave([[0, 2, 4], [1, 3]])
    [0, 1, 2, 3, 4]
    """
    total = sum(len(share) for share in shares)
    return [shares[row % len(shares)][row // len(shares)] for row in range(total)]
