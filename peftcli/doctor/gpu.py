"""Checks of the GPUs: what the installed torch can do with them, and whether they compute correctly."""

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
TAKEN_BYTES, TAKEN_SHARE = 1.5 * 2**30, 0.1
"""More of a card than this, in bytes and as a share, is held by another program and not by the driver."""
SIDE = 256
MOST_ERROR = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest relative distance of a product of SIDE terms from the one in float64."""
KERNELS = ("flash_attn", "flash_attn_interface", "liger_kernel", "triton", "kernels")
"""Packages with faster kernels; none of them is needed."""


@dataclass(frozen=True)
class GPU:
    """One graphics card."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int
    native_bf16: bool


@dataclass(frozen=True)
class Cuda:
    """The cards that this process sees, and what stands between them and us.

    Attributes:
        wheel: CUDA version that the installed torch was built with, None for a wheel without CUDA.
        driver: version of the NVIDIA driver, None where none is seen.
        masked: CUDA_VISIBLE_DEVICES hides all cards.
        cards: in the order of their numbers.
        problem: what asking for them raised, empty for nothing.
    """

    wheel: str | None
    driver: str | None
    masked: bool
    cards: tuple[GPU, ...] = ()
    problem: str = ""


def probe_cuda() -> Cuda:
    """Ask torch and the driver."""
    cards: list[GPU] = []
    problem = ""
    try:
        if torch.cuda.is_available():
            cards = [_card(number) for number in range(torch.cuda.device_count())]
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:160]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    masked = visible is not None and visible.strip() in ("", "-1", "NoDevFiles")
    return Cuda(torch.version.cuda, _driver(DRIVER), masked, tuple(cards), problem)


def _card(number: int) -> GPU:
    properties = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    with torch.cuda.device(number):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return GPU(properties.name, (properties.major, properties.minor), total, free, native)


def _driver(file: Path) -> str | None:
    if not file.is_file():
        return None
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", file.read_text(encoding="utf-8", errors="replace"))
    return found[0] if found else "of unknown version"


def check_gpus(cuda: Cuda, *, wanted: bool = True) -> Check:
    """Say which cards there are, and why one that the driver knows cannot be used.

    Args:
        wanted: False for a recipe that asks for the CPU.
    """
    bad = FAIL if wanted else WARN
    if cuda.problem:
        there = f"torch sees a card and cannot ask it: {cuda.problem}"
        return Check("GPU", bad, there, "check with nvidia-smi; end what fills the card, or restart the machine")
    if cuda.cards:
        return _judge_present(cuda)
    if cuda.driver is None:
        return Check("GPU", OK, "none here: runs take the CPU, which is enough for small models and rehearsals")
    if cuda.masked:
        return Check("GPU", WARN, "CUDA_VISIBLE_DEVICES hides it", "unset CUDA_VISIBLE_DEVICES")
    if cuda.wheel is None:
        there = f"NVIDIA driver {cuda.driver} is here, but the installed torch was built without CUDA"
        return Check("GPU", bad, there, "install a torch wheel with CUDA (pytorch.org names the command)")
    there = f"NVIDIA driver {cuda.driver} is here, but torch (CUDA {cuda.wheel}) reaches no card"
    fix = f"check with nvidia-smi; update the driver, or install a torch wheel for an older CUDA than {cuda.wheel}"
    return Check("GPU", bad, there, fix)


def _judge_present(cuda: Cuda) -> Check:
    shown = [
        f"{card.name} (sm_{card.capability[0]}{card.capability[1]}), {size(card.free_bytes)} free of "
        f"{size(card.memory_bytes)}"
        for card in cuda.cards
    ]
    there = f"{'; '.join(shown)}; driver {cuda.driver or 'unknown'}, torch for CUDA {cuda.wheel}"
    for card in cuda.cards:
        taken = card.memory_bytes - card.free_bytes
        if taken > TAKEN_BYTES and taken > TAKEN_SHARE * card.memory_bytes:
            return Check("GPU", WARN, there, f"end what holds {size(taken)} of it (nvidia-smi lists the programs)")
    return Check("GPU", OK, there)


def machine_of(machine: Machine, card: GPU) -> Machine:
    """The machine as if this card were its first."""
    return replace(
        machine,
        name=card.name,
        capability=card.capability,
        native_bf16=card.native_bf16,
        memory_bytes=card.memory_bytes,
    )


