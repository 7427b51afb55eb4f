"""Atomic checkpoints: staged, listed with their hashes, renamed, and verified before use."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.filesystem import apply_umask
from peftcli.run_dir import read_json, write_json

MANIFEST = "manifest.json"
STAGING = ".staging"
NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state", "adapter_model.safetensors")
"""Prefixes of the files without which a resume would silently reset some state."""


@dataclass(frozen=True)
class FoundCheckpoint:
    """The newest valid checkpoint, and newer ones that are damaged, each with the reason."""

    path: Path | None
    step: int
    damaged: list[tuple[str, str]]


def seal(
    folder: Path, step: int, counters: Mapping[str, float], stamp: Mapping[str, Any], log: str | None = None
) -> None:
    """Write the manifest of a staged checkpoint and flush all its files to disk.

    Args:
        counters: counts of the run up to this step, for the session that resumes.
        stamp: the fingerprint of the run, which that session compares.
        log: `log_mark` of the run's log, which that session compares too.
    """
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
        files[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "sha256": digest}
    facts = {"schema": 1, "step": step, "counters": dict(counters), "stamp": dict(stamp), "files": files, "log": log}
    write_json(folder / MANIFEST, facts | {"sha256": _own_hash(facts)})
    with (folder / MANIFEST).open("rb") as stream:
        os.fsync(stream.fileno())
    _sync_folder(folder)


def _own_hash(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def promote(staged: Path, final: Path) -> None:
    """Rename a sealed checkpoint to its final name, atomically."""
    apply_umask(staged)
    if final.exists():
        _remove(final)
    os.rename(staged, final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used; None if it is complete."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST} is missing"
    try:
        facts = read_json(manifest)
        stated = facts.pop("sha256")
        files = dict(facts["files"])
    except (ValueError, KeyError, TypeError, AttributeError):  # truncated, other JSON, or not text
        return f"{MANIFEST} cannot be read"
    if stated != _own_hash(facts):
        return f"{MANIFEST} was changed"
    for name in NEEDED:
        if not any(listed.startswith(name) for listed in files):
            return f"{name} is not listed"
    for name, facts in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {facts['bytes']}"
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != facts["sha256"]:
                return f"the hash of {name} differs"
    return None


def newest_valid(checkpoints: Path) -> FoundCheckpoint:
    """Find the newest complete checkpoint; newer damaged ones are renamed to `*.bad` and reported."""
    damaged: list[tuple[str, str]] = []
    for step, folder in reversed(list_checkpoints(checkpoints)):
        reason = damage(folder)
        if reason is None:
            return FoundCheckpoint(folder, step, damaged)
        damaged.append((folder.name, reason))
        aside = folder.with_name(folder.name + ".bad")
        if aside.exists():
            _remove(aside)
        os.rename(folder, aside)
    return FoundCheckpoint(None, 0, damaged)


def list_checkpoints(checkpoints: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run by step, ascending."""
    if not checkpoints.is_dir():
        return []
    found = []
    for path in checkpoints.iterdir():
        name = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if name and path.is_dir():
            found.append((int(name[1]), path))
    return sorted(found)


def rotate(checkpoints: Path, keep: int, best: str | None) -> None:
    """Remove the oldest checkpoints beyond `keep`, but keep at least two and the best one."""
    for _, folder in list_checkpoints(checkpoints)[: -max(keep, 2)]:
        if best is None or Path(best).name != folder.name:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; if it was moved to another disk and linked, only the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def clear_staging(checkpoints: Path) -> None:
    """Remove incomplete files of a killed process."""
    shutil.rmtree(checkpoints / STAGING, ignore_errors=True)
