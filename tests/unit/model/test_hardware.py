"""The machine as a plan sees it where GPUs differ: every process plans for the smallest one in use."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peftcli.model.hardware import probe_machine
from peftcli.plan.machine import Machine

A100 = SimpleNamespace(name="NVIDIA A100", major=8, minor=0, total_memory=80 * 2**30)
T4 = SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=15 * 2**30)
SMALL_L4 = SimpleNamespace(name="NVIDIA L4", major=8, minor=9, total_memory=12 * 2**30)


def probe(monkeypatch: pytest.MonkeyPatch, gpus: list[Any], **variables: str) -> Machine:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpus[number])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **given: gpus[0].major >= 8)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch.version, "hip", None)
    return probe_machine()


def test_one_process_plans_for_the_gpu_that_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = probe(monkeypatch, [A100, T4])
    assert machine.label == "NVIDIA A100 (sm_80)" and machine.memory_bytes == 80 * 2**30
    assert machine.native_bf16 and machine.count == 2


def test_processes_on_unequal_gpus_plan_for_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = probe(monkeypatch, [A100, T4], WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    assert machine.label == "NVIDIA A100 and Tesla T4 (sm_75)" and machine.memory_bytes == 15 * 2**30
    assert not machine.native_bf16


def test_the_least_of_each_is_what_all_gpus_have(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = probe(monkeypatch, [A100, SMALL_L4, T4], WORLD_SIZE="2")
    assert machine.capability == (8, 0) and machine.memory_bytes == 12 * 2**30 and machine.native_bf16


def test_on_several_machines_only_the_gpus_of_this_one_count(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = probe(monkeypatch, [A100, A100], WORLD_SIZE="4", LOCAL_WORLD_SIZE="2")
    assert machine.label == "NVIDIA A100 (sm_80)" and machine.processes == 4
