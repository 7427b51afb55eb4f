"""Errors of the libraries that are caused by a trainer argument, reported as errors of the recipe."""

import importlib.metadata
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peftcli.errors import MachineError, PeftcliError, RecipeError
from peftcli.recipe.problems import hide_secrets, printable, show

LONGEST = 400
"""Maximum characters of a library's message to show."""
READERS: Mapping[str, tuple[str, ...]] = {
    "create_scheduler": ("lr_scheduler_type", "lr_scheduler_kwargs"),
    "create_optimizer": ("optim", "optim_args", "optim_target_modules"),
    "get_optimizer_cls_and_kwargs": ("optim", "optim_args", "optim_target_modules"),
    "_get_dataloader": (
        *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers"),
        *("dataloader_multiprocessing_context", "dataloader_pin_memory", "dataloader_in_order"),
        *("train_sampling_strategy", "accelerator_config"),
    ),
    "create_accelerator_and_postprocess": ("accelerator_config", "deepspeed"),
    "activation_checkpointing_enable": ("activation_checkpointing", "activation_checkpointing_kwargs"),
    "apply_liger_kernel": ("use_liger_kernel", "liger_kernel_config"),
    "activate_neftune": ("neftune_noise_alpha",),
    "_compile": ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    "compile_fx": ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    "save_on_cpu": ("activation_checkpointing_kwargs", "activation_offloading"),
}
"""Functions of the libraries that read trainer arguments, whose errors may not name the argument.

Source: transformers/trainer.py 5.23, torch/_dynamo, torch/utils/checkpoint.py 2.13.
"""


@contextmanager
def naming_arguments(given: Mapping[str, Any], *, only: bool = False) -> Iterator[None]:
    """Turn an error caused by a trainer argument into one that names the argument; other errors pass through.

    Args:
        given: the trainer arguments of the recipe.
        only: the code inside only reads arguments, so that any error is caused by one of them.

    Raises:
        MachineError: a package that the argument needs is not installed.
        RecipeError: the libraries reject the argument.
    """
    try:
        yield
    except (PeftcliError, OSError, MemoryError):
        raise
    except Exception as problem:
        names = arguments_behind(problem, given) or (list(given) if only else [])
        if not names:
            raise
        missing = isinstance(problem, ImportError | importlib.metadata.PackageNotFoundError)
        message = _message(names, given, problem)
        raise (MachineError(message) if missing else RecipeError(message)) from problem


def arguments_behind(problem: BaseException, given: Mapping[str, Any]) -> list[str]:
    """The arguments that an error names or that were being read; names in the message take precedence.

    Args:
        given: the trainer arguments of the recipe.
    """
    text = str(problem)
    named = [name for name in given if _names(text, name)]
    if named:
        return named
    frames = {frame.name for frame in traceback.extract_tb(problem.__traceback__)}
    read = {name for function in frames & READERS.keys() for name in READERS[function]}
    return [name for name in given if name in read]


def _names(text: str, name: str) -> bool:
    """Whether a message names an argument; a plain word such as `debug` must be marked as a name."""
    if "_" in name:
        return re.search(rf"(?<!\w){name}(?!\w)", text) is not None
    return re.search(rf"(?:--|args\.|[`'\"]){name}(?:[`'\"=\s]|$)", text) is not None


def _message(names: list[str], given: Mapping[str, Any], problem: Exception) -> str:
    values = ", ".join(f"trainer.{name} = {show(given[name])}" for name in names)
    text = hide_secrets(printable(" ".join(str(problem).split()) or type(problem).__name__, LONGEST))
    fix = "change or remove it" if len(names) == 1 else "change or remove one of them"
    return f"{values}: rejected by the libraries: {text}\n{fix}; --traceback shows the full trace"
