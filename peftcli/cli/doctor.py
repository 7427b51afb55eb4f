"""The body of `doctor`: prints one line per check and fails if a check fails."""

import json
import platform
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftcli.cli.console import Shown, console, quiet
from peftcli.cli.recipes import find_recipe
from peftcli.cli.text import JSON_OUTPUT, printable
from peftcli.doctor.check import FAIL, Check, anonymous, private_words
from peftcli.doctor.packages import (
    OURS,
    TESTED,
    check_databases,
    check_imports,
    check_python,
    check_requirements,
    check_tested_versions,
    installed_needs,
    stated_pythons,
    version_lines,
)
from peftcli.errors import MachineError
from peftcli.installed import installed_versions
from peftcli.recipe.load import load_recipe
from peftcli.recipe.schema import Recipe

COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}
NEEDED = (
    *("psutil", "filelock", "huggingface_hub", "pyarrow", "matplotlib", "jinja2", "sacrebleu"),
    *("torch", "bitsandbytes", "transformers", "accelerate", "peft", "datasets", "trl"),
)
"""Packages that the other checks, or a run, import."""


def doctor_command(name: str | None, overrides: Sequence[str], *, as_json: bool) -> None:
    """Print what this machine supports, in general or for a recipe.

    Raises:
        MachineError: at least one check failed.
        RecipeError: the recipe is invalid.
    """
    recipe = load_recipe(find_recipe(name), overrides).recipe if name is not None else None
    with quiet(None) as streams:
        shown, private = Shown(console(streams.err)), private_words()
        shown.note("loading the libraries")
        verdicts = [anonymous(verdict, private) for verdict in ask_all(recipe)]
        versions = {"python": platform.python_version(), **installed_versions((OURS, *TESTED))}
        if as_json:
            JSON_OUTPUT.write(json.dumps(as_object(verdicts, versions), ensure_ascii=False), streams.out)
        else:
            print_verdicts(verdicts, console(streams.out))
        streams.out.flush()
    failed = [verdict.name for verdict in verdicts if verdict.result == FAIL]
    if failed:
        raise MachineError(f"{len(failed)} of {len(verdicts)} checks failed: {', '.join(failed)}; see the fixes above")


def ask_all(recipe: Recipe | None) -> Iterable[Check]:
    """All checks; those that need the libraries are skipped if one cannot be imported."""
    needs = installed_needs()
    installed = installed_versions([OURS, *TESTED, "sqlalchemy", *{need.what.name for need in needs}])
    python = platform.python_version()
    yield Check("versions", "ok", f"{', '.join(version_lines())}; {platform.system()} {platform.machine()}")
    yield check_python(python, *stated_pythons())
    yield check_requirements(needs, installed)
    yield check_tested_versions(installed)
    yield check_databases(installed["sqlalchemy"], asked=recipe is not None and _reads_database(recipe))
    imports = check_imports(NEEDED)
    yield imports
    if imports.result == FAIL:
        return
    from peftcli.doctor.run import run_checks
    from peftcli.doctor.system import encodings

    yield from run_checks(recipe, encodings())


def _reads_database(recipe: Recipe) -> bool:
    sources = (recipe.dataset, *(recipe.dataset.sources or ()))
    return any(source.url is not None or source.url_env is not None for source in sources)


def print_verdicts(verdicts: Sequence[Check], out: Console) -> None:
    """One line per check; on a terminal, long lines wrap within their column."""
    width = max(len(verdict.name) for verdict in verdicts)
    if not out.is_terminal:
        for verdict in verdicts:
            out.print(printable(f"{verdict.name:<{width}}  {verdict.result:<4}  {verdict.line}"))
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for verdict in verdicts:
        sign = Text(verdict.result, style=COLOURS[verdict.result])
        table.add_row(verdict.name, sign, Text(printable(verdict.line)))
    out.print(table)


def as_object(verdicts: Sequence[Check], versions: dict[str, str | None]) -> dict[str, Any]:
    """The object of `--json`; the field for the fix is null if there is nothing to fix."""
    checks = [
        {"name": found.name, "result": found.result, "found": found.found, "fix": found.fix or None}
        for found in verdicts
    ]
    return {"schema": 2, "checks": checks, "versions": versions}
