"""Sizes and times of a recipe's data files, which show at once, without reading, that the rows may have changed."""

import glob
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftcli.recipe.schema import DatasetSection


def file_state(dataset: DatasetSection) -> str | None:
    """SHA-256 over the names, sizes and modification times of the files; None without files, or if one is missing.

    Args:
        dataset: section of the recipe, with absolute paths.
    """
    held_out = [section for section in (dataset.test, dataset.validation) if section is not None]
    sections: list[Any] = [*(dataset.sources or (dataset,)), *dataset.join, *held_out]
    paths = [section.path for section in sections if section.path is not None]
    found = [[_state(file) for file in _files(path)] for path in paths]
    if not found or not all(found):
        return None
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _files(path: str) -> Iterator[Path]:
    for place in [path] if Path(path).exists() else sorted(glob.glob(path, recursive=True)):
        if Path(place).is_dir():
            yield from sorted(file for file in Path(place).rglob("*") if file.is_file())
        else:
            yield Path(place)


def _state(file: Path) -> tuple[str, int, int]:
    facts = file.stat()
    return file.name, facts.st_size, facts.st_mtime_ns
