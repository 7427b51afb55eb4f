"""The head of a task: its transformers class, its modules, and its initialization.

The running statistics of batch norms stay those of the base, so that a disabled adapter gives the base.
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from peftcli.errors import MachineError
from peftcli.model.files import stored_names
from peftcli.plan.plan import Base
from peftcli.tasks.registry import DEFAULT, TASKS

PROBLEM_TYPES = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
"""Problem types of transformers, by our name."""
POOLER = "pooler"
"""Modules that base checkpoints may lack, such as those of masked language models."""
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "roberta-prelayernorm")
"""Model types whose position ids start after the pad token's id."""


def auto_class(task: str) -> Any:
    """The auto class of transformers for a task."""
    return getattr(transformers, TASKS[task].auto_class)


def label_settings(task: str, labels: tuple[str, ...], problem_type: str | None) -> dict[str, Any]:
    """The configuration values for a model's labels; empty for a language model.

    >>> label_settings("token-classification", ("O", "B-group"), None)["id2label"]
    {0: 'O', 1: 'B-group'}
    """
    if TASKS[task].generates:
        return {}
    settings: dict[str, Any] = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    return settings | ({"problem_type": PROBLEM_TYPES[problem_type]} if problem_type is not None else {})


def build_empty(
    path: str,
    config: PreTrainedConfig,
    task: str = DEFAULT,
    labels: tuple[str, ...] = (),
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build the model of a task on the meta device.

    Raises:
        MachineError: transformers has no such model of this type.
    """
    # A copy, because building a model changes its configuration.
    config = type(config).from_dict(config.to_dict())
    if not TASKS[task].generates:
        config.num_labels = len(labels)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(task).from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError) as problem:
        kind = getattr(config, "model_type", "?")
        raise MachineError(
            f"{path}: transformers has no {TASKS[task].model} of type {kind}; set another model.name"
        ) from problem
    return model


def head_modules(model: PreTrainedModel, task: str, path: str, revision: str | None = None) -> tuple[str, ...]:
    """Names of the modules that are fully trained for a task: those that the bare model or its files lack.

    Args:
        model: of the task, also on the meta device.
        path: of the base, whose files tell whether it has a pooler; if it is not local, it is assumed to have one.
    """
    if TASKS[task].generates:
        return ()
    body = model.base_model_prefix
    parts = [part for name, child in model.named_children() if name != body for part in _parts(name, child)]
    head = [name for name, part in parts if any(True for _ in part.parameters())]
    stored = stored_names(path, revision)
    pooler = getattr(getattr(model, body, None), POOLER, None)
    if pooler is not None and stored is not None:
        names = [f"{POOLER}.{name}" for name, _ in pooler.named_parameters()]
        if not all(any(key.endswith(name) for key in stored) for name in names):
            head.append(f"{body}.{POOLER}")
    return tuple(head)


def _parts(name: str, module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """A module, or the parts of a Sequential: PEFT cannot unload every method next to a trained Sequential."""
    if not isinstance(module, torch.nn.Sequential):
        return [(name, module)]
    return [(f"{name}.{inner}", part) for inner, part in module.named_children()]


def unquantized_modules(base: Base) -> list[str] | None:
    """Modules that are not quantized: those that transformers skips by default, and the head.

    An explicit list replaces that of transformers; None keeps it.
    """
    if TASKS[base.task].generates:
        return None
    trust = base.trust_remote_code
    config = AutoConfig.from_pretrained(base.path, revision=base.revision, trust_remote_code=trust)
    empty = build_empty(base.path, config, base.task, base.labels, trust_remote_code=trust)
    return sorted({*get_keys_to_not_convert(empty), *base.head})


def load_with_head(base: Base, arguments: Mapping[str, Any]) -> PreTrainedModel:
    """Load a base with the head of its task; a missing head is initialized randomly with a fixed seed.

    Args:
        arguments: for `from_pretrained`.

    Raises:
        MachineError: the files lack weights other than those of the head.
    """
    cards = [torch.cuda.current_device()] if base.device == "cuda" else []
    with torch.random.fork_rng(devices=cards):
        torch.manual_seed(base.seed)
        model, said = auto_class(base.task).from_pretrained(
            base.path,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **label_settings(base.task, base.labels, base.problem_type),
            **arguments,
        )
    mismatched = [name if isinstance(name, str) else name[0] for name in said["mismatched_keys"]]
    outside = [name for name in (*said["missing_keys"], *mismatched) if not is_within(name, base.head)]
    if outside:
        raise MachineError(
            f"{base.path}: its files have no matching weights for {', '.join(sorted(outside)[:3])}, which would stay "
            "random; set model.name to a base that has them"
        )
    loaded: PreTrainedModel = model
    return loaded


def positions_of(config: PreTrainedConfig) -> int | None:
    """The maximum sequence length of a model in tokens; None if unknown."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and text.model_type in OFFSET_POSITIONS:
        return int(positions) - int(text.pad_token_id or 0) - 1
    return positions


def is_within(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a name is that of a module or inside one.

    >>> is_within("classifier.weight", ("classifier",)), is_within("classifiers", ("classifier",))
    (True, False)
    """
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a forward pass in training changes a module, such as the running statistics of a batch norm."""
    return isinstance(module, _BatchNorm)


def freeze_statistics(model: nn.Module) -> None:
    """Make each batch norm use the statistics of the base, in training too.

    Then a forward pass does not depend on other rows of its batch, and changes nothing.
    """
    for module in model.modules():
        if keeps_statistics(module):
            # The trainer sets the whole model to training mode before each step.
            module.register_forward_pre_hook(_as_in_evaluation)


def _as_in_evaluation(module: nn.Module, inputs: Any) -> None:
    module.eval()
