"""The driver of `prove.sh`: steps in processes of their own, each with a limit of time and a JSON file of figures.

A step that fails or hangs does not stop the others. The table comes last; the exit code is 0 only where all steps
passed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from settings import FIGURES, SCALE

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TOTAL_SECONDS = {"a": 590, "b": 200}
"""Of each part on a large GPU."""
FACTORS = {"full": 1.0, "tiny": 3.0, "rehearsal": 2.5}
"""By which all limits of time grow; a rehearsal computes little, and starts as many processes on fewer cores."""
SUMMING_UP_SECONDS = 3
KILLED_AFTER_SECONDS = 5
LEAST_SECONDS = 5
"""Less than this is left: a step does not begin."""
TAIL = 3000
"""Characters of a step's output that are kept."""
WIDEST = 11_500
"""Characters of the table: some places that run it keep only the last 12,000 of the output."""
MODEL_BYTES = 24 * 2**30
"""Room for the model that part b writes, and for its runs."""
NO_TESTS = 5
"""Exit code of pytest where nothing was run."""


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: of the step and of its file.
        words: after the interpreter.
        seconds: it may take on a large GPU.
    """

    name: str
    words: tuple[str, ...]
    seconds: int

    @property
    def tests(self) -> bool:
        """Whether pytest runs it."""
        return "pytest" in self.words


def script(name: str, file: str, seconds: int, *words: str) -> Step:
    return Step(name, (str(HERE / file), *words), seconds)


def tests(name: str, seconds: int) -> Step:
    file = str(ROOT / "tests" / "gpu" / f"test_{name}.py")
    return Step(name, ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-m", "gpu", file), seconds)


def steps_of(part: str, scale: str, out: Path) -> list[Step]:
    """The steps of a part, in the order of their use where the time is over before the end."""
    if part == "a":
        return [
            script("machine", "machine.py", 40),
            tests("kernels", 60),
            tests("apart", 60),
            tests("train", 90),
            tests("memory", 70),
            tests("resume", 60),
            tests("head", 45),
            script("commands", "commands.py", 75),
            script("commands-as-t4", "commands.py", 75, "--as-t4"),
            script("optimizations", "optimizations.py", 200, "--seconds", str(round(150 * FACTORS[scale]))),
            script("profile", "profiling.py", 60),
            script("decode", "decoding.py", 45),
        ]
    shape = {"full": "3b", "tiny": "0.6b", "rehearsal": "tiny"}[scale]
    rehearsal = scale == "rehearsal"
    steps, tuned = ("3", "trl_tuned_fp32") if rehearsal else ("25", "trl_tuned")
    shared = ("--shape", shape, "--regime", "skewed", "--steps", steps, "--rounds", "1", "--output", str(out))
    beside = str(ROOT / "scripts" / "bench" / "batching.py")
    padded = () if rehearsal else ("--tool", "padded")
    of_16 = (beside, *shared, "--tool", "flat", *padded, "--tool", tuned)
    of_4 = (beside, *shared, "--bits", "4", "--tool", "flat", "--tool", tuned)
    return [Step("batching-16-bit", of_16, 110), Step("batching-4-bit", of_4, 85)]


class Proof:
    """Runs steps one after the other and keeps what each came to."""

    def __init__(self, words: argparse.Namespace, place: Path) -> None:
        """
        Args:
            place: temporary folder for caches and logs.
        """
        self.scale = "rehearsal" if words.rehearse else "tiny" if words.tiny else "full"
        self.out: Path = words.out
        self._collect: Path | None = words.collect
        self._place = place
        self._site: Path | None = None
        self.results: list[dict[str, Any]] = []
        self._begun = time.monotonic()

    def install(self, wheels: Path) -> None:
        """Put wheels into a folder of this run, without a package index."""
        site = self._place / "site"
        words = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
        files = [str(file) for file in sorted(wheels.glob("*.whl"))]
        self._site = site
        step = Step("install", (*words, "--target", str(site), *files), 60)
        self.run(step, time.monotonic() + step.seconds * FACTORS[self.scale])

    def run(self, step: Step, deadline: float) -> None:
        """Run one step, or say why not, and write its file."""
        limit = min(step.seconds * FACTORS[self.scale], deadline - time.monotonic())
        if limit < LEAST_SECONDS:
            self._keep(step, "skipped", 0.0, {}, "the time of this part is over")
            return
        file, log = self._place / f"{step.name}.json", self._place / f"{step.name}.log"
        begun = time.monotonic()
        code = run_within([sys.executable, *step.words], log, limit, self._environment(file))
        seconds = time.monotonic() - begun
        figures = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        outcomes = [value["outcome"] for name, value in figures.items() if name.endswith(": outcome")]
        status = "timeout" if code is None else "failed" if code else "ok"
        if step.tests and (code == NO_TESTS or (code == 0 and "passed" not in outcomes)):
            status = "skipped"
        said = log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
        self._keep(step, status, seconds, figures, said, exit_code=code, limit_seconds=round(limit, 1))

    def lacks_gpu(self) -> bool:
        """Whether the last step has found that there is no GPU to prove anything on."""
        known = self.results[-1]["figures"].get("environment") if self.results else None
        return self.scale != "rehearsal" and known is not None and known["device"]["kind"] != "cuda"

    def _environment(self, figures: Path) -> dict[str, str]:
        paths = [str(path) for path in (ROOT, self._site) if path is not None]
        # Several processes share the cores of a CPU; threads that wait for each other would take most of the time.
        threads = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "2000"} if self.scale == "rehearsal" else {}
        return {
            **threads,
            **os.environ,
            SCALE: self.scale,
            FIGURES: str(figures),
            "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PEFTCLI_CACHE": str(self._place / "cache"),
        }

    def _keep(
        self, step: Step, status: str, seconds: float, figures: Mapping[str, Any], said: str, **more: Any
    ) -> None:
        number = len(self.results) + 1
        result = {"schema": 1, "number": number, "step": step.name, "scale": self.scale, "status": status}
        result |= {"seconds": round(seconds, 1), **more, "figures": dict(figures), "said": said}
        result = self._without_names(result)
        self.results.append(result)
        write(self.out / f"{number:02d}-{step.name}.json", result)
        if self._collect is not None:
            write(self._collect, {"schema": 1, "scale": self.scale, "steps": self.results})
        print(f"{number:02d} {step.name}: {status}, {seconds:.0f} s", flush=True)

    def _without_names(self, result: dict[str, Any]) -> dict[str, Any]:
        """The same without folders, and without names of users and hosts, so that it can be sent in."""
        if self._site is not None and str(self._site) not in sys.path:
            sys.path.insert(0, str(self._site))
        try:
            from peftcli.cli.bench import nameless
            from peftcli.doctor.check import private_words
        except ImportError as problem:  # on a machine that lacks a package; the first step says so
            return {**result, "said": str(problem), "figures": {}}
        found: dict[str, Any] = nameless(result, private_words())
        return found

    def table(self) -> str:
        """All steps, what failed in them, and the optimizations, within `WIDEST` characters."""
        seconds = time.monotonic() - self._begun
        lines = [f"{'':2} {'step':18} {'status':8} {'seconds':>8}  what"]
        for result in self.results:
            row = f"{result['number']:02d} {result['step']:18} {result['status']:8} {result['seconds']:8.1f}"
            lines.append(f"{row}  {summary(result)}"[:150])
        lines.append(f"{'':2} {'all':18} {'':8} {seconds:8.1f}")
        lines += [line for result in self.results if result["status"] in ("failed", "timeout") for line in why(result)]
        lines += [line for result in self.results for line in details(result)]
        return "\n".join(lines)[:WIDEST]


def run_within(words: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str]) -> int | None:
    """The exit code of a process, None where it was ended with all its children because its time was over."""
    with log.open("wb") as sink:
        child = subprocess.Popen(
            words, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, env=dict(environment), start_new_session=True
        )
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                child.wait(KILLED_AFTER_SECONDS)
            return None
        finally:
            end_group(child)


def end_group(child: "subprocess.Popen[bytes]") -> None:
    """End what a process has left running, as a DataLoader's workers."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    child.wait()


