"""Key and value names of earlier versions: for "did you mean", and for the recipes in run folders.

A user's recipe with an earlier name gets an error with the current name. The copy in a run folder was written by
peftcli, so it is read with the names of its version.
"""

from typing import Any

from peftcli.recipe.problems import KeyPath
from peftcli.recipe.yaml import Tree

RENAMED_KEYS: dict[str, str] = {
    "performance.without": "performance.disable",
    "model.problem": "model.problem_type",
    "dataset.limits.dropped": "dataset.limits.max_dropped",
    "dataset.limits.truncated": "dataset.limits.max_truncated",
    "dataset.limits.leaked": "dataset.limits.max_leaked",
    "dataset.limits.eos_trained": "dataset.limits.min_eos_trained",
    "evaluation.retention": "evaluation.forgetting_text",
    "evaluation.retention_tokens": "evaluation.forgetting_tokens",
    "gates.retention_loss": "gates.forgetting_loss",
    "gates.retention_change": "gates.forgetting_change",
}
"""Earlier dotted keys with the current ones; a key stays in its section."""

RENAMED_VALUES: dict[str, dict[str, str]] = {
    "performance.batching": {"flat": "padding_free"},
    "performance.disable": {
        "head": "fused_loss",
        "products": "fused_lora",
        "casts": "skip_adapter_casts",
        "figures": "deferred_metrics",
    },
}
"""Earlier values with the current ones, by current key."""


def new_value(path: KeyPath, value: Any) -> str | None:
    """The current name of a value, or of an item of a list; None if it was not renamed.

    >>> new_value(("performance", "disable", 0), "head"), new_value(("model", "dtype"), "flat")
    ('fused_loss', None)
    """
    key = ".".join(part for part in path if isinstance(part, str))
    return RENAMED_VALUES.get(key, {}).get(value) if isinstance(value, str) else None


def rename_earlier(tree: Tree) -> None:
    """Rename the keys and values of a stored recipe to the current names, in place.

    A key is not renamed if the new name is also present; it is then rejected like any other unknown key.
    """
    for old, new in RENAMED_KEYS.items():
        *section, before = old.split(".")
        after = new.rpartition(".")[2]
        holder = tree.get(*section)
        if isinstance(holder, dict) and before in holder and after not in holder:
            tree.rename((*section, before), after)
    for key, names in RENAMED_VALUES.items():
        *section, last = key.split(".")
        holder = tree.get(*section)
        value = holder.get(last) if isinstance(holder, dict) else None
        if isinstance(value, list):
            holder[last] = [names.get(item, item) if isinstance(item, str) else item for item in value]
        elif isinstance(value, str):
            holder[last] = names.get(value, value)
