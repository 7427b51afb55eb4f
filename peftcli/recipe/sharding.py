"""What cannot stand beside a base that several processes hold in parts (`performance.sharding: full`)."""

from collections.abc import Iterator, Mapping
from typing import Any

from peftcli.recipe.problems import KeyPath, Problems, dotted
from peftcli.recipe.schema import Recipe
from peftcli.recipe.tasks import CAUSAL
from peftcli.recipe.yaml_text import Tree

ASKED = "performance.sharding: full"
DIVIDED = ("lora",)
"""Methods whose own weights stand beside those of the base and need none of them whole."""
BESIDE = frozenset(
    [
        *("method", "r", "alpha", "dropout", "bias", "use_rslora", "target_modules", "layers", "init_from", "dtype"),
        *("alpha_pattern", "exclude_modules", "init_lora_weights", "loraplus_lr_ratio", "rank_pattern"),
    ]
)
"""Keys of the adapter section that ask nothing of whole weights."""
PLAIN_STARTS = (True, False, "gaussian")
"""Ways for LoRA to begin that look at no weight of the base."""
_WHOLE = "it needs whole weights of the base"
_TRAINER = {
    "activation_offloading": "it would move gathered weights too",
    "deepspeed": "DeepSpeed divides the model in its own way",
    "load_best_model_at_end": "it was not tried with it",
    "torch_compile": "it was not tried with it",
    "use_liger_kernel": "it was not tried with it",
}
"""Arguments of the trainer, and why they cannot be had."""


def find_undivided(tree: Tree, problems: Problems) -> None:
    """Add a problem for each key that cannot stand beside `performance.sharding: full`."""
    if tree.get("performance", "sharding") != "full":
        return
    for path, why in undivided(tree.values):
        if path not in tree.spoiled:
            problems.add(tree.place(path), f"{dotted(path)} excludes {ASKED}: {why}; keep one of the two")


def undivided(sections: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Keys that ask for what a base in parts cannot do, each with the reason.

    Args:
        sections: of a recipe, as a YAML file has them.
    """
    if _section(sections, "model").get("task", CAUSAL) != CAUSAL:
        yield ("model", "task"), "a head is trained whole, and only language models were tried"
    if sections.get("stages"):
        yield ("stages",), "the result of a stage is folded into whole weights"
    if _section(sections, "quantization").get("bits") == 8:
        yield ("quantization", "bits"), "8-bit weights were not tried in parts, 4-bit weights can be divided"
    yield from _of_adapter(_section(sections, "adapter"))
    for name, why in _TRAINER.items():
        if _section(sections, "trainer").get(name):
            yield ("trainer", name), why


def _of_adapter(adapter: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    method = adapter.get("method", "lora")
    if method not in DIVIDED:
        yield ("adapter", "method"), f"{method} was not tried with weights in parts, {', '.join(DIVIDED)} can be had"
        return
    for key, value in adapter.items():
        if value is None or value is False:
            continue
        if key not in BESIDE:
            yield ("adapter", key), _WHOLE
        elif isinstance(value, Mapping) and key in ("target_modules", "layers"):
            yield ("adapter", key), "choosing by the gradient needs the gradients of whole weights"
        elif key == "init_lora_weights" and value not in PLAIN_STARTS:
            yield ("adapter", key), _WHOLE


def sections_of(recipe: Recipe) -> dict[str, Any]:
    """The sections of a checked recipe that `undivided` reads, as a YAML file has them."""
    given = recipe.adapter.model_dump(exclude_none=True, exclude={"arguments"})
    return {
        "model": {"task": recipe.model.task},
        "stages": recipe.stages,
        "quantization": {} if recipe.quantization is None else {"bits": recipe.quantization.bits},
        "adapter": {**given, **recipe.adapter.arguments},
        "trainer": recipe.trainer,
    }


def _section(sections: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = sections.get(name)
    return found if isinstance(found, Mapping) else {}
