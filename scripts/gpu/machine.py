"""What this machine is: GPU, driver, clocks, versions, and what `peftcli doctor` finds.

python scripts/gpu/machine.py
"""

import json
import shutil
import subprocess
import sys

import torch
from settings import record, rehearsing

from peftcli.model.hardware import describe_environment, probe_machine
from peftcli.plan.gpus import gpu_of

ASKED = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")


def main() -> None:
    """Record it; the exit code is 1 where no CUDA device is here or doctor finds a fault."""
    machine = probe_machine()
    environment = describe_environment(machine, "proof")
    del environment["command"]
    card = gpu_of(machine)
    record(
        {
            "environment": environment,
            "cuda": torch.version.cuda,
            "architectures": list(machine.arch_list),
            "native_bf16": machine.native_bf16,
            "known_as": None if card is None else card.key,
            "nvidia_smi": nvidia_smi(),
        }
    )
    words = [sys.executable, "-m", "peftcli", "doctor", "--json"]
    ended = subprocess.run(words, capture_output=True, text=True)
    checks = json.loads(ended.stdout)["checks"] if ended.stdout.startswith("{") else []
    wrong = [check for check in checks if check["result"] != "ok"]
    record({"doctor": {"exit_code": ended.returncode, "checks": len(checks), "not_ok": wrong}})
    print(json.dumps(environment["device"]), ended.returncode, wrong, ended.stderr[-500:])
    if machine.device != "cuda" and not rehearsing():
        sys.exit("error: no CUDA device is here; --rehearse runs the same steps on a CPU")
    sys.exit(1 if ended.returncode else 0)


def nvidia_smi() -> list[dict[str, str]]:
    """What the driver says of each GPU; empty without its tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    words = [tool, f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"]
    lines = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
    return [dict(zip(ASKED, (cell.strip() for cell in line.split(",")), strict=False)) for line in lines]


if __name__ == "__main__":
    main()
