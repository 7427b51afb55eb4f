"""The files that a path, a folder or a glob stands for, and what each of them is."""

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
"""Names of files that stand in a folder of data and hold no rows; readme.jsonl may hold some."""
_LIKE = {"jsonl": "json"}
"""Kinds that may stand side by side in one source."""


@dataclass(frozen=True)
class DataFile:
    """One file, and how it is read.

    Attributes:
        path: where it is; messages show it.
        name: as rows show it; no folder of this machine.
        kind: one of the values of ENDINGS.
        section: the part of the recipe that names it.
        key: dotted name of that part, for messages.
    """

    path: Path
    name: str
    kind: str
    section: FilesSection
    key: str

    @property
    def packing(self) -> str | None:
        """The ending of a packed file, such as .gz."""
        return self.path.suffix.lower() if self.path.suffix.lower() in PACKED else None


def list_files(path: Path, without: frozenset[Path], file_format: str | None) -> list[Path]:
    """The files that a path, a folder or a glob stands for, in the order of their names.

    Raises:
        DataError: there are none, or one of them is no regular file.
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
        raise DataError(f"{path}: cannot be read: {problem.strerror}; look at its name and permissions") from problem
    left = {file.resolve() for file in without}
    kept = [file for file in files if file.resolve() not in left]
    if files and not kept:
        raise DataError(f"{path}: every file there is one of the test rows' own; name other files for training")
    if not kept:
        raise DataError(f"{path}: no file matches; look at the folder and the pattern")
    return kept


def data_files(section: FilesSection, without: frozenset[Path], key: str) -> list[DataFile]:
    """The files of a section, all of one kind.

    Raises:
        DataError: as in `list_files`, or the kind of a file is not known, or the kinds differ.
    """
    assert section.path is not None  # the recipe has seen to it
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
                f"{path}: holds files of two kinds, {files[0].name} ({files[0].kind}) and {file.name} ({file.kind}); "
                f"name those of one kind, such as {path if path.is_dir() else path.parent}/*{files[0].path.suffix}"
            )
    return files


def _kind(path: Path, section: FilesSection, key: str) -> str:
    if section.file_format is not None:
        return section.file_format
    ending = _ending(path)
    if ending in (".xlsx", ".xls", ".ods"):
        raise DataError(f"{path}: is a spreadsheet; export it as CSV and name that file")
    if ending not in ENDINGS:
        raise DataError(
            f"{path}: the ending {ending or '(none)'} is not known; known are {', '.join(ENDINGS)}, packed also with "
            f"{', '.join(PACKED)}; set {key}.file_format ({', '.join(dict.fromkeys(ENDINGS.values()))}), or name "
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
        raise DataError(f"{folder}: holds the splits {splits}; name one of them, such as {folder}/train")
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _saved_dataset(folder)
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    entries = [entry for entry in entries if not _is_aside(entry)]
    files = [_regular(entry) for entry in entries if not entry.is_dir()]
    if files and (file_format is not None or any(_ending(file) in ENDINGS for file in files)):
        return files
    below = next((f"; for those below it write {folder}/**/*" for entry in entries if entry.is_dir()), "")
    raise DataError(f"{folder}: no data file in this folder{below}; known endings are {', '.join(ENDINGS)}")


def _is_aside(entry: Path) -> bool:
    return _ASIDE.fullmatch(entry.name) is not None and _ending(entry) in ("", ".txt", ".md", ".rst", ".json")


def _saved_dataset(folder: Path) -> list[Path]:
    """The files of a folder that `Dataset.save_to_disk` wrote, in the order of their rows."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / part["filename"] for part in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as problem:
        raise DataError(f"{folder}/state.json: names no data files; save the data set again") from problem
    for file in files:
        if not file.is_file():
            raise DataError(f"{folder}: {file.name} is missing, which state.json names; save the data set again")
    if not files:
        raise DataError(f"{folder}: no rows; the saved data set is empty")
    return files


def _regular(path: Path) -> Path:
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path}: is a link to a file that is not there; mend the link or name the file itself")
    if not path.is_file() and not path.is_dir():
        raise DataError(f"{path}: is no regular file; write the rows into a file and name that")
    return path


def _nearest(path: Path) -> str:
    if path.is_symlink():
        return "; the link leads nowhere"
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent}"
    near = nearest(path.name, [file.name for file in path.parent.iterdir()])
    return f"; did you mean {near}?" if near else f"; look into {path.parent}"
