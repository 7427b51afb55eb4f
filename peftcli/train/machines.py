"""Training on several machines without a shared disk: file transfer and consistency checks."""

import hashlib
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from peftcli.errors import MachineError
from peftcli.model.distributed import from_first, gather, rank_and_world_size
from peftcli.plan.plan import Plan
from peftcli.train.baseline import DECIDED
from peftcli.train.resume import is_allowed, shown_value
from peftcli.train.stop import is_first_of_machine

CHUNK_BYTES = 64 * 2**20


def on_this_machine(folder: Path, received: Path) -> Path:
    """A path at which this process can read a folder of the first process: the folder itself, or a copy sent here.

    All processes must call this together. A machine that already has the same files at that path gets no copy.

    Args:
        received: parent folder of the copy; the caller removes it at the end.
    """
    rank, count = rank_and_world_size()
    if count == 1:
        return folder
    files = from_first(lambda: _hashes(folder))
    identity = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
    copy = received / identity / folder.name
    receives = False
    if rank and is_first_of_machine():
        shutil.rmtree(copy, ignore_errors=True)  # an incomplete copy of a killed process
        receives = _hashes(folder) != files
    if any(gather(receives)):
        for name in sorted(files):
            _send(folder / name, copy / name if receives else None)
    gather(None)  # the copy is complete before other processes of its machine use it
    return copy if rank and copy.is_dir() else folder


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a folder by its name; empty if the folder does not exist."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            found[str(file.relative_to(folder))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _send(source: Path, target: Path | None) -> None:
    """Read a file in the first process and broadcast it in chunks; processes with a target write it."""
    stream = source.open("rb") if rank_and_world_size()[0] == 0 else None
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
    try:
        while True:
            chunk = [stream.read(CHUNK_BYTES) if stream is not None else b""]
            dist.broadcast_object_list(chunk, src=0)
            if target is not None:
                with target.open("ab") as file:
                    file.write(chunk[0])
            if not chunk[0]:
                return
    finally:
        if stream is not None:
            stream.close()


def what_must_be_alike(plan: Plan, stamp: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same in all processes: rows, base, versions, and decisions that affect the computation."""
    decided = {one.key: one.value for one in plan.decisions if one.key in DECIDED}
    work = {"performance": sorted(plan.optimizations), "performance.batching": plan.batching.kind}
    if plan.shards > 1:  # checkpointed blocks are gathered twice, by all processes
        work["trainer.activation_checkpointing"] = str(plan.checkpointed_blocks)
    return {**stamp, **decided, **work}


def check_alike(facts: Mapping[str, Any], allowed: Collection[str]) -> None:
    """Check that all processes train with the same data, base, versions and decisions.

    Args:
        facts: of this process, by key.
        allowed: keys, or their prefixes such as `versions`, passed with `--force`.

    Raises:
        MachineError: in every process, if one of them differs from the first.
    """
    first, *others = gather(dict(facts))
    for rank, other in enumerate(others, start=1):
        differs = [
            f"  {key}: {shown_value(first[key])} in process 0, {shown_value(other.get(key))} in process {rank}"
            for key in first
            if first[key] != other.get(key) and not is_allowed(key, allowed)
        ]
        if differs:
            raise MachineError(
                "the processes of this training differ:\n"
                + "\n".join(differs)
                + "\ngive every machine the same data files, model files and package versions, and set keys in the "
                "recipe that different machines decide differently (model.dtype, model.attention)"
            )
