"""A training of one step, from the start of the process to its exit, compared with `trl sft`.

    python scripts/bench/startup.py [--rows 2000] [--rounds 3]

Three ways take turns on the same rows and model: `peftcli train`, the command `trl sft`, and TRL's script without its
launcher. peftcli also plans, checks the rows, measures the adapter and writes its report; each begins with empty
caches of prepared rows. The results go to scripts/bench/results/startup-cpu.json.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from peftcli.bench.compare import make_model
from peftcli.bench.measure import run_process
from peftcli.bench.workload import ALPHA, FLAT, RANK, SHAPES, SKEWED, TOOLS, Job, write_spec

RESULT = Path(__file__).parent / "results" / "startup-cpu.json"
WAYS = ("peftcli train", "trl sft", "trl/scripts/sft.py")


def commands(job: Job) -> dict[str, list[str]]:
    """The three command lines; the arguments are those of one and the same training."""
    recipe = job.recipe(TOOLS[FLAT].settings)
    del recipe["adapter"]["init_from"]
    recipe["trainer"]["max_steps"] = 1
    path = write_spec(job.folder / "recipe.yaml", recipe)
    values = {
        "model_name_or_path": str(job.model),
        "dataset_name": str(job.folder / "data"),
        "output_dir": str(job.folder / "run-trl"),
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "max_length": job.regime.max_length,
        **recipe["trainer"],
    }
    theirs = [
        "--use_peft",
        "--use_cpu",
        *(str(word) for name, value in values.items() for word in (f"--{name}", value)),
    ]
    home = Path(sys.executable).parent
    ours = [str(home / "peftcli"), "train", str(path), "--output-dir", str(job.folder / "run-ours")]
    return dict(
        zip(
            WAYS,
            (ours, [str(home / "trl"), "sft", *theirs], [sys.executable, "-m", "trl.scripts.sft", *theirs]),
            strict=True,
        )
    )


def once(words: list[str], workspace: Path) -> dict[str, Any]:
    """One process with empty caches: its seconds and the peak of its memory."""
    for name in ("run-ours", "run-trl", "cache", "datasets"):
        shutil.rmtree(workspace / name, ignore_errors=True)
    apart = {
        "PEFTCLI_CACHE": str(workspace / "cache"),
        "HF_DATASETS_CACHE": str(workspace / "datasets"),
        "HF_HUB_OFFLINE": "1",
    }
    ended = run_process(words, workspace / "output.log", more=apart)
    if ended.error is not None:
        raise SystemExit(f"{words[0]}: {ended.error}")
    return {"seconds": ended.seconds, "peak_bytes": ended.peak_bytes}


def main() -> None:
    """Measure both ways, interleaved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    words = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        model = Path(make_model("tiny", 16, workspace)["folder"])
        job = Job(SHAPES["tiny"], 16, SKEWED, -(-words.rows // SKEWED.rows), workspace, model, "cpu")
        job.write()
        (workspace / "data").mkdir()
        shutil.copy(workspace / "rows.jsonl", workspace / "data" / "train.jsonl")
        for number in range(words.rounds):
            for way, command in commands(job).items():
                runs[way].append(once(command, workspace))
                print(f"round {number + 1}  {way:<20} {runs[way][-1]['seconds']:.2f} s", flush=True)
    found: dict[str, Any] = {"schema": 1, "rows": words.rows, "cores": os.cpu_count(), "rounds": words.rounds}
    for way, made in runs.items():
        seconds = [run["seconds"] for run in made]
        found[way] = {
            "median": round(statistics.median(seconds), 2),
            "min": round(min(seconds), 2),
            "max": round(max(seconds), 2),
            "peak_mib": round(max(run["peak_bytes"] for run in made) / 2**20),
        }
    found["ours_of_theirs"] = {way: round(found[WAYS[0]]["median"] / found[way]["median"], 3) for way in WAYS[1:]}
    print(json.dumps(found["ours_of_theirs"]))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
