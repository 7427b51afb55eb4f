"""The fault matrix as real commands on a CPU, and a table of how each ended.

    python scripts/faults                      the 32 faulty recipes, stops, kills (5), damage, folders, identity, fuzz
    python scripts/faults A 27 --peer          some of them, `trl sft` beside them where it has the feature
    python scripts/faults 26 --kills 40        as many kills as a release is worth

Numbers are those of the fault matrix; A is the list of 32 faulty recipes. Exit code 1 when a case fails.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
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
from ground import Ground
from table import Case, Drill, Row, print_head, print_row, write_rows

TINY = "from peftcli.tiny.build import tiny_model; print(tiny_model('tiny:llama'))"


def all_cases(kill_count: int, examples: int) -> list[Case | Drill]:
    """Every case; the light ones come first."""
    cases = [*inputs.THE_32, *hostile.CASES, *data_rows.CASES, *folders.CASES, *disks.CASES, *models.CASES]
    light = [*data_rows.DRILLS, *folders.DRILLS, *disks.DRILLS, *models.DRILLS, *identity.DRILLS]
    return [*cases, *light, *stops.DRILLS, *kills.drills(kill_count), *fuzz.drills(examples)]


def main() -> int:
    """Run the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", help="numbers of the matrix, or A; all when left out")
    parser.add_argument("--peer", action="store_true", help="run trl sft beside it")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the rows there too, beside those of other cases"
    )
    parser.add_argument("--kills", type=int, default=5, help="random kills of case 26")
    parser.add_argument("--examples", type=int, default=200, help="of each fuzz test")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the cases")
    asked = parser.parse_args()
    model = Path(
        subprocess.run([sys.executable, "-c", TINY], check=True, capture_output=True, text=True).stdout.strip()
    )
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    cases = all_cases(asked.kills, asked.examples) + (peer.drills(asked.kills) if asked.peer else [])
    print_head(peer=asked.peer)
    rows = []
    for number, case in enumerate(chosen(cases, asked.numbers)):
        for row in play(case, folder / f"{number:03d}", model, peer_too=asked.peer):
            print_row(row, peer=asked.peer)
            rows.append(row)
        if not asked.keep:
            shutil.rmtree(folder / f"{number:03d}", ignore_errors=True)
    if asked.keep:
        print(f"folders in {folder}")
    else:
        shutil.rmtree(folder)
    if asked.json is not None:
        write_rows(asked.json, rows)
    failed = sum(row.good is False for row in rows)
    print(f"{len(rows)} cases, {failed} failed, {sum(row.actual == '-' for row in rows)} skipped")
    return 1 if failed else 0


def chosen(cases: Sequence[Case | Drill], numbers: Sequence[str]) -> Iterator[Case | Drill]:
    """The cases of these numbers; a case may carry several."""
    for case in cases:
        if not numbers or set(case.number.split("+")) & set(numbers):
            yield case


def play(case: Case | Drill, folder: Path, model: Path, *, peer_too: bool) -> Iterator[Row]:
    """Run a case; one that cannot be played to its end has failed."""
    found = None
    if peer_too and isinstance(case, Case) and case.peer is not None:
        found = peer.run_peer(case, Ground(folder / "trl", model))
    try:
        for row in case.run(Ground(folder / "ours", model)):
            yield replace(row, peer=found)
    except Exception:  # the rest of the table is still worth having
        said = " ".join(traceback.format_exc().split())[-300:]
        yield Row(case.number, case.fault, "", "", 0.0, None, False, said)


if __name__ == "__main__":
    raise SystemExit(main())
