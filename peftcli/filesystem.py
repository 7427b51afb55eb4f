"""Expansion of paths, and permissions of files that other users may read."""

import os
import re
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def expand_path(text: str) -> str:
    """A path with `~` and environment variables expanded.

    The path of an existing file is returned unchanged, unless it starts with `~`: the trainer would expand that again,
    so a folder of this name is written `./~`.

    >>> expand_path("data/a.csv")
    'data/a.csv'

    Raises:
        ValueError: a variable is not set; the message has its name.
    """
    if os.path.lexists(text) and not text.startswith("~"):
        return text
    unset = next((name for found in _VARIABLE.finditer(text) if (name := found[1] or found[2]) not in os.environ), None)
    if unset is not None:
        raise ValueError(f"the environment variable {unset} is not set")
    return os.path.expanduser(os.path.expandvars(text))


def new_file_mode() -> int:
    """The mode of a new file under the umask."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def apply_umask(folder: Path) -> None:
    """Set the mode of a folder and of everything in it to what the umask specifies.

    Temporary folders and files written by safetensors are private to the user otherwise.
    """
    mode = new_file_mode()
    executable = (mode & 0o444) >> 2  # who may read a folder may also enter it
    folder.chmod(mode | executable)
    for path in folder.rglob("*"):
        path.chmod(mode | executable if path.is_dir() else mode)
