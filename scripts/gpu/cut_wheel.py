"""Cut the wheel of bitsandbytes to the libraries that one machine needs.

    python scripts/gpu/cut_wheel.py WHEEL cuda130 cpu

The wheel holds a library for each version of CUDA, of which a machine loads one. RECORD is written again without the
others, so pip installs and removes the result as any other wheel.
"""

import csv
import io
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

LIBRARY = "bitsandbytes/libbitsandbytes_"


def cut(wheel: Path, kept: Sequence[str]) -> None:
    """Leave only the libraries of these kinds in a wheel; it is replaced whole or not at all.

    Args:
        kept: kinds of libraries, such as `cuda130` and `cpu`.

    Raises:
        SystemExit: the wheel has no library of a kind.
    """
    with zipfile.ZipFile(wheel) as source:
        names = source.namelist()
        kinds = {name: _kind(name) for name in names if name.startswith(LIBRARY)}
        missing = sorted(set(kept) - set(kinds.values()))
        if missing:
            there = ", ".join(sorted(set(kinds.values())))
            raise SystemExit(f"error: {wheel.name} has no library for {', '.join(missing)}; it has {there}")
        dropped = {name for name, kind in kinds.items() if kind not in kept}
        made = wheel.with_suffix(".part")
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target:
            for entry in source.infolist():
                if entry.filename in dropped:
                    continue
                content = source.read(entry)
                if entry.filename.endswith(".dist-info/RECORD"):
                    content = _without(content, dropped)
                target.writestr(entry, content, zipfile.ZIP_DEFLATED)
    os.replace(made, wheel)


def _kind(name: str) -> str:
    return name.removeprefix(LIBRARY).partition(".")[0]


def _without(record: bytes, dropped: set[str]) -> bytes:
    rows = [row for row in csv.reader(io.StringIO(record.decode())) if row and row[0] not in dropped]
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(rows)
    return written.getvalue().encode()


if __name__ == "__main__":
    cut(Path(sys.argv[1]), sys.argv[2:])
