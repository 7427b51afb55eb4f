"""Checks the tensors of an adapter file: complete, without extra tensors, of the right shape, and finite."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from peftcli.errors import MachineError

WEIGHTS, PICKLED, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"


def check_adapter_files(folder: Path, stated: Mapping[str, str] | None) -> None:
    """Refuse an adapter folder with missing or damaged files.

    Args:
        folder: of the adapter.
        stated: what `read_tensors` returned when the adapter was written; None if it was not recorded.

    Raises:
        MachineError: a file is missing, pickled or damaged, or a tensor differs from what was written.
    """
    if not (folder / CONFIG).is_file():
        raise MachineError(f"{folder}: no {CONFIG}, so not an adapter; pass an adapter folder")
    try:
        json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as problem:
        raise MachineError(f"{folder / CONFIG}: damaged, not JSON ({problem}); restore the file") from problem
    file = folder / WEIGHTS
    if not file.is_file() and (folder / PICKLED).is_file():
        raise MachineError(
            f"{folder / PICKLED}: a pickle, which can run code when loaded; adapters are only read from safetensors; "
            "convert it"
        )
    if not file.is_file():
        raise MachineError(f"{folder}: no {WEIGHTS}, so not an adapter; pass an adapter folder")
    found = read_tensors(file)
    if stated is not None and found != stated:
        raise MachineError(f"{file}: {_difference(found, stated)}; restore the file")
    _refuse_not_finite(file)


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that determine an adapter's results, by name."""
    found = {}
    earlier = sorted(str(path.parent.relative_to(folder)) for path in folder.glob(f"*/*/{CONFIG}"))
    for name in (f"{place}/{file}" for place in (".", *earlier) for file in (WEIGHTS, CONFIG)):
        with (folder / name).open("rb") as stream:
            found[name.removeprefix("./")] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def refuse_changed(folder: Path, stated: Mapping[str, str]) -> None:
    """Refuse an adapter if any bit of its files changed since it was written.

    Args:
        stated: what `hash_files` returned then; empty if it was not recorded.

    Raises:
        MachineError: a file differs.
    """
    try:
        now = hash_files(folder)
    except FileNotFoundError as problem:
        raise MachineError(f"{problem.filename}: missing; restore it, or train again") from problem
    changed = [name for name, digest in stated.items() if now.get(name) != digest]
    if changed:
        raise MachineError(f"{folder}: {' and '.join(changed)} changed after training; restore it, or train again")


def read_tensors(file: Path) -> dict[str, str]:
    """Dtype and shape of each tensor of a safetensors file, such as `F32 8x128`.

    Raises:
        MachineError: the file is truncated or not safetensors.
    """
    try:
        with safe_open(str(file), framework="pt") as stream:
            slices = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118
            return {
                name: f"{one.get_dtype()} {'x'.join(map(str, one.get_shape())) or 'scalar'}"
                for name, one in sorted(slices.items())
            }
    except (OSError, SafetensorError) as problem:
        raise MachineError(
            f"{file}: truncated or damaged, {file.stat().st_size} bytes ({_line(problem)}); restore the file"
        ) from problem


def refuse_unfit(folder: Path, missing: list[str], unexpected: list[str]) -> None:
    """Refuse an adapter that only partly fits the base.

    Args:
        missing: names of weights that the base needs with this configuration and the file lacks.
        unexpected: names of weights that are only in the file.

    Raises:
        MachineError: there are any.
    """
    for names, verb in ((missing, "lacks"), (unexpected, "contains")):
        if names:
            why = f"which this base with this {CONFIG} {'needs' if verb == 'lacks' else 'does not have'}"
            raise MachineError(f"{folder / WEIGHTS}: {verb} {_listed(names)}, {why}; restore the files of the adapter")


def explain_unfit(folder: Path, problem: Exception) -> str:
    """One line on why PEFT could not load an adapter onto a base.

    Args:
        problem: the exception.
    """
    if isinstance(problem, KeyError):
        return f"{folder / WEIGHTS}: lacks {problem.args[0]}; restore the files of the adapter"
    lines = [line.strip() for line in str(problem).splitlines()]
    first = next((line for line in lines if line.startswith("size mismatch")), _line(problem))
    return f"{folder}: the adapter does not fit this base: {first}; use the base that it was trained on"


def _difference(found: Mapping[str, str], stated: Mapping[str, str]) -> str:
    lacking = [name for name in stated if name not in found]
    extra = [name for name in found if name not in stated]
    if lacking:
        return f"lacks {_listed(lacking)} of the {len(stated)} tensors that training wrote"
    if extra:
        return f"contains {_listed(extra)}, which training did not write"
    name = next(name for name in stated if found[name] != stated[name])
    return f"{name} is {found[name]}, but training wrote {stated[name]}"


def _refuse_not_finite(file: Path) -> None:
    with safe_open(str(file), framework="pt") as stream:
        for name in stream.keys():  # noqa: SIM118
            tensor: Any = stream.get_tensor(name)
            wide = tensor.float() if tensor.itemsize == 1 else tensor  # 8-bit floats have no isfinite
            if not torch.isfinite(wide).all():
                raise MachineError(f"{file}: {name} has values that are not finite; restore the file, or train again")


def _listed(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:300]
