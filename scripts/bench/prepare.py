"""Chats from the file to token ids and labels, with peftcli and with SFTTrainer: seconds, and whether they are equal.

    python scripts/bench/prepare.py [--rows 20000] [--rounds 3] [--turns FILE.jsonl]

The loss is on the assistant's turns. Each way runs in a separate process, with an empty cache and its imports made
before the clock starts; peftcli also looks for duplicates, leaks, odd characters and personal data. Then
`peftcli train` is run twice for one step on the same chats: the second run finds them in the cache. The results go to
scripts/bench/results/prepare-cpu.json.
"""

import argparse
import hashlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from peftcli.bench.measure import run_process
from peftcli.bench.workload import write_spec
from peftcli.run_dir import RunDir

RESULT = Path(__file__).parent / "results" / "prepare-cpu.json"
SHIPPED = Path(__file__).parents[2] / "peftcli" / "assets" / "chats.jsonl"
MAX_LENGTH = 512
TEST_ROWS = 50
IMPORTS = "import peftcli.cli.train, peftcli.train.run, peftcli.train.deadline"


def write_chats(path: Path, count: int, turns: Path, seed: int) -> None:
    """Chats of 1 to 6 exchanges, each exchange drawn from those of a file of chats; a number makes chats distinct."""
    drawn, pairs = random.Random(seed), []
    for line in turns.read_text(encoding="utf-8").splitlines():
        messages = [turn for turn in json.loads(line)["messages"] if turn["role"] in ("user", "assistant")]
        pairs += [pair for pair in zip(messages[::2], messages[1::2], strict=False) if pair[0]["role"] == "user"]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            chosen = [dict(turn) for pair in drawn.choices(pairs, k=drawn.randint(1, 6)) for turn in pair]
            chosen[0]["content"] = f"{seed}-{number}: {chosen[0]['content']}"
            file.write(json.dumps({"messages": chosen}) + "\n")


def ours(workspace: Path, model: Path) -> Callable[[], Iterable[tuple[Any, Any]]]:
    """Prepare the chats as `peftcli data` does."""
    from transformers import AutoTokenizer

    from peftcli.data.prepare import prepare
    from peftcli.plan.plan import LossMask
    from peftcli.progress import Silent
    from peftcli.recipe.schema import DatasetSection

    section = DatasetSection.model_validate(
        {
            "path": str(workspace / "chats.jsonl"),
            "test": {"path": str(workspace / "test.jsonl")},
            "max_length": MAX_LENGTH,
            "too_long": "truncate",
        }
    )
    rule = LossMask(False, True, ("assistant_only_loss",), MAX_LENGTH)

    def work() -> Iterable[tuple[Any, Any]]:
        side = prepare(section, AutoTokenizer.from_pretrained(model), rule, 42, Silent()).train
        return _rows_of(side)

    return work


def _rows_of(side: Any) -> Iterable[tuple[Any, Any]]:
    """The rows as they are read, as those of SFTTrainer's data set are."""
    table = side.store.examples.select(["input_ids", "labels"]).take(side.rows)
    for batch in table.to_batches():
        for row in batch.to_pylist():
            yield row["input_ids"], row["labels"]