def summary(result: Mapping[str, Any]) -> str:
    """What a step came to, in a few words."""
    figures = result["figures"]
    outcomes = [value["outcome"] for name, value in figures.items() if name.endswith(": outcome")]
    if outcomes:
        counted = {kind: outcomes.count(kind) for kind in ("passed", "failed", "skipped")}
        return ", ".join(f"{number} {kind}" for kind, number in counted.items() if number)
    if "environment" in figures:
        device, packages = figures["environment"]["device"], figures["environment"]["packages"]
        return f"{device['name']}, torch {packages['torch']}, CUDA {figures['cuda']}"
    if "adapter_loss" in figures:
        merged = (figures.get("merge") or {}).get("top1_agreement")
        return f"loss {figures['base_loss']:.3f} -> {figures['adapter_loss']:.3f}, merge agrees on {merged}"
    if result["status"] == "skipped":
        return str(result["said"])
    return ""


def why(result: Mapping[str, Any]) -> list[str]:
    """The failed tests of a step, or the end of what it wrote."""
    figures = result["figures"]
    failed = {name: one for name, one in figures.items() if name.endswith(": outcome") and one["outcome"] == "failed"}
    errors = {name: one for name, one in figures.items() if isinstance(one, dict) and "error" in one}
    lines = [f"  {name.removesuffix(': outcome')}: {one['said']}"[:400] for name, one in failed.items()]
    lines += [f"  {name}: {one['error']}"[:400] for name, one in errors.items()]
    end = result["said"].strip().splitlines()[-4:]
    return ["", f"{result['step']}:", *(lines[:12] or [f"  {line[:200]}" for line in end])]


