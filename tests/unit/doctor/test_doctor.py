"""The doctor: facts made up or real, a verdict for each, a mend for what is not well, and nothing private in it."""

import io
import json
import platform
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from packaging.requirements import Requirement
from rich.console import Console

from peftcli.cli.doctor import print_verdicts
from peftcli.doctor import gpu, hub, packages, quantization, recipe, run, tested
from peftcli.doctor.check import Check, anonymous, private_words, refused, without_private
from peftcli.doctor.gpu import GPU as Card
from peftcli.doctor.gpu import Cuda
from peftcli.doctor.hub import Hub, HubModel
from peftcli.doctor.packages import Need
from peftcli.doctor.quantization import Trial
from peftcli.doctor.system import (
    DiskPath,
    Host,
    check_cache,
    check_cores,
    check_disk,
    check_encoding,
    check_memory,
    check_model_cache,
    check_session,
    probe_disk,
)
from peftcli.errors import DataError, MachineError, RecipeError
from peftcli.installed import installed_versions
from peftcli.model.hardware import core_quota, memory_limit, usable_memory
from peftcli.model.load import FAST_CPU_PATH
from peftcli.plan.machine import Machine
from peftcli.recipe.load import load_recipe
from peftcli.train.deadline import Deadline, NotebookLimit

