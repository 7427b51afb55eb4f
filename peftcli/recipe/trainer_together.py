"""Rules between trainer arguments: arguments that need others, and arguments without effect."""

from collections.abc import Iterator, Mapping
from typing import Any

from peftcli.recipe.optimizers import optimizer_faults
from peftcli.recipe.problems import KeyPath
from peftcli.recipe.schedulers import scheduler_faults
from peftcli.recipe.trainer_values import inner_faults
from peftcli.tasks.registry import TASKS

_WORKERS = ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context")
_GENERATING = tuple(task.name for task in TASKS.values() if task.generates)
_COMPILE = ("torch_compile_backend", "torch_compile_mode")


def default_logging_steps(arguments: Mapping[str, Any]) -> int:
    """Default number of steps between log lines: about 20 lines, at most 10 steps apart."""
    steps = arguments.get("max_steps")
    return max(1, min(10, steps // 20)) if isinstance(steps, int) and steps > 0 else 10


def save_strategy(arguments: Mapping[str, Any]) -> str:
    """When the trainer saves checkpoints; peftcli also saves them by time."""
    default = "steps" if "save_steps" in arguments else "no"
    return str(arguments.get("save_strategy", default))


def together_faults(arguments: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Conflicts between trainer arguments: the key, and the message.

    Args:
        arguments: of one training, with their current names and valid values.
    """
    yield from scheduler_faults(arguments)
    yield from optimizer_faults(arguments)
    yield from inner_faults(arguments)
    yield from _best_faults(arguments)
    for name in _WORKERS:
        if arguments.get(name) and not arguments.get("dataloader_num_workers"):
            text = f"trainer.{name} needs worker processes; add dataloader_num_workers: 1 or more, or remove it"
            yield (name,), text
    if arguments.get("activation_checkpointing") is False and arguments.get("activation_checkpointing_kwargs"):
        text = "trainer.activation_checkpointing_kwargs has no effect with activation_checkpointing: false; remove one"
        yield ("activation_checkpointing_kwargs",), text
    if arguments.get("liger_kernel_config") and not arguments.get("use_liger_kernel"):
        yield ("liger_kernel_config",), "trainer.liger_kernel_config has no effect without use_liger_kernel; remove it"
    yield from _compile_faults(arguments)


def _best_faults(arguments: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    evaluates, saves = str(arguments.get("eval_strategy", "no")), save_strategy(arguments)
    if saves == "best" and evaluates == "no":
        text = "trainer.save_strategy: best saves the best evaluated step; add eval_strategy: steps"
        yield ("save_strategy",), text
    if not arguments.get("load_best_model_at_end") or saves == "best":
        return
    name = "trainer.load_best_model_at_end"
    if evaluates == "no" or saves != evaluates:
        fix = "add eval_strategy: epoch and save_strategy: epoch"
        if evaluates != "no":
            fix = f"set save_strategy: {evaluates}"
        text = f"{name} needs equal eval_strategy and save_strategy, but these are {evaluates} and {saves}; {fix}"
        yield ("load_best_model_at_end",), text
    elif evaluates == "steps":
        logged = arguments.get("logging_steps", default_logging_steps(arguments))
        eval_steps, save_steps = arguments.get("eval_steps") or logged, arguments.get("save_steps", 500)
        remainder = round(save_steps * 1_000_000) % max(1, round(eval_steps * 1_000_000))
        if (eval_steps < 1) != (save_steps < 1) or remainder:
            text = f"{name} needs save_steps ({save_steps:g}) to be a multiple of eval_steps ({eval_steps:g})"
            yield ("load_best_model_at_end",), f"{text}; set save_steps: {eval_steps:g}"


def _compile_faults(arguments: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    for name in _COMPILE:
        if arguments.get(name) is not None and arguments.get("torch_compile") is False:
            yield (name,), f"trainer.{name} has no effect with torch_compile: false; remove one of the two"
    backend = arguments.get("torch_compile_backend")
    if arguments.get("torch_compile_mode") is not None and str(backend or "inductor").lower() != "inductor":
        text = f"trainer.torch_compile_mode is for the backend inductor, but torch_compile_backend is {backend}"
        yield ("torch_compile_mode",), f"{text}; remove one of the two"


def implied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that the libraries enable because of others; set explicitly, so that all other code sees them."""
    compiles = any(arguments.get(name) is not None for name in _COMPILE)
    return {"torch_compile": True} if compiles and "torch_compile" not in arguments else {}


def deprecations(arguments: Mapping[str, Any], task: Any) -> Iterator[tuple[KeyPath, str]]:
    """Arguments that the next major version of a library removes: the key, and the notice.

    Source: the warnings of trl/trainer/sft_trainer.py, 1.16.
    """
    if arguments.get("use_liger_kernel"):
        text = "trainer.use_liger_kernel is deprecated and will be removed in TRL 2.0, which uses kernels from the Hub "
        yield ("use_liger_kernel",), text + "instead (use_kernels); remove it to be ready for that"
    if task in (None, *_GENERATING) and arguments.get("label_smoothing_factor"):
        text = (
            "trainer.label_smoothing_factor is deprecated for language models and will be removed in TRL 2.0 without "
        )
        yield ("label_smoothing_factor",), text + "a replacement; until then each step runs an extra forward pass"