def check_torch_build(machine: Machine, cards: Sequence[GPU]) -> Check:
    """Hold the architectures of the torch wheel against every card."""
    try:
        for card in cards:
            check_wheel(machine_of(machine, card))
    except MachineError as problem:
        return refused("kernels", problem)
    return Check("kernels", OK, f"torch has them for every card here ({', '.join(machine.arch_list)})")


def auto_dtype(machine: Machine, *, on_gpu: bool) -> Decision:
    """The dtype that a recipe gets which leaves it to the plan."""
    least = Recipe.model_validate({"name": "any", "model": {"name": "any"}, "dataset": {"path": "any"}, "trainer": {}})
    return choose_dtype(least, machine, on_gpu)


def check_precision(chosen: Decision) -> Check:
    """Say which dtype that is, and why."""
    return Check("precision", OK, f"model.dtype: auto is {chosen.value}: {chosen.reason}")


def check_several_gpus(cards: Sequence[GPU]) -> list[Check]:
    """How to use more than one card; nothing where there is one."""
    if len(cards) < 2:
        return []
    there = f"`peftcli train` shares the rows of a step among all {len(cards)}, --num-processes 1 uses one"
    if len({(card.name, card.memory_bytes) for card in cards}) > 1:
        fix = "choose equal ones with CUDA_VISIBLE_DEVICES, or expect the pace and the room of the smallest"
        return [Check("several GPUs", WARN, f"{there}; they differ", fix)]
    return [Check("several GPUs", OK, there)]


def matmul_error(device: str, dtype: str) -> float:
    """Relative distance of one product on a device from that in float64 on the CPU.

    Raises:
        RuntimeError: the device cannot do it.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SIDE, SIDE, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
    exact = left.double() @ right.double()
    found = (left.to(device) @ right.to(device)).cpu().double()
    return float((found - exact).norm() / exact.norm())


def try_matmuls(device: str, native_bf16: bool) -> tuple[dict[str, float], str]:
    """The error of a product in each dtype that training may use, and what went wrong, empty for nothing."""
    errors: dict[str, float] = {}
    for dtype in ("float32", "float16", *(("bfloat16",) if native_bf16 else ())):
        try:
            errors[dtype] = matmul_error(device, dtype)
        except RuntimeError as problem:
            return errors, f"{dtype}: {' '.join(str(problem).split())[:160]}"
    return errors, ""


def check_matmuls(number: int, errors: dict[str, float], problem: str) -> Check:
    """Whether a card computed what it should.

    Args:
        number: of the card.
        errors: relative distance from the exact product, by dtype.
        problem: what kept it from computing, empty for nothing.
    """
    name = f"arithmetic {number}"
    if problem:
        return Check(name, FAIL, f"a product on card {number} failed: {problem}", "check the driver with nvidia-smi")
    wrong = [f"{dtype} by {error:.2g}" for dtype, error in errors.items() if not error <= MOST_ERROR[dtype]]
    if wrong:
        fix = "restart the machine; if it stays so, the card is faulty: take another"
        return Check(name, FAIL, f"products on card {number} are wrong: {', '.join(wrong)}", fix)
    return Check(name, OK, f"products on card {number} are right in {', '.join(errors)}")


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
    fix = "install a C compiler (apt-get install gcc) and the triton that this torch asks for, or leave it so"
    return Check(name, WARN, found, fix)


def check_kernels(problems: dict[str, str | None], missing: Sequence[str]) -> Check:
    """Which optional packages with faster kernels can be loaded.

    Args:
        problems: of each package that is installed, what importing it raised, None for nothing.
        missing: those that are not installed.
    """
    broken = {name: problem for name, problem in problems.items() if problem is not None}
    if broken:
        there = ", ".join(f"{name} is installed and cannot be loaded ({problem})" for name, problem in broken.items())
        return Check("fast kernels", WARN, there, f"pip uninstall {' '.join(broken)}, or build for this torch")
    here = ", ".join(problems) or "none"
    return Check("fast kernels", OK, f"{here} here; not here and not needed: {', '.join(missing) or 'none'}")


def probe_kernels() -> tuple[dict[str, str | None], list[str]]:
    """Import those optional packages that are installed."""
    here = [name for name in KERNELS if importlib.util.find_spec(name) is not None]
    return {name: import_problem(name) for name in here}, [name for name in KERNELS if name not in here]
