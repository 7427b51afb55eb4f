"""Trainer arguments that the libraries accept but do not use, because of other arguments."""

from collections.abc import Iterator, Mapping
from typing import Any

from peftcli.recipe.problems import KeyPath

_OF_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_NOT_ADAM = (
    *("sgd", "adagrad", "rmsprop", "adafactor"),
    *("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "grokadamw"),
)
"""Optimizers whose handlers do not pass the arguments of Adam on. Source: transformers/trainer_optimizer.py, 5.23."""
_STEPS = (("eval_steps", "eval_strategy"), ("save_steps", "save_strategy"), ("logging_steps", "logging_strategy"))


def without_effect(arguments: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Arguments without effect: the key, and the notice.

    Args:
        arguments: of one training, with their current names and valid values.
    """
    for name, text in _idle(arguments):
        yield (name,), f"trainer.{name} has no effect {text}"


def _idle(arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for steps, strategy in _STEPS:
        chosen = arguments.get(strategy)
        if arguments.get(steps) is not None and chosen not in (None, "steps"):
            yield steps, f"with {strategy}: {chosen}; set {strategy}: steps, or remove it"
    for name in ("eval_steps", "eval_delay"):
        if arguments.get(name) and "eval_strategy" not in arguments:
            yield name, "without eval_strategy; add eval_strategy: steps, or remove it"
    if arguments.get("num_train_epochs") is not None and (arguments.get("max_steps") or -1) > 0:
        yield "num_train_epochs", f"with max_steps: {arguments['max_steps']}, which ends the training; remove one"
    if arguments.get("packing_strategy") and not (arguments.get("packing") or arguments.get("eval_packing")):
        yield "packing_strategy", "without packing: true; add that, or remove it"
    optimizer = arguments.get("optim")
    if optimizer in _NOT_ADAM:
        for name in _OF_ADAM:
            if arguments.get(name) is not None:
                yield name, f"with optim: {optimizer}; remove it, or set optim: adamw_torch"
