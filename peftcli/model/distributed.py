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
    """Whether each process holds a part of the model, so that all must run it equally often and at the same time."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def disable_accelerate_fsdp() -> None:
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
        with torch.no_grad() if is_fsdp(model) else torch.inference_mode():
            return work(model, *args, **kwargs)

    return quietly


def local_rows(rows: int, *, in_step: bool = False) -> list[int]:
    """Indices of the rows that this process takes: every n-th, so that the shares are alike.

    Args:
        in_step: all shares have equally many rows, the last one of some being a row of another process.
    """
    rank, count = rank_and_world_size()
    mine = list(range(rank, rows, count))
    if in_step and rows and len(mine) < -(-rows // count):
        mine.append(rank % rows)
    return mine


def gather(value: Any) -> list[Any]:
    """The value of every process, in the order of ranks, on every process."""
    _, count = rank_and_world_size()
    if count == 1:
        return [value]
    values: list[Any] = [None] * count
    dist.all_gather_object(values, value)
    return values


def from_first(work: Callable[[], T]) -> T:
    """Do some work in the first process alone, and return what it gave in every process.

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
    """Do some work in every process, and fail in all of them where it fails in one.

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
    """Whether an error says that another process has ended, does not answer or cannot be reached."""
    # gloo's errors have no type of their own.
    return isinstance(problem, dist.DistError) or (isinstance(problem, RuntimeError) and "gloo" in str(problem))


def tell_others(problem: PeftcliError) -> None:
    """Leave what ends this process alone where the others look once they have lost it."""
    with suppress(dist.DistError):  # whoever keeps the store has ended as well
        _store().set(ENDED_BY, f"process {rank_and_world_size()[0]}: {problem}")


def told_by_other() -> str | None:
    """What another process has ended by, None where it could not tell."""
    with suppress(dist.DistError):
        if _store().check([ENDED_BY]):
            return str(_store().get(ENDED_BY).decode())
    return None


def first_of_machine_first(work: Callable[[], T], *, is_first: bool) -> T:
    """Let one process of each machine do some work before the others there, which then find it in the cache.

    The others ask torch's store and wait in no collective: one of NCCL ends the training after `trainer.ddp_timeout`.

    Args:
        is_first: this is the one of its machine.
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
        _store().set(key, "over")  # what the first one could not do, the others run into as well


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def destroy_process_group() -> None:
    """Wait for all processes and take the group apart; a process that ends inside it can abort."""
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
