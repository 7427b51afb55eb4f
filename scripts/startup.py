"""Print the seconds of the light commands and of bare Python: the best of several runs."""

import subprocess
import sys
import time
from pathlib import Path

RUNS = 7
RECIPE = str(Path(__file__).parent.parent / "recipes" / "quickstart.yaml")
COMMANDS = {
    "bare Python": ["-c", "pass"],
    "peftcli --help": ["-m", "peftcli", "--help"],
    "peftcli validate": ["-m", "peftcli", "validate", RECIPE],
    "import torch": ["-c", "import torch"],
}


def best_seconds(words: list[str]) -> float:
    """The shortest wall time of several runs, in seconds."""
    times = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        times.append(time.perf_counter() - begun)
    return min(times)


if __name__ == "__main__":
    for name, words in COMMANDS.items():
        print(f"{name:<18} {best_seconds(words):.3f} s")
