"""Thousands of spoilt recipes and data files: none may end as a bug of ours."""

import contextlib
import io
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from table import Judge, Row, Scenario
from workspace import Workspace

ROOT = Path(__file__).parents[2]
SEED = 2
TOKENS = """
null ~ yes no on off .nan .inf -1 0 010 0x1F 1e999 9999999999999999999999 true '' "" [] {} [[ {a: { - : , & * ! % @ ` |
> &a *a <<: ? --- ... \ufeff \0 \x1b \ud800 é 世 !!python/object:os.system 8h30m >=1 ../../x ~nobody/x http://x {a} {
auto model: trainer: learning_rate: adapter hf_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
"""
"""What a slip of the hand or a hostile one puts into a recipe, white space between."""
LONGEST = 40
"""Lines on stderr that a spoilt recipe may cause: each problem has one."""


def spoil(text: str, chance: random.Random) -> str:
    """Change a recipe's text at one to four places."""
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(text) + 1)
        length = chance.randrange(12)
        change = chance.choice(["cut", "insert", "replace", "line", "repeat"])
        token = chance.choice([*TOKENS.split(), "\t", "\n", " "])
        lines = text.split("\n")
        number = chance.randrange(len(lines))
        if change == "cut":
            text = text[:at] + text[at + length :]
        elif change == "insert":
            text = text[:at] + token + text[at:]
        elif change == "replace":
            key = lines[number].split(":")[0]
            text = "\n".join([*lines[:number], f"{key}: {token}", *lines[number + 1 :]])
        elif change == "line":
            text = "\n".join([*lines[:number], *lines[number + 1 :]])
        else:
            text = "\n".join([*lines[: number + 1], *lines[number:]])
    return text


def recipes(examples: int, ground: Workspace) -> Iterator[Row]:
    """Validate spoilt recipes in this process; a bug would end with 1."""
    from peftcli.cli.main import main  # light: torch is not imported by it

    judge = Judge("2", f"{examples} spoilt recipes", "0 2")
    chance = random.Random(SEED)
    healthy = ground.recipe({"budget.wall_clock": "1h", "gates": {"loss": "< 2"}}).read_text()
    path = ground.folder / "spoilt.yaml"
    codes: Counter[int] = Counter()
    for number in range(examples):
        path.write_bytes(spoil(healthy, chance).encode("utf-8", "surrogatepass"))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
            code = main(["validate", str(path), "--no-data"])
        said = err.getvalue()
        codes[code] += 1
        fine = code in (0, 2) and "Traceback" not in said and len(said.splitlines()) <= LONGEST and "\x1b" not in said
        judge.holds(fine, f"example {number}: exit {code}: {said[-200:]!r}")
    yield judge.row(", ".join(f"{count} with exit {code}" for code, count in sorted(codes.items())))


def data_files(examples: int, ground: Workspace) -> Iterator[Row]:
    """The tests over spoilt data files, with so many examples each."""
    judge = Judge("11", f"{examples} examples for each fuzz test of data files", "0")
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:xdist",
            "-p",
            "no:cacheprovider",
            "tests/cli/test_data_fuzz.py",
        ],
        cwd=ROOT,
        env={**os.environ, "PEFTCLI_FUZZ_EXAMPLES": str(examples), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    lines = found.stdout.strip().splitlines()
    judge.holds(found.returncode == 0, found.stdout[-500:])
    yield judge.row(re.sub(r" in .*", "", lines[-1]) if lines else "")


def drills(examples: int) -> list[Scenario]:
    """The fuzz drills; recipes are quick, so they get ten times as many."""
    return [
        Scenario("2", "spoilt recipes", partial(recipes, 10 * examples)),
        Scenario("11", "spoilt data", partial(data_files, examples)),
    ]
