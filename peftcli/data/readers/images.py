"""Folders with one subfolder of images per class, and tables that name image files."""

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
"""Images are read whole for each row, so a batch has fewer of them."""
ASIDE = ("thumbs.db", "desktop.ini", "__macosx")
"""What systems leave in folders, besides names that begin with a dot."""


@dataclass
class ImageFolder:
    """The files of a folder, each in the folder of its class.

    Attributes:
        folder: that holds the folders of the classes.
        apart: folders whose files belong to the test rows.
    """

    folder: Path
    apart: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.folder.name}/"

    @property
    def files(self) -> tuple[Path, ...]:
        """The folder itself stands for its files."""
        return (self.folder,)

    def fingerprint(self) -> str:
        """SHA-256 over the place, the names and the bytes of all files."""
        digest = hashlib.sha256(str(self.folder).encode())
        for name in self._names():
            digest.update(b"\0" + name.encode("utf-8", "surrogateescape") + b"\0" + content_hash(self.folder / name))
        return digest.hexdigest()

    def batches(self) -> Iterator[Rows]:
        """The files, one of each class in turn, so that the first few of them have all classes.

        Raises:
            DataError: the folders are not those of classes.
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
            for place, folders, files in os.walk(self.folder, onerror=_raise, followlinks=True):
                folders[:] = sorted(one for one in folders if self._is_wanted(Path(place, one)))
                below = Path(place).relative_to(self.folder).as_posix()
                start = "" if below == "." else f"{below}/"
                found = sorted(f"{start}{file}" for file in files if not _is_aside(file))
                if not found and not folders and start:
                    found = [start]
                classes.setdefault(start.split("/")[0], []).extend(found)
        except OSError as problem:
            raise DataError(f"{problem.filename}: cannot be read: {problem.strerror}") from problem
        turns = itertools.zip_longest(*(classes[name] for name in sorted(classes)))
        return [name for turn in turns for name in turn if name is not None]

    def _is_wanted(self, folder: Path) -> bool:
        within = folder.parent.resolve().is_relative_to(folder.resolve())  # a link back to where it stands
        return not _is_aside(folder.name) and folder not in self.apart and not within

    def _check(self, names: list[str]) -> None:
        if any(name.count("/") == 1 and not name.endswith("/") for name in names):
            return
        below = sorted({name.split("/")[0] for name in names if name.count("/") > 1})
        if below:
            inner = f"dataset.path: {self.folder.name}/{below[0]}"
            raise DataError(
                f"{self.folder}: its folders hold folders and no image, so which of them are the classes is not known; "
                f"name the one that holds the folders of the classes, such as {inner}"
            )
        raise DataError(
            f"{self.folder}: holds no folder of a class with files in it; put the images of each class into a folder "
            "of its name, or name a table with the columns image and label"
        )


@dataclass
class ImageTable:
    """The rows of files that name images, relative to the folder of those files."""

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
        """What the names of the images are relative to.

        Raises:
            DataError: the files stand in several folders.
        """
        folders = {file.parent for file in self.table.files}
        if len(folders) > 1:
            raise DataError(
                f"{self.table.place}: its files stand in several folders, and the images are named relative to a file; "
                "put them into one folder, or name each in dataset.sources"
            )
        return folders.pop()

    def fingerprint(self) -> str:
        """SHA-256 over the table, its place, and the size and time of each image that a cell may name."""
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
    """What a section of the recipe names: a folder of images, or files whose rows name some.

    Args:
        without: files and folders that are left out, since they hold the test rows.
        key: dotted name of the section.

    Raises:
        DataError: as `open_source`, or the images would not be files.
    """
    path = Path(section.path or "")
    if section.path is not None and is_image_folder(path):
        return ImageFolder(path, tuple(without))
    source = open_source(section, without=without, key=key)
    if not isinstance(source, FileSource):
        raise DataError(f"{key}: images are read from files; write them into folders, and name those in {key}.path")
    return ImageTable(source)


def is_image_folder(path: Path) -> bool:
    """Whether a path is a folder of images and not one of tables."""
    if not path.is_dir():
        return False
    with os.scandir(path) as entries:
        return not any(entry.is_file() and Path(entry.name).suffix.lower() in ENDINGS for entry in entries)


def content_hash(path: Path) -> bytes:
    """SHA-256 of a file; of what cannot be read, nothing: its row is left out with the reason."""
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
