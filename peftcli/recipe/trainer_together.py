"""Rules between trainer arguments: what one of them needs of the others, and what does nothing beside them."""

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
    """Steps between two lines of the log where a recipe does not say: about 20 lines, at most 10 steps apart."""
    steps = arguments.get("max_steps")
    return max(1, min(10, steps // 20)) if isinstance(steps, int) and steps > 0 else 10


def save_strategy(arguments: Mapping[str, Any]) -> str:
    """When the trainer saves on its own; peftcli keeps checkpoints by the clock besides."""
    default = "steps" if "save_steps" in arguments else "no"
    return str(arguments.get("save_strategy", default))


def together_faults(arguments: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """What is wrong between some trainer arguments: the key, and the sentence.

    Args:
        arguments: of one training, under their installed names, each with a value that it may have.
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
        text = "trainer.activation_checkpointing_kwargs does nothing with activation_checkpointing: false; remove one"
        yield ("activation_checkpointing_kwargs",), text
    if arguments.get("liger_kernel_config") and not arguments.get("use_liger_kernel"):
        yield ("liger_kernel_config",), "trainer.liger_kernel_config does nothing without use_liger_kernel; remove it"
    yield from _compile_faults(arguments)


def _best_faults(arguments: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    evaluates, saves = str(arguments.get("eval_strategy", "no")), save_strategy(arguments)
    if saves == "best" and evaluates == "no":
        text = "trainer.save_strategy: best keeps the step with the lowest evaluation loss; add eval_strategy: steps"
        yield ("save_strategy",), text
    if not arguments.get("load_best_model_at_end") or saves == "best":
        return
    name = "trainer.load_best_model_at_end"
    if evaluates == "no" or saves != evaluates:
        fix = "add eval_strategy: epoch and save_strategy: epoch"
        if evaluates != "no":
            fix = f"write save_strategy: {evaluates}"
        text = f"{name} needs the same eval_strategy and save_strategy, and these are {evaluates} and {saves}; {fix}"
        yield ("load_best_model_at_end",), text
    elif evaluates == "steps":
        logged = arguments.get("logging_steps", default_logging_steps(arguments))
        every, kept = arguments.get("eval_steps") or logged, arguments.get("save_steps", 500)
        if (every < 1) != (kept < 1) or round(kept * 1_000_000) % max(1, round(every * 1_000_000)):
            text = f"{name} needs save_steps ({kept:g}) to be a multiple of eval_steps ({every:g})"
            yield ("load_best_model_at_end",), f"{text}; write save_steps: {every:g}"


def _compile_faults(arguments: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    for name in _COMPILE:
        if arguments.get(name) is not None and arguments.get("torch_compile") is False:
            yield (name,), f"trainer.{name} does nothing with torch_compile: false; remove one of the two"
    backend = arguments.get("torch_compile_backend")
    if arguments.get("torch_compile_mode") is not None and str(backend or "inductor").lower() != "inductor":
        text = f"trainer.torch_compile_mode belongs to the backend inductor, and torch_compile_backend is {backend}"
        yield ("torch_compile_mode",), f"{text}; remove one of the two"


def implied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that others switch on in the libraries, so that everything below sees them."""
    compiles = any(arguments.get(name) is not None for name in _COMPILE)
    return {"torch_compile": True} if compiles and "torch_compile" not in arguments else {}


def deprecations(arguments: Mapping[str, Any], task: Any) -> Iterator[tuple[KeyPath, str]]:
    """What the next major version of a library takes away: the key, and the notice.

    Source: the warnings of trl/trainer/sft_trainer.py, 1.16.
    """
    if arguments.get("use_liger_kernel"):
        text = "trainer.use_liger_kernel is deprecated and goes with TRL 2.0, which takes kernels from the Hub instead "
        yield ("use_liger_kernel",), text + "(use_kernels); remove it to be ready for that"
    if task in (None, *_GENERATING) and arguments.get("label_smoothing_factor"):
        text = "trainer.label_smoothing_factor is deprecated for language models and goes with TRL 2.0, with nothing "
        yield ("label_smoothing_factor",), text + "in its place; until then each step runs an extra forward pass"
