"""The optimizers of the installed transformers: the `optim_args` of each, and those that cannot be used."""

from collections.abc import Iterator, Mapping
from typing import Any

from peftcli.nearest import nearest
from peftcli.recipe.argument_values import limit_fault
from peftcli.recipe.problems import KeyPath, choice_text, show

_FLOAT, _WHOLE, _BOOL, _TRUE = "a number", "a whole number", "true or false", "true"
_DTYPES = "float32, float64, bfloat16 or float16"
_TEXT_VALUES = "transformers passes them to the optimizer as strings, which fails; remove optim_args"
_LOW_RANK = {"rank": _WHOLE, "update_proj_gap": _WHOLE, "scale": _FLOAT}
_ADEMAMIX = {
    **dict.fromkeys(("beta1", "beta2", "beta3", "alpha", "eps"), _FLOAT),
    **dict.fromkeys(("t_alpha", "t_beta3"), _WHOLE),
}

OPTIMIZER_ARGUMENTS: Mapping[str, Mapping[str, str]] = {
    "adamw_anyprecision": {
        "use_kahan_summation": _BOOL,
        **dict.fromkeys(("momentum_dtype", "variance_dtype", "compensation_buffer_dtype"), _DTYPES),
    },
    "adamw_torch_4bit": {"bf16_stochastic_round": _BOOL},
    "adamw_torch_8bit": {"bf16_stochastic_round": _BOOL},
    "ademamix": _ADEMAMIX,
    "paged_ademamix": _ADEMAMIX,
    "sgd": {**dict.fromkeys(("momentum", "dampening", "weight_decay"), _FLOAT), "nesterov": _BOOL},
    "adagrad": dict.fromkeys(("lr_decay", "weight_decay", "eps"), _FLOAT),
    "rmsprop": {**dict.fromkeys(("momentum", "alpha", "eps", "weight_decay"), _FLOAT), "centered": _BOOL},
    "galore": {**_LOW_RANK, "proj_type": "std, reverse_std, right, left or full"},
    "apollo": {
        **_LOW_RANK,
        "proj": "random or svd",
        "scale_type": "channel or tensor",
        "proj_type": "std, right or left",
    },
    "grokadamw": dict.fromkeys(
        ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"), _FLOAT
    ),
    "schedule_free": dict.fromkeys(("weight_lr_power", "r"), _FLOAT),
    # transformers converts these with `bool`, which is true for any string.
    "stable_adamw": {"max_lr": _FLOAT, "kahan_sum": _TRUE, "decouple_lr": _TRUE},
}
"""Valid `optim_args` by prefix of the optimizer's name; the longest prefix counts.

Source: the handlers in transformers/trainer_optimizer.py, 5.23, except `block_size` of torchao's optimizers and all
arguments of bitsandbytes' RMSprop, which are passed as strings.
"""
_BACKWARD = "it updates weights during the backward pass, before the gradient of the step can be checked"
IMPOSSIBLE: Mapping[str, str] = {
    "adamw_torch_xla": "it runs on TPUs, and peftcli trains on NVIDIA GPUs and CPUs",
    "adamw_torch_npu_fused": "it runs on Ascend NPUs, and peftcli trains on NVIDIA GPUs and CPUs",
    "lomo": _BACKWARD,
    "adalomo": _BACKWARD,
    **dict.fromkeys(
        (
            *("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"),
            "apollo_adamw_layerwise",
        ),
        _BACKWARD,
    ),
}
"""Optimizers that peftcli does not support, and why."""
TARGETED = ("galore_", "apollo_")
"""Name prefixes of the optimizers that need `optim_target_modules`; others ignore it."""
_SHARES = {name: ((">=", 0), ("<", 1)) for name in ("beta1", "beta2", "beta3")}
_POSITIVE = dict.fromkeys(
    ("rank", "update_proj_gap", "t_alpha", "t_beta3", "eps", "max_lr", "gradient_clipping"), ((">", 0),)
)
_LIMITS: Mapping[str, tuple[tuple[str, float], ...]] = {**_SHARES, **_POSITIVE}


def optimizer_faults(arguments: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Problems with the optimizer in the trainer arguments: the key, and the message."""
    name = str(arguments.get("optim", "adamw_torch_fused"))
    if name in IMPOSSIBLE:
        yield ("optim",), f"trainer.optim: {name} cannot be used: {IMPOSSIBLE[name]}; use adamw_torch"
        return
    targets = arguments.get("optim_target_modules")
    if name.startswith(TARGETED) and not targets:
        yield ("optim",), f"trainer.optim: {name} needs optim_target_modules; add optim_target_modules: all-linear"
    elif targets and not name.startswith(TARGETED):
        text = f"trainer.optim_target_modules has no effect with optim: {name}, only with galore_* and apollo_*"
        yield ("optim_target_modules",), f"{text}; remove it"
    given = arguments.get("optim_args")
    if isinstance(given, str) and given.strip():
        for fault in _argument_faults(name, given):
            yield ("optim_args",), f"trainer.optim_args = {show(given)}: {fault}"


def _argument_faults(optimizer: str, text: str) -> Iterator[str]:
    if optimizer.startswith("rmsprop_bnb"):
        yield _TEXT_VALUES
        return
    pairs = text.replace(" ", "").split(",")
    if any(pair.count("=") != 1 or not all(pair.split("=")) for pair in pairs):
        yield "must be a list of name=value, such as momentum=0.9,nesterov=true"
        return
    given = dict(pair.split("=") for pair in pairs)
    starts = [start for start in OPTIMIZER_ARGUMENTS if optimizer.startswith(start)]
    takes = OPTIMIZER_ARGUMENTS[max(starts, key=len)] if starts else {}
    for name, value in given.items():
        if name not in takes:
            yield _unknown(name, optimizer, list(takes))
        elif not _reads(value, takes[name]):
            yield f"{name} must be {takes[name]}"
        elif takes[name] in (_FLOAT, _WHOLE):
            fault = limit_fault(float(value), _LIMITS.get(name, ((">=", 0),)))
            if fault is not None:
                yield f"{name} {fault}"
    if _is_true(given.get("nesterov")) and not (_number(given, "momentum") > 0 and _number(given, "dampening") == 0):
        yield "nesterov=true needs a momentum greater than 0 and no dampening; add momentum=0.9"


def _unknown(name: str, optimizer: str, takes: list[str]) -> str:
    if not takes:
        return f"{optimizer} has no arguments; remove optim_args"
    near = nearest(name, takes)
    fix = f"did you mean {near}?" if near else f"use {choice_text(takes)}"
    return f"{name} is not an argument of {optimizer}; {fix}"


def _reads(value: str, kind: str) -> bool:
    """Whether transformers can convert a string to a type."""
    if kind in (_FLOAT, _WHOLE):
        try:
            float(value) if kind == _FLOAT else int(value)
        except ValueError:
            return False
        return True
    if kind == _BOOL:
        return value.lower() in ("true", "false", "1", "0")
    return value in kind.replace(" or ", ", ").split(", ")


def _is_true(value: str | None) -> bool:
    return value is not None and value.lower() in ("true", "1")


def _number(given: Mapping[str, str], name: str) -> float:
    value = given.get(name, "0")
    return float(value) if _reads(value, _FLOAT) else 0.0
