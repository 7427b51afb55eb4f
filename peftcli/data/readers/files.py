"""Lists the files of a path, a folder or a glob, and determines their formats."""

import glob
import json
import re
from dataclasses import dataclass
from pathlib import Path

from peftcli.errors import DataError
from peftcli.nearest import nearest
from peftcli.recipe.schema import FilesSection

ENDINGS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".sqlite": "sqlite",
    ".sqlite3": "sqlite",
    ".db": "sqlite",
}
PACKED = (".gz", ".bz2", ".xz", ".zst")

_ASIDE = re.compile(r"(readme|licen[cs]e)([.-].*)?|dataset_info\.json|state\.json", re.IGNORECASE)
"""Names of files in data folders that are not data; readme.jsonl may be."""
_LIKE = {"jsonl": "json"}
"""Formats that can be mixed in one source."""


@dataclass(frozen=True)
class DataFile:
    """One file, and how it is read.

    Attributes:
        path: for messages.
        name: relative to the folder of the source.
        kind: one of the values of ENDINGS.
        section: the section of the recipe that names it.
        key: dotted name of that section, for messages.
    """

    path: Path
    name: str
    kind: str
    section: FilesSection
    key: str

    @property
    def packing(self) -> str | None:
        """The extension of a compressed file, such as .gz."""
        return self.path.suffix.lower() if self.path.suffix.lower() in PACKED else None


def list_files(path: Path, without: frozenset[Path], file_format: str | None) -> list[Path]:
    """The files of a path, a folder or a glob, sorted by name.

    Raises:
        DataError: there are none, or one is not a regular file.
    """
    try:
        if path.is_dir():
            files = _folder_files(path, file_format)
        elif path.exists():
            return [_regular(path)]
        elif glob.has_magic(str(path)):
            files = [_regular(Path(name)) for name in sorted(glob.glob(str(path), recursive=True))]
            files = [file for file in files if not file.is_dir()]
        else:
            raise DataError(f"{path}: no such file{_nearest(path)}")
    except OSError as problem:
        raise DataError(f"{path}: cannot be read: {problem.strerror}; check its name and permissions") from problem
    excluded = {file.resolve() for file in without}
    remaining = [file for file in files if file.resolve() not in excluded]
    if files and not remaining:
        raise DataError(f"{path}: all files are already used as test rows; use other files for training")
    if not remaining:
        raise DataError(f"{path}: no file matches; check the folder and the pattern")
    return remaining


def data_files(section: FilesSection, without: frozenset[Path], key: str) -> list[DataFile]:
    """The files of a section, all of the same format.

    Raises:
        DataError: as in `list_files`, or a format is unknown, or the formats differ.
    """
    assert section.path is not None  # checked by the recipe
    path = Path(section.path)
    paths = list_files(path, without, section.file_format)
    folder = paths[0].parent
    while not all(file.is_relative_to(folder) for file in paths):
        folder = folder.parent
    files = [
        DataFile(file, file.relative_to(folder).as_posix(), _kind(file, section, key), section, key) for file in paths
    ]
    for file in files[1:]:
        if _LIKE.get(file.kind, file.kind) != _LIKE.get(files[0].kind, files[0].kind):
            raise DataError(
                f"{path}: has files of two formats, {files[0].name} ({files[0].kind}) and {file.name} ({file.kind}); "
                f"select one format, such as {path if path.is_dir() else path.parent}/*{files[0].path.suffix}"
            )
    return files


def _kind(path: Path, section: FilesSection, key: str) -> str:
    if section.file_format is not None:
        return section.file_format
    ending = _ending(path)
    if ending in (".xlsx", ".xls", ".ods"):
        raise DataError(f"{path}: is a spreadsheet; export it as CSV and use that file")
    if ending not in ENDINGS:
        raise DataError(
            f"{path}: unknown file extension {ending or '(none)'}; known are {', '.join(ENDINGS)}, also compressed "
            f"with {', '.join(PACKED)}; set {key}.file_format ({', '.join(dict.fromkeys(ENDINGS.values()))}), or use "
            "other files"
        )
    return ENDINGS[ending]


def _ending(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _folder_files(folder: Path, file_format: str | None) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
        raise DataError(f"{folder}: has the splits {splits}; use one of them, such as {folder}/train")
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _saved_dataset(folder)
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    entries = [entry for entry in entries if not _is_aside(entry)]
    files = [_regular(entry) for entry in entries if not entry.is_dir()]
    if files and (file_format is not None or any(_ending(file) in ENDINGS for file in files)):
        return files
    below = next((f"; to include subfolders use {folder}/**/*" for entry in entries if entry.is_dir()), "")
    raise DataError(f"{folder}: no data file in this folder{below}; known extensions are {', '.join(ENDINGS)}")


def _is_aside(entry: Path) -> bool:
    return _ASIDE.fullmatch(entry.name) is not None and _ending(entry) in ("", ".txt", ".md", ".rst", ".json")


def _saved_dataset(folder: Path) -> list[Path]:
    """The files of a folder from `Dataset.save_to_disk`, in row order."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / part["filename"] for part in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as problem:
        raise DataError(f"{folder}/state.json: lists no data files; save the dataset again") from problem
    for file in files:
        if not file.is_file():
            raise DataError(f"{folder}: {file.name} is listed in state.json but missing; save the dataset again")
    if not files:
        raise DataError(f"{folder}: the saved dataset has no rows; save one with rows")
    return files


def _regular(path: Path) -> Path:
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path}: is a broken link; fix the link or use the file itself")
    if not path.is_file() and not path.is_dir():
        raise DataError(f"{path}: is not a regular file; write the rows to a file and use that")
    return path


def _nearest(path: Path) -> str:
    if path.is_symlink():
        return "; the link is broken"
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist"
    near = nearest(path.name, [file.name for file in path.parent.iterdir()])
    return f"; did you mean {near}?" if near else f"; check the files in {path.parent}"
