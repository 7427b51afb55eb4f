"""Checks the installed packages against their requirements and the tested versions."""

import importlib
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.version import Version

from peftcli.doctor.check import FAIL, OK, WARN, Check
from peftcli.doctor.tested import TRAINING, tested_range
from peftcli.installed import installed_versions

TESTED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
    "bitsandbytes": "0.50.2",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "huggingface_hub": "2.4.0",
    "tokenizers": "0.23.3",
    "safetensors": "0.8.0",
    "numpy": "2.4.6",
    "pandas": "3.1.1",
    "pyarrow": "26.0.1",
    "typer": "0.29.2",
    "pyyaml": "6.0.3",
    "pydantic": "2.14.3",
    "rich": "15.0.0",
    "psutil": "7.2.2",
    "filelock": "4.2.11",
    "xxhash": "4.1.0",
    "rapidfuzz": "3.14.6",
    "matplotlib": "3.11.2",
    "jinja2": "3.1.6",
    "sacrebleu": "2.6.0",
    "scikit-learn": "1.9.1",
    "scipy": "1.17.1",
    "seqeval": "1.2.2",
}
"""The versions of constraints.txt, with which the tests and CI run."""
OURS = "peftcli"


@dataclass(frozen=True)
class Need:
    """A requirement of one package on another."""

    by: str
    what: Requirement


def installed_needs() -> list[Need]:
    """The requirements of peftcli and those of its direct dependencies, without extras.

    If peftcli is run without being installed, its requirements are the packages that the tests ran with: those that
    affect a run in the oldest tested version or later, others in any version.
    """
    ours = _needs_of(OURS) or [Need(OURS, _tested_need(name)) for name in TESTED]
    return ours + [need for direct in ours for need in _needs_of(direct.what.name)]


def _tested_need(name: str) -> Requirement:
    return Requirement(f"{name}>={tested_range(name)[0]}" if name in TRAINING else name)