ROOT = Path(__file__).parents[3]
GIB = 2**30
T4 = Card("Tesla T4", (7, 5), 15 * GIB, 14 * GIB, native_bf16=False)
L4 = Card("NVIDIA L4", (8, 9), 22 * GIB, 22 * GIB, native_bf16=True)
P100 = replace(T4, name="Tesla P100", capability=(6, 0))
WITH_T4 = Cuda("12.8", "570.86.15", masked=False, gpus=(T4,))
CPU = Machine("cpu", "a processor", None, native_bf16=False, arch_list=(), memory_bytes=16 * GIB)
GPU = Machine("cuda", "Tesla T4", (7, 5), native_bf16=False, arch_list=("sm_75", "sm_80"), memory_bytes=15 * GIB)
HOST = Host(cores=4, quota_cores=None, threads=None, memory_bytes=16 * GIB, free_bytes=12 * GIB)
Cli = Callable[..., int]
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def without_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide a driver that the torch under test was not built for."""
    monkeypatch.setattr(gpu, "DRIVER", tmp_path / "no-driver")


def expect(verdict: Check, result: str, *said: str) -> None:
    """A verdict with this result and these words; one that is not ok has a mend, and only that."""
    assert verdict.result == result, verdict
    assert bool(verdict.fix) is (result != "ok"), verdict
    for words in said:
        assert words in verdict.line, verdict


# Verdicts


def test_an_error_of_ours_becomes_a_fail_whose_mend_is_its_last_part() -> None:
    found = refused("plan", MachineError("needs bfloat16, but T4 has none; set float16; or another card"))
    assert (found.result, found.fix) == ("fail", "or another card")
    found = refused("room", MachineError("runs/a needs 3 GiB more: 3 checkpoints; rest\nfree some space"))
    assert (found.found, found.fix) == ("runs/a needs 3 GiB more: 3 checkpoints; rest", "free some space")
    assert refused("x", DataError("no rows")) == Check("x", "fail", "no rows")


def test_what_is_pasted_names_no_path_user_host_or_token() -> None:
    token = "hf_" + "a1" * 17
    text = (
        f"/home/anna/models/llama: refused to anna on pc7, ~/secret/x, token {token}, see /data/anna; org/model stays"
    )
    said = without_private(text, {"anna": "***", "pc7": "***"})
    assert said == ".../llama: refused to *** on ***, .../x, token ***, see .../***; org/model stays"
    assert without_private("12 GiB/s, https://pytorch.org/get and runs/a", {}).endswith(
        "https://pytorch.org/get and runs/a"
    )


def test_private_words_leave_common_names_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "localhost")
    monkeypatch.setattr("getpass.getuser", lambda: "root")
    monkeypatch.setenv("HOME", "/home/anna")
    assert private_words() == {"/home/anna": "~"}


# Versions


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tools = {name for name in pinned if f'"{name}' in project.split("dev = [")[1].split("[project.scripts]")[0]}
    assert {name: version for name, version in pinned.items() if name not in tools} == packages.TESTED


def need(text: str, by: str = "peftcli") -> Need:
    return Need(by, Requirement(text))


def test_a_package_below_its_bound_or_missing_fails_with_the_command_that_mends() -> None:
    needs = [need("trl>=1.16"), need("peft>=0.21"), need("torch>=2.6"), need("tokenizers>=0.23", by="transformers")]
    installed = {"trl": "1.9.0", "peft": None, "torch": "2.13.0+cu128", "tokenizers": "0.22.0"}
    found = packages.check_requirements(needs, installed)
    expect(found, "fail", "peftcli requires trl>=1.16, but 1.9.0 is installed", "peft>=0.21, which is not installed")
    assert found.fix == "pip install 'trl>=1.16' 'peft>=0.21'" and "tokenizers" not in found.line


def test_two_other_packages_that_do_not_fit_are_a_warning() -> None:
    needs = [need("torch>=2.6"), need("tokenizers>=0.23", by="transformers")]
    installed = {"torch": "2.13.0", "tokenizers": "0.22.0"}
    expect(
        packages.check_requirements(needs, installed),
        "warn",
        "transformers requires tokenizers>=0.23, but 0.22.0 is installed",
    )
    expect(
        packages.check_requirements(needs, installed | {"tokenizers": "0.23.1"}),
        "ok",
        "peftcli's 1 requirements are installed",
    )


def test_a_build_before_the_release_counts_as_it_sorts() -> None:
    expect(packages.check_requirements([need("torch>=2.6")], {"torch": "2.9.0a0+git1234"}), "ok")


def test_needs_are_read_from_the_metadata_without_the_extras() -> None:
    found = {(each.by, each.what.name) for each in packages.installed_needs()}
    assert ("peftcli", "trl") in found and ("transformers", "tokenizers") in found
    assert ("peftcli", "pytest") not in found


def test_a_package_that_runs_from_a_folder_needs_what_the_tests_ran_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "OURS", "no-such-package-peftcli")
    found = {each.what.name for each in packages.installed_needs() if each.by == "no-such-package-peftcli"}
    assert found == set(packages.TESTED)
    assert packages.stated_pythons() == (None, [])


@pytest.fixture
def two_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that ran with torch 2.6 and trl 1.16, and with torch 2.14 and trl 1.16; the rest as pinned."""
    pinned = {name: packages.TESTED[name] for name in tested.TRAINING}
    made = [
        tested.Combination(torch, "2026-01-01", "3.11.9", pinned | {"torch": torch, "trl": trl}, tested.Tests(1, 0))
        for torch, trl in (("2.6.0", "1.16.0"), ("2.14.1", "1.16.2"))
    ]
    monkeypatch.setattr(tested, "COMBINATIONS", tuple(made))


def test_versions_within_those_that_tests_ran_on_are_fine(two_combinations: None) -> None:
    for torch_here in ("2.6.0+cu124", "2.9.1", "2.14.3"):
        found = packages.check_tested_versions(packages.TESTED | {"torch": torch_here, "rich": "99.0"})
        expect(found, "ok", "tested with torch 2.6 to 2.14, transformers 5.23, trl 1.16, peft 0.21")


def test_only_a_newer_second_number_of_a_training_library_is_worth_a_warning(two_combinations: None) -> None:
    found = packages.check_tested_versions(packages.TESTED | {"torch": "2.15.0", "trl": "1.16.9", "datasets": "6.0.0"})
    expect(
        found, "warn", "torch 2.15.0 is newer than 2.14.1, the newest tested version", "datasets 6.0.0", "torch==2.14.1"
    )
    assert "trl" not in found.line


