"""Whole trainings of the same rows at equal loss: peftcli, padding-free and padded, and SFTTrainer, plain and tuned.

    python scripts/bench/batching.py --regime skewed [--tool flat --tool trl ...] [--steps 40] [--rounds 3]
        [--shape auto] [--bits 16] [--seeds 0] [--peer unsloth=PYTHON ...] [--output FILE]

Tools take turns, each in a separate process on all cores. The results of a regime replace those of the same regime
in the file. The package `peftcli.bench` does the measuring; `peftcli bench` is the short form.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from peers import peer_runner, peer_tools
from workloads import REGIMES, TOOLS, TUNED, limit_of, train_other_seeds, tuned_for

from peftcli.bench.compare import judge, make_model, take_turns
from peftcli.bench.measure import measure
from peftcli.bench.result import PLAIN, Measurements, regime_result, result_object
from peftcli.bench.workload import REFERENCE, SHAPES, Job
from peftcli.cli.bench import bench_table, nameless
from peftcli.cli.console import Shown, console
from peftcli.doctor.check import private_words

RESULTS = Path(__file__).parent / "results"


def compare(words: argparse.Namespace, regime: str) -> dict[str, Any]:
    """One regime with all tools; the object that is saved."""
    pythons = dict(peer.partition("=")[::2] for peer in words.peer)
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        made = make_model(words.shape, words.bits, workspace)
        shape, on_gpu = SHAPES[made["shape"]], made["device"] == "cuda"
        lengths = REGIMES[regime].stretched(shape.stretch)
        job = Job(shape, words.bits, lengths, words.steps, workspace, Path(made["folder"]), made["device"])
        tools = [tuned_for(TOOLS[name], on_gpu=on_gpu, flash=made["flash"]) for name in words.tool or TOOLS]
        tools += peer_tools(pythons)
        rows = job.write()
        run = peer_runner(pythons, measure)
        measured = take_turns(tools, job, words.rounds, Shown(console(sys.stderr)), run=run)
        result = regime_result(job, rows, tools, with_limit(measured, job, words.seeds), made)
        found: dict[str, Any] = nameless(result_object(made, words.bits, [result], (PLAIN, TUNED)), private_words())
    console(sys.stdout).print(bench_table(found["regimes"][0]))
    print(f"\n{found['verdict']}")
    return found


def with_limit(measured: Measurements, job: Job, seeds: int) -> Measurements:
    """The same measurements, with the limit of the gate from the spread of the reference over other seeds."""
    others = train_other_seeds(job, seeds)
    if not others or REFERENCE not in measured.held_out:
        return measured
    return replace(measured, limit=limit_of([*judge(job, others).values(), measured.held_out[REFERENCE]]))


def keep(found: dict[str, Any], path: Path) -> None:
    """Write the results, and keep those of other regimes in the file for the same model."""
    before = json.loads(path.read_text()) if path.is_file() else {}
    new = {result["regime"] for result in found["regimes"]}
    same = all(before.get(name) == found[name] for name in ("shape", "bits"))
    others = [result for result in before.get("regimes", []) if result["regime"] not in new] if same else []
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**found, "regimes": [*others, *found["regimes"]]}, indent=1) + "\n")


def main() -> None:
    """Measure the requested regimes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regime", choices=list(REGIMES), action="append")
    parser.add_argument("--tool", choices=list(TOOLS), action="append")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=0, help="runs of the reference in other orders, for the gate")
    parser.add_argument("--shape", default="auto")
    parser.add_argument("--bits", type=int, choices=(4, 16), default=16)
    parser.add_argument("--output", type=Path)
    words = parser.parse_args()
    for regime in words.regime or REGIMES:
        found = compare(words, regime)
        kind = found["environment"]["device"]["kind"]
        keep(found, words.output or RESULTS / f"batching-{kind}.json")


if __name__ == "__main__":
    main()
