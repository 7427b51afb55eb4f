"""The light commands import nothing heavy."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HEAVY = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "pyarrow",
    "numpy",
    "rapidfuzz",
)
RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
PROBE = """
import sys
from peftcli.cli.main import main
code = main(sys.argv[1:])
print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
raise SystemExit(code)
"""


@pytest.mark.parametrize("words", [["--help"], ["train", "-h"], ["validate", str(RECIPE)], ["--version", "--verbose"]])
def test_a_light_command_imports_nothing_heavy(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(heavy=HEAVY), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [([], False), (["--set", "trainer.optim=adamw_8bit"], True), (["--set", "quantization.bits=4"], True)],
    ids=["whole", "8-bit optimizer", "nf4"],
)
def test_a_training_imports_bitsandbytes_only_where_the_recipe_has_a_use_for_it(
    write_recipe: Callable[..., Path], tmp_path: Path, words: list[str], wanted: bool
) -> None:
    recipe = write_recipe(quantization=None, trainer={"max_steps": 1})
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(heavy=("bitsandbytes",)), "train", str(recipe), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().splitlines()[-1] == ("['bitsandbytes']" if wanted else "[]")