def details(result: Mapping[str, Any]) -> list[str]:
    """A line for each variant of the optimizations, each profiled model and each batch size."""
    shown = []
    for name, one in result["figures"].items():
        if result["step"] == "optimizations" and isinstance(one, dict):
            shown.append(f"  {name:52} {variant_line(one)}")
        if result["step"] == "profile" and isinstance(one, dict):
            parts = {key: value for key, value in one.items() if key != "largest"}
            shown.append(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in parts.items()))
            shown += [f"    {kernel['share']:7.1%} {kernel['name'][:70]}" for kernel in one["largest"][:6]]
        if result["step"] == "decode" and isinstance(one, dict):
            shown.append(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in one.items()))
    return ["", f"{result['step']}:", *shown] if shown else []


def variant_line(one: Mapping[str, Any]) -> str:
    """The figures of one variant; one of other losses has no speed."""
    for key in ("skipped", "error"):
        if key in one:
            return f"{key}: {one[key]}"[:90]
    if one.get("equal_loss") is False:
        return f"other losses, by {one['loss_difference']}"
    mfu = "" if one["mfu"] is None else f" MFU {one['mfu']:.1%}"
    times = f" {one['time_over_a']:5.2f} of A's time" if "time_over_a" in one else ""
    rates = f"{one['step_milliseconds']:9.1f} ms {one['tokens_per_second']:10,.0f} tokens/s"
    return f"{rates} {one['peak_bytes'] / 2**30:6.1f} GiB{mfu}{times}"


def write(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, file)


def fastest_folder() -> Path | None:
    """The folder in memory where it has room for a model of a few billion weights, else the default one."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free >= MODEL_BYTES else None


def arguments() -> argparse.Namespace:
    """The words of the command line, checked."""
    parser = argparse.ArgumentParser(prog="prove.sh", description="Prove peftcli on a GPU, in one command.")
    parser.add_argument("part", nargs="?", choices=("a", "b"))
    parser.add_argument(
        "--tiny", action="store_true", help="for a GPU of 16 GB; limits of time are three times as long"
    )
    parser.add_argument("--rehearse", action="store_true", help="the same steps on a CPU at tiny shapes, both parts")
    parser.add_argument("--wheels", type=Path, help="folder of pack.sh, which is installed first")
    parser.add_argument("--out", type=Path, help="folder of the JSON files; a new temporary one when left out")
    parser.add_argument("--collect", type=Path, help="one file with the JSON of all steps so far")
    parser.add_argument("--only", action="append", metavar="STEP", help="run this step alone; may be repeated")
    words = parser.parse_args()
    if words.part is None and not words.rehearse:
        parser.error("name a part, a or b, or --rehearse")
    if words.tiny and words.rehearse:
        parser.error("--tiny and --rehearse are two scales; choose one")
    if words.wheels is not None and not any(words.wheels.glob("*.whl")):
        parser.error(f"--wheels {words.wheels}: no wheel is there; scripts/gpu/pack.sh makes them")
    words.out = words.out or Path(tempfile.mkdtemp(prefix="peftcli-proof-"))
    words.out.mkdir(parents=True, exist_ok=True)
    return words


def main() -> int:
    """Run the steps that are asked for; returns the exit code."""
    words = arguments()
    with tempfile.TemporaryDirectory(prefix="peftcli-proof-work-", dir=fastest_folder()) as folder:
        proof = Proof(words, Path(folder))
        if words.wheels is not None:
            proof.install(words.wheels)
        parts = [words.part] if words.part else ["a", "b"]
        found = [(part, step) for part in parts for step in steps_of(part, proof.scale, Path(folder) / "batching.json")]
        unknown = set(words.only or ()) - {step.name for _, step in found}
        if unknown:
            sys.exit(f"error: --only {', '.join(sorted(unknown))}: the steps are {', '.join(s.name for _, s in found)}")
        total = sum(TOTAL_SECONDS[part] for part in parts) * FACTORS[proof.scale]
        deadline = time.monotonic() + total - SUMMING_UP_SECONDS
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            for _, step in found:
                if not words.only or step.name in words.only:
                    proof.run(step, deadline)
                if proof.lacks_gpu():
                    break
        finally:  # also where whoever started this ends it
            print(f"\n{proof.table()}\n\nfigures: {words.out}", flush=True)
    return 0 if all(result["status"] == "ok" for result in proof.results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
