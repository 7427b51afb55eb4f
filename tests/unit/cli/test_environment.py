"""What torch's allocator and the threads of OpenMP are told before torch is imported."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftcli.cli import environment
from peftcli.cli.environment import ALLOCATOR_NAMES, set_variables


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with a GPU of NVIDIA, and no variable set."""
    monkeypatch.setattr(environment, "NVIDIA", (str(tmp_path),))
    for name in (*ALLOCATOR_NAMES, "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("2.8.0+cu128", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.9.1", "PYTORCH_ALLOC_CONF"),
        ("2.13.0+cpu", "PYTORCH_ALLOC_CONF"),
        ("3.0.0a0+git1", "PYTORCH_ALLOC_CONF"),
    ],
)
def test_the_allocator_gets_growing_segments_under_the_name_that_torch_reads(
    variables: None, monkeypatch: pytest.MonkeyPatch, version: str, name: str
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    set_variables()
    assert {key: os.environ.get(key) for key in ALLOCATOR_NAMES} == dict.fromkeys(ALLOCATOR_NAMES) | {
        name: "expandable_segments:True"
    }
    assert os.environ["GOMP_SPINCOUNT"] == "2000"


@pytest.mark.parametrize("name", ALLOCATOR_NAMES)
def test_what_the_user_tells_the_allocator_stays(variables: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128")
    set_variables()
    assert [os.environ.get(key) for key in ALLOCATOR_NAMES if key != name] == [None, None]
    assert os.environ[name] == "max_split_size_mb:128"


def test_without_a_gpu_the_allocator_is_left_alone(variables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "NVIDIA", ("/nowhere",))
    set_variables()
    assert not any(name in os.environ for name in ALLOCATOR_NAMES)


def test_a_command_sets_it_before_torch_is_imported(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from peftcli.cli import environment, main\n"
        f"environment.NVIDIA = ({str(tmp_path)!r},)\n"
        "code = main.main(['--version'])\n"
        "assert 'torch' not in sys.modules\n"
        "import os\n"
        "print(os.environ[environment.allocator_variable()])\n"
    )
    clean = {key: value for key, value in os.environ.items() if key not in ALLOCATOR_NAMES}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=clean)
    assert done.stdout.splitlines()[-1] == "expandable_segments:True", done.stderr
