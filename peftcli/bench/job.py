"""One measurement as files: what a child process is to do, and the recipe of peftcli's own part."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.bench.regimes import HELD_OUT_ROWS, Regime, Row, draw_rows, write_rows
from peftcli.bench.shapes import BenchShape
from peftcli.bench.tools import Tool

RANK, ALPHA = 16, 32
SEED = 42
HELD_OUT_SEED = 1


@dataclass(frozen=True)
class Job:
    """What every tool is given alike.

    Attributes:
        shape: of the model.
        bits: of its weights, 4 or 16; a CPU trains those that are not quantized in float32.
        regime: of the rows.
        steps: of the optimizer.
        place: folder for rows and runs.
        model: folder of the base, with the first adapter in `adapter/`.
        device: `cpu` or `cuda`.
        seed: of the order of the rows.
    """

    shape: BenchShape
    bits: int
    regime: Regime
    steps: int
    place: Path
    model: Path
    device: str
    seed: int = SEED

    @property
    def adapter(self) -> Path:
        """The adapter that every tool starts from."""
        return self.model / "adapter"

    def write(self) -> list[Row]:
        """Write the rows to train and those held out; returns the first."""
        vocabulary = int(self.shape.widths["vocab_size"])
        rows = draw_rows(self.regime, self.steps * self.regime.rows, vocabulary, seed=0)
        write_rows(rows, self.place, "rows")
        write_rows(draw_rows(self.regime, HELD_OUT_ROWS, vocabulary, HELD_OUT_SEED), self.place, "held-out")
        return rows

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the trainer that all share."""
        return {
            "max_steps": self.steps,
            "per_device_train_batch_size": self.regime.rows,
            "learning_rate": self.shape.learning_rate,
            "lr_scheduler_type": "linear",
            "logging_steps": 1,
        }

    def recipe(self, performance: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe of peftcli; as JSON it is YAML too."""
        recipe: dict[str, Any] = {
            "name": "bench",
            "seed": self.seed,
            "model": {"name": str(self.model)},
            "adapter": {"r": RANK, "alpha": ALPHA, "target_modules": "all-linear", "init_from": str(self.adapter)},
            "dataset": {
                "path": str(self.place / "rows.jsonl"),
                "columns": {"prompt": "prompt", "completion": "completion"},
                "test": {"path": str(self.place / "held-out.jsonl")},
                "max_length": self.regime.max_length,
                "limits": {"max_leaked": 1},
            },
            "trainer": self.arguments,
            "performance": dict(performance),
            "evaluation": {"baseline": False, "samples": 0, "rows": 1, "max_new_tokens": 1},
        }
        if self.bits == 4:
            recipe["quantization"] = {"bits": 4}
        return recipe

    def sft(self, tool: Tool, run: Path) -> dict[str, Any]:
        """What the child that runs SFTTrainer is told."""
        settings = dict(tool.settings)
        model = {name: settings.pop(name) for name in ("dtype", "attn_implementation") if name in settings}
        length = None if settings.get("padding_free") else self.regime.max_length
        shared = {**self.arguments, "seed": self.seed, "max_length": length, "use_cpu": self.device == "cpu"}
        return {
            "model": str(self.model),
            "model_settings": model,
            "bits": self.bits,
            "adapter": str(self.adapter),
            "rows": str(self.place / "rows-ids.jsonl"),
            "run": str(run),
            "arguments": {**shared, **settings},
        }


def write_spec(path: Path, spec: Mapping[str, Any]) -> Path:
    """Write what a child is told, and return the path."""
    path.write_text(json.dumps(dict(spec)), encoding="utf-8")
    return path