def theirs(workspace: Path, model: Path) -> Callable[[], Iterable[tuple[Any, Any]]]:
    """Prepare them as SFTTrainer does when it is made; the model is loaded before the clock starts."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    base = AutoModelForCausalLM.from_pretrained(model)
    arguments = SFTConfig(
        output_dir=str(workspace / "unused"),
        use_cpu=True,
        assistant_only_loss=True,
        max_length=MAX_LENGTH,
        report_to=[],
        disable_tqdm=True,
    )

    def work() -> Iterable[tuple[Any, Any]]:
        rows = load_dataset("json", data_files=str(workspace / "chats.jsonl"), split="train")
        tokenizer = AutoTokenizer.from_pretrained(model)
        made = SFTTrainer(model=base, args=arguments, train_dataset=rows, processing_class=tokenizer).train_dataset
        return ((row["input_ids"], row["labels"]) for row in made)

    return work


def one(way: str, workspace: Path, model: Path, result: Path) -> None:
    """Run one way in this process and write what it took, with a digest of the ids and labels in their order."""
    work = {"ours": ours, "theirs": theirs}[way](workspace, model)
    begun = time.perf_counter()
    made = work()
    seconds = time.perf_counter() - begun
    digest, rows, tokens, trained = hashlib.sha256(), 0, 0, 0
    for ids, labels in made:
        digest.update(json.dumps([ids, labels]).encode())
        rows, tokens, trained = rows + 1, tokens + len(ids), trained + sum(label != -100 for label in labels)
    counts = {"seconds": seconds, "rows": rows, "tokens": tokens, "trained_tokens": trained}
    result.write_text(json.dumps({**counts, "sha256": digest.hexdigest()}))


def second_time(workspace: Path, model: Path) -> dict[str, float]:
    """Seconds to the end of the first step with empty caches and then again, and of only the imports."""
    recipe = {
        "model": {"name": str(model)},
        "adapter": {"r": 16},
        "dataset": {"path": "chats.jsonl", "test": {"path": "test.jsonl"}, "max_length": MAX_LENGTH},
        "trainer": {"assistant_only_loss": True, "max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 4},
        "evaluation": {"baseline": False, "samples": 0, "rows": 1, "max_new_tokens": 1},
    }
    path, seconds = write_spec(workspace / "recipe.yaml", recipe), {}
    apart = {"PEFTCLI_CACHE": str(workspace / "cache-train")}
    for name in ("first", "second"):
        run, stepped = RunDir(workspace / f"run-{name}"), []

        def look(run: RunDir = run, stepped: list[float] = stepped) -> None:
            if not stepped and run.log.is_file() and run.log.stat().st_size:
                stepped.append(time.monotonic())

        begun = time.monotonic()
        words = [sys.executable, "-m", "peftcli", "train", str(path), "--output-dir", str(run.path)]
        ended = run_process(words, workspace / "output.log", look, apart)
        if ended.error is not None:
            raise SystemExit(f"peftcli train: {ended.error}")
        seconds[f"{name}_step_seconds"] = round(stepped[0] - begun, 2)
    imports = [run_process([sys.executable, "-c", IMPORTS], workspace / "output.log").seconds for _ in range(3)]
    seconds["imports_seconds"] = round(statistics.median(imports), 2)
    seconds["second_beyond_imports_seconds"] = round(seconds["second_step_seconds"] - seconds["imports_seconds"], 2)
    return seconds


def main() -> None:
    """Measure both ways, interleaved, then the second run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=Path, default=SHIPPED, help="a file of chats that exchanges are drawn from")
    words = parser.parse_args()
    if words.one:
        way, *paths = words.one
        return one(way, *(Path(path) for path in paths))
    from peftcli.tiny.build import tiny_model

    model = tiny_model("tiny:llama")
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        write_chats(workspace / "chats.jsonl", words.rows, words.turns, seed=0)
        write_chats(workspace / "test.jsonl", TEST_ROWS, words.turns, seed=1)
        for number in range(words.rounds):
            for way, made in runs.items():
                made.append(_measured(way, workspace, model, number))
                print(f"round {number + 1}  {way:<7} {made[-1]['seconds']:.2f} s", flush=True)
        found = _summary(runs, words.rows) | second_time(workspace, model)
    print(json.dumps(found, indent=1))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


def _measured(way: str, workspace: Path, model: Path, number: int) -> dict[str, Any]:
    result = workspace / "one.json"
    words = [sys.executable, __file__, "--one", way, str(workspace), str(model), str(result)]
    apart = {"PEFTCLI_CACHE": f"{workspace}/cache-{number}", "HF_DATASETS_CACHE": f"{workspace}/datasets-{number}"}
    ended = run_process(words, workspace / "output.log", more=apart)
    if ended.error is not None:
        raise SystemExit(f"{way}: {ended.error}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def _summary(runs: dict[str, list[dict[str, Any]]], rows: int) -> dict[str, Any]:
    seconds = {way: [run["seconds"] for run in made] for way, made in runs.items()}
    medians = {way: round(statistics.median(taken), 3) for way, taken in seconds.items()}
    digests = {run["sha256"] for made in runs.values() for run in made}
    return {
        "schema": 1,
        "rows": rows,
        "cores": os.cpu_count(),
        "tokens": {way: made[0]["tokens"] for way, made in runs.items()},
        "equal_ids_and_labels": len(digests) == 1,
        "seconds": {
            way: {"median": medians[way], "min": min(taken), "max": max(taken)} for way, taken in seconds.items()
        },
        "times_as_fast": round(medians["theirs"] / medians["ours"], 2) if len(digests) == 1 else None,
    }


if __name__ == "__main__":
    main()
