"""Checks of trainer arguments that accept fewer values than their type annotation says."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from peftcli.nearest import nearest
from peftcli.recipe.argument_values import limit_fault, type_error
from peftcli.recipe.library_args import Argument, class_arguments
from peftcli.recipe.messages import choices_text
from peftcli.recipe.problems import KeyPath, show

LARGEST = 2**31 - 1
"""Maximum whole number: counts of rows, steps and seconds are far smaller, and the libraries store some in 32 bits."""
COMPILERS = ("inductor", "cudagraphs", "eager", "aot_eager", "tvm")
"""Backends in both accelerate's DynamoBackend and torch._dynamo.list_backends, without those for TPUs."""
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "lite")
"""Source: torch._inductor.list_mode_options, torch 2.13."""
_CHECKPOINTING = {
    "every_n_layers": Argument("every_n_layers", frozenset({"int"})),
    "offload": Argument("offload", frozenset({"bool"})),
    "use_reentrant": Argument("use_reentrant", frozenset({"bool", "none"})),
    "preserve_rng_state": Argument("preserve_rng_state", frozenset({"bool"})),
    "determinism_check": Argument("determinism_check", frozenset({"str"}), ("default", "none")),
    "debug": Argument("debug", frozenset({"bool"})),
    "early_stop": Argument("early_stop", frozenset({"bool"})),
}
"""Keys of `activation_checkpointing_kwargs` that a recipe can set.

Source: transformers/trainer.py 5.23 (the first two) and torch.utils.checkpoint.checkpoint, torch 2.13.
"""
_NOT_HERE = {
    ("activation_checkpointing_kwargs", "selective"): "TRL's selective checkpointing does not work with PEFT models",
    ("activation_checkpointing_kwargs", "context_fn"): "it is a Python function",
    ("accelerator_config", "use_configured_state"): "peftcli configures accelerate itself",
    ("accelerator_config", "gradient_accumulation_kwargs"): (
        "peftcli runs the micro-batches of a step itself; use gradient_accumulation_steps"
    ),
    ("liger_kernel_config", "fused_linear_cross_entropy"): "TRL computes the loss itself and rejects it",
}
"""Keys of mapping arguments that cannot be set, and why."""
JSON_TEXTS = ("accelerator_config", "activation_checkpointing_kwargs", "deepspeed", "lr_scheduler_kwargs")
"""Mapping arguments that can be JSON strings on the command line of transformers."""


def read_json_text(name: str, value: Any) -> Any:
    """Parse a JSON string as transformers does; return any other value unchanged."""
    if name not in JSON_TEXTS or not isinstance(value, str) or not value.startswith("{"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def value_fault(name: str, value: Any) -> str | None:
    """What is wrong with a value of the right type, or None."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"must be at most {LARGEST}"
    if isinstance(value, str) and name in JSON_TEXTS and name != "deepspeed":
        return "must be a mapping; write its keys in the recipe"
    return _CHECKS[name](value) if name in _CHECKS and value is not None else None


def inner_faults(arguments: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Problems inside arguments that are mappings: the key, and the message."""
    for name, takes in (
        ("activation_checkpointing_kwargs", _CHECKPOINTING),
        ("accelerator_config", _accelerator_config()),
    ):
        given = arguments.get(name)
        if isinstance(given, Mapping) and takes:
            for key, value in given.items():
                yield from _inner_fault(name, str(key), value, takes)
    liger = arguments.get("liger_kernel_config")
    for key, value in liger.items() if isinstance(liger, Mapping) else ():
        yield from _inner_fault("liger_kernel_config", str(key), value, {str(key): Argument(key, frozenset({"bool"}))})


def _inner_fault(name: str, key: str, value: Any, takes: Mapping[str, Argument]) -> Iterator[tuple[KeyPath, str]]:
    path: KeyPath = (name, key)
    why = _NOT_HERE.get((name, key))
    if why is not None:
        if value not in (None, False):
            yield path, f"trainer.{name}.{key} cannot be set: {why}; remove it"
        return
    if key not in takes:
        near = nearest(key, takes)
        fix = f"did you mean {near}?" if near else f"use one of {', '.join(takes)}"
        yield path, f"trainer.{name}.{key} is not a valid key; {fix}"
        return
    fault = type_error(takes[key], value)
    fault = fault or (limit_fault(value, ((">=", 1),)) if key == "every_n_layers" else None)
    if fault is not None:
        yield path, f"trainer.{name}.{key} = {show(value)}: {fault}"


@cache
def _accelerator_config() -> dict[str, Argument]:
    return class_arguments("transformers", "trainer_pt_utils.py", "AcceleratorConfig")


def _debug(value: Any) -> str | None:
    words = value.split() if isinstance(value, str) else value
    if "tpu_metrics_debug" in words:
        return "tpu_metrics_debug needs a TPU, and peftcli trains on NVIDIA GPUs and CPUs; remove it"
    return None if all(word == "underflow_overflow" for word in words) else "must be underflow_overflow"


def _compiler(value: str) -> str | None:
    return None if value.lower() in COMPILERS else choices_text([*COMPILERS], value)


def _pad(value: Any) -> str | None:
    if not isinstance(value, str) or value == "auto":
        return None
    return "must be a whole number or auto" + ("; remove the quotes" if value.isdigit() else "")


def _one_of(*choices: str) -> Callable[[Any], str | None]:
    """A check that a string is one of the choices; other types are checked elsewhere."""

    def check(value: Any) -> str | None:
        return None if not isinstance(value, str) or value in choices else choices_text([*choices], value)

    return check


_CHECKS: Mapping[str, Callable[[Any], str | None]] = {
    "ddp_backend": _one_of("nccl", "gloo", "mpi"),
    "debug": _debug,
    "include_num_input_tokens_seen": _one_of("all", "non_padding", "no"),
    "pad_to_multiple_of": _pad,
    "torch_compile_backend": _compiler,
    "torch_compile_mode": _one_of(*COMPILE_MODES),
}
