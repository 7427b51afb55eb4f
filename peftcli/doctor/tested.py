"""Which combinations of versions the tests ran on: read by `doctor`, and written to docs/versions.md."""

from collections.abc import Mapping
from dataclasses import dataclass

from packaging.version import Version

TRAINING = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")
"""Packages whose behaviour changes what a run does."""


@dataclass(frozen=True)
class Tests:
    """How many tests passed and failed.

    Attributes:
        files: names of the test files without `test_`, empty for all of them.
        known: why the failed ones fail, empty where none did.
    """

    passed: int
    failed: int
    files: tuple[str, ...] = ()
    known: str = ""


@dataclass(frozen=True)
class Combination:
    """Versions that were installed together, and the tests that ran on them.

    Attributes:
        name: what the combination is.
        date: of the last run, YYYY-MM-DD.
        python: in full.
        versions: of the packages in `TRAINING`.
        part: the test files that ran one by one.
        whole: the run of all tests, None where there was none.
    """

    name: str
    date: str
    python: str
    versions: Mapping[str, str]
    part: Tests
    whole: Tests | None = None


def _versions(*numbers: str) -> dict[str, str]:
    return dict(zip(TRAINING, numbers, strict=True))


PIN = ("5.23.0", "1.16.0", "0.21.2", "0.50.2", "1.15.0", "5.2.0")
"""Of constraints.txt, without torch."""
DATE = "2026-11-28"
ATTENTION = ("varlen_attention",)
NUMBERS = ("varlen_attention", "padding_free", "fsdp", "planner", "optimizations", "stages")
PYTHONS = ("varlen_attention", "planner", "registry", "broken_recipes", "resume", "adalora")

COMBINATIONS = (
    Combination(
        "oldest",
        DATE,
        "3.11.7",
        _versions("2.8.0", "5.23.0", "1.16.0", "0.21.0", "0.50.0", "1.10.1", "4.7.0"),
        Tests(173, 0, NUMBERS),
    ),
    Combination("torch 2.10", DATE, "3.11.7", _versions("2.10.0", *PIN), Tests(33, 0, ATTENTION)),
    Combination("torch 2.11", DATE, "3.11.7", _versions("2.11.0", *PIN), Tests(33, 0, ATTENTION)),
    Combination("torch 2.12", DATE, "3.11.7", _versions("2.12.1", *PIN), Tests(33, 0, ATTENTION)),
    Combination("pinned", DATE, "3.11.7", _versions("2.13.0", *PIN), Tests(33, 0, ATTENTION), Tests(3667, 0)),
    Combination("pinned, Python 3.12", DATE, "3.12.1", _versions("2.13.0", *PIN), Tests(271, 0, PYTHONS)),
    Combination("pinned, Python 3.13", DATE, "3.13.0", _versions("2.13.0", *PIN), Tests(271, 0, PYTHONS)),
    Combination("torch 2.14", DATE, "3.11.7", _versions("2.14.1", *PIN), Tests(33, 0, ATTENTION)),
    Combination(
        "newest",
        DATE,
        "3.11.7",
        _versions("2.15.0", "5.24.0", *PIN[1:]),
        Tests(173, 0, NUMBERS),
    ),
)
"""Only what was run, oldest first; whoever runs it again changes the date and the counts. A run of the whole suite is
entered as `whole`."""


def tested_range(package: str) -> tuple[str, str]:
    """The oldest and the newest version of a package in `TRAINING` on which tests ran."""
    found = sorted((each.versions[package] for each in COMBINATIONS), key=Version)
    return found[0], found[-1]


def versions_page() -> str:
    """docs/versions.md."""
    head = ["set", "date", "Python", *TRAINING, "some test files", "whole suite"]
    rows = [
        [each.name, each.date, each.python, *each.versions.values(), _count(each.part), _count(each.whole)]
        for each in COMBINATIONS
    ]
    table = [head, ["---"] * len(head), *rows]
    files = [f"- {each.name}: {', '.join(each.part.files) or 'none'}" for each in COMBINATIONS]
    known = [
        f"- {each.name}: {tests.known}"
        for each in COMBINATIONS
        for tests in (each.part, each.whole)
        if tests and tests.known
    ]
    return "\n".join(
        [
            "# Tested versions",
            "",
            "Written by `python scripts/versions.py` from `peftcli/doctor/tested.py`, which `doctor` reads too.",
            "The oldest set is that of `constraints-oldest.txt` (`make test-oldest`), which holds the lower bounds of",
            "`pyproject.toml`; the pinned set is that of `constraints.txt`, on which CI runs. All ran on a CPU.",
            "",
            *("| " + " | ".join(row) + " |" for row in table),
            "",
            "Test files that ran one by one:",
            "",
            *files,
            *(["", "Why tests failed:", "", *known] if known else []),
            "",
        ]
    )


def _count(tests: Tests | None) -> str:
    if tests is None:
        return "not run"
    return f"{tests.passed} passed" + (f", {tests.failed} failed" if tests.failed else "")
