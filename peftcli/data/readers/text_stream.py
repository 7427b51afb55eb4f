"""Text files as streams of characters: decompressed and decoded, or refused with a reason."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

import pyarrow as pa

from peftcli.data.readers.files import DataFile
from peftcli.errors import DataError

HEAD_BYTES = 4096
CHUNK_BYTES = 1 << 20

_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"PAR1", "parquet", "a Parquet file"),
    (b"ARROW1", "arrow", "an Arrow file"),
    (b"SQLite format 3\0", "sqlite", "an SQLite database"),
    (b"\x1f\x8b", ".gz", "packed with gzip"),
    (b"BZh", ".bz2", "packed with bzip2"),
    (b"\xfd7zXZ\0", ".xz", "packed with xz"),
    (b"\x28\xb5\x2f\xfd", ".zst", "packed with Zstandard"),
    (b"PK\x03\x04", "", "a spreadsheet or a zip archive; export it as CSV, or unpack it"),
    (b"%PDF", "", "a PDF document; save its text as a .txt file"),
    (b"version https://git-lfs", "", "a pointer of Git LFS and not the data; fetch them with git lfs pull"),
    (b"FEA1", "", "a Feather file of version 1; write it again as Parquet"),
)
_PAGE = (b"<!doctype html", b"<html")
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_BINARY = {"parquet": "a Parquet file", "sqlite": "an SQLite database"}
_WIDE = ("utf-16", "utf-32")


def check_head(file: DataFile) -> None:
    """Look at the first bytes of a file: they tell what it is, whatever its name says.

    Raises:
        DataError: it is empty, unreadable or something else than its name or the recipe says.
    """
    with reading(file), file.path.open("rb") as plain:
        head = plain.read(HEAD_BYTES)
    if not head:
        raise DataError(f"{file.path}: empty; {_expected(file)}")
    if file.packing is not None:
        if file.kind in ("parquet", "arrow", "sqlite"):
            raise DataError(f"{file.path}: a packed {file.kind} file is not read; unpack it first")
        if _signature(head)[0] != file.packing:
            raise DataError(f"{file.path}: ends in {file.packing} but is not packed so; mend its name or pack it again")
        with reading(file), unpacked(file.path) as stream:
            head = stream.read(HEAD_BYTES)
        if not head:
            raise DataError(f"{file.path}: empty once unpacked; {_expected(file)}")
    _check_signature(file, head)
    if file.kind not in ("parquet", "arrow", "sqlite"):
        _check_letters(file, head)


@contextmanager
def open_text(file: DataFile, newline: str | None = None) -> Iterator[TextIO]:
    """The letters of a text file, unpacked and decoded as they are read; a byte order mark is skipped.

    Raises:
        DataError: inside the `with` too, where the file cannot be unpacked or decoded.
    """
    try:
        with reading(file), unpacked(file.path) as raw, io.TextIOWrapper(raw, _codec(file), newline=newline) as text:
            yield text
    except UnicodeDecodeError as problem:
        raise _undecodable(file) from problem


@contextmanager
def reading(file: DataFile) -> Iterator[None]:
    """Turn the errors of reading and unpacking into ones with the name of the file."""
    try:
        yield
    except EOFError as problem:
        raise DataError(_cut_off(file)) from problem
    except OSError as problem:
        if "Truncated compressed stream" in str(problem):  # what Arrow says for Zstandard
            raise DataError(_cut_off(file)) from problem
        if problem.errno is None:  # what gzip says
            raise DataError(_unpackable(file, problem)) from problem
        said = problem.strerror or " ".join(str(problem).split())[:200]
        raise DataError(f"{file.path}: cannot be read: {said}; look at its permissions, or fetch it again") from problem
    except (zlib.error, lzma.LZMAError) as problem:
        raise DataError(_unpackable(file, problem)) from problem


def unpacked(path: Path) -> IO[bytes]:
    """Open a file for reading bytes, through its packing where the ending names one."""
    packing = path.suffix.lower()
    if packing == ".zst":
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    opened: IO[bytes] = _OPENERS.get(packing, open)(path, "rb")
    return opened


def _unpackable(file: DataFile, problem: Exception) -> str:
    return f"{file.path}: cannot be unpacked: {' '.join(str(problem).split())[:200]}; fetch or pack it again"


def _cut_off(file: DataFile) -> str:
    return f"{file.path}: ends in the middle of what is packed; it was cut off, so fetch or pack it again"


def _expected(file: DataFile) -> str:
    if file.kind in ("csv", "tsv"):
        return "a header line with the column names is expected"
    return "rows are expected"


def _signature(head: bytes) -> tuple[str, str]:
    for start, kind, said in _SIGNATURES:
        if head.startswith(start):
            return kind, said
    return "", ""


def _check_signature(file: DataFile, head: bytes) -> None:
    kind, said = _signature(head)
    if kind == file.kind or (not said and file.kind not in _BINARY):
        return
    if not said:
        raise DataError(
            f"{file.path}: is not {_BINARY[file.kind]}, by its first bytes; mend its ending or {file.key}.file_format"
        )
    if not kind:
        raise DataError(f"{file.path}: is {said}")
    if kind.startswith("."):
        raise DataError(f"{file.path}: is {said}; let its name end in {kind}")
    raise DataError(f"{file.path}: is {said}; let its name end in .{kind}, or set {file.key}.file_format: {kind}")


def _check_letters(file: DataFile, head: bytes) -> None:
    """Refuse text that a narrow encoding would read as letters and zeros, and web pages where rows should stand."""
    if file.kind != "text" and head.removeprefix(codecs.BOM_UTF8).lstrip().lower().startswith(_PAGE):
        raise DataError(f"{file.path}: is a web page, perhaps one that asks to sign in; fetch the file itself")
    if _codec(file).startswith(_WIDE):
        return
    wide = ""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        wide = "utf-32"
    elif head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        wide = "utf-16"
    elif b"\0" in head:
        pairs = max(len(head) // 2, 1)
        zeros = [head[start::2].count(0) / pairs for start in (0, 1)]
        if max(zeros) < 0.4:
            byte = head.index(0)
            line = head.count(b"\n", 0, byte) + 1
            raise DataError(
                f"{file.path}:{line}: byte {byte} is zero, which stands in no text; take it out, or name a text file"
            )
        wide = "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    if wide:
        raise DataError(f"{file.path}: is {wide.upper()} by its first bytes; set {file.key}.encoding: {wide}")


def _codec(file: DataFile) -> str:
    name = codecs.lookup(file.section.encoding).name
    return "utf-8-sig" if name == "utf-8" else name


def _undecodable(file: DataFile) -> DataError:
    """Find the first byte that is no letter; the error of a stream counts from somewhere in its midst.

    The file is read once more, since that error tells neither the line nor what came before.
    """
    # Not the codec that skips a byte order mark: what that one takes away it does not count.
    decoder = codecs.getincrementaldecoder(codecs.lookup(file.section.encoding).name)()
    line, passed = 1, 0
    with reading(file), unpacked(file.path) as stream:
        while True:
            chunk = stream.read(CHUNK_BYTES)
            state = decoder.getstate()
            begins = passed - len(state[0])
            try:
                line += decoder.decode(chunk, not chunk).count("\n")
            except UnicodeDecodeError as problem:
                byte = begins + problem.start
                decoder.setstate(state)
                return _no_letter(file, line + decoder.decode(chunk[: max(byte - passed, 0)]).count("\n"), byte)
            if not chunk:  # it can be decoded after all: somebody wrote to it meanwhile
                return DataError(f"{file.path}: changed while it was read; start again")
            passed += len(chunk)


def _no_letter(file: DataFile, line: int, byte: int) -> DataError:
    codec = codecs.lookup(file.section.encoding).name
    fix = f"set {file.key}.encoding (for example cp1252 or latin-1), or save the file as UTF-8"
    if codec != "utf-8":
        fix = f"set {file.key}.encoding to what the file was written in"
    return DataError(f"{file.path}:{line}: byte {byte} is not {codec.upper()}; {fix}")
