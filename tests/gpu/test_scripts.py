"""The driver and the packing of `scripts/gpu`: nothing here needs a GPU."""

import csv
import io
import json
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cut_wheel
import optimizations
import profiling
import prove
import psutil
import pytest
import settings
import torch
from as_t4 import as_t4

from peftcli.doctor.gpu import auto_dtype
from peftcli.model.hardware import probe_machine
from peftcli.model.padding_free import repeats_heads

SLEEPER = (
    "import subprocess, sys, time; "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    "print('child', child.pid, flush=True); time.sleep(60)"
)
RECORDER = "import os, pathlib; pathlib.Path(os.environ['PEFTCLI_GPU_FIGURES']).write_text('{\"speed\": 3}', 'utf-8'); "


@pytest.fixture
def proof(tmp_path: Path) -> prove.Proof:
    out, place = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    place.mkdir()
    return prove.Proof(Namespace(rehearse=True, tiny=False, out=out, collect=tmp_path / "all.json"), place)


def run(proof: prove.Proof, name: str, code: str, seconds: float = 60) -> dict[str, Any]:
    step = prove.Step(name, ("-c", code), 100)
    proof.run(step, prove.time.monotonic() + seconds)
    number = len(proof.results)
    found: dict[str, Any] = json.loads((proof.out / f"{number:02d}-{name}.json").read_text())
    return found


def test_each_step_is_written_at_once_and_none_stops_the_others(proof: prove.Proof, tmp_path: Path) -> None:
    failed = run(proof, "breaks", RECORDER + "raise SystemExit('error: no such kernel')")
    assert failed["status"] == "failed" and failed["exit_code"] == 1
    assert failed["figures"] == {"speed": 3} and "no such kernel" in failed["said"]
    assert run(proof, "works", RECORDER)["status"] == "ok"
    assert run(proof, "late", RECORDER, seconds=1)["status"] == "skipped"
    assert [step["step"] for step in json.loads((tmp_path / "all.json").read_text())["steps"]] == [
        *("breaks", "works", "late")
    ]
    table = proof.table()
    assert "error: no such kernel" in table and len(table) <= prove.WIDEST


def test_a_step_that_hangs_is_ended_with_its_children_and_keeps_its_figures(
    proof: prove.Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove, "LEAST_SECONDS", 0)
    found = run(proof, "hangs", RECORDER + SLEEPER, seconds=3)
    assert found["status"] == "timeout" and found["exit_code"] is None
    assert found["figures"] == {"speed": 3}
    child = (
        psutil.Process(int(found["said"].split()[-1])) if psutil.pid_exists(int(found["said"].split()[-1])) else None
    )
    assert child is None or child.status() == psutil.STATUS_ZOMBIE


def test_names_of_folders_do_not_reach_the_figures(proof: prove.Proof) -> None:
    found = run(proof, "tells", "raise SystemExit('/home/anna/secret/model: not here')")
    assert "anna" not in json.dumps(found) and ".../model: not here" in found["said"]


def test_tests_that_were_all_skipped_prove_nothing(proof: prove.Proof, tmp_path: Path) -> None:
    file = tmp_path / "test_nothing.py"
    file.write_text("import pytest\n\ndef test_a(): pytest.skip('no GPU')\n")
    proof.run(
        prove.Step("tests", ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)), 100),
        prove.time.monotonic() + 90,
    )
    assert proof.results[0]["status"] == "skipped" and proof.results[0]["exit_code"] == 0


def test_the_limits_of_a_part_are_those_of_its_table() -> None:
    for part, most in prove.TOTAL_SECONDS.items():
        assert all(step.seconds <= most for step in prove.steps_of(part, "full", Path("out.json")))
    names = [step.name for part in prove.TOTAL_SECONDS for step in prove.steps_of(part, "rehearsal", Path("out.json"))]
    assert len(names) == len(set(names))
    for step in prove.steps_of("a", "full", Path("out.json")):
        assert any(Path(word).is_file() for word in step.words), step.words


def test_figures_are_put_beside_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.FIGURES, str(tmp_path / "figures.json"))
    for figures in ({"a": {"x": 1}, "b": 2}, {"a": {"y": 3}}, {"b": 4}):
        settings.record(figures)
    assert json.loads((tmp_path / "figures.json").read_text()) == {"a": {"x": 1, "y": 3}, "b": 4}


def test_a_variant_with_other_losses_shows_no_speed() -> None:
    same = {"step_milliseconds": 5.0, "tokens_per_second": 10.0, "mfu": None, "peak_bytes": 2**30}
    assert "10 tokens/s" in prove.variant_line(same)
    assert "tokens/s" not in prove.variant_line({"equal_loss": False, "loss_difference": 0.5})


def test_losses_of_another_number_of_steps_are_not_compared() -> None:
    trained = [optimizations.Trained(losses, (1.0,), 1, 1) for losses in ((2.0, 1.0), (2.2, 1.0), (2.0,))]
    assert optimizations._loss_difference(trained[1], trained[0]) == pytest.approx(0.2 / 3, abs=1e-6)
    assert optimizations._loss_difference(trained[2], trained[0]) is None


def chosen() -> tuple[object, ...]:
    """What peftcli makes of the GPU."""
    machine = probe_machine()
    dtype = auto_dtype(machine, on_gpu=True).value
    return machine.capability, dtype, repeats_heads(torch.device("cuda")), machine.memory_bytes


def test_as_on_a_t4_peftcli_takes_float16_and_repeats_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    real = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: real)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    native = ((9, 0), "bfloat16", False, 80 * 2**30)
    assert chosen() == native
    with as_t4():
        assert chosen() == ((7, 5), "float16", True, 80 * 2**30)
    assert chosen() == native


def test_spans_that_overlap_are_busy_once() -> None:
    assert profiling.busy_and_gaps([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0), (5.5, 5.7)]) == (4.0, [2.0])


def write_wheel(folder: Path) -> Path:
    """A wheel as bitsandbytes is made: plain code, and a library for each version of CUDA."""
    names = [
        "bitsandbytes/__init__.py",
        *(f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda128", "cuda130")),
    ]
    info = "bitsandbytes-1.0.dist-info"
    wheel = folder / "bitsandbytes-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name in names:
            file.writestr(name, "")
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        rows = [*names, f"{info}/METADATA", f"{info}/WHEEL", f"{info}/RECORD"]
        file.writestr(f"{info}/RECORD", "".join(f"{row},,\n" for row in rows))
    return wheel


def test_a_cut_wheel_has_the_libraries_that_were_asked_for_and_pip_installs_it(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path)
    cut_wheel.cut(wheel, ["cuda130", "cpu"])
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        record = file.read("bitsandbytes-1.0.dist-info/RECORD").decode()
    libraries = [name for name in names if "libbitsandbytes_" in name]
    assert libraries == [f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda130")]
    assert sorted(row[0] for row in csv.reader(io.StringIO(record))) == sorted(names)
    words = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
    ]
    assert subprocess.run([*words, str(wheel)]).returncode == 0
    assert (tmp_path / "site" / libraries[1]).is_file()


def test_a_library_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path)
    before = wheel.read_bytes()
    with pytest.raises(SystemExit, match="no library for cuda999; it has cpu, cuda128, cuda130"):
        cut_wheel.cut(wheel, ["cuda999", "cpu"])
    assert wheel.read_bytes() == before
