"""All cases of the fault matrix, and how one of them is run."""

import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import data_rows
import disks
import folders
import fuzz
import hostile
import identity
import inputs
import kills
import models
import peer
import stops
from table import Case, Row, Scenario
from workspace import Workspace


def all_cases(kill_count: int, examples: int) -> list[Case | Scenario]:
    """Every case; the light ones come first."""
    cases = [*inputs.THE_32, *hostile.CASES, *data_rows.CASES, *folders.CASES, *disks.CASES, *models.CASES]
    light = [*data_rows.DRILLS, *folders.DRILLS, *disks.DRILLS, *models.DRILLS, *identity.DRILLS]
    return [*cases, *light, *stops.DRILLS, *kills.drills(kill_count), *fuzz.drills(examples)]


def chosen(cases: Sequence[Case | Scenario], numbers: Sequence[str]) -> Iterator[Case | Scenario]:
    """The cases of these numbers; a case may carry several."""
    for case in cases:
        if not numbers or set(case.number.split("+")) & set(numbers):
            yield case


def run_case(case: Case | Scenario, folder: Path, model: Path, *, peer_too: bool) -> Iterator[Row]:
    """Run a case; one that cannot be played to its end has failed."""
    found = None
    if peer_too and isinstance(case, Case) and case.peer is not None:
        found = peer.run_peer(case, Workspace(folder / "trl", model))
    try:
        for row in case.run(Workspace(folder / "ours", model)):
            yield replace(row, peer=found)
    except Exception:  # the rest of the table is still worth having
        said = " ".join(traceback.format_exc().split())[-300:]
        yield Row(case.number, case.fault, "", "", 0.0, None, False, said)
