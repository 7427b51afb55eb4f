"""The light commands import nothing heavy."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "pyarrow", "numpy")
RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
PROBE = """
import sys
from peftcli.cli.app import main
code = main(sys.argv[1:])
print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
raise SystemExit(code)
"""


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["validate", str(RECIPE)]])
def test_a_light_command_imports_nothing_heavy(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(heavy=HEAVY), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr.strip().splitlines()[-1] == "[]"
