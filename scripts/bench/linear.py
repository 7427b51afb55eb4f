"""Whether a step costs in proportion to its tokens: padding-free batches with 10^3 to 10^5 tokens a step.

    python scripts/bench/linear.py [--tokens 1000 --tokens 10000 ...] [--steps 4] [--rounds 1]

Prints the median seconds of a step for each size, and the exponent of the line through them on logarithmic axes: 1 is
in proportion. The results go to scripts/bench/results/linear-cpu.json.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peftcli.bench.compare import make_model
from peftcli.bench.measure import Measurement, measure
from peftcli.bench.workload import FLAT, SHAPES, SKEWED, TOOLS, Job, draw_rows

RESULT = Path(__file__).parent / "results" / "linear-cpu.json"
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the least-squares line through the logarithms."""
    across = [math.log(tokens) for tokens, _ in points]
    up = [math.log(seconds) for _, seconds in points]
    return statistics.linear_regression(across, up).slope


def mean_tokens() -> float:
    """Tokens of a row of chat length."""
    rows = draw_rows(SKEWED, 2000, 2048, seed=0)
    return statistics.mean(len(row.ids) for row in rows)


def step_seconds(tokens: int, steps: int, rounds: int, workspace: Path, model: Path) -> tuple[float, float]:
    """Tokens of a step and the median of its seconds; the first step counts in neither."""
    regime = replace(SKEWED, rows=max(1, round(tokens / mean_tokens())))
    job = Job(SHAPES["tiny"], 16, regime, steps, workspace, model, "cpu")
    real = sum(len(row.ids) for row in job.write()) / steps
    seconds: list[float] = []
    for _ in range(rounds):
        ran = measure(TOOLS[FLAT], job)
        if not isinstance(ran, Measurement):
            raise SystemExit(f"{tokens} tokens a step: {ran}")
        seconds.extend(ran.step_seconds)
    return real, statistics.median(seconds)


def main() -> None:
    """Measure each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, action="append")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    words = parser.parse_args()
    points = []
    with tempfile.TemporaryDirectory() as workspace:
        model = Path(make_model("tiny", 16, Path(workspace))["folder"])
        for tokens in words.tokens or SIZES:
            real, seconds = step_seconds(tokens, words.steps, words.rounds, Path(workspace), model)
            points.append((real, seconds))
            print(f"{real:>9,.0f} tokens a step  {seconds:8.3f} s  {seconds / real * 1e6:6.1f} us a token", flush=True)
    found = {
        "schema": 1,
        "steps": words.steps,
        "points": [{"tokens": round(tokens), "seconds": round(seconds, 4)} for tokens, seconds in points],
        "exponent": round(exponent(points), 4) if len(points) > 1 else None,
    }
    print(f"exponent {found['exponent']}")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
