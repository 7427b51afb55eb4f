"""This machine and the limits of its container, for the plan and for `environment.json`."""

import importlib.util
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from peftcli.installed import installed_versions
from peftcli.model.fused_norms import has_fused_kernel
from peftcli.plan.machine import SHARES_BATCH, Machine
from peftcli.results import Device, EnvironmentJson

PACKAGES = ("peftcli", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")
FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}

FSDP_MORE = ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING")
"""Variables of accelerate's FSDP options that are not supported here."""

NATIVE_BF16 = (8, 0)
"""Compute capability from which NVIDIA GPUs support bfloat16 natively."""
NO_LIMIT_BYTES = 2**60
"""Control groups version 1 write a number near 2**63 for no limit."""


def probe_machine() -> Machine:
    """Read the hardware from torch and the operating system; a CPU if no CUDA device is usable."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    asked = _is_set("ACCELERATE_USE_FSDP")
    more = tuple(name.lower() for name in FSDP_MORE if _is_set(name))
    if not torch.cuda.is_available():
        return Machine(
            device="cpu",
            name=_processor(),
            capability=None,
            native_bf16=False,
            arch_list=(),
            memory_bytes=usable_memory(),
            processes=processes,
            shares_batch=_is_set(SHARES_BATCH),
            fsdp=asked,
            fsdp_more=more,
        )
    gpus = _used_gpus(processes)
    capability = min((gpu.major, gpu.minor) for gpu in gpus)
    return Machine(
        device="cuda",
        name=" and ".join(dict.fromkeys(gpu.name for gpu in gpus)),
        capability=capability,
        # torch only answers for the current device, and selecting another one would create a context there.
        native_bf16=torch.cuda.is_bf16_supported(including_emulation=False)
        and (torch.version.hip is not None or capability >= NATIVE_BF16),
        arch_list=tuple(torch.cuda.get_arch_list()),
        memory_bytes=min(gpu.total_memory for gpu in gpus),
        count=torch.cuda.device_count(),
        processes=processes,
        shares_batch=_is_set(SHARES_BATCH),
        flash_attention=tuple(
            name for name, package in FLASH_PACKAGES.items() if importlib.util.find_spec(package) is not None
        ),
        fused_norms=has_fused_kernel("cuda"),
        liger=importlib.util.find_spec("liger_kernel") is not None,
        fsdp=asked,
        fsdp_more=more,
    )


def _used_gpus(processes: int) -> list[Any]:
    """The properties of the GPUs used by a launch: the first ones, one per process.

    Every process must make the same plan, so it is made for the smallest of them.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return [torch.cuda.get_device_properties(number) for number in range(min(here, torch.cuda.device_count()))]


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def describe_environment(machine: Machine, command: str) -> EnvironmentJson:
    """The content of `environment.json`: versions and hardware, without names of users, hosts or folders."""
    capability = machine.capability
    return EnvironmentJson(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        packages=installed_versions(PACKAGES),
        device=Device(
            kind=machine.device,
            name=machine.name,
            capability=None if capability is None else f"{capability[0]}.{capability[1]}",
            memory_bytes=machine.memory_bytes,
            count=machine.count,
        ),
        cpu_count=os.cpu_count(),
        ram_bytes=psutil.virtual_memory().total,
        command=command,
    )


def peak_memory_bytes(device: str) -> int:
    """Peak memory so far: of torch's allocator on a GPU, of the process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss starts with the memory of the parent process
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
        if found is not None:
            return int(found[1]) * 1024
    import resource

    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib * 1024 if platform.system() != "Darwin" else kib


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes of the machine's memory, or of the container's limit if that is lower.

    Args:
        root: folder with `proc` and `sys`.
    """
    limit, _ = memory_limit(root)
    total = int(psutil.virtual_memory().total)
    return total if limit is None else min(total, limit)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be allocated without swapping, on the machine or within what the container allows.

    Args:
        root: where `proc` and `sys` lie.
    """
    limit, used = memory_limit(root)
    free = int(psutil.virtual_memory().available)
    return free if limit is None else min(free, max(0, limit - used))


def memory_limit(root: Path) -> tuple[int | None, int]:
    """The tightest memory limit in bytes of this process's control groups, and how much of it is used."""
    found = []
    for folder in _groups(root, "memory"):
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            allowed = _number(folder / limit)
            if allowed is not None and allowed < NO_LIMIT_BYTES:
                # Cached files that are not in active use are evicted first, so they count as free.
                found.append((int(allowed), max(0, int(_number(folder / used) or 0) - _stat(folder, cache))))
    return min(found, default=(None, 0), key=lambda pair: pair[0] - pair[1])


def core_quota(root: Path) -> float | None:
    """The tightest CPU limit of this process's control groups, in cores."""
    found = []
    for folder in _groups(root, "cpu"):
        words = _text(folder / "cpu.max").split() or [
            _text(folder / "cpu.cfs_quota_us"),
            _text(folder / "cpu.cfs_period_us"),
        ]
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control groups, in both versions."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and controller not in names:
            continue
        top = root / "sys/fs/cgroup"
        tops = (top / controllers, top / controller) if controllers else (top, top / "unified")
        for base in {place for place in tops if place.is_dir()}:
            inner = base / path.lstrip("/")
            # In a container the path is often that of the host, and only the root is visible.
            yield from (place for place in (inner, *inner.parents) if place.is_dir() and place.is_relative_to(base))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:  # another version of control groups, or not visible
        return ""


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdecimal() else None


def _stat(folder: Path, name: str) -> int:
    for line in _text(folder / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdecimal():
            return int(value)
    return 0
