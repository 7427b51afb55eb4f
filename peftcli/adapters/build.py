"""Builds the PEFT configuration from the adapter section of a recipe."""

import inspect
from typing import Any

import peft
from peft import PeftConfig

from peftcli.adapters.register import own_config
from peftcli.methods.base import Method
from peftcli.methods.registry import METHODS
from peftcli.plan.adalora import first_rank
from peftcli.recipe.schema import AdapterSection
from peftcli.tasks.registry import TASKS

NESTED = {"eva_config": peft.EvaConfig}
"""Arguments that are a mapping in a recipe and an object in PEFT."""
ENDLESS = 10**9
"""Steps of AdaLoRA's schedule until the trainer knows the real number."""


def peft_config(adapter: AdapterSection, task: str, *, tokenizer: str | None = None) -> PeftConfig:
    """The PEFT configuration of an adapter section.

    Args:
        adapter: from a plan, with targets as names or `all-linear`.
        tokenizer: path of the base model's tokenizer, to initialize a soft prompt from a text; None for random
            initialization.

    Raises:
        ValueError: PEFT rejects a value; the message is PEFT's.
    """
    method = METHODS[adapter.method]
    config_class = _config_class(method)
    values: dict[str, Any] = {"task_type": TASKS[task].peft_type}
    values |= {name: value for name, value in method.defaults.items() if name not in ("r", "alpha", "dropout")}
    values |= {argument: getattr(adapter, key) for key, argument in method.argument_names.items()}
    ours = () if method.peft_module is None else method.arguments
    values |= {name: _plain(name, value) for name, value in adapter.arguments.items() if name not in ours}
    values |= _shared(adapter, inspect.signature(config_class).parameters)
    if values.get("init_lora_weights") not in (None, True, False, "eva", "gaussian", "orthogonal", "mica"):
        values["init_lora_weights"] = True  # the trainer initializes the adapter; PEFT would change the base weights
    if method.allocates_ranks:
        values |= _schedule(adapter)
    values |= _prompt_init(values, tokenizer)
    config: PeftConfig = config_class(**values)
    return config


def _config_class(method: Method) -> type[PeftConfig]:
    found: type[PeftConfig] = (
        getattr(peft, method.config) if method.peft_module is not None else own_config(method.config)
    )
    return found


def _plain(name: str, value: Any) -> Any:
    return NESTED[name](**value) if name in NESTED and isinstance(value, dict) else value


def _shared(adapter: AdapterSection, takes: Any) -> dict[str, Any]:
    """The keys that the schema has for many methods, as far as this method has them."""
    targets, saved = adapter.target_modules, adapter.modules_to_save
    values: dict[str, Any] = {
        "target_modules": targets if targets is None or isinstance(targets, str) else list(targets),
        "modules_to_save": None if saved is None else list(saved),
        "bias": adapter.bias,
    }
    if METHODS[adapter.method].is_lora:
        values |= {"use_rslora": adapter.use_rslora, "use_dora": adapter.use_dora}
    return {name: value for name, value in values.items() if name in takes}


def _schedule(adapter: AdapterSection) -> dict[str, Any]:
    """A placeholder schedule; the trainer sets the steps when it knows their number."""
    return {"init_r": first_rank(adapter), "total_step": ENDLESS, "tinit": 0, "tfinal": 0}


def _prompt_init(values: dict[str, Any], tokenizer: str | None) -> dict[str, Any]:
    from_text = values.get("prompt_tuning_init") == "TEXT"
    if from_text and tokenizer is None:
        return {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None}
    return {"tokenizer_name_or_path": tokenizer} if from_text else {}
