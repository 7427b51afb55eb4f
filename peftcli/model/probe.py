"""What this machine is: for the plan, and for `environment.json`."""

import importlib.metadata
import importlib.util
import os
import platform
import re
from pathlib import Path
from typing import Any

import psutil
import torch

from peftcli.model.container import usable_memory
from peftcli.plan.machine import SHARES_BATCH, Machine

PACKAGES = ("peftcli", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")
FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}

FSDP_MORE = ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING")
"""What accelerate's configuration may ask of FSDP, by its variables, and is not done here."""


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
    properties = torch.cuda.get_device_properties(0)
    return Machine(
        device="cuda",
        name=properties.name,
        capability=(properties.major, properties.minor),
        native_bf16=torch.cuda.is_bf16_supported(including_emulation=False),
        arch_list=tuple(torch.cuda.get_arch_list()),
        memory_bytes=properties.total_memory,
        count=torch.cuda.device_count(),
        processes=processes,
        shares_batch=_is_set(SHARES_BATCH),
        flash_attention=tuple(
            name for name, package in FLASH_PACKAGES.items() if importlib.util.find_spec(package) is not None
        ),
        fsdp=asked,
        fsdp_more=more,
    )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def describe_environment(machine: Machine, command: str) -> dict[str, Any]:
    """The content of `environment.json`: versions and hardware, no name of a user, host or folder."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    capability = machine.capability
    return {
        "schema": 1,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "device": {
            "kind": machine.device,
            "name": machine.name,
            "capability": None if capability is None else f"{capability[0]}.{capability[1]}",
            "memory_bytes": machine.memory_bytes,
            "count": machine.count,
        },
        "cpu_count": os.cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "command": command,
    }


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
