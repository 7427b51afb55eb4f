"""Run folders that are there already, as the entries of a comparison."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftcli.compare.collect import Entry
from peftcli.compare.variants import unique
from peftcli.errors import RecipeError
from peftcli.rundir import RunDir, read_json

RESULT = "compare.json"


def is_run(folder: Path) -> bool:
    """Whether a folder is a run, or a comparison, which holds runs."""
    return folder.is_dir() and (RunDir(folder).recipe.is_file() or (folder / RESULT).is_file())


def open_runs(folders: Sequence[Path]) -> list[Entry]:
    """The runs of some folders; a comparison among them stands for its variants.

    Raises:
        RecipeError: a folder is no run, or there are fewer than two.
    """
    found: list[Entry] = []
    for folder in folders:
        if not is_run(folder):
            raise RecipeError(
                f"{folder}: no run folder (recipe.yaml is missing); name runs that are there, or recipes to train"
            )
        path = Path(os.path.abspath(folder))
        found += [Entry(path.name, path)] if RunDir(path).recipe.is_file() else _variants(path)
    entries = list({entry.folder: entry for entry in found}.values())
    if len(entries) < 2:
        raise RecipeError(
            f"{', '.join(map(str, folders))}: fewer than two runs are nothing to compare; name more of them"
        )
    names = [entry.name for entry in entries]
    shown = [
        name if names.count(name) == 1 else f"{one.folder.parent.name}-{name}"
        for one, name in zip(entries, names, strict=True)
    ]
    return [
        Entry(name, one.folder, one.varied, one.exit_code, one.error)
        for name, one in zip(unique(iter(shown)), entries, strict=True)
    ]


def _variants(home: Path) -> list[Entry]:
    """The variants that a comparison has trained in its own folder, in its order; one of other runs has none."""
    try:
        rows = read_json(home / RESULT)["variants"]
        return [_variant(home, row) for row in rows if (home / row["run"]).is_dir()]
    except (ValueError, KeyError, TypeError) as problem:
        raise RecipeError(f"{home / RESULT}: is no comparison of this version; train it again") from problem


def _variant(home: Path, row: dict[str, Any]) -> Entry:
    folder = home / row["run"]
    code, error = row["exit_code"], row["error"]
    if RunDir(folder).status() == "finished" and code != 7:  # trained alone since
        code, error = None, None
    return Entry(row["name"], folder, row["varied"], code, error)
