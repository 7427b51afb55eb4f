"""Cases, how they ended, and the table of both."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from workspace import Ended, Workspace

Prepare = Callable[[Workspace], None]
MOST_LINES = 5
"""On stderr, for a fault that the user made."""
MOST_NOTE = 300
"""Letters of a note in the table; the JSON file holds all of it."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        number: of the fault matrix; letters before it name a list of its own.
        good: None where the case could not be shown on this machine, or is told and not judged.
        peer: how `trl sft` ended on the same fault: exit code, seconds, lines; None where it has no such feature.
    """

    number: str
    fault: str
    expected: str
    actual: str
    seconds: float
    lines: int | None
    good: bool | None
    note: str = ""
    peer: tuple[int, float, int] | None = None


@dataclass(frozen=True)
class Case:
    """A fault that one command must answer.

    Attributes:
        exit: the exit code that product.md names for it.
        keys: dotted keys that differ from the healthy recipe.
        edit: changes the text of the recipe.
        rows: the data file, in place of healthy rows.
        prepare: does anything else to the folder before the command runs.
        words: the command, where it is not `train`; RECIPE stands for the recipe.
        says: parts that stderr must hold.
        most_seconds: it may take so long.
        most_cpu_seconds: it may compute so long; unlike the other, this does not depend on what else the machine does.
        most_mib: it may take so much memory.
        repeats: how often it runs; the seconds are their median.
        peer: keys of the same fault for `trl sft`, laid over a healthy configuration; None where it has none.
        peer_edit: changes the text of trl's configuration.
    """

    number: str
    fault: str
    exit: int
    keys: Mapping[str, Any] = field(default_factory=dict)
    edit: Callable[[str], str | bytes] | None = None
    rows: bytes | None = None
    prepare: Prepare | None = None
    words: tuple[str, ...] = ("train", "RECIPE", "--output-dir", "run")
    says: tuple[str, ...] = ()
    most_seconds: float | None = None
    most_cpu_seconds: float | None = None
    most_mib: float | None = None
    most_lines: int = MOST_LINES
    repeats: int = 1
    within: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    peer: Mapping[str, Any] | None = None
    peer_edit: Callable[[str], str] | None = None

    def run(self, ground: Workspace) -> Iterator[Row]:
        """Spoil the folder, run the command, and judge how it ended."""
        text: str | bytes = ground.recipe(self.keys).read_text()
        if self.edit is not None:
            text = self.edit(str(text))
        recipe = ground.write("recipe.yaml", text)
        if self.rows is not None:
            ground.write("rows.jsonl", self.rows)
        if self.prepare is not None:
            self.prepare(ground)
        words = [str(recipe) if word == "RECIPE" else word.replace("FOLDER", str(ground.folder)) for word in self.words]
        within = [word.replace("FOLDER", str(ground.folder)) for word in self.within]
        ends = [ground.run(*words, within=within, environment=self.environment) for _ in range(self.repeats)]
        seconds = median(end.seconds for end in ends)
        problems = self.problems(ends[-1], seconds)
        yield Row(
            self.number,
            self.fault,
            str(self.exit),
            str(ends[-1].code),
            seconds,
            ends[-1].lines,
            not problems,
            "; ".join(problems) or first_error(ends[-1].err),
        )

    def problems(self, end: Ended, seconds: float) -> list[str]:
        """What is wrong with how the command ended."""
        found = []
        if end.code != self.exit:
            found.append(f"exit {end.code}: {end.err.strip()[-300:]}")
        if "Traceback" in end.err:
            found.append("a traceback")
        if end.code and end.lines > self.most_lines:
            found.append(f"{end.lines} lines on stderr")
        found += [f"does not say {part!r}: {end.err[-300:]!r}" for part in self.says if part not in end.err + end.out]
        if self.most_seconds is not None and seconds > self.most_seconds:
            found.append(f"took {seconds:.2f} s")
        if self.most_cpu_seconds is not None and end.cpu_seconds > self.most_cpu_seconds:
            found.append(f"computed for {end.cpu_seconds:.2f} s")
        if self.most_mib is not None and end.peak_mib > self.most_mib:
            found.append(f"took {end.peak_mib:.0f} MiB")
        return found


@dataclass(frozen=True)
class Scenario:
    """A fault that takes more than one command; `run` plays it and judges."""

    number: str
    fault: str
    run: Callable[[Workspace], Iterable[Row]]


class Judge:
    """Collects what must hold in a drill, and makes its row."""

    def __init__(self, number: str, fault: str, expected: str) -> None:
        self._begun = time.perf_counter()
        self._head = (number, fault, expected)
        self._wrong: list[str] = []
        self._codes: list[int] = []
        self._most_lines = 0

    def ended(self, end: Ended, code: int, *says: str, lines: int | None = MOST_LINES) -> Ended:
        """A command must have ended with this code, few lines and these parts of a message."""
        self._codes.append(end.code)
        self._most_lines = max(self._most_lines, end.lines if end.code else 0)
        if end.code != code:
            self._wrong.append(f"exit {end.code} and not {code}: {end.err.strip()[-300:]}")
        if "Traceback" in end.err:
            self._wrong.append("a traceback")
        if lines is not None and end.code and end.lines > lines:
            self._wrong.append(f"{end.lines} lines on stderr: {end.err[-300:]!r}")
        self._wrong += [f"does not say {part!r}: {end.err[-300:]!r}" for part in says if part not in end.err + end.out]
        return end

    def holds(self, fact: bool, otherwise: str) -> None:
        """A fact must hold."""
        if not fact:
            self._wrong.append(otherwise)

    def row(self, note: str = "") -> Row:
        number, fault, expected = self._head
        codes = " ".join(dict.fromkeys(str(code) for code in self._codes))
        seconds = time.perf_counter() - self._begun
        good = not self._wrong
        note = "; ".join(self._wrong) or note
        return Row(number, fault, expected, codes, seconds, self._most_lines, good, note)


def skipped(number: str, fault: str, why: str) -> Row:
    """The row of a case that cannot be shown here."""
    return Row(number, fault, "-", "-", 0.0, None, None, why)


def first_error(err: str) -> str:
    """The first line that tells of an error, without the paths' temporary part."""
    return next((line for line in err.splitlines() if line.startswith(("error:", "stopped "))), "")[:160]