def test_a_version_older_than_any_tested_fails_with_the_command_that_fixes_it(
    two_combinations: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "OURS", "no-such-package-peftcli")
    needs = [each for each in packages.installed_needs() if each.by == "no-such-package-peftcli"]
    monkeypatch.setattr(packages, "OURS", "peftcli")
    needs = [replace(each, by="peftcli") for each in needs]
    old = packages.TESTED | {"torch": "2.5.1"}
    expect(
        packages.check_requirements(needs, old),
        "fail",
        "torch>=2.6.0, but 2.5.1 is installed",
        "pip install 'torch>=2.6.0'",
    )
    assert "torch" not in packages.check_tested_versions(old).line


def test_python_is_held_against_what_the_package_states() -> None:
    asked, tested = packages.stated_pythons()
    assert asked == ">=3.11" and "3.11" in tested
    expect(packages.check_python("3.11.7", asked, tested), "ok")
    expect(packages.check_python("3.10.2", asked, tested), "fail", ">=3.11 is required")
    expect(packages.check_python("3.14.0", asked, tested), "warn", "but only 3.11, 3.12")


def test_sqlalchemy_is_missed_only_by_a_recipe_that_reads_a_database() -> None:
    expect(packages.check_databases(None, asked=False), "ok", "only dataset.url needs it")
    expect(packages.check_databases(None, asked=True), "fail", "peftcli[sql]")
    expect(packages.check_databases("2.1.9", asked=True), "ok")


def test_a_package_that_breaks_on_import_is_named_with_what_it_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_wheel.py").write_text("raise OSError('libcudart.so.12: cannot open')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = packages.check_imports(["json", "broken_wheel"])
    expect(
        found, "fail", "broken_wheel cannot be imported (OSError: libcudart.so.12: cannot open)", "--force-reinstall"
    )
    expect(packages.check_imports(["torch"]), "ok", "torch can be imported")


# The device


@pytest.mark.parametrize(
    ("cuda", "result", "said"),
    [
        (Cuda(None, None, masked=False), "ok", "none: runs use the CPU"),
        (Cuda(None, "570.86.15", masked=False), "fail", "torch was built without CUDA"),
        (Cuda("13.0", "535.104.05", masked=False), "fail", "an older CUDA than 13.0"),
        (Cuda("12.8", "570.86.15", masked=True), "warn", "unset CUDA_VISIBLE_DEVICES"),
        (replace(WITH_T4, gpus=(), problem="CUDA error: out of memory"), "fail", "cannot query it: CUDA error"),
        (WITH_T4, "ok", "Tesla T4 (sm_75), 14.0 GiB free of 15.0 GiB; driver 570.86.15, torch for CUDA 12.8"),
        (replace(WITH_T4, gpus=(replace(T4, free_bytes=4 * GIB),)), "warn", "end the programs that use 11.0 GiB of it"),
    ],
)
def test_a_card_that_cannot_be_used_says_why(cuda: Cuda, result: str, said: str) -> None:
    expect(gpu.check_gpus(cuda), result, said)
    assert gpu.check_gpus(cuda, wanted=False).result == ("warn" if result == "fail" else result)


def test_the_driver_version_is_found_in_both_kinds_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert gpu._driver(file) is None
    for text in ("Kernel Module  570.86.15  Release", "Open Kernel Module for x86_64  570.86.15  Release"):
        file.write_text(
            f"NVRM version: NVIDIA UNIX {text} Build  Thu Jan 23 2025\nGCC version: gcc 12.3.0", encoding="utf-8"
        )
        assert gpu._driver(file) == "570.86.15"


def test_every_card_is_held_against_the_wheel() -> None:
    expect(gpu.check_torch_build(GPU, (T4,)), "ok", "sm_75, sm_80")
    expect(gpu.check_torch_build(GPU, (T4, P100)), "fail", "no kernels for Tesla P100 (sm_60)", "on Kaggle: GPU T4 x2")


@pytest.mark.parametrize(
    ("machine", "dtype"), [(CPU, "float32"), (GPU, "float16"), (gpu.machine_of(GPU, L4), "bfloat16")]
)
def test_the_precision_is_that_which_the_plan_would_choose(machine: Machine, dtype: str) -> None:
    chosen = gpu.auto_dtype(machine, on_gpu=machine.device == "cuda")
    assert chosen.value == dtype
    expect(gpu.check_precision(chosen), "ok", f"auto is {dtype}")


