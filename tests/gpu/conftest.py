"""Where the tests of a GPU run, in one place; and their figures, for `scripts/gpu/prove.sh`.

Without a CUDA device they are skipped. With PEFTCLI_GPU_SCALE=rehearsal they run on a CPU at tiny shapes, where a
substitute stands for each kernel: that proves the tests, not the kernels.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; deterministic products need it
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "gpu"))

import settings

WIDEST = "float32"
"""16-bit dtypes of the rehearsal: a CPU trains neither float16, nor bfloat16 as a GPU does."""


@dataclass(frozen=True)
class Gpu:
    """What the tests run on.

    Attributes:
        name: `cuda`, or `cpu` in a rehearsal.
        scale: sizes.
        native_bf16: the GPU computes bfloat16 itself.
    """

    name: str
    scale: settings.Scale
    native_bf16: bool

    @property
    def rehearsal(self) -> bool:
        """There is no GPU: kernels are substitutes and nothing is measured."""
        return self.name == "cpu"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """16-bit dtypes that are native here."""
        return ("bfloat16", "float16") if self.native_bf16 or self.rehearsal else ("float16",)

    @property
    def trained_dtype(self) -> str:
        """What `model.dtype: auto` becomes here."""
        if self.rehearsal:
            return WIDEST
        return "bfloat16" if self.native_bf16 else "float16"


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    """The device of all tests here, or a skip with its reason."""
    import torch

    if settings.rehearsing():
        return Gpu("cpu", settings.scale(), native_bf16=False)
    if not torch.cuda.is_available():
        pytest.skip(f"no CUDA device is here; {settings.SCALE}=rehearsal runs these tests on a CPU at tiny shapes")
    return Gpu("cuda", settings.scale(), torch.cuda.is_bf16_supported(including_emulation=False))


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Mapping[str, Any]], None]:
    """Takes the figures of a test; they are kept where `prove.sh` runs the tests."""

    def keep(figures: Mapping[str, Any]) -> None:
        settings.record({request.node.name: dict(figures)})

    return keep


@pytest.fixture
def t4(gpu: Gpu) -> Callable[[bool], Any]:
    """A context in which torch says that it is of a T4; nothing in a rehearsal, and nothing where False is given."""
    from as_t4 import as_t4

    return lambda wanted: as_t4() if wanted and not gpu.rehearsal else nullcontext()


@pytest.fixture
def kernels(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The attention kernels of this GPU; in a rehearsal substitutes, and a CPU that says it is of sm_80."""
    from peftcli.model import varlen_attention

    if gpu.rehearsal:
        from gpu.substitutes import substitute_kernels

        substitute_kernels(monkeypatch)
    varlen_attention._chosen.cache_clear()
    varlen_attention.rejected.clear()
    yield
    varlen_attention._chosen.cache_clear()
    varlen_attention.rejected.clear()


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Deterministic algorithms alone, for one test."""
    import torch

    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep how each test ended, and why, beside its figures."""
    if report.when != "call" and report.passed:
        return
    name, said = report.nodeid.rpartition("::")[2], ""
    if report.failed:
        said = str(getattr(report.longrepr, "reprcrash", report.longrepr)).splitlines()[0][-300:]
    elif report.skipped and isinstance(report.longrepr, tuple):
        said = str(report.longrepr[2])[:300]
    settings.record({f"{name}: outcome": {"outcome": report.outcome, "said": said}})
