"""Opens the source of a recipe section."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from peftcli.data.readers.csv import read_csv
from peftcli.data.readers.files import DataFile, data_files
from peftcli.data.readers.json import read_json, read_lines
from peftcli.data.readers.sql import open_database, read_sqlite
from peftcli.data.readers.text import read_conll, read_text
from peftcli.data.readers.text_stream import check_head, reading
from peftcli.data.rows import Rows, Source, listed
from peftcli.errors import DataError
from peftcli.recipe.schema import FilesSection, SourceSection, TestSection, ValidationSection


def _read_parquet(file: DataFile) -> Iterator[Rows]:
    from peftcli.data.readers.parquet import read_parquet  # pyarrow; the other formats do without it

    return read_parquet(file)


def _read_arrow(file: DataFile) -> Iterator[Rows]:
    from peftcli.data.readers.parquet import read_arrow

    return read_arrow(file)


_READERS: dict[str, Callable[[DataFile], Iterator[Rows]]] = {
    "csv": read_csv,
    "tsv": read_csv,
    "json": read_json,
    "jsonl": read_lines,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "text": read_text,
    "conll": read_conll,
    "sqlite": read_sqlite,
}
_LOOSE = ("json", "jsonl")
"""Formats whose files may have different columns, like their rows."""


class OpenSource(Source, Protocol):
    """A source with its files; empty for the Hub and database URLs."""

    files: tuple[Path, ...]


@dataclass
class FileSource:
    """The rows of several files of one format, in order."""

    name: str
    files: tuple[Path, ...]
    place: Path
    parts: list[DataFile]

    def fingerprint(self) -> str:
        """SHA-256 over the files and the keys that affect how they are read."""
        section = self.parts[0].section
        keys = section.model_dump(include={"file_format", "encoding", "csv", "table", "query"}, mode="json")
        digest = hashlib.sha256(json.dumps(keys, sort_keys=True).encode("utf-8"))
        for part in self.parts:
            # Recent changes of an SQLite file may be in its -wal file.
            for path in (part.path, part.path.with_name(part.path.name + "-wal")):
                if path is part.path or (part.kind == "sqlite" and path.is_file()):
                    with reading(part), path.open("rb") as file:
                        digest.update(part.kind.encode() + hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        """Class names by column, if the files have them."""
        if self.parts[0].kind not in ("parquet", "arrow"):
            return {}
        from peftcli.data.readers.parquet import class_names

        found = [class_names(part) for part in self.parts]
        return {name: names for name, names in found[0].items() if all(one.get(name) == names for one in found)}

    def batches(self) -> Iterator[Rows]:
        """The rows of all files in order.

        Raises:
            DataError: a file cannot be read, its columns are not those of the first file, or there are no rows.
        """
        first: Rows | None = None
        for part in self.parts:
            for rows in _READERS[part.kind](part):
                first = first or rows
                if part.kind not in _LOOSE and rows.columns.keys() != first.columns.keys():
                    raise DataError(
                        f"{part.path}: its columns are {listed(rows.columns)}, those of {first.file} are "
                        f"{listed(first.columns)}; files of one source need the same columns"
                    )
                yield rows
        if first is None:
            raise DataError(f"{self.place}: no rows; add rows, or use another file")


def open_source(section: FilesSection, *, without: frozenset[Path] = frozenset(), key: str = "dataset") -> OpenSource:
    """Open the source of a section: find and check its files, without reading the rows.

    Args:
        section: a section of the recipe with a source; its path is absolute.
        without: files of the test rows, which are excluded from a folder or glob.
        key: dotted name of the section, for messages.

    Raises:
        DataError: a file is missing, empty or has another format than its name; a URL contains a password.
        MachineError: the environment variable with a database URL is not set.
    """
    if isinstance(section, SourceSection) and (section.url is not None or section.url_env is not None):
        return open_database(section, key)
    if isinstance(section, SourceSection | TestSection) and section.path is None:
        default = "validation" if isinstance(section, ValidationSection) else "test"
        split = section.hub_split or (default if isinstance(section, TestSection) else "train")
        assert section.name is not None  # checked by the recipe
        from peftcli.data.readers.hub import HubSource

        return HubSource(section.name, section.config, section.revision, split, key)
    parts = data_files(section, without, key)
    for part in parts:
        check_head(part)
    path = Path(section.path or "")
    return FileSource(path.name, tuple(part.path for part in parts), path, parts)
