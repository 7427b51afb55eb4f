"""Image folders with one subfolder per class, and tables with image paths."""

import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peftcli.data.readers.files import ENDINGS
from peftcli.data.readers.open import FileSource, open_source
from peftcli.data.rows import BATCH_ROWS, Rows
from peftcli.errors import DataError
from peftcli.recipe.schema import FilesSection

BATCH_IMAGES = BATCH_ROWS // 20
"""Batches are smaller than for text, because whole images are read."""
ASIDE = ("thumbs.db", "desktop.ini", "__macosx")
"""System files in folders, in addition to names that start with a dot."""


@dataclass
class ImageFolder:
    """The images of a folder with one subfolder per class.

    Attributes:
        folder: parent of the class folders.
        excluded: folders with the test rows.
    """

    folder: Path
    excluded: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.folder.name}/"

    @property
    def files(self) -> tuple[Path, ...]:
        """The folder, instead of its files."""
        return (self.folder,)

    def fingerprint(self) -> str:
        """SHA-256 over the path, the names and the contents of all files."""
        digest = hashlib.sha256(str(self.folder).encode())
        for name in self._names():
            digest.update(b"\0" + name.encode("utf-8", "surrogateescape") + b"\0" + content_hash(self.folder / name))
        return digest.hexdigest()

    def batches(self) -> Iterator[Rows]:
        """The files, alternating between classes, so that the first few contain all classes.

        Raises:
            DataError: the subfolders are not class folders.
        """
        names = self._names()
        self._check(names)
        for first in range(0, len(names), BATCH_IMAGES):
            part = names[first : first + BATCH_IMAGES]
            labels = [name.split("/")[0] if "/" in name else None for name in part]
            yield Rows(self.name, list(range(first + 1, first + 1 + len(part))), {"image": part, "label": labels})

    def _names(self) -> list[str]:
        classes: dict[str, list[str]] = {}
        try:
            for current, folders, files in os.walk(self.folder, onerror=_raise, followlinks=True):
                folders[:] = sorted(one for one in folders if self._is_wanted(Path(current, one)))
                below = Path(current).relative_to(self.folder).as_posix()
                start = "" if below == "." else f"{below}/"
                found = sorted(f"{start}{file}" for file in files if not _is_aside(file))
                if not found and not folders and start:
                    found = [start]
                classes.setdefault(start.split("/")[0], []).extend(found)
        except OSError as problem:
            raise DataError(
                f"{problem.filename}: cannot be read: {problem.strerror}; check its permissions"
            ) from problem
        rounds = itertools.zip_longest(*(classes[name] for name in sorted(classes)))
        return [name for names in rounds for name in names if name is not None]

    def _is_wanted(self, folder: Path) -> bool:
        is_cycle = folder.parent.resolve().is_relative_to(folder.resolve())  # a link to one of its parents
        return not _is_aside(folder.name) and folder not in self.excluded and not is_cycle

    def _check(self, names: list[str]) -> None:
        if any(name.count("/") == 1 and not name.endswith("/") for name in names):
            return
        below = sorted({name.split("/")[0] for name in names if name.count("/") > 1})
        if below:
            inner = f"dataset.path: {self.folder.name}/{below[0]}"
            raise DataError(
                f"{self.folder}: its subfolders contain folders instead of images, so the classes are ambiguous; "
                f"use the parent of the class folders, such as {inner}"
            )
        raise DataError(
            f"{self.folder}: has no class folder with files; put the images of each class into a folder with its "
            "name, or use a table with the columns image and label"
        )