def test_several_cards_are_told_with_the_flag_that_uses_them() -> None:
    assert gpu.check_several_gpus([T4]) == []
    expect(gpu.check_several_gpus([T4, T4])[0], "ok", "--num-processes 1 uses one")
    expect(gpu.check_several_gpus([T4, L4])[0], "warn", "they differ")


def test_products_are_right_here_in_every_dtype() -> None:
    errors, problem = gpu.try_matmuls("cpu", native_bf16=True)
    assert set(errors) == {"float32", "float16", "bfloat16"} and problem == ""
    expect(gpu.check_matmuls(0, errors, problem), "ok", "correct in float32, float16, bfloat16")


def test_a_wrong_product_or_one_that_is_no_number_fails() -> None:
    expect(gpu.check_matmuls(1, {"float32": 0.02}, ""), "fail", "GPU 1 are wrong: float32 by 0.02")
    expect(gpu.check_matmuls(0, {"float32": float("nan")}, ""), "fail", "wrong")


def test_a_device_that_cannot_multiply_says_what_it_raised() -> None:
    errors, problem = gpu.try_matmuls("meta", native_bf16=False)
    assert errors == {} and problem
    expect(gpu.check_matmuls(0, errors, problem), "fail", "a matmul on GPU 0 failed: float32: ")


def test_optional_kernels_are_named_and_only_broken_ones_warn() -> None:
    expect(gpu.check_kernels({"triton": None}, ["flash_attn"]), "ok", "installed: triton", "missing: flash_attn")
    expect(gpu.check_kernels({"flash_attn": "ImportError: undefined symbol"}, []), "warn", "pip uninstall flash_attn")


# 4 bit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_4_bit_layer_trains_here_as_its_unpacked_weights_would(dtype: str) -> None:
    trial = quantization.try_4bit("cpu", dtype)
    expect(quantization.check_4bit(trial), "ok", "on the CPU: outputs and gradients match the dequantized weights")
    assert 0.05 < trial.loss < 0.15, "NF4 loses about a tenth"


def test_a_4_bit_layer_whose_gradient_is_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    real = quantization.Linear4bit.forward

    def without_half(self: Any, x: torch.Tensor) -> torch.Tensor:
        return real(self, x - 0.5 * (x - x.detach()))  # the value is that of x, the gradient half of it

    monkeypatch.setattr(quantization.Linear4bit, "forward", without_half)
    trial = quantization.try_4bit("cpu", "float32")
    expect(quantization.check_4bit(trial), "fail", "wrong on the CPU: gradients by 0.5")
    assert trial.product < 1e-5


def test_a_layer_that_was_not_quantized_at_all_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        quantization.Linear4bit, "forward", lambda self, x: x[..., :1] * torch.ones(quantization.OUTPUTS)
    )
    expect(
        quantization.check_4bit(quantization.try_4bit("cpu", "float32")),
        "fail",
        "outputs in evaluation by",
        "outputs in training by",
        "gradients by",
    )
    expect(
        quantization.check_4bit(Trial("cpu", "float32", 0.0, 0.0, 0.0, loss=0.7)), "fail", "dequantized weights by 0.7"
    )
    expect(quantization.check_4bit(Trial("cuda", "float16")), "fail", "on the GPU")


def test_a_bitsandbytes_without_its_library_is_told_and_matters_only_to_4_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'cdequantize_blockwise'")

    monkeypatch.setattr(quantization, "dequantize_4bit", missing)
    trial = quantization.try_4bit("cpu", "float32")
    expect(quantization.check_4bit(trial), "fail", "bitsandbytes fails on the CPU: AttributeError: 'NoneType'")
    expect(quantization.check_4bit(trial, asked=False), "warn")


