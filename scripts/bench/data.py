"""Rows per second and peak memory of `peftcli data` and of plain `load_dataset` and `map`, for growing CSV files.

Run it with the Python of the environment: `python scripts/bench/data.py [ROWS ...]`. Each measurement is a process of
its own with an empty cache; the results go to scripts/bench/results/data-cpu.json. `peftcli` also looks for
duplicates, near duplicates, leaks, odd characters and personal data; the plain way only tokenizes, labels and splits.
"""

import importlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "scripts" / "bench" / "results" / "data-cpu.json"
MAX_LENGTH = 128
SAMPLE_SECONDS = 0.02


def write_rows(path: Path, rows: int) -> None:
    """A CSV with an id, a question of about nine words and an answer of three."""
    drawn = random.Random(0)
    words = sorted({word for word in (ROOT / "peftcli/assets/corpus.txt").read_text().split() if word.isalpha()})
    with path.open("w", encoding="utf-8") as file:
        file.write("id,question,answer\n")
        for number in range(rows):
            question = " ".join(drawn.choices(words, k=8))
            file.write(f"{number},{question} {number},{' '.join(drawn.choices(words, k=3))}\n")


def ours(path: Path, tokenizer_folder: Path) -> int:
    """Prepare the file as `peftcli data` does; returns the rows of both sides."""
    from transformers import AutoTokenizer

    from peftcli.data.prepare import prepare
    from peftcli.plan.plan import LossMask
    from peftcli.progress import Silent
    from peftcli.recipe.schema import DatasetSection

    section = DatasetSection.model_validate(
        {"path": str(path), "prompt": "{question} ->", "completion": " {answer}", "max_length": MAX_LENGTH}
    )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    data = prepare(section, tokenizer, LossMask(True, True, (), MAX_LENGTH), 42, Silent())
    return int(data.facts["train_rows"] + data.facts["test_rows"])


def plain(path: Path, tokenizer_folder: Path) -> int:
    """The same ids and labels with `load_dataset`, a batched `map` and `train_test_split`."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts = [f"{question} ->" for question in rows["question"]]
        wholes = [f"{p} {answer}{tokenizer.eos_token}" for p, answer in zip(prompts, rows["answer"], strict=True)]
        ids = tokenizer(wholes, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        starts = [len(prompt) for prompt in tokenizer(prompts)["input_ids"]]
        labels = [[-100] * start + row[start:] for start, row in zip(starts, ids, strict=True)]
        return {"input_ids": ids, "labels": labels}

    rows = datasets.load_dataset("csv", data_files=str(path), split="train")
    made = rows.map(encode, batched=True, remove_columns=rows.column_names)
    sides = made.train_test_split(0.2, seed=42)
    return int(sides["train"].num_rows + sides["test"].num_rows)


def measured(way: str, path: Path, tokenizer_folder: Path) -> None:
    """Print what one way took as JSON; the imports are made before the clock starts."""
    import datasets
    import transformers

    assert datasets and transformers  # half of what either way imports anyway
    if way == "ours":
        importlib.import_module("peftcli.data.prepare")
    before = status()["RssAnon"]
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            peak.append(max(peak.pop(), status()["RssAnon"]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    rows = (ours if way == "ours" else plain)(path, tokenizer_folder)
    seconds = time.perf_counter() - begun
    again = time.perf_counter()
    (ours if way == "ours" else plain)(path, tokenizer_folder)
    second = time.perf_counter() - again
    done.set()
    watcher.join()
    print(
        json.dumps(
            {
                "rows": rows,
                "seconds": round(seconds, 3),
                "rows_per_second": round(rows / seconds),
                "second_time_seconds": round(second, 3),
                "peak_anonymous_mib_above_start": round((peak[0] - before) / 1024, 1),
                "peak_resident_mib": round(status()["VmHWM"] / 1024, 1),
            }
        )
    )


def status() -> dict[str, int]:
    """KiB of this process by name, as the kernel states them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}


def main() -> None:
    """Measure each size both ways, one after the other."""
    sizes = [int(word) for word in sys.argv[1:]] or [10_000, 100_000, 1_000_000]
    sys.path.insert(0, str(ROOT))
    from peftcli.tiny.build import tiny_model

    folder = tiny_model("tiny:llama")
    results = []
    for rows in sizes:
        with tempfile.TemporaryDirectory() as workspace:
            path = Path(workspace) / "rows.csv"
            write_rows(path, rows)
            found = {"rows": rows, "file_bytes": path.stat().st_size}
            for way in ("ours", "plain"):
                environment = os.environ | {
                    "PEFTCLI_CACHE": f"{workspace}/cache",
                    "HF_DATASETS_CACHE": f"{workspace}/datasets",
                }
                words = [sys.executable, __file__, "--one", way, str(path), str(folder)]
                ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
                found[way] = json.loads(ended.stdout.splitlines()[-1])
            found["times_faster"] = round(found["plain"]["seconds"] / found["ours"]["seconds"], 2)
            results.append(found)
            print(json.dumps(found, indent=1))
    RESULT.write_text(
        json.dumps(
            {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "sizes": results}, indent=1
        )
        + "\n"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measured(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
