"""Checks of the GPUs: whether the installed torch supports them, and whether they compute correctly."""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from peftcli.doctor.check import FAIL, OK, WARN, Check, refused
from peftcli.doctor.packages import import_problem
from peftcli.errors import MachineError
from peftcli.plan.choices import check_wheel, choose_dtype
from peftcli.plan.machine import Machine
from peftcli.plan.plan import Decision
from peftcli.recipe.schema import Recipe
from peftcli.report.format import size

DRIVER = Path("/proc/driver/nvidia/version")
USED_BYTES, USED_SHARE = 1.5 * 2**30, 0.1
"""If more GPU memory than this is in use, in bytes and as a share, another program uses it, not only the driver."""
SIDE = 256
MOST_ERROR = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Maximum relative error of a matmul with SIDE terms, compared with float64."""
KERNELS = ("flash_attn", "flash_attn_interface", "liger_kernel", "triton", "kernels")
"""Optional packages with faster kernels."""


@dataclass(frozen=True)
class GPU:
    """One GPU."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int
    native_bf16: bool


@dataclass(frozen=True)
class Cuda:
    """The GPUs that this process can see, and why it cannot see others.

    Attributes:
        wheel: CUDA version that the installed torch was built with, None for a wheel without CUDA.
        driver: version of the NVIDIA driver, None if there is none.
        masked: whether CUDA_VISIBLE_DEVICES hides all GPUs.
        gpus: in the order of their indices.
        problem: the error when querying them, empty for none.
    """

    wheel: str | None
    driver: str | None
    masked: bool
    gpus: tuple[GPU, ...] = ()
    problem: str = ""


def probe_cuda() -> Cuda:
    """Query torch and the driver."""
    gpus: list[GPU] = []
    problem = ""
    try:
        if torch.cuda.is_available():
            gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:160]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    masked = visible is not None and visible.strip() in ("", "-1", "NoDevFiles")
    return Cuda(torch.version.cuda, _driver(DRIVER), masked, tuple(gpus), problem)


def _gpu(index: int) -> GPU:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    with torch.cuda.device(index):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return GPU(properties.name, (properties.major, properties.minor), total, free, native)


def _driver(file: Path) -> str | None:
    if not file.is_file():
        return None
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", file.read_text(encoding="utf-8", errors="replace"))
    return found[0] if found else "of unknown version"


def check_gpus(cuda: Cuda, *, wanted: bool = True) -> Check:
    """List the GPUs, or say why a GPU with a driver cannot be used.

    Args:
        wanted: False for a recipe that uses the CPU.
    """
    bad = FAIL if wanted else WARN
    if cuda.problem:
        found = f"torch sees a GPU but cannot query it: {cuda.problem}"
        fix = "check with nvidia-smi; end the programs that use its memory, or restart the machine"
        return Check("GPU", bad, found, fix)
    if cuda.gpus:
        return _check_present(cuda)
    if cuda.driver is None:
        return Check("GPU", OK, "none: runs use the CPU, which is enough for small models and smoke runs")
    if cuda.masked:
        return Check("GPU", WARN, "CUDA_VISIBLE_DEVICES hides all GPUs", "unset CUDA_VISIBLE_DEVICES")
    if cuda.wheel is None:
        found = f"NVIDIA driver {cuda.driver} is installed, but the installed torch was built without CUDA"
        return Check("GPU", bad, found, "install a torch wheel with CUDA (see pytorch.org for the command)")
    found = f"NVIDIA driver {cuda.driver} is installed, but torch (CUDA {cuda.wheel}) finds no GPU"
    fix = f"check with nvidia-smi; update the driver, or install a torch wheel for an older CUDA than {cuda.wheel}"
    return Check("GPU", bad, found, fix)


def _check_present(cuda: Cuda) -> Check:
    shown = [
        f"{gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]}), {size(gpu.free_bytes)} free of "
        f"{size(gpu.memory_bytes)}"
        for gpu in cuda.gpus
    ]
    found = f"{'; '.join(shown)}; driver {cuda.driver or 'unknown'}, torch for CUDA {cuda.wheel}"
    for gpu in cuda.gpus:
        used = gpu.memory_bytes - gpu.free_bytes
        if used > USED_BYTES and used > USED_SHARE * gpu.memory_bytes:
            return Check("GPU", WARN, found, f"end the programs that use {size(used)} of it (see nvidia-smi)")
    return Check("GPU", OK, found)


def machine_of(machine: Machine, gpu: GPU) -> Machine:
    """The machine with this GPU as the first one."""
    return replace(
        machine,
        name=gpu.name,
        capability=gpu.capability,
        native_bf16=gpu.native_bf16,
        memory_bytes=gpu.memory_bytes,
    )


def check_torch_build(machine: Machine, gpus: Sequence[GPU]) -> Check:
    """Check that the torch wheel has kernels for the architecture of every GPU."""
    try:
        for gpu in gpus:
            check_wheel(machine_of(machine, gpu))
    except MachineError as problem:
        return refused("kernels", problem)
    return Check("kernels", OK, f"torch has kernels for every GPU ({', '.join(machine.arch_list)})")


