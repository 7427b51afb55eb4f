"""This machine and the limits of its container: for the plan, and for `environment.json`."""

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
from peftcli.plan.machine import SHARES_BATCH, Machine
from peftcli.results import Device, EnvironmentJson

PACKAGES = ("peftcli", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")
FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}

FSDP_MORE = ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING")
"""What accelerate's configuration may ask of FSDP, by its variables, and is not done here."""

NATIVE_BF16 = (8, 0)
"""Compute capability from which NVIDIA's GPUs compute bfloat16."""
NO_LIMIT_BYTES = 2**60
"""Version 1 of control groups writes a number near 2**63 for no limit."""


def probe_machine() -> Machine:
    """Ask torch and the operating system what is here; a CPU where no CUDA device is usable."""
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
        # torch answers for the current device alone, and asking it of another one opens a context there.
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
        fsdp=asked,
        fsdp_more=more,
    )


def _used_gpus(processes: int) -> list[Any]:
    """The properties of the GPUs of this machine that a launch of some processes uses: the first ones, one for each.

    Every process must plan the same, so a plan is for the smallest of them.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return [torch.cuda.get_device_properties(number) for number in range(min(here, torch.cuda.device_count()))]


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def describe_environment(machine: Machine, command: str) -> EnvironmentJson:
    """The content of `environment.json`: versions and hardware, no name of a user, host or folder."""
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
    if status.is_file():  # the other count begins with the memory of whoever started this process
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
        if found is not None:
            return int(found[1]) * 1024
    import resource

    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib * 1024 if platform.system() != "Darwin" else kib


def resident_bytes() -> int:
    """Memory of this process that is in the machine's memory now."""
    return int(psutil.Process().memory_info().rss)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes of the machine's memory or, where that is less, of what the container allows.

    Args:
        root: where `proc` and `sys` lie.
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
    """Bytes that the tightest control group around this process allows, and how many of those are used."""
    found = []
    for folder in _groups(root, "memory"):
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            allowed = _number(folder / limit)
            if allowed is not None and allowed < NO_LIMIT_BYTES:
                # Files that were read and not touched again are given up first, so they count as free.
                found.append((int(allowed), max(0, int(_number(folder / used) or 0) - _stat(folder, cache))))
    return min(found, default=(None, 0), key=lambda pair: pair[0] - pair[1])


def core_quota(root: Path) -> float | None:
    """Cores' worth of time that the tightest control group around this process allows."""
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
    """The folders of the control groups around this process, of both versions."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and controller not in names:
            continue
        top = root / "sys/fs/cgroup"
        tops = (top / controllers, top / controller) if controllers else (top, top / "unified")
        for base in {place for place in tops if place.is_dir()}:
            inner = base / path.lstrip("/")
            # In a container the path is often that of the machine outside, and only the top can be seen.
            yield from (place for place in (inner, *inner.parents) if place.is_dir() and place.is_relative_to(base))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:  # another version of control groups, or hidden from us
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
