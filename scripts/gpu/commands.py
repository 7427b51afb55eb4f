"""The main job as a user runs it: train, merge, generate and eval of the quickstart, each a command of its own.

python scripts/gpu/commands.py [--as-t4]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from settings import record, rehearsing

from peftcli.run_dir import RunDir, read_json

STEPS = 100
REHEARSED_STEPS = 12
MOST_ROWS = 64
"""Test rows that a rehearsal answers."""


def training_words(run: Path, *, as_t4: bool) -> list[str]:
    """The training, shorter than the recipe's, with gates for so short a run.

    Merged weights are rounded in the dtype of the base once more; in bfloat16 some tokens that are about as likely as
    the first one change places with it.
    """
    words = ["train", "quickstart", "--output-dir", str(run), "--set", "gates.exact_match=>= 0"]
    words += ["--set", "gates.merge_top1_agreement=>= 0.98"]
    steps = REHEARSED_STEPS if rehearsing() else STEPS
    words += ["--set", f"trainer.max_steps={steps}"]
    if rehearsing():
        words += ["--set", f"evaluation.rows={MOST_ROWS}", "--set", "dataset.max_train_samples=2000"]
        words += [] if as_t4 else ["--set", "model.dtype=bfloat16"]
    return words + (["--num-processes", "1"] if as_t4 else [])  # a process that is launched would not know


def run(name: str, words: Sequence[str], *, as_t4: bool) -> bool:
    """Run one command and record it; returns whether it ended well and, where JSON was asked for, wrote it."""
    start = [str(Path(__file__).with_name("as_t4.py"))] if as_t4 else ["-m", "peftcli"]
    begun = time.monotonic()
    ended = subprocess.run([sys.executable, *start, *words], capture_output=True, text=True)
    said = ended.stderr.strip().splitlines()[-3:]
    found: dict[str, Any] = {"exit_code": ended.returncode, "seconds": round(time.monotonic() - begun, 1)}
    record({name: found | ({"said": " / ".join(said)[:600]} if ended.returncode else {})})
    print(name, found, *(said if ended.returncode else ()), flush=True)
    return ended.returncode == 0 and ("--json" not in words or bool(json.loads(ended.stdout)))


def main() -> None:
    """Run the commands; the exit code is 1 where one failed, or the adapter learned nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as-t4", action="store_true", help="let torch say that its GPU is a T4")
    as_t4 = bool(parser.parse_args().as_t4)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run"
        if not run("train", training_words(place, as_t4=as_t4), as_t4=as_t4):
            sys.exit(1)
        done = [run("merge", ["merge", str(place)], as_t4=as_t4)]
        if not (as_t4 and rehearsing()):  # where it is the same as without
            done.append(run("generate", ["generate", str(place), "Oat Milk", "--json"], as_t4=as_t4))
            done.append(run("eval", ["eval", str(place), "--json"], as_t4=as_t4))
        metrics, facts = read_json(RunDir(place).metrics), read_json(RunDir(place).train)
    losses = [metrics[name]["loss"] for name in ("base", "adapter")]
    record(
        {
            "base_loss": losses[0],
            "adapter_loss": losses[1],
            "exact_match": metrics["adapter"]["exact_match"],
            "merge": metrics["merge"],
            "gates": metrics["gates"],
            "seconds": facts["seconds"],
            "tokens_per_second": facts["tokens_per_second"],
            "batching": facts["batching"],
            "optimizations": facts["levers"],
        }
    )
    sys.exit(0 if all(done) and losses[1] < losses[0] else 1)


if __name__ == "__main__":
    main()
