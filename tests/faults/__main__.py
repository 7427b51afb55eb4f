"""The fault matrix as real commands on a CPU, and a table of how each ended.

    python tests/faults                      the 32 faulty recipes, stops, kills (5), damage, folders, identity, fuzz
    python tests/faults A 27 --peer          some of them, `trl sft` beside them where it has the feature
    python tests/faults 26 --kills 40        as many kills as a release is worth

Numbers are those of the fault matrix; A is the list of 32 faulty recipes. Exit code 1 when a case fails.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import peer
from matrix import all_cases, chosen, run_case
from table import print_head, print_row, write_rows

TINY = "from peftcli.tiny.build import tiny_model; print(tiny_model('tiny:llama'))"


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
        for row in run_case(case, folder / f"{number:03d}", model, peer_too=asked.peer):
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


if __name__ == "__main__":
    raise SystemExit(main())
