"""The products job with peftcli and with a plain SFTTrainer script, in one run: seconds, quality, drift of the merge.

python scripts/bench/products.py MODEL PRODUCTS.CSV DEPARTMENTS.CSV [--out results/products-cpu.json]

MODEL is a small causal language model; the data are two CSV files joined on department_id. Each is run in 4 bit and
without quantization. Ratios of one run are what counts: machines are noisy.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent


def recipe_of(model: str, products: str, departments: str, *, quantized: bool) -> dict[str, Any]:
    """The recipe of the job: LoRA r 16 on all linear layers, 600 steps of 32 rows."""
    recipe: dict[str, Any] = {
        "name": "products",
        "model": {"name": model},
        "quantization": {"bits": 4},
        "adapter": {"r": 16, "alpha": 32, "target_modules": "all-linear"},
        "dataset": {
            "path": products,
            "join": [{"path": departments, "on": "department_id"}],
            "prompt": "{product_name} ->:",
            "completion": " {department}",
            "split": {"test_size": 0.2, "seed": 42},
            "max_length": 512,
        },
        "trainer": {
            "per_device_train_batch_size": 32,
            "max_steps": 600,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "linear",
        },
    }
    if not quantized:
        del recipe["quantization"]
    return recipe


def run_ours(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Train and merge with peftcli; what `metrics.json` and `merge.json` say."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = folder / "run"
    base = [sys.executable, "-m", "peftcli"]
    subprocess.run([*base, "train", str(folder / "recipe.yaml"), "--output-dir", str(run)], check=True)
    subprocess.run([*base, "merge", str(run)], check=True)
    metrics = json.loads((run / "metrics.json").read_text())
    return {
        "what": "peftcli" + ("" if "quantization" in recipe else ", no quantization"),
        "prepare_seconds": json.loads((run / "data.json").read_text())["prepare_seconds"],
        "train_seconds": metrics["train"]["seconds"],
        "tokens_per_second": metrics["train"]["tokens_per_second"],
        "base": metrics["base"],
        "adapter": metrics["adapter"],
        "merged": metrics["merged"],
        "merge": metrics["merge"],
        "data": metrics["data"],
        "environment": json.loads((run / "environment.json").read_text()) | {"command": None},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "products", "departments"):
        parser.add_argument(name)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    rows = []
    for quantized in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            recipe = recipe_of(words.model, words.products, words.departments, quantized=quantized)
            rows.append(run_ours(Path(folder), recipe))
        plain = [sys.executable, str(HERE / "plain_trl.py"), words.model, words.products, words.departments]
        done = subprocess.run([*plain, *([] if quantized else ["--no-4bit"])], check=True, stdout=subprocess.PIPE)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        ours, theirs = rows[-2], rows[-1]
        both = [row["prepare_seconds"] + row["train_seconds"] for row in (theirs, ours)]
        ours["seconds_of_plain_over_ours"] = round(both[0] / both[1], 2)
        shown = ("what", "prepare_seconds", "train_seconds", "seconds_of_plain_over_ours")
        print(json.dumps({name: ours[name] for name in shown}))
        print(json.dumps(theirs))
    if words.out is not None:
        words.out.write_text(json.dumps({"schema": 1, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
