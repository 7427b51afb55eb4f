"""Paths as people write them, and the modes of files that others may read."""

import os
import re
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def expand_path(text: str) -> str:
    """A path with `~` and environment variables filled in; the name of an existing file is taken as it is.

    >>> expand_path("data/a.csv")
    'data/a.csv'

    Raises:
        ValueError: a variable is not set; the text says which.
    """
    if os.path.lexists(text):
        return text
    unset = next((name for found in _VARIABLE.finditer(text) if (name := found[1] or found[2]) not in os.environ), None)
    if unset is not None:
        raise ValueError(f"the environment variable {unset} is not set")
    return os.path.expanduser(os.path.expandvars(text))


def new_file_mode() -> int:
    """The mode that the umask asks for."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def apply_umask(folder: Path) -> None:
    """Give a folder and all that is in it the mode that the umask asks for.

    Temporary folders and the files of safetensors are private to the user otherwise, beside neighbours that are not.
    """
    mode = new_file_mode()
    executable = (mode & 0o444) >> 2  # who may read a folder may also enter it
    folder.chmod(mode | executable)
    for path in folder.rglob("*"):
        path.chmod(mode | executable if path.is_dir() else mode)
