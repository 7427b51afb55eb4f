"""What the container around this process allows it: memory and processor time, from its control groups."""

from collections.abc import Iterator
from pathlib import Path

import psutil

NO_LIMIT_BYTES = 2**60
"""Version 1 of control groups writes a number near 2**63 for no limit."""


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes of the machine's memory or, where that is less, of what the container allows.

    Args:
        root: where `proc` and `sys` lie.
    """
    limit, _ = memory_limit(root)
    total = int(psutil.virtual_memory().total)
    return total if limit is None else min(total, limit)


def memory_limit(root: Path) -> tuple[int | None, int]:
    """Bytes that the tightest control group around this process allows, and how many of those are used."""
    found = []
    for folder in _groups(root, "memory"):
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            allowed = _number(folder / limit)
            if allowed is not None and allowed < NO_LIMIT_BYTES:
                # Files that were read and not touched again are given up first, so they count as free.
                found.append((int(allowed), max(0, int(_number(folder / used) or 0) - _stat(folder, cache))))
    return min(found, default=(None, 0), key=lambda pair: pair[0] - pair[1])


def core_quota(root: Path) -> float | None:
    """Cores' worth of time that the tightest control group around this process allows."""
    found = []
    for folder in _groups(root, "cpu"):
        words = _text(folder / "cpu.max").split() or [
            _text(folder / "cpu.cfs_quota_us"),
            _text(folder / "cpu.cfs_period_us"),
        ]
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the control groups around this process, of both versions."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and controller not in names:
            continue
        top = root / "sys/fs/cgroup"
        tops = (top / controllers, top / controller) if controllers else (top, top / "unified")
        for base in {place for place in tops if place.is_dir()}:
            inner = base / path.lstrip("/")
            # In a container the path is often that of the machine outside, and only the top can be seen.
            yield from (place for place in (inner, *inner.parents) if place.is_dir() and place.is_relative_to(base))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:  # another version of control groups, or hidden from us
        return ""


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdecimal() else None


def _stat(folder: Path, name: str) -> int:
    for line in _text(folder / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdecimal():
            return int(value)
    return 0