@dataclass
class PictureFolder:
    """All files of a folder and its subfolders as images without a class."""

    folder: Path

    @property
    def name(self) -> str:
        return f"{self.folder.name}/"

    def fingerprint(self) -> str:
        """SHA-256 over the path, the names, sizes and times of all files."""
        digest = hashlib.sha256(str(self.folder).encode())
        for name in self._names():
            digest.update(b"\0" + name.encode("utf-8", "surrogateescape") + b"\0" + _stamp(self.folder / name))
        return digest.hexdigest()

    def batches(self) -> Iterator[Rows]:
        """The files, sorted by name.

        Raises:
            DataError: there are none, or a folder cannot be read.
        """
        names = self._names()
        if not names:
            raise DataError(f"{self.folder}: no files in this folder; use a folder of images")
        for first in range(0, len(names), BATCH_IMAGES):
            part = names[first : first + BATCH_IMAGES]
            yield Rows(self.name, list(range(first + 1, first + 1 + len(part))), {"image": part})

    def _names(self) -> list[str]:
        found: list[str] = []
        try:
            for current, folders, files in os.walk(self.folder, onerror=_raise):
                folders[:] = [one for one in folders if not _is_aside(one)]
                below = Path(current).relative_to(self.folder)
                found += [(below / file).as_posix() for file in files if not _is_aside(file)]
        except OSError as problem:
            raise DataError(
                f"{problem.filename}: cannot be read: {problem.strerror}; check its permissions"
            ) from problem
        return sorted(found)


@dataclass
class ImageTable:
    """Rows with image paths relative to the file of the rows."""

    table: FileSource

    @property
    def name(self) -> str:
        return self.table.name

    @property
    def files(self) -> tuple[Path, ...]:
        return self.table.files

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        return self.table.class_names

    @property
    def folder(self) -> Path:
        """The base folder of relative image paths.

        Raises:
            DataError: the files are in several folders.
        """
        folders = {file.parent for file in self.table.files}
        if len(folders) > 1:
            raise DataError(
                f"{self.table.place}: its files are in several folders, but image paths are relative to one; "
                "put them into one folder, or list each in dataset.sources"
            )
        return folders.pop()

    def fingerprint(self) -> str:
        """SHA-256 over the table, its folder, and the size and time of each image that a cell may refer to."""
        digest = hashlib.sha256(f"{self.table.fingerprint()} {self.folder}".encode())
        for rows in self.table.batches():
            for name in itertools.chain.from_iterable(rows.columns.values()):
                if isinstance(name, str) and "\0" not in name and len(name) < 4096:
                    digest.update(_stamp(self.folder / name))
        return digest.hexdigest()

    def batches(self) -> Iterator[Rows]:
        for rows in self.table.batches():
            for first in range(0, max(1, len(rows)), BATCH_IMAGES):
                yield _part(rows, first)


def open_images(
    section: FilesSection, *, without: frozenset[Path] = frozenset(), key: str = "dataset"
) -> ImageFolder | ImageTable:
    """Open the images of a section: a folder of images, or a table with image paths.

    Args:
        without: files and folders of the test rows, which are excluded.
        key: dotted name of the section.

    Raises:
        DataError: as `open_source`, or the source is not made of files.
    """
    path = Path(section.path or "")
    if section.path is not None and is_image_folder(path):
        return ImageFolder(path, tuple(without))
    source = open_source(section, without=without, key=key)
    if not isinstance(source, FileSource):
        raise DataError(f"{key}: images must be files; save them in folders, and set {key}.path")
    return ImageTable(source)


def is_image_folder(path: Path) -> bool:
    """Whether a path is a folder of images, not of tables."""
    if not path.is_dir():
        return False
    with os.scandir(path) as entries:
        return not any(entry.is_file() and Path(entry.name).suffix.lower() in ENDINGS for entry in entries)


def content_hash(path: Path) -> bytes:
    """SHA-256 of a file; empty if it cannot be read, since its row is dropped with the reason."""
    if not path.is_file():
        return b""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return b""


def _stamp(path: Path) -> bytes:
    try:
        found = path.stat()
    except OSError:
        return b"-"
    return f"{found.st_size} {found.st_mtime_ns}\n".encode()


def _part(rows: Rows, first: int) -> Rows:
    chosen = slice(first, first + BATCH_IMAGES)
    columns = {name: values[chosen] for name, values in rows.columns.items()}
    return Rows(rows.file, rows.numbers[chosen], columns, rows.unread if first == 0 else [])


def _is_aside(name: str) -> bool:
    return name.startswith(".") or name.lower() in ASIDE


def _raise(problem: OSError) -> None:
    raise problem
