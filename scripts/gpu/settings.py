"""The device, the sizes and the figures of a proof: decided here for the scripts and for `tests/gpu`.

Nothing heavy is imported, so that the driver and skipped tests start at once.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCALE = "PEFTCLI_GPU_SCALE"
"""Environment variable: `full`, `tiny` (a GPU of 16 GB) or `rehearsal` (the same steps on a CPU)."""
FIGURES = "PEFTCLI_GPU_FIGURES"
"""Environment variable: the JSON file that a step writes its figures to."""


@dataclass(frozen=True)
class Scale:
    """How large things are.

    Attributes:
        name: `full`, `tiny` or `rehearsal`.
        large, small: shapes of `workbench`, for speed.
        memory: shape of the memory forecast.
        long_rows: lengths of the rows of the attention kernels, tokens.
        layers: of the random models whose rows are compared alone and in one batch.
        hidden: width of those models.
        vocabularies, head_tokens, head_width: of the loss head.
        steps: of each training that is compared.
        warm, timed: steps before and within a measurement.
        decode_rows, decode_tokens: rows at once, and new tokens of each.
    """

    name: str
    large: str
    small: str
    memory: str
    long_rows: tuple[int, ...]
    layers: tuple[int, ...]
    hidden: int
    vocabularies: tuple[int, ...]
    head_tokens: int
    head_width: int
    steps: int
    warm: int
    timed: int
    decode_rows: tuple[int, ...]
    decode_tokens: int


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            *("full", "3b", "0.6b", "1b"),
            *((4096, 2000, 7), (16, 32), 1024, (32_000, 152_064), 8192, 4096),
            *(30, 3, 8, (16, 32, 64, 128), 32),
        ),
        Scale(
            *("tiny", "0.6b", "small", "small"),
            *((1024, 500, 7), (16, 32), 1024, (32_000,), 2048, 2048),
            *(30, 2, 5, (16, 64), 16),
        ),
        Scale(
            *("rehearsal", "rehearsal", "rehearsal", "rehearsal"),
            *((40, 20, 7), (2,), 64, (300,), 96, 32),
            *(12, 1, 2, (2, 4), 4),
        ),
    )
}


def scale() -> Scale:
    """The scale of this process.

    Raises:
        KeyError: the variable names none.
    """
    return SCALES[os.environ.get(SCALE, "full")]


def rehearsing() -> bool:
    """Whether this is the rehearsal on a CPU, whatever GPUs are here."""
    return scale().name == "rehearsal"


def device_name() -> str:
    """`cuda`, or `cpu` in a rehearsal."""
    return "cpu" if rehearsing() else "cuda"


def record(figures: Mapping[str, Any]) -> None:
    """Add figures to those of this step; each call writes the file, so that a step that is stopped keeps its own.

    Args:
        figures: by name; where a name has figures already, the new ones are put beside them.
    """
    place = os.environ.get(FIGURES)
    if place is None:
        return
    file = Path(place)
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, value in figures.items():
        both = isinstance(value, Mapping) and isinstance(known.get(name), dict)
        known[name] = {**known[name], **value} if both else value
    part = file.with_suffix(".part")
    part.write_text(json.dumps(known, indent=1), encoding="utf-8")
    os.replace(part, file)
