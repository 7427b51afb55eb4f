"""The versions that pyproject.toml promises, those that the tests run on, and the page and table that name them."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from peftcli.doctor.packages import TESTED
from peftcli.doctor.tested import COMBINATIONS, TRAINING, versions_page

ROOT = Path(__file__).parent.parent
BROUGHT_ALONG = "# What these bring along"


def bounds() -> dict[str, Version]:
    """The lower bound of every package that pyproject.toml gives one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found: dict[str, Version] = {}
    for asked in map(Requirement, lines):
        for clause in asked.specifier:
            assert clause.operator == ">=", f"{asked}: only a lower bound can be tested by constraints-oldest.txt"
            name, version = canonicalize_name(asked.name), Version(clause.version)
            assert found.setdefault(name, version) == version, f"{name} has two lower bounds"
    return found


def pins(text: str) -> dict[str, Version]:
    found = re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in found}


def test_the_oldest_constraints_are_the_lower_bounds() -> None:
    text = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8")
    ours, brought = text.split(BROUGHT_ALONG)
    assert pins(ours) == bounds()
    assert not pins(brought).keys() & bounds().keys()


@pytest.mark.parametrize("name", TRAINING)
def test_every_lower_bound_and_every_pin_of_a_training_library_was_run(name: str) -> None:
    ran = [Version(each.versions[name]) for each in COMBINATIONS]
    assert min(ran) == bounds()[name] and Version(TESTED[name]) in ran


def test_the_page_of_versions_is_the_table() -> None:
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    assert page == versions_page(), "run python scripts/versions.py"
    for each in COMBINATIONS:
        assert f"| {each.name} | {each.date} | {each.python} | {each.versions['torch']} |" in page


def test_the_pythons_that_are_named_as_tested_were_run() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    start = "Programming Language :: Python :: "
    named = {line.removeprefix(start) for line in project["classifiers"] if line.startswith(start)}
    assert named == {".".join(each.python.split(".")[:2]) for each in COMBINATIONS}
