"""Tools that take turns: A B C A B C, so that a machine that slows down slows all of them."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftcli.bench.gate import limit_of
from peftcli.bench.job import SEED, Job, write_spec
from peftcli.bench.measure import Ran, measure, run_child
from peftcli.bench.tools import REFERENCE, TOOLS, Tool
from peftcli.errors import MachineError
from peftcli.progress import Progress

Run = Callable[[Tool, Job], Ran | str]


@dataclass(frozen=True)
class Measured:
    """All runs of a regime.

    Attributes:
        runs: of each tool, one for each round that came to its end.
        errors: of tools that did not.
        held_out: nats per token of each tool's adapter of the first round.
        limit: of the gate of equal loss.
    """

    runs: Mapping[str, Sequence[Ran]]
    errors: Mapping[str, str]
    held_out: Mapping[str, float]
    limit: float


def make_model(shape: str, bits: int, place: Path) -> dict[str, Any]:
    """Make the model in a process of its own, and ask what this machine is.

    Raises:
        MachineError: it could not be made.
    """
    spec = write_spec(place / "make.json", {"shape": shape, "bits": bits})
    result = place / "made.json"
    ended = run_child("make", spec, result)
    if ended.code == MachineError.exit_code:
        raise MachineError(ended.error)
    if ended.error is not None:
        raise MachineError(f"the model of --shape {shape} could not be made: {ended.error}; try a smaller --shape")
    made: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return made


def take_turns(
    tools: Sequence[Tool], job: Job, rounds: int, progress: Progress, *, seeds: int = 0, run: Run = measure
) -> Measured:
    """Run every tool once a round, and judge the adapters of the first one.

    A tool that fails is not tried again.

    Args:
        seeds: runs of the reference with other orders of the rows, for the limit of the gate; 0 leaves it as it is.
        run: runs one tool once.
    """
    runs: dict[str, list[Ran]] = {tool.name: [] for tool in tools}
    errors: dict[str, str] = {}
    progress.start("runs", rounds * len(tools))
    for number in range(rounds):
        for place, tool in enumerate(tools):
            if tool.name not in errors:
                ran = run(tool, job)
                if isinstance(ran, str):
                    errors[tool.name] = ran
                    progress.note(f"  {tool.title}: {ran}")
                else:
                    runs[tool.name].append(_kept(ran, job.place / f"adapter-{tool.name}", first=number == 0))
            progress.advance(number * len(tools) + place + 1, {"tool": tool.title})
    progress.end()
    others = _other_seeds(job, seeds)
    folders = {name: made[0].adapter for name, made in runs.items() if made} | others
    held_out = judge(job, folders) if folders else {}
    spread = [held_out[name] for name in (*others, REFERENCE) if name in held_out] if others else []
    return Measured(runs, errors, held_out, limit_of(spread))


def _kept(ran: Ran, folder: Path, *, first: bool) -> Ran:
    if first:
        shutil.copytree(ran.adapter, folder, dirs_exist_ok=True)
    return replace(ran, adapter=folder)


def _other_seeds(job: Job, seeds: int) -> dict[str, Path]:
    """Adapters of the reference, each trained on the rows in another order."""
    folders = {}
    for seed in range(SEED + 1, SEED + 1 + seeds):
        ran = measure(TOOLS[REFERENCE], replace(job, seed=seed))
        if isinstance(ran, Ran):
            folders[f"seed-{seed}"] = _kept(ran, job.place / f"adapter-seed-{seed}", first=True).adapter
    return folders


def judge(job: Job, adapters: Mapping[str, Path]) -> dict[str, float]:
    """The held-out loss of each adapter, all by the same code.

    Raises:
        MachineError: the base could not be run.
    """
    spec = {
        "model": str(job.model),
        "bits": job.bits,
        "device": job.device,
        "dtype": "float32" if job.device == "cpu" else "bfloat16",
        "rows": str(job.place / "held-out-ids.jsonl"),
        "adapters": {name: str(folder) for name, folder in adapters.items()},
    }
    result = job.place / "judged.json"
    ended = run_child("judge", write_spec(job.place / "judge.json", spec), result)
    if ended.error is not None:
        raise MachineError(f"the held-out rows could not be run: {ended.error}")
    judged: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))
    return judged