def auto_dtype(machine: Machine, *, on_gpu: bool) -> Decision:
    """The dtype that the plan chooses for `model.dtype: auto`."""
    sections = {"name": "any", "model": {"name": "any"}, "dataset": {"path": "any"}, "trainer": {}}
    return choose_dtype(Recipe.model_validate(sections), machine, on_gpu)


def check_precision(chosen: Decision) -> Check:
    """Show the dtype, with the reason."""
    return Check("precision", OK, f"model.dtype: auto is {chosen.value}: {chosen.reason}")


def check_several_gpus(gpus: Sequence[GPU]) -> list[Check]:
    """How to use more than one GPU; no check if there is only one."""
    if len(gpus) < 2:
        return []
    found = f"`peftcli train` splits each batch across all {len(gpus)} GPUs; --num-processes 1 uses one"
    if len({(gpu.name, gpu.memory_bytes) for gpu in gpus}) > 1:
        fix = (
            "select equal ones with CUDA_VISIBLE_DEVICES; otherwise speed and memory will be those of the smallest GPU"
        )
        return [Check("multiple GPUs", WARN, f"{found}; they differ", fix)]
    return [Check("multiple GPUs", OK, found)]


def matmul_error(device: str, dtype: str) -> float:
    """Relative error of a matmul on a device, compared with float64 on the CPU.

    Raises:
        RuntimeError: the matmul fails on the device.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SIDE, SIDE, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
    exact = left.double() @ right.double()
    computed = (left.to(device) @ right.to(device)).cpu().double()
    return float((computed - exact).norm() / exact.norm())


def try_matmuls(device: str, native_bf16: bool) -> tuple[dict[str, float], str]:
    """The error of a matmul in each dtype that training may use, and a failure if there was one, else empty."""
    errors: dict[str, float] = {}
    for dtype in ("float32", "float16", *(("bfloat16",) if native_bf16 else ())):
        try:
            errors[dtype] = matmul_error(device, dtype)
        except RuntimeError as problem:
            return errors, f"{dtype}: {' '.join(str(problem).split())[:160]}"
    return errors, ""


def check_matmuls(index: int, errors: dict[str, float], problem: str) -> Check:
    """Whether a GPU computes correctly.

    Args:
        index: of the GPU.
        errors: relative error by dtype.
        problem: the failure, empty for none.
    """
    name = f"matmul {index}"
    if problem:
        return Check(name, FAIL, f"a matmul on GPU {index} failed: {problem}", "check the driver with nvidia-smi")
    wrong = [f"{dtype} by {error:.2g}" for dtype, error in errors.items() if not error <= MOST_ERROR[dtype]]
    if wrong:
        fix = "restart the machine; if it happens again, the GPU is faulty: use another one"
        return Check(name, FAIL, f"matmuls on GPU {index} are wrong: {', '.join(wrong)}", fix)
    return Check(name, OK, f"matmuls on GPU {index} are correct in {', '.join(errors)}")


def try_trl_loss(number: int, dtype: str) -> str | None:
    """How TRL's loss fails on a GPU in some dtype; None where it gives what it should.

    Args:
        number: of the GPU.
    """
    # It brings TRL, which need not be importable for the checks before.
    from peftcli.model.fused_loss import trl_loss_problem
    from peftcli.model.load import DTYPES

    return trl_loss_problem(torch.device("cuda", number), DTYPES[dtype])


def check_trl_loss(number: int, problem: str | None) -> Check:
    """Whether the loss of a language model is computed by TRL's Triton kernels."""
    name = f"loss kernel {number}"
    if problem is None:
        return Check(name, OK, f"TRL's fused loss on GPU {number} gives the values and gradients of float32")
    found = f"TRL's fused loss on GPU {number} fails ({problem}); training uses another one with the same values"
    fix = "install a C compiler (apt-get install gcc) and the triton that this torch asks for, or keep that one"
    return Check(name, WARN, found, fix)


def check_kernels(problems: dict[str, str | None], missing: Sequence[str]) -> Check:
    """Which optional packages with faster kernels can be imported.

    Args:
        problems: the import error of each installed package, None for none.
        missing: packages that are not installed.
    """
    broken = {name: problem for name, problem in problems.items() if problem is not None}
    if broken:
        found = ", ".join(f"{name} is installed but cannot be imported ({problem})" for name, problem in broken.items())
        return Check("fast kernels", WARN, found, f"pip uninstall {' '.join(broken)}, or build it for this torch")
    installed = ", ".join(problems) or "none"
    return Check("fast kernels", OK, f"installed: {installed}; optional and missing: {', '.join(missing) or 'none'}")


def probe_kernels() -> tuple[dict[str, str | None], list[str]]:
    """Import the optional packages that are installed."""
    installed = [name for name in KERNELS if importlib.util.find_spec(name) is not None]
    return {name: import_problem(name) for name in installed}, [name for name in KERNELS if name not in installed]
