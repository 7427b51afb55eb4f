"""The terminal kept for what we say: what the libraries write goes to a log file."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO


@dataclass(frozen=True)
class Streams:
    """Where we write while the libraries are kept quiet: for results, and for people."""

    out: TextIO
    err: TextIO


@contextmanager
def quiet(log: Path | None) -> Iterator[Streams]:
    """Send file descriptors 1 and 2 to a log file, and give streams that still reach the terminal.

    Descriptors, not `sys.stderr`: compiled libraries and child processes write there too. An error that passes
    through restores them first, so that its message reaches the terminal.

    Args:
        log: file that is appended to; None keeps nothing once the context is left.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with (
        os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace") as out,
        os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace") as err,
        log.open("ab") if log is not None else tempfile.TemporaryFile() as sink,
    ):
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        try:
            yield Streams(out, err)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(saved, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
