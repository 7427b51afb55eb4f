"""What batching.py compares beyond `peftcli bench`: more lengths of rows, more settings, and a limit over seeds."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peftcli.bench.compare import keep_adapter
from peftcli.bench.measure import Measurement, measure
from peftcli.bench.result import LARGEST_SHARE
from peftcli.bench.workload import REFERENCE, SEED, SKEWED, Job, Regime, Tool
from peftcli.bench.workload import TOOLS as QUICK_TOOLS

TAIL, TAIL_EVERY = 8, 100
"""Each hundredth row of `long_tail` is eight times as long."""
SPREADS = 3
"""The limit of the gate is this many times the spread of the reference over several seeds."""


@dataclass(frozen=True)
class LongTail(Regime):
    """A regime in which a few rows are much longer."""

    def draw_length(self, drawn: random.Random, number: int) -> int:
        tokens = super().draw_length(drawn, number)
        # In the middle of each hundred, so that a short run has one too.
        return tokens * TAIL if number % TAIL_EVERY == TAIL_EVERY // 2 else tokens

    @property
    def max_length(self) -> int:
        return self.longest * TAIL


@dataclass(frozen=True)
class Short(Regime):
    """A regime of very short rows, which stay as short for larger models."""

    def stretched(self, times: int) -> Regime:
        return self


REGIMES = {
    regime.name: regime
    for regime in (
        SKEWED,
        Regime("uniform", 128, 0.0, 128, 128),
        LongTail("long_tail", 98, 0.72, 33, 418),
        Short("short", 6, 0.3, 4, 12, rows=32),
    )
}
TUNED = ("trl_tuned", "trl_tuned_fp32")
_FLAT_512 = {"batching": "padding_free", "tokens_per_micro_batch": 512}
# TRL's documentation, "Speeding Up Training" and "Reducing Memory Usage": no padding, and no checkpointing where memory
# allows; packing would change the steps.
_TUNED = {"padding_free": True, "activation_checkpointing": False}
TOOLS = {
    tool.name: tool
    for tool in (
        QUICK_TOOLS["flat"],
        Tool("flat_512", "peftcli (512 tokens)", True, _FLAT_512),
        QUICK_TOOLS["padded"],
        QUICK_TOOLS["trl"],
        QUICK_TOOLS["trl_fp32"],
        Tool("trl_tuned", "SFTTrainer (tuned)", False, _TUNED),
        Tool("trl_tuned_fp32", "SFTTrainer (tuned, float32)", False, {**_TUNED, "bf16": False}),
    )
}


def tuned_for(tool: Tool, *, on_gpu: bool, flash: bool) -> Tool:
    """SFTTrainer tuned for a GPU: weights in 16 bit, and flash attention where its package is installed."""
    if tool.name != "trl_tuned" or not on_gpu:
        return tool
    more = {"dtype": "bfloat16"} | ({"attn_implementation": "flash_attention_2"} if flash else {})
    return replace(tool, settings={**tool.settings, **more})


def limit_of(held_out: Sequence[float]) -> float:
    """The limit of the gate, from held-out losses of the reference over at least two seeds.

    >>> limit_of([6.0, 6.006, 6.003])
    0.003
    """
    spread = (max(held_out) - min(held_out)) / min(held_out)
    return round(min(LARGEST_SHARE, SPREADS * spread), 9)


def train_other_seeds(job: Job, seeds: int) -> dict[str, Path]:
    """Adapters of the reference, each trained on the rows in another order."""
    folders = {}
    for seed in range(SEED + 1, SEED + 1 + seeds):
        found = measure(QUICK_TOOLS[REFERENCE], replace(job, seed=seed))
        if isinstance(found, Measurement):
            folders[f"seed-{seed}"] = keep_adapter(found, job.folder / f"adapter-seed-{seed}").adapter
    return folders
