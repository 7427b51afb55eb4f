"""A short comparison with the recorded one: `python scripts/bench/smoke.py [--record]`, less than a minute.

Ratios of two tools that take turns hold on a busy or another machine where seconds do not. A ratio under
`LEAST_SHARE` of the recorded one ends with exit code 1; CI shows that and goes on.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from peftcli.bench.compare import make_model, take_turns
from peftcli.bench.result import regime_result
from peftcli.bench.workload import SHAPES, SKEWED, TOOLS, Job
from peftcli.progress import Silent

RECORD = Path(__file__).parent / "results" / "smoke-cpu.json"
STEPS = 12
LEAST_SHARE = 0.8
"""Of the recorded ratio; a single round of twelve steps is no finer."""
COMPARED = ("padded", "trl_fp32")


def measured() -> dict[str, Any]:
    """peftcli, peftcli with padded batches and plain SFTTrainer, one round of chat lengths."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        made = make_model("tiny", 16, workspace)
        job = Job(SHAPES["tiny"], 16, SKEWED, STEPS, workspace, Path(made["folder"]), "cpu")
        tools = [TOOLS[name] for name in ("flat", *COMPARED)]
        return regime_result(job, job.write(), tools, take_turns(tools, job, 1, Silent()), made)


def main() -> None:
    """Print each ratio with the recorded one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="save the ratios for later comparisons")
    words = parser.parse_args()
    found = measured()
    for tool in found["tools"].values():
        if "error" in tool:
            raise SystemExit(f"{tool['title']} did not run: {tool['error']}")
    now = {name: ratio["times_as_fast"] for name, ratio in found["ratios"].items()}
    if words.record:
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps({"schema": 1, "steps": STEPS, "times_as_fast": now}, indent=1) + "\n")
    before = json.loads(RECORD.read_text())["times_as_fast"] if RECORD.is_file() else {}
    slower = False
    print(f"times as fast as, over {STEPS} steps:  now  recorded")
    for name in COMPARED:
        known = before.get(name)
        low = name not in now or (known is not None and now[name] < LEAST_SHARE * known)
        slower |= low
        shown = "other loss" if name not in now else f"{now[name]:.2f}"
        recorded = "-" if known is None else f"{known:.2f}"
        print(f"  {TOOLS[name].title:<34} {shown}  {recorded}{'  lower' if low else ''}")
    sys.exit(slower)


if __name__ == "__main__":
    main()
