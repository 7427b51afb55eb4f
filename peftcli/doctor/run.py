"""Runs all checks that need the libraries, in the order in which they matter for a run."""

import platform
import time
from collections.abc import Iterator

from peftcli.doctor import gpu, quantization, system
from peftcli.doctor.check import FAIL, Check, refused
from peftcli.doctor.hub import check_hub, probe_hub
from peftcli.doctor.recipe import check_recipe
from peftcli.doctor.system import check_session
from peftcli.errors import PeftcliError
from peftcli.model.hardware import probe_machine
from peftcli.plan.machine import Machine
from peftcli.recipe.schema import Recipe
from peftcli.train.deadline import deadline, notebook_limit


def run_checks(recipe: Recipe | None, encodings: dict[str, str]) -> Iterator[Check]:
    """Run all checks of this machine.

    Args:
        recipe: to check as well, None for general checks only.
        encodings: of this process, read before its streams were changed.
    """
    cuda, found = gpu.probe_cuda(), system.probe_host()
    yield gpu.check_gpus(cuda, wanted=not _uses_cpu(recipe))
    machine = None if cuda.problem else probe_machine()
    if machine is not None:
        yield from _device_checks(cuda, machine, recipe)
    yield gpu.check_kernels(*gpu.probe_kernels())
    on_cpu = machine is not None and machine.device == "cpu"
    yield system.check_cores(found, machine.name if machine is not None and on_cpu else platform.machine())
    yield system.check_memory(found)
    yield from system.check_disks()
    hub = probe_hub()
    yield check_hub(hub)
    yield _session_check(recipe)
    yield system.check_encoding(encodings)
    if recipe is not None and machine is not None:
        yield from check_recipe(recipe, machine, hub)


def _device_checks(cuda: gpu.Cuda, machine: Machine, recipe: Recipe | None) -> Iterator[Check]:
    on_cpu = machine.device == "cpu" or _uses_cpu(recipe)
    if cuda.gpus:
        wheel = gpu.check_torch_build(machine, cuda.gpus)
        yield wheel
        if wheel.result != FAIL:
            for index, one in enumerate(cuda.gpus):
                yield gpu.check_matmuls(index, *gpu.try_matmuls(f"cuda:{index}", one.native_bf16))
            yield from gpu.check_several_gpus(cuda.gpus)
        elif not on_cpu:
            return  # without kernels for the GPU every further check would fail
    chosen = gpu.auto_dtype(machine, on_gpu=not on_cpu)
    yield gpu.check_precision(chosen)
    if not on_cpu:
        for number in range(len(cuda.gpus)):
            yield gpu.check_trl_loss(number, gpu.try_trl_loss(number, chosen.value))
    bits = None if recipe is None or recipe.quantization is None else recipe.quantization.bits
    where = "cpu" if on_cpu else "cuda"
    yield quantization.check_4bit(quantization.try_4bit(where, chosen.value), asked=recipe is None or bits == 4)
    if bits == 8:
        yield quantization.check_8bit(quantization.try_8bit(where, chosen.value))


def _uses_cpu(recipe: Recipe | None) -> bool:
    return recipe is not None and bool(recipe.trainer.get("use_cpu"))


def _session_check(recipe: Recipe | None) -> Check:
    now = time.time()
    try:
        until = deadline(now)
    except PeftcliError as problem:
        return refused("session", problem)
    budget = None if recipe is None else recipe.budget.wall_clock
    return check_session(notebook_limit(now=now), until, now, budget=budget, runs=recipe is not None)
