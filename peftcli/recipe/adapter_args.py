"""Checks the `adapter` section: shared keys, and the arguments of the method."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from peftcli.methods.base import ARGUMENT_NAMES, Method
from peftcli.methods.registry import METHODS
from peftcli.recipe.aliases import NAME_ALIASES
from peftcli.recipe.argument_values import nested_type_error, type_error
from peftcli.recipe.library_args import CLOSED, homes_of, method_arguments, recipe_arguments
from peftcli.recipe.messages import unknown_key
from peftcli.recipe.problems import Problems, choice_text, dotted, show
from peftcli.recipe.schema import AdapterSection, QuantizationSection
from peftcli.recipe.yaml import Tree
from peftcli.tasks.registry import DEFAULT

FIELDS = tuple(key for key in AdapterSection.model_fields if key != "arguments")
_LACKS = {"r": "has no rank", "alpha": "has no scaling factor", "dropout": "has no dropout"}
UNQUANTIZED_INITS = {
    "mica": "it is computed from unquantized weights",
    "orthogonal": "it uses the dtype of the weights, which must be a floating-point type",
}
"""Initializations of LoRA that need an unquantized base model."""
MOST_METHODS = 4
"""Maximum number of methods to list for an argument."""


def read_adapter(tree: Tree, trainer: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """Check the section and sort it into the schema's keys and the method's arguments.

    Args:
        trainer: the checked arguments of the trainer section; some exclude certain methods.

    Returns:
        The section under the key `adapter`, for further checks by the schema; empty if the recipe has none.
    """
    section = tree.values.get("adapter")
    if "adapter" not in tree.values:
        return {}
    if not isinstance(section, dict):
        return {"adapter": section}
    name = section.get("method", "lora")
    method = METHODS.get(name) if isinstance(name, str) else None
    fields = {key: value for key, value in section.items() if key in FIELDS}
    if method is None:
        return {"adapter": fields}
    _check_fields(method, fields, tree, problems)
    others = [key for key in section if key not in FIELDS and ("adapter", key) not in tree.spoiled]
    arguments = {key: section[key] for key in others if _check_argument(method, key, section[key], tree, problems)}
    check_together(method, tree, trainer, problems)
    _check_init(arguments, fields, tree, problems)
    return {"adapter": fields | ({"arguments": arguments} if arguments else {})}


def _check_fields(method: Method, given: Mapping[str, Any], tree: Tree, problems: Problems) -> None:
    """Report each key of the schema that has no effect with the method."""
    known = method_arguments(method.name)

    def why_unused(key: str) -> str | None:
        if key in ARGUMENT_NAMES and key not in method.argument_names:
            return _LACKS[key]
        if key == "target_modules" and method.prompts:
            return "adapts no modules"
        if key == "target_modules" and method.targets == "whole":
            return "trains whole blocks"
        if key == "layers" and (method.prompts or method.targets == "embeddings" or method.trains_all):
            return "trains all layers" if method.trains_all else "adapts no layers"
        if key in ("use_rslora", "use_dora") and given[key] is not False and not method.is_lora:
            return "is not LoRA"
        if key == "modules_to_save" and known is not None and key not in known:
            return "saves no other modules"
        return None

    for key, value in given.items():
        why = why_unused(key)
        if value is not None and why is not None:
            text = f"adapter.{key} has no effect with {method.name}, which {why}; remove it"
            problems.add(tree.place(("adapter", key)), text)
    if given.get("dtype") == "bfloat16" and method.targets != "whole":
        text = (
            f"adapter.dtype: bfloat16 is for methods that train the model's own weights; the few weights of "
            f"{method.name} are cheap in float32; remove it, or set adapter.method: full or freeze"
        )
        problems.add(tree.place(("adapter", "dtype")), text)
    _check_choice(method, given, tree, problems)


def _check_choice(method: Method, given: Mapping[str, Any], tree: Tree, problems: Problems) -> None:
    """Report a selection by gradient that is not possible, or two of them."""
    chosen = [key for key in ("target_modules", "layers") if isinstance(given.get(key), dict)]
    where = {key: tree.place(("adapter", key)) for key in chosen}
    if len(chosen) == 2:
        text = "adapter.layers excludes adapter.target_modules: only one of them can be selected by gradient; keep one"
        problems.add(where["layers"], text)
    for key in chosen:
        if method.targets != "linear":
            text = f"adapter.{key}: only linear layers can be selected by gradient, and {method.name} adapts others"
            problems.add(where[key], f"{text}; list them instead")


def _check_argument(method: Method, key: str, value: Any, tree: Tree, problems: Problems) -> bool:
    known = method_arguments(method.name)
    where, name = tree.place(("adapter", key)), dotted(("adapter", key))
    shared = next((core for core, argument in method.argument_names.items() if argument == key), None)
    if known is None:
        problems.note(where, f"{name} is not checked, because peft is not installed")
        return True
    if key in method.unsupported_arguments or key in CLOSED:
        why = method.unsupported_arguments.get(key) or CLOSED[key]
        problems.add(where, f"{name} cannot be set: {why}; remove it")
    elif shared is not None:
        problems.add(where, f"{name} is not a recipe key; did you mean adapter.{shared}?")
    elif key not in known:
        problems.add(where, f"{name} of {method.name}", partial(_unknown, method, key))
    else:
        fault = type_error(known[key], value) or nested_type_error(value) or _pattern_fault(key, value)
        if fault is None:
            return True
        problems.add(where, f"{name} = {show(value)}: {fault}")
    return False


def _pattern_fault(key: str, value: Any) -> str | None:
    """What is wrong with the regular expressions of an argument; None if nothing is."""
    if key in ("rank_pattern", "alpha_pattern") and isinstance(value, Mapping):
        patterns = list(value)
    elif key == "exclude_modules" and isinstance(value, str):
        patterns = [value]
    else:
        return None
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as problem:
            return f"{pattern} is not a regular expression ({problem}); fix it"
        if isinstance(value, Mapping) and pattern.startswith("^"):
            # PEFT searches `(.*\\.)?(KEY)$` from the start, so that ^ is not at the start of the key.
            bare = pattern.removeprefix("^")
            return f"{pattern} matches no module, because a key is compared with the end of a full name; write {bare}"
    return None


def _unknown(method: Method, key: str) -> str:
    owners = [one.name for one in homes_of(key)]
    if owners and key not in NAME_ALIASES:
        shown = owners[:MOST_METHODS] + (["others"] if len(owners) > MOST_METHODS else [])
        joined = choice_text(shown).replace(" or ", " and ")
        return f"adapter.{key} is an argument of {joined}, not of {method.name}; remove it or set adapter.method"
    return unknown_key(("adapter", key), recipe_arguments(method.name))


def _check_init(arguments: Mapping[str, Any], given: Mapping[str, Any], tree: Tree, problems: Problems) -> None:
    """Report initializations of LoRA with a missing requirement, and a LoRA+ ratio below 1."""
    init = arguments.get("init_lora_weights")
    kind = init.partition("_niter_")[0] if isinstance(init, str) else ""
    where = tree.place(("adapter", "init_lora_weights"))
    if kind == "loftq" and not isinstance(tree.values.get("quantization"), dict):
        text = "adapter.init_lora_weights: loftq needs a quantized base model; add `quantization: {bits: 4}`"
        problems.add(where, text)
    bits = quantized_bits(tree)
    if kind in UNQUANTIZED_INITS and bits is not None:
        text = f"{kind} does not work on {bits}-bit weights: {UNQUANTIZED_INITS[kind]}; use pissa"
        problems.add(where, f"adapter.init_lora_weights: {text}")
    if kind == "corda":
        text = "adapter.init_lora_weights: corda needs statistics of another dataset; use pissa, which needs none"
        problems.add(where, text)
    batches = arguments.get("gradient_batches")
    measured = kind == "lora_ga" or arguments.get("mask") == "gradient"
    if batches is not None and (batches < 1 or not measured):
        text = "must be at least 1" if batches < 1 else "has no effect without `mask: gradient` or lora_ga; remove it"
        problems.add(tree.place(("adapter", "gradient_batches")), f"adapter.gradient_batches = {show(batches)}: {text}")
    if kind in ("pissa", "olora", "lora_ga") and given.get("use_dora") is True:
        text = f"adapter.init_lora_weights: {kind} excludes adapter.use_dora, which initializes itself from the weight"
        problems.add(where, f"{text}; keep one")
    ratio = arguments.get("loraplus_lr_ratio")
    if ratio is not None and ratio < 1:
        text = f"adapter.loraplus_lr_ratio = {show(ratio)}: must be at least 1"
        problems.add(tree.place(("adapter", "loraplus_lr_ratio")), text)


def quantized_bits(tree: Tree) -> Any:
    """Bits of the base weights as set in the recipe; None if they are not quantized."""
    if not isinstance(tree.values.get("quantization"), dict):
        return None
    return tree.get("quantization", "bits") or QuantizationSection.model_fields["bits"].default


def check_together(method: Method, tree: Tree, trainer: Mapping[str, Any], problems: Problems) -> None:
    """Report other settings of the recipe that the method does not support."""
    title = f"adapter.method {method.name}"
    task = tree.get("model", "task") or DEFAULT
    if isinstance(task, str) and task not in method.tasks:
        text = f"model.task: {task} is not supported by {title}, only {choice_text(method.tasks)}; change one of them"
        problems.add(tree.place(("model", "task")), text)
    if tree.get("model", "add_tokens") and method.config != "LoraConfig" and not method.trains_all:
        text = f"model.add_tokens: {title} cannot train the embedding rows of new tokens; set adapter.method: lora"
        problems.add(tree.place(("model", "add_tokens")), text)
    bits = quantized_bits(tree)
    why = method.on_bits(bits) if bits is not None else ""
    if why:
        wider = "set quantization.bits: 8 or " if method.fewest_bits == 8 else ""
        problems.add(
            tree.place(("quantization",)),
            f"{title} does not work on {bits}-bit weights: {why}; {wider}remove `quantization`",
        )
    if method.checkpointing and trainer.get("activation_checkpointing"):
        text = f"trainer.activation_checkpointing excludes {title}: {method.checkpointing}; remove it"
        problems.add(tree.place(("trainer", "activation_checkpointing")), text)
    for key in ("packing", "padding_free"):
        if method.padded and trainer.get(key):
            problems.add(tree.place(("trainer", key)), f"trainer.{key} excludes {title}: {method.padded}; remove it")
    if method.padded and tree.get("performance", "batching") == "padding_free":
        text = f"performance.batching: padding_free excludes {title}: {method.padded}; remove it"
        problems.add(tree.place(("performance", "batching")), text)
    gates = tree.values.get("gates")
    for gate in gates if method.merge and isinstance(gates, dict) else ():
        if str(gate).startswith("merge_"):
            text = f"gates.{gate} can never be met: {title} cannot be merged ({method.merge}); remove it"
            problems.add(tree.place(("gates", gate)), text)
