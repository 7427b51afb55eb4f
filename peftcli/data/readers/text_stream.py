"""Text files as character streams: decompressed and decoded, or rejected with a reason."""

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

from peftcli.data.readers.files import DataFile
from peftcli.errors import DataError

HEAD_BYTES = 4096
CHUNK_BYTES = 1 << 20

_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"PAR1", "parquet", "a Parquet file"),
    (b"ARROW1", "arrow", "an Arrow file"),
    (b"SQLite format 3\0", "sqlite", "an SQLite database"),
    (b"\x1f\x8b", ".gz", "compressed with gzip"),
    (b"BZh", ".bz2", "compressed with bzip2"),
    (b"\xfd7zXZ\0", ".xz", "compressed with xz"),
    (b"\x28\xb5\x2f\xfd", ".zst", "compressed with Zstandard"),
    (b"PK\x03\x04", "", "a spreadsheet or a zip archive; export it as CSV, or unpack it"),
    (b"%PDF", "", "a PDF document; save its text as a .txt file"),
    (b"version https://git-lfs", "", "a Git LFS pointer instead of the data; download them with git lfs pull"),
    (b"FEA1", "", "a Feather file of version 1; write it again as Parquet"),
)
_PAGE = (b"<!doctype html", b"<html")
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_BINARY = {"parquet": "a Parquet file", "sqlite": "an SQLite database"}
_WIDE = ("utf-16", "utf-32")


def check_head(file: DataFile) -> None:
    """Check the format of a file by its first bytes.

    Raises:
        DataError: it is empty, unreadable or has another format than its name or the recipe says.
    """
    with reading(file), file.path.open("rb") as raw:
        head = raw.read(HEAD_BYTES)
    if not head:
        raise DataError(f"{file.path}: empty; {_expected(file)}")
    if file.packing is not None:
        if file.kind in ("parquet", "arrow", "sqlite"):
            raise DataError(f"{file.path}: compressed {file.kind} files are not supported; decompress it first")
        if _signature(head)[0] != file.packing:
            raise DataError(
                f"{file.path}: has the extension {file.packing}, but is not compressed like this; fix its name or "
                "compress it again"
            )
        with reading(file), unpacked(file.path) as stream:
            head = stream.read(HEAD_BYTES)
        if not head:
            raise DataError(f"{file.path}: empty after decompression; {_expected(file)}")
    _check_signature(file, head)
    if file.kind not in ("parquet", "arrow", "sqlite"):
        _check_letters(file, head)


@contextmanager
def open_text(file: DataFile, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file for streaming, decompressed and decoded; a byte order mark is skipped.

    Raises:
        DataError: also inside the `with` block, if the file cannot be decompressed or decoded.
    """
    try:
        with reading(file), unpacked(file.path) as raw, io.TextIOWrapper(raw, _codec(file), newline=newline) as text:
            yield text
    except UnicodeDecodeError as problem:
        raise _undecodable(file) from problem


@contextmanager
def reading(file: DataFile) -> Iterator[None]:
    """Convert errors of reading and decompressing to errors with the name of the file."""
    try:
        yield
    except EOFError as problem:
        raise DataError(_truncated(file)) from problem
    except OSError as problem:
        if "Truncated compressed stream" in str(problem):  # Arrow's message for Zstandard
            raise DataError(_truncated(file)) from problem
        if problem.errno is None:  # errors of gzip
            raise DataError(_corrupt(file, problem)) from problem
        text = problem.strerror or " ".join(str(problem).split())[:200]
        raise DataError(
            f"{file.path}: cannot be read: {text}; check its permissions, or download it again"
        ) from problem
    except (zlib.error, lzma.LZMAError) as problem:
        raise DataError(_corrupt(file, problem)) from problem


def unpacked(path: Path) -> IO[bytes]:
    """Open a file for reading bytes, decompressed according to its extension."""
    packing = path.suffix.lower()
    if packing == ".zst":
        import pyarrow as pa  # only for these files, because `validate` reads text without it

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    opened: IO[bytes] = _OPENERS.get(packing, open)(path, "rb")
    return opened


def _corrupt(file: DataFile, problem: Exception) -> str:
    text = " ".join(str(problem).split())[:200]
    return f"{file.path}: cannot be decompressed: {text}; download or compress it again"


def _truncated(file: DataFile) -> str:
    return f"{file.path}: the compressed data are truncated; download or compress it again"


def _expected(file: DataFile) -> str:
    if file.kind in ("csv", "tsv"):
        return "add a header line with the column names"
    return "add rows"


def _signature(head: bytes) -> tuple[str, str]:
    for start, kind, description in _SIGNATURES:
        if head.startswith(start):
            return kind, description
    return "", ""


def _check_signature(file: DataFile, head: bytes) -> None:
    kind, description = _signature(head)
    if kind == file.kind or (not description and file.kind not in _BINARY):
        return
    if not description:
        raise DataError(
            f"{file.path}: its first bytes are not those of {_BINARY[file.kind]}; fix its extension or "
            f"{file.key}.file_format"
        )
    if not kind:
        raise DataError(f"{file.path}: is {description}")
    if kind.startswith("."):
        raise DataError(f"{file.path}: is {description}; add the extension {kind}")
    raise DataError(
        f"{file.path}: is {description}; change its extension to .{kind}, or set {file.key}.file_format: {kind}"
    )


def _check_letters(file: DataFile, head: bytes) -> None:
    """Reject UTF-16 and UTF-32 without the right encoding, binary files, and web pages."""
    if file.kind != "text" and head.removeprefix(codecs.BOM_UTF8).lstrip().lower().startswith(_PAGE):
        raise DataError(f"{file.path}: is a web page, possibly a login page; download the file itself")
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
            raise DataError(f"{file.path}:{line}: byte {byte} is NUL, which is not text; remove it, or use a text file")
        wide = "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    if wide:
        raise DataError(f"{file.path}: its first bytes are {wide.upper()}; set {file.key}.encoding: {wide}")


def _codec(file: DataFile) -> str:
    name = codecs.lookup(file.section.encoding).name
    return "utf-8-sig" if name == "utf-8" else name


def _undecodable(file: DataFile) -> DataError:
    """Find the first invalid byte and its line, by reading the file again.

    The error of the stream only has a position relative to a chunk.
    """
    # Not the codec that skips a byte order mark, because it does not count the skipped bytes.
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
                return _invalid_byte(file, line + decoder.decode(chunk[: max(byte - passed, 0)]).count("\n"), byte)
            if not chunk:  # it can be decoded now, so it was changed in the meantime
                return DataError(f"{file.path}: changed while it was being read; run the command again")
            passed += len(chunk)


def _invalid_byte(file: DataFile, line: int, byte: int) -> DataError:
    codec = codecs.lookup(file.section.encoding).name
    fix = f"set {file.key}.encoding (for example cp1252 or latin-1), or save the file as UTF-8"
    if codec != "utf-8":
        fix = f"set {file.key}.encoding to the encoding of the file"
    return DataError(f"{file.path}:{line}: byte {byte} is not {codec.upper()}; {fix}")
