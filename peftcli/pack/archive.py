"""Writes a folder as .tar.gz or .zip, with the same bytes for the same files."""

import gzip
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from peftcli.errors import RecipeError
from peftcli.filesystem import new_file_mode

FIXED_TIME = 315_532_800
"""Time of every file, seconds: 1980-01-01, the first that a .zip can hold."""
ENDINGS = (".tar.gz", ".tgz", ".zip")


def writer_of(output: Path) -> Callable[[Path, Path, str], None]:
    """The function that writes a format.

    Raises:
        RecipeError: the file extension is that of no format.
    """
    if output.name.endswith((".tar.gz", ".tgz")):
        return _write_tar
    if output.name.endswith(".zip"):
        return _write_zip
    raise RecipeError(f"--output {output}: unknown file extension; use {', '.join(ENDINGS)}")


def write_archive(folder: Path, output: Path, top: str) -> int:
    """Write all files of a folder beside the archive's name, and move the file there; returns its bytes.

    Args:
        top: folder in the archive.

    Raises:
        RecipeError: the file extension is that of no format.
    """
    write = writer_of(output)
    with _moved_to(output) as temporary:
        write(folder, temporary, top)
    return output.stat().st_size


@contextmanager
def _moved_to(output: Path) -> Iterator[Path]:
    descriptor, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    os.close(descriptor)
    try:
        yield Path(name)
        os.chmod(name, new_file_mode())
        os.replace(name, output)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def packed_files(folder: Path) -> list[tuple[Path, str]]:
    """The files of a folder with their names in it, sorted."""
    files = [(file, file.relative_to(folder).as_posix()) for file in folder.rglob("*") if file.is_file()]
    return sorted(files, key=lambda pair: pair[1])


def _write_tar(folder: Path, output: Path, top: str) -> None:
    with (
        output.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for file, name in packed_files(folder):
            entry = tarfile.TarInfo(f"{top}/{name}")
            entry.size, entry.mtime, entry.mode = file.stat().st_size, FIXED_TIME, 0o644
            with file.open("rb") as content:
                archive.addfile(entry, content)


def _write_zip(folder: Path, output: Path, top: str) -> None:
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, name in packed_files(folder):
            entry = zipfile.ZipInfo(f"{top}/{name}", (1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr, entry.create_system = zipfile.ZIP_DEFLATED, 0o644 << 16, 3
            with file.open("rb") as content, archive.open(entry, "w", force_zip64=True) as target:
                while block := content.read(2**20):
                    target.write(block)