def test_a_cpu_that_would_repack_is_told_and_kept_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = quantization.Linear4bit.__init__

    def with_avx512(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        setattr(self, FAST_CPU_PATH, True)

    monkeypatch.setattr(quantization.Linear4bit, "__init__", with_avx512)
    trial = quantization.try_4bit("cpu", "float32")
    assert trial.repacks
    expect(quantization.check_4bit(trial), "ok", "this CPU has AVX512_BF16", "peftcli switches that kernel off")


# The host


def write_files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n", encoding="ascii")
    return root


def test_limits_of_control_groups_of_version_2_are_found(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/kubepods/pod1"
    write_files(
        tmp_path,
        {
            "proc/self/cgroup": "0::/kubepods/pod1",
            f"{group}/memory.max": "max",
            f"{group}/cpu.max": "max 100000",
            "sys/fs/cgroup/kubepods/memory.max": str(8 * GIB),
            "sys/fs/cgroup/kubepods/memory.current": str(3 * GIB),
            "sys/fs/cgroup/kubepods/memory.stat": f"anon {GIB}\ninactive_file {GIB}",
            "sys/fs/cgroup/kubepods/cpu.max": "150000 100000",
        },
    )
    assert memory_limit(tmp_path) == (8 * GIB, 2 * GIB)
    assert core_quota(tmp_path) == 1.5


def test_limits_of_control_groups_of_version_1_are_found_also_where_only_the_top_is_seen(tmp_path: Path) -> None:
    write_files(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(4 * GIB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB),
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
    )
    assert memory_limit(tmp_path) == (4 * GIB, GIB)
    assert usable_memory(tmp_path) == min(4 * GIB, psutil.virtual_memory().total)
    assert core_quota(tmp_path) == 2.0


def test_no_limit_is_none(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) == (None, 0) and core_quota(tmp_path) is None
    write_files(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/\n1:cpu:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    )
    assert memory_limit(tmp_path) == (None, 0) and core_quota(tmp_path) is None


def test_a_container_with_less_time_than_cores_wants_fewer_threads() -> None:
    expect(check_cores(HOST, "x"), "ok", "4 cores, x")
    slow = replace(HOST, quota_cores=1.5)
    expect(check_cores(slow, "x"), "warn", "the CPU quota of the container is 1.5", "OMP_NUM_THREADS=1")
    expect(check_cores(replace(slow, threads=2), "x"), "ok", "OMP_NUM_THREADS is 2")
    expect(check_cores(replace(slow, threads=4), "x"), "warn")


def test_memory_is_that_of_the_container_where_it_is_less() -> None:
    expect(check_memory(HOST), "ok", "12.0 GiB free of 16.0 GiB")
    tight = replace(HOST, limit_bytes=4 * GIB, used_bytes=3 * GIB)
    expect(check_memory(tight), "warn", "1.0 GiB free of 4.0 GiB, the limit of the container; the machine has 16.0 GiB")
    assert tight.usable_bytes == 4 * GIB


def test_text_that_is_not_utf_8_warns() -> None:
    expect(check_encoding({"files": "UTF-8", "the terminal": "utf8"}), "ok")
    expect(check_encoding({"files": "ANSI_X3.4-1968", "the terminal": "utf-8"}), "warn", "for files", "PYTHONUTF8=1")


# Disks, network, session


def test_a_disk_that_is_small_or_takes_no_file_is_told() -> None:
    full, none = DiskPath(GIB // 2), DiskPath(GIB, problem=MachineError("/x cannot be written: no space; name another"))
    expect(check_disk(DiskPath(9 * GIB)), "ok", "9.0 GiB free in the working folder")
    expect(check_disk(full), "warn", "512 MiB free")
    expect(check_disk(none), "fail", "cannot be written", "output_dir")
    expect(check_cache(full), "warn", "PEFTCLI_CACHE")
    expect(check_cache(none), "fail", "PEFTCLI_CACHE")
    expect(check_model_cache(full), "warn", "HF_HOME")
    expect(check_model_cache(none), "warn", "read-only")


def test_a_quota_counts_where_it_is_less_than_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCLI_QUOTA", f"{tmp_path}=1MiB")
    expect(check_disk(probe_disk(tmp_path / "runs")), "warn", "free with a quota of 1.0 MiB")
    assert probe_disk(Path("/dev/null/x")).problem is not None


class _Answering(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(403 if self.path == "/closed" else 200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_the_hub_is_asked_once_and_every_answer_counts() -> None:
    with HTTPServer(("127.0.0.1", 0), _Answering) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            assert hub.answer_code(address, 5.0) == 200
            assert hub.answer_code(f"{address}/closed", 5.0) == 403
        finally:
            server.shutdown()
            thread.join()


def test_a_hub_that_never_answers_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert hub.answer_code(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.3) is None
    assert hub.answer_code("no address", 0.3) is None


def test_a_look_up_that_hangs_is_left_behind() -> None:
    stop = threading.Event()
    assert hub.in_time(lambda: stop.wait(30.0), 0.2) is None  # a look-up that was waited for would give False
    stop.set()
    assert hub.in_time(lambda: 7, 5.0) == 7


def test_nobody_is_asked_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "answer_code", lambda *_: pytest.fail("the Hub was asked"))
    assert hub.probe_hub().offline
    expect(hub.check_hub(hub.probe_hub()), "ok", "HF_HUB_OFFLINE is set")


def test_a_hub_that_is_out_of_reach_warns() -> None:
    expect(hub.check_hub(Hub(offline=False, code=200)), "ok", "huggingface.co responds")
    expect(hub.check_hub(Hub(offline=False)), "warn", "did not respond within 2 s", "HF_HUB_OFFLINE=1")
    expect(hub.check_hub(Hub(offline=False, code=407, mirror=True)), "warn", "HF_ENDPOINT", "status 407")


def test_a_session_is_held_against_the_budget_of_a_recipe() -> None:
    kaggle = NotebookLimit("Kaggle", 12 * 3600.0, started=0.0)
    expect(check_session(None, None, 0.0, runs=True), "ok", "no notebook service")
    expect(
        check_session(kaggle, None, 3600.0),
        "ok",
        "Kaggle ends a session after at most 12h",
        "budget.wall_clock: 10h30m",
    )
    expect(check_session(kaggle, None, 3600.0, runs=True), "warn", "budget.wall_clock: 10h30m")
    expect(check_session(kaggle, None, 3600.0, budget=39600.0, runs=True), "ok", "budget of 11h is shorter")
    expect(check_session(kaggle, None, 7200.0, budget=39600.0, runs=True), "warn", "budget of 11h is longer")
    expect(check_session(kaggle, Deadline(9000.0, "x"), 1800.0, runs=True), "ok", "in 2h")


# A recipe


@pytest.mark.parametrize(
    ("said", "has_token", "result", "words"),
    [
        (None, False, "ok", "did not report its size"),
        (HubModel(found=False), True, "fail", "HF_TOKEN"),
        (HubModel(True, gated=True, weights_bytes=GIB), False, "fail", "gated, and no token is set"),
        (HubModel(True, gated=True, weights_bytes=GIB), True, "ok", "1.0 GiB to download, gated; a token is set"),
        (
            HubModel(True, weights_bytes=14 * GIB),
            False,
            "fail",
            "14.0 GiB to download, but the model cache has only 9.0 GiB",
        ),
        (HubModel(True, weights_bytes=8 * GIB), False, "ok", "8.0 GiB to download"),
    ],
)
def test_a_model_of_the_hub_is_asked_for_before_it_is_downloaded(
    said: HubModel | None, has_token: bool, result: str, words: str
) -> None:
    expect(recipe.check_download("org/model", said, has_token=has_token, free=9 * GIB), result, words)


@pytest.mark.parametrize(
    ("name", "hub", "words"),
    [
        ("nobody/no-model", Hub(offline=True), "not in the model cache, and HF_HUB_OFFLINE is set"),
        ("nobody/no-model", Hub(offline=False), "huggingface.co does not respond"),
        ("./no-model", Hub(offline=False, code=200), "no such folder"),
    ],
)
def test_a_model_that_cannot_be_had_fails_without_a_wait(write_recipe: Write, name: str, hub: Hub, words: str) -> None:
    asked = load_recipe(write_recipe(model={"name": name})).recipe
    found = recipe.find_model(asked, hub)
    assert found.path is None and found.check.result == "fail" and words in found.check.line


def test_a_model_that_the_hub_has_is_planned_from_there(write_recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "model_on_hub", lambda *_: HubModel(True, weights_bytes=1000))
    asked = load_recipe(write_recipe(model={"name": "org/model", "revision": "v1"})).recipe
    found = recipe.find_model(asked, Hub(offline=False, code=200))
    assert (found.path, found.revision, found.check.result) == ("org/model", "v1", "ok")


def test_what_another_machine_cannot_do_is_the_sentence_of_the_plan(write_recipe: Write, tiny_llama: Path) -> None:
    asked = load_recipe(write_recipe(model={"dtype": "bfloat16"})).recipe
    found = recipe.plan_for(asked, CPU, str(tiny_llama), None)
    expect(recipe.check_plan(found), "ok", "LlamaForCausalLM in bfloat16, 4 bit on the cpu, 4 rows per step")
    with pytest.raises(MachineError, match="needs bfloat16, but Tesla T4"):
        recipe.plan_for(asked, GPU, str(tiny_llama), None)
    typo = load_recipe(write_recipe(adapter={"target_modules": ["q_prj"]})).recipe
    with pytest.raises(RecipeError, match="nearest names: "):
        recipe.plan_for(typo, CPU, str(tiny_llama), None)


def test_trackers_are_missed_by_name() -> None:
    assert recipe.check_trackers((), ["wandb"]) == []
    expect(recipe.check_trackers(("wandb",), ["wandb"])[0], "ok")
    expect(recipe.check_trackers(("wandb", "trackio"), ["wandb"])[0], "fail", "trackio not installed")


# A card without kernels, from end to end


def made_up(monkeypatch: pytest.MonkeyPatch, card: Card) -> list[str]:
    """Put a card into this machine; returns the list of devices on which products were asked for."""
    asked: list[str] = []
    monkeypatch.setattr(gpu, "probe_cuda", lambda: replace(WITH_T4, gpus=(card,)))
    monkeypatch.setattr(run, "probe_machine", lambda: gpu.machine_of(GPU, card))
    monkeypatch.setattr(gpu, "try_matmuls", lambda where, bf16: (asked.append(where), ({"float32": 0.0}, ""))[1])
    monkeypatch.setattr(
        quantization, "try_4bit", lambda where, dtype: asked.append(where) or Trial(where, dtype, 0, 0, 0, 0)
    )
    monkeypatch.setattr(gpu, "try_trl_loss", lambda number, dtype: asked.append(f"loss {number} {dtype}"))
    return asked


def test_a_card_without_kernels_is_not_asked_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = made_up(monkeypatch, P100)
    found = {verdict.name: verdict for verdict in run.run_checks(None, {"files": "utf-8"})}
    assert found["kernels"].result == "fail" and asked == []
    assert "4-bit" not in found and found["disk"].result


def test_a_card_with_kernels_is_asked_and_gets_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = made_up(monkeypatch, T4)
    found = {verdict.name: verdict for verdict in run.run_checks(None, {"files": "utf-8"})}
    assert asked == ["cuda:0", "loss 0 float16", "cuda"]
    expect(found["matmul 0"], "ok")
    expect(found["loss kernel 0"], "ok")
    expect(found["precision"], "ok", "float16")
    expect(found["4-bit"], "ok", "NF4 in float16 on the GPU")


def test_an_8_bit_layer_is_tried_for_a_recipe_that_asks_for_one(
    monkeypatch: pytest.MonkeyPatch, write_recipe: Write
) -> None:
    asked = made_up(monkeypatch, T4)
    monkeypatch.setattr(
        quantization, "try_8bit", lambda where, dtype: asked.append("8-bit") or Trial(where, dtype, 0, 0, 0, loss=0.5)
    )
    asking = load_recipe(write_recipe(quantization={"bits": 8})).recipe
    found = {}
    for verdict in run.run_checks(asking, {"files": "utf-8"}):
        found[verdict.name] = verdict
        if verdict.name == "8-bit":
            break
    assert asked == ["cuda:0", "loss 0 float16", "cuda", "8-bit"]
    expect(found["8-bit"], "fail", "int8 in float16 is wrong on the GPU: dequantized weights by 0.5")


# The command


def test_the_command_prints_a_line_for_each_check_and_exits_0(run_cli: Cli, capfd: Any) -> None:
    assert run_cli("doctor") == 0
    lines = capfd.readouterr().out.splitlines()
    found = [re.fullmatch(r"(\S.*?) +(ok|warn)    ?\S.*", line) for line in lines]
    names = [match[1] for match in found if match is not None]
    assert len(names) == len(lines) == len(set(names))
    assert {"versions", "packages", "GPU", "4-bit", "memory", "disk", "Hub", "fast kernels"} <= set(names)


def test_a_recipe_that_this_machine_can_run_is_all_well(write_recipe: Write, run_cli: Cli, capfd: Any) -> None:
    assert run_cli("doctor", write_recipe(), "--json") == 0
    out = capfd.readouterr().out
    value = json.loads(out)
    found = {check["name"]: check for check in value["checks"]}
    assert value["schema"] == 2 and value["versions"]["trl"] == installed_versions(["trl"])["trl"]
    assert set(found["plan"]) == {"name", "result", "found", "fix"} and found["plan"]["fix"] is None
    assert [found[name]["result"] for name in ("model", "plan", "disk space", "4-bit")] == ["ok"] * 4
    assert str(Path.home()) not in out and str(ROOT) not in out and platform.node() not in out


def test_a_recipe_that_it_cannot_run_exits_4_with_every_reason(
    write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTCLI_QUOTA", f"{tmp_path}=1MiB")
    monkeypatch.setattr(recipe, "get_available_reporting_integrations", list)
    assert run_cli("doctor", write_recipe(report={"trackers": ["wandb"]})) == 4
    said = capfd.readouterr()
    fails = {line[: line.index("  ")]: line for line in said.out.splitlines() if " fail  " in line}
    assert set(fails) == {"disk space", "trackers"}
    assert "lower adapter.r" in fails["disk space"] and str(tmp_path) not in said.out
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "2 of " in errors[0] and "trackers, disk space" in errors[0]


def test_what_the_plan_refuses_is_a_check_that_fails(write_recipe: Write, run_cli: Cli, capfd: Any) -> None:
    assert run_cli("doctor", write_recipe(model={"attention": "flash_attention_2"})) == 4
    assert "plan" in (line := next(line for line in capfd.readouterr().out.splitlines() if " fail " in line))
    assert "this machine has none" in line and line.endswith("set auto")


def test_a_recipe_that_is_wrong_exits_2_before_anything_is_asked(write_recipe: Write, run_cli: Cli, capfd: Any) -> None:
    assert run_cli("doctor", write_recipe(adapter={"r": 0})) == 2
    said = capfd.readouterr()
    assert said.out == "" and "adapter.r = 0" in said.err


def test_a_library_that_cannot_be_loaded_ends_the_questions_that_need_it(
    run_cli: Cli, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftcli.cli.doctor.NEEDED", ("torch", "no_such_library"))
    assert run_cli("doctor") == 4
    said = capfd.readouterr()
    assert "no_such_library cannot be imported (ModuleNotFoundError" in said.out and "memory" not in said.out
    assert "1 of 6 checks failed: imports" in said.err


def test_on_a_terminal_of_80_columns_long_lines_keep_to_their_column() -> None:
    out = io.StringIO()
    wide = Check("model cache", "fail", "word " * 30, "mend " * 10)
    print_verdicts([wide, Check("a", "ok", "b")], Console(file=out, width=80, force_terminal=True, color_system=None))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert len(lines) > 3 and all(len(line) <= 80 for line in lines)
    assert all(line.startswith(" " * 19 + "word") or "mend" in line for line in lines[1:-1])
    assert anonymous(wide, {}) == wide
