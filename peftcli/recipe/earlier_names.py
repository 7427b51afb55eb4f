"""Names that keys and values had in earlier versions: for "did you mean", and for the recipes in run folders.

A recipe that a user wrote gets an error with the new name. The copy in a run folder was written by the tool itself, so
it is read with the names it was written with.
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
"""Earlier dotted keys with those of today; a key stays in its section."""

RENAMED_VALUES: dict[str, dict[str, str]] = {
    "performance.batching": {"flat": "padding_free"},
    "performance.disable": {
        "head": "fused_loss",
        "products": "fused_lora",
        "casts": "skip_adapter_casts",
        "figures": "deferred_metrics",
    },
}
"""Earlier values by the key of today."""


def new_value(path: KeyPath, value: Any) -> str | None:
    """The name that a value of a key, or of an item of its list, has today; None where it was not renamed.

    >>> new_value(("performance", "disable", 0), "head"), new_value(("model", "dtype"), "flat")
    ('fused_loss', None)
    """
    key = ".".join(part for part in path if isinstance(part, str))
    return RENAMED_VALUES.get(key, {}).get(value) if isinstance(value, str) else None


def rename_earlier(tree: Tree) -> None:
    """Give the keys and values of a stored recipe the names of today, in place.

    A key whose new name is there too stays as it is, and is refused like any other unknown key.
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
