"""Chooses where a merged model is loaded for its comparison with the adapter, and how many rows are compared there.

The GPU held the quantized base; merged, its weights are several times as large.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from peftcli.errors import MemoryExhausted
from peftcli.model.hardware import available_memory
from peftcli.report.format import size

FEW_ROWS = 32
"""Compared at most where layers wait in RAM or run on the CPU, which takes seconds to minutes for a batch."""
ONE_GPU, ALL_GPUS, BESIDE_RAM, RAM = 0.9, 0.85, 0.8, 0.9
"""Shares of the free memory that weights may fill: activations and logits need the rest, among several GPUs also the
part of a layer that no GPU holds any more, and beside RAM one layer at a time on its way through the GPU."""


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that can be allocated: on each visible GPU, and in RAM."""

    gpus: tuple[int, ...]
    ram: int

    @property
    def text(self) -> str:
        """For messages."""
        free = [f"{size(self.ram)} of RAM"]
        if self.gpus:
            where = "the GPU" if len(self.gpus) == 1 else f"{len(self.gpus)} GPUs"
            free.insert(0, f"{size(sum(self.gpus))} on {where}")
        return " and ".join(free)


@dataclass(frozen=True)
class Placement:
    """Where a merged model is loaded.

    Attributes:
        name: for people and `merge.json`.
        device: `cuda` or `cpu`; of a model in several places where its inputs go.
        max_memory: bytes of weights by place, as accelerate takes them; None for a model that is whole on `device`.
        rows: that are compared at most; None for all, with generated answers.
    """

    name: str
    device: str
    max_memory: Mapping[int | str, int] | None = None
    rows: int | None = None

    @property
    def offloads(self) -> bool:
        """Whether layers may wait in RAM."""
        return self.max_memory is not None and "cpu" in self.max_memory


def measure_free_memory(*, on_gpu: bool, with_own: bool = False) -> FreeMemory:
    """Ask what is free now.

    Args:
        on_gpu: the adapter is used on a GPU, so its merged model may be too.
        with_own: count what torch holds on the GPUs in this process as free, since it will be given back.
    """
    gpus = range(torch.cuda.device_count() if on_gpu else 0)
    free = [torch.cuda.mem_get_info(gpu)[0] + (torch.cuda.memory_reserved(gpu) if with_own else 0) for gpu in gpus]
    return FreeMemory(tuple(free), available_memory())


def choose_placements(weights: int, free: FreeMemory) -> list[Placement]:
    """The places that hold a model, the fastest first; none where nothing holds it.

    Args:
        weights: bytes.
    """
    if not free.gpus:
        return [Placement("the CPU", "cpu")]
    found = []
    if weights <= ONE_GPU * free.gpus[0]:
        found.append(Placement("the GPU", "cuda"))
    if len(free.gpus) > 1 and weights <= ALL_GPUS * sum(free.gpus):
        found.append(Placement(f"{len(free.gpus)} GPUs", "cuda", _shares(free.gpus, ONE_GPU)))
    beside = _shares(free.gpus, BESIDE_RAM) | {"cpu": int(RAM * free.ram)}
    if weights <= sum(beside.values()):
        name = "the GPU" if len(free.gpus) == 1 else f"{len(free.gpus)} GPUs"
        found.append(Placement(f"{name} and RAM", "cuda", beside, FEW_ROWS))
    if weights <= RAM * free.ram:
        found.append(Placement("the CPU", "cpu", rows=FEW_ROWS))
    return found


def _shares(gpus: tuple[int, ...], ratio: float) -> dict[int | str, int]:
    return {number: int(ratio * free) for number, free in enumerate(gpus)}


def placement_note(placement: Placement, weights: int, free: FreeMemory) -> str | None:
    """What to say before the model is loaded; None for one that is whole on its own device."""
    if placement.max_memory is None and placement.rows is None:
        return None
    head = f"the merged model takes {size(weights)}, and {free.text} are free: it is compared on {placement.name}"
    if placement.rows is None:
        return head
    return (
        f"{head}, on the outputs for at most {placement.rows} rows and without generated answers; the first rows show "
        "how long that takes"
    )


def check_memory(weights: int, folding: int, free: FreeMemory) -> None:
    """Refuse a merge that would run out of memory, before anything is written.

    Args:
        weights: bytes of the merged model.
        folding: bytes of RAM that writing it takes at the peak.

    Raises:
        MemoryExhausted: there is no room to fold or to compare.
    """
    nothing = "nothing was written, and the adapter is unchanged"
    if folding > free.ram:
        raise MemoryExhausted(
            f"folding the adapter into its base takes {size(folding)} of RAM, and {size(free.ram)} are free; "
            f"{nothing}; close other programs, or merge on a machine with more RAM"
        )
    if not choose_placements(weights, free):
        raise MemoryExhausted(
            f"the merged model takes {size(weights)}, more than the {free.text} that are free, so it could not be "
            f"compared with the adapter; {nothing}; merge on a machine with more memory, or use the adapter unmerged"
        )
