"""What trainer arguments require of the machine and of installed packages, beyond the decisions of a plan."""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from peftcli.errors import MachineError
from peftcli.plan.choices import choose_device
from peftcli.plan.machine import Machine
from peftcli.recipe.schema import Recipe
from peftcli.recipe.stages import stage_recipes

OPTIMIZER_PACKAGES = {
    "galore_": "galore_torch",
    "apollo_": "apollo_torch",
    "grokadamw": "grokadamw",
    "schedule_free_": "schedulefree",
    "stable_adamw": "optimi",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "adamw_anyprecision": "torchdistx",
    "adamw_apex_fused": "apex",
}
"""The package that an optimizer of the trainer imports, by the prefix of its name.

Source: transformers/trainer_optimizer.py, 5.23.
"""
PIP_NAMES = {
    "galore_torch": "galore-torch",
    "apollo_torch": "apollo-torch",
    "optimi": "torch-optimi",
    "liger_kernel": "liger-kernel",
}
"""Names on PyPI that differ from the import name."""
TRACKER_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}
"""Packages of a tracker (any one is enough), if they differ from the tracker's name."""
TF32 = (8, 0)
"""First compute capability with TF32: Ampere. Source: transformers/utils/import_utils.py, is_torch_tf32_available."""
TRITON = (7, 0)
"""First compute capability that triton compiles for. Source: torch/utils/_triton.py and the README of triton."""


def check_packages(recipe: Recipe) -> None:
    """Check that the packages that a recipe needs are installed.

    Raises:
        MachineError: at least one is missing; the message lists all.
    """
    _raise_all(dict.fromkeys(line for stage in stage_recipes(recipe) for line in _missing_packages(stage)))


def check_hardware(recipe: Recipe, machine: Machine) -> None:
    """Check that a machine supports the trainer arguments of a recipe.

    Args:
        recipe: of one stage.
        machine: this one, or that of `--gpu`.

    Raises:
        MachineError: at least one argument is not supported; the message lists all.
    """
    on_gpu = choose_device(recipe, machine).value == "cuda"
    capability = machine.capability or (0, 0)
    found = machine.label if on_gpu else "a CPU" if machine.device == "cpu" else "a CPU (trainer.use_cpu)"
    lines = []
    for name, (least, why) in gpu_arguments(recipe.trainer).items():
        if not on_gpu or capability < least:
            needed = "a CUDA GPU" + (f" of sm_{least[0]}{least[1]} or later" if least > (0, 0) else "")
            lines.append(f"trainer.{name} needs {needed} ({why}), but this is {found}; remove it, or use such a GPU")
    _raise_all(lines)


def gpu_arguments(trainer: Mapping[str, Any]) -> dict[str, tuple[tuple[int, int], str]]:
    """Trainer arguments that need a GPU, each with the minimum capability and the reason."""
    kwargs = trainer.get("activation_checkpointing_kwargs") or {}
    compiler = str(trainer.get("torch_compile_backend") or "inductor").lower()
    any_gpu = (0, 0)
    found = {
        "tf32: true": (trainer.get("tf32"), TF32, "for TF32 matmuls"),
        "activation_offloading: true": (trainer.get("activation_offloading"), any_gpu, "it moves activations off it"),
        "activation_checkpointing_kwargs.offload: true": (
            kwargs.get("offload"),
            any_gpu,
            "it moves activations off it",
        ),
        "use_liger_kernel: true": (trainer.get("use_liger_kernel"), TRITON, "for triton's kernels"),
        "deepspeed": (trainer.get("deepspeed"), any_gpu, "DeepSpeed is not supported on a CPU"),
        "ddp_backend: nccl": (trainer.get("ddp_backend") == "nccl", any_gpu, "NCCL connects GPUs"),
        "torch_compile_backend: cudagraphs": (compiler == "cudagraphs", any_gpu, "it records CUDA graphs"),
    }
    return {name: (least, why) for name, (asked, least, why) in found.items() if asked}


def _missing_packages(recipe: Recipe) -> Iterator[str]:
    trainer, optimizer = recipe.trainer, str(recipe.trainer.get("optim", ""))
    for start, package in OPTIMIZER_PACKAGES.items():
        if optimizer.startswith(start) and find_spec(package) is None:
            yield _without(f"trainer.optim: {optimizer}", package, "set adamw_torch")
    if trainer.get("use_liger_kernel") and find_spec("liger_kernel") is None:
        yield _without("trainer.use_liger_kernel: true", "liger_kernel", "remove it")
    if trainer.get("deepspeed") and find_spec("deepspeed") is None:
        yield _without("trainer.deepspeed", "deepspeed", "remove it; performance.sharding: full also shards the base")
    if str(trainer.get("torch_compile_backend") or "").lower() == "tvm" and find_spec("tvm") is None:
        yield _without("trainer.torch_compile_backend: tvm", "tvm", "set inductor")
    for tracker in recipe.report.trackers:
        packages = TRACKER_PACKAGES.get(tracker, (tracker,))
        if all(find_spec(package) is None for package in packages):
            yield _without(f"report.trackers: {tracker}", packages[0], "remove it there")


def _without(what: str, package: str, otherwise: str) -> str:
    name = PIP_NAMES.get(package, package)
    return f"{what} needs the package {package}, which is not installed; pip install {name}, or {otherwise}"


def _raise_all(found: Mapping[str, Any] | list[str]) -> None:
    if found:
        raise MachineError("\n  ".join(found))