def _needs_of(package: str) -> list[Need]:
    try:
        lines = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = [Requirement(line) for line in lines]
    return [Need(package, one) for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def check_requirements(needs: Sequence[Need], installed: Mapping[str, str | None]) -> Check:
    """Compare the installed versions with the requirements.

    A mismatch with peftcli's own requirements fails; one between other packages is a warning, since many are harmless.

    Args:
        installed: version by package name, None if it is missing.
    """
    unmet = [need for need in needs if not _is_met(need, installed.get(need.what.name))]
    if not unmet:
        direct = sum(need.by == OURS for need in needs)
        return Check("packages", OK, f"peftcli's {direct} requirements are installed and compatible")
    ours = [need for need in unmet if need.by == OURS]
    found = ", ".join(_unmet_text(need, installed.get(need.what.name)) for need in ours or unmet)
    wanted = " ".join(f"'{need.what.name}{need.what.specifier}'" for need in ours or unmet)
    return Check("packages", FAIL if ours else WARN, found, f"pip install {wanted}")


def _is_met(need: Need, version: str | None) -> bool:
    return version is not None and need.what.specifier.contains(version, prereleases=True)


def _unmet_text(need: Need, version: str | None) -> str:
    required = f"{need.by} requires {need.what.name}{need.what.specifier}"
    return f"{required}, which is not installed" if version is None else f"{required}, but {version} is installed"


def check_tested_versions(installed: Mapping[str, str | None]) -> Check:
    """Compare the installed versions with the tested range; the patch version is ignored.

    Older versions are not reported here: peftcli does not allow them, so `check_requirements` fails.
    """
    present = {name: version for name in TRAINING if (version := installed.get(name)) is not None}
    newer = {name: last for name in present if _is_newer(present[name], last := tested_range(name)[1])}
    if newer:
        found = ", ".join(
            f"{name} {present[name]} is newer than {last}, the newest tested version" for name, last in newer.items()
        )
        wanted = " ".join(f"{name}=={last}" for name, last in newer.items())
        return Check("tested", WARN, found, f"if something misbehaves, pip install {wanted}")
    ranges = {name: tested_range(name) for name in present}
    inside = [name for name, (first, _) in ranges.items() if Version(present[name]) >= Version(first)]
    return Check("tested", OK, "tested with " + ", ".join(f"{name} {_range_text(*ranges[name])}" for name in inside))


def _is_newer(version: str, last: str) -> bool:
    return _first_two(version) > _first_two(last)


def _range_text(first: str, last: str) -> str:
    """A range of versions, without patch versions.

    >>> _range_text("2.6.0", "2.15.0"), _range_text("1.16.0", "1.16.0")
    ('2.6 to 2.15', '1.16')
    """
    first, last = (".".join(map(str, _first_two(version))) for version in (first, last))
    return first if first == last else f"{first} to {last}"


def _first_two(version: str) -> tuple[int, ...]:
    return Version(version).release[:2]


def check_python(version: str, required: str | None, tested: Sequence[str]) -> Check:
    """Compare the running Python with the required and the tested versions.

    Args:
        version: such as 3.11.9.
        required: the package's Requires-Python, such as >=3.11, None if unknown.
        tested: major and minor number of each tested version; empty if unknown.
    """
    if required and not Requirement(f"python{required}").specifier.contains(version, prereleases=True):
        fix = "create a virtual environment with a supported Python"
        return Check("python", FAIL, f"{version}, but {required} is required", fix)
    if tested and ".".join(version.split(".")[:2]) not in tested:
        found = f"{version}, but only {', '.join(tested)} are tested"
        return Check("python", WARN, found, f"if something misbehaves, use Python {tested[-1]}")
    return Check("python", OK, version)


def stated_pythons() -> tuple[str | None, list[str]]:
    """The Python versions that the installed peftcli requires, and those it lists as tested."""
    try:
        metadata = importlib.metadata.metadata(OURS)
    except importlib.metadata.PackageNotFoundError:
        return None, []
    start = "Programming Language :: Python :: "
    named = [line.removeprefix(start) for line in metadata.get_all("Classifier") or [] if line.startswith(start)]
    return (metadata.get_all("Requires-Python") or [None])[0], [name for name in named if "." in name]


def version_lines() -> list[str]:
    """The versions that a bug report should include, peftcli's own first; read without importing the packages."""
    found = installed_versions((OURS, *TRAINING))
    own = found.pop(OURS) or "(not installed)"
    others = {"python": platform.python_version(), **found}
    return [f"{OURS} {own}", *(f"{name} {version or 'missing'}" for name, version in others.items())]


def check_databases(version: str | None, *, asked: bool) -> Check:
    """Whether `dataset.url` could be read.

    Args:
        version: of SQLAlchemy, None if it is not installed.
        asked: whether the recipe needs it.
    """
    if version is not None:
        return Check("databases", OK, f"sqlalchemy {version}")
    if asked:
        return Check(
            "databases",
            FAIL,
            "the recipe reads a database, but sqlalchemy is not installed",
            "pip install 'peftcli[sql]'",
        )
    return Check("databases", OK, "sqlalchemy is not installed; only dataset.url needs it")


def check_imports(names: Sequence[str]) -> Check:
    """Import packages, and report those that are broken or missing."""
    broken = {name: problem for name in names if (problem := import_problem(name)) is not None}
    if not broken:
        return Check("imports", OK, f"{', '.join(name for name in names if name in TRAINING)} can be imported")
    found = ", ".join(f"{name} cannot be imported ({problem})" for name, problem in broken.items())
    wanted = " ".join(f"{name}=={TESTED[name]}" if name in TESTED else name for name in broken)
    return Check("imports", FAIL, found, f"pip install --force-reinstall {wanted}; the other checks need them")


def import_problem(name: str) -> str | None:
    """Import a package, and return the error in one line, or None."""
    try:
        importlib.import_module(name)
    except Exception as problem:  # a broken wheel can raise anything
        return f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
    return None
