"""GPUs that a plan can be made for without having one: `plan --gpu NAME`."""

import re
from dataclasses import dataclass

from peftcli.errors import RecipeError
from peftcli.nearest import nearest
from peftcli.plan.machine import Machine

GIB = 2**30
SUSTAINED = 0.45
"""Share of the peak that training reaches, from published runs, over a whole step.

LLaMA-Factory, Llama-2-7B in 4 bit on an A100, 8192 tokens: 3,128 tokens/s, 0.48 of the peak; 1024 tokens: 0.31
(https://github.com/hiyouga/LLaMA-Factory/wiki/Performance-comparison). torchtune, compiled, Llama-3.2-3B with LoRA on
an A100: 8,210 tokens/s, 0.53; Llama-3.1-8B in 4 bit on a 4090: 2,413 tokens/s, 0.67 (README of pytorch/torchtune).
"""
THROTTLED = 0.35
"""The same for a T4, which is throttled by its 70 W limit; an assumption, no published run was found."""


@dataclass(frozen=True)
class GPU:
    """One GPU model.

    Attributes:
        key: value of `--gpu`.
        name: as reported by torch.
        capability: (major, minor).
        memory_gib: as reported by torch; drivers differ by a few percent.
        tflops: peak of dense 16-bit matmuls with float32 accumulation, in 10^12 per second.
        gb_per_second: memory bandwidth in 10^9 bytes per second.
        count: number of GPUs.
        sustained: share of the peak that training reaches.
        note: advice that is printed with the plan.

    Source: NVIDIA's data sheets; half of the figure if it is given with sparsity.
    """

    key: str
    name: str
    capability: tuple[int, int]
    memory_gib: float
    tflops: float
    gb_per_second: float
    count: int = 1
    sustained: float = SUSTAINED
    note: str = ""

    @property
    def flops(self) -> float:
        """FLOPs per second that training reaches."""
        return self.tflops * 1e12 * self.sustained

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.gb_per_second * 1e9


GPUS = (
    GPU("t4", "Tesla T4", (7, 5), 14.74, 65, 320, sustained=THROTTLED),
    GPU("t4x2", "Tesla T4", (7, 5), 14.74, 65, 320, count=2, sustained=THROTTLED),
    GPU(
        "p100",
        "Tesla P100-PCIE-16GB",
        (6, 0),
        15.89,
        18.7,
        732,
        note="the torch of Kaggle's image has no kernels for a P100; choose GPU T4 x2 there",
    ),
    GPU("v100", "Tesla V100-SXM2-16GB", (7, 0), 15.77, 125, 900),
    GPU("v100-32", "Tesla V100-SXM2-32GB", (7, 0), 31.73, 125, 900),
    GPU("l4", "NVIDIA L4", (8, 9), 22.03, 121, 300),
    GPU("a10", "NVIDIA A10", (8, 6), 22.0, 125, 600),
    GPU("a10g", "NVIDIA A10G", (8, 6), 22.06, 70, 600),
    GPU("a40", "NVIDIA A40", (8, 6), 44.4, 149.7, 696),
    GPU("a6000", "NVIDIA RTX A6000", (8, 6), 47.5, 154.8, 768),
    GPU("l40s", "NVIDIA L40S", (8, 9), 44.4, 362, 864),
    GPU("a100-40", "NVIDIA A100-SXM4-40GB", (8, 0), 39.4, 312, 1555),
    GPU("a100-80", "NVIDIA A100-SXM4-80GB", (8, 0), 79.2, 312, 2039),
    GPU("h100", "NVIDIA H100 80GB HBM3", (9, 0), 79.1, 989, 3350),
    GPU("h200", "NVIDIA H200", (9, 0), 139.8, 989, 4800),
    GPU("rtx3090", "NVIDIA GeForce RTX 3090", (8, 6), 23.6, 71, 936),
    GPU("rtx4090", "NVIDIA GeForce RTX 4090", (8, 9), 23.5, 165, 1008),
    GPU("rtx5090", "NVIDIA GeForce RTX 5090", (12, 0), 31.3, 209.5, 1792),
)


def find_gpu(key: str) -> GPU:
    """The GPU that `--gpu` names.

    Raises:
        RecipeError: the name is unknown.

    >>> find_gpu("T4 x2").count
    2
    """
    plain = re.sub(r"[\s_]|nvidia|tesla|geforce", "", key.lower())
    known = {gpu.key: gpu for gpu in GPUS}
    bare = {gpu.key.replace("-", ""): gpu for gpu in GPUS} | {gpu.key.removeprefix("rtx"): gpu for gpu in GPUS}
    found = known.get(plain) or bare.get(plain.replace("-", ""))
    if found is not None:
        return found
    near = nearest(plain, known, least=0.5)
    hint = f"; did you mean {near}?" if near else ""
    raise RecipeError(f"--gpu {key}: unknown GPU{hint}\nknown GPUs are {', '.join(known)}")


def gpu_of(machine: Machine) -> GPU | None:
    """The GPU of a machine, by its name and memory; None if it is not in the table."""
    if machine.device != "cuda":
        return None
    words = re.sub(r"nvidia|tesla|geforce", "", machine.name.lower())
    parts = re.sub(r"rtx (?=\d)", "rtx", re.sub(r"[^a-z0-9]+", " ", words).strip()).split()
    fitting = [gpu for gpu in GPUS if gpu.count == 1 and gpu.key.split("-")[0] in parts]
    near = [gpu for gpu in fitting if abs(gpu.memory_gib * GIB - machine.memory_bytes) < 0.1 * machine.memory_bytes]
    return near[0] if near else None


def machine_with(gpu: GPU, processes: int = 1) -> Machine:
    """A machine with this GPU, and with everything installed that the GPU supports."""
    major, minor = gpu.capability
    flash = ("flash_attention_2",) * (major >= 8) + ("flash_attention_3",) * (gpu.capability == (9, 0))
    return Machine(
        device="cuda",
        name=gpu.name,
        capability=gpu.capability,
        native_bf16=major >= 8,
        arch_list=(f"sm_{major}{minor}",),
        memory_bytes=int(gpu.memory_gib * GIB),
        count=gpu.count,
        processes=processes,
        flash_attention=flash,
        fused_norms=True,
    )