def print_row(row: Row, *, peer: bool) -> None:
    """Print one line of the table."""
    verdict = {True: "ok", False: "FAILED", None: "-"}[row.good]
    lines = "-" if row.lines is None else str(row.lines)
    cells = [f"{row.number:<5}", f"{row.fault[:58]:<58}", f"{row.expected[:12]:>12}", f"{row.actual[:12]:>12}"]
    cells += [f"{row.seconds:7.2f}", f"{lines:>5}", f"{verdict:<7}"]
    if peer:
        cells.append("{:>4} {:6.1f} {:4}".format(*row.peer) if row.peer else f"{'-':>4} {'-':>6} {'-':>4}")
    note = "" if row.good and row.note.startswith("error:") else " ".join(row.note.split())[:MOST_NOTE]
    print("  ".join([*cells, note]).rstrip(), flush=True)


def print_head(*, peer: bool) -> None:
    """Print the names of the columns."""
    head = f"{'no':<5}  {'fault':<58}  {'expected':>12}  {'actual':>12}  {'seconds':>7}  {'lines':>5}  verdict"
    print(head + ("  trl: exit, seconds, lines" if peer else ""), flush=True)


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write the rows as JSON; rows of other cases that stand in the file already are kept."""
    before = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    new = [asdict(row) for row in rows]
    names = {(row["number"], row["fault"]) for row in new}
    kept = [row for row in before if (row["number"], row["fault"]) not in names]
    text = json.dumps({"schema": 1, "rows": sorted([*kept, *new], key=_place)}, indent=1, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def _place(row: dict[str, Any]) -> int:
    return int(row["number"].split("+")[0]) if row["number"][0].isdigit() else 0
