"""Finds keys that need test rows in a recipe with `dataset.split.test_size: 0`."""

from peftcli.recipe.problems import Problems
from peftcli.recipe.yaml import Tree

NOT_HELD_OUT = ("merge_", "forgetting_")
"""Name prefixes of gates on metrics that need no test rows."""
NEEDED = "but dataset.split.test_size is 0; remove one of the two"


def find_untested(tree: Tree, problems: Problems) -> None:
    """Add a problem for each key that has no effect, or can never be met, without test rows."""
    size = tree.get("dataset", "split", "test_size")
    if isinstance(size, bool) or size != 0:
        return
    gates = tree.get("gates")
    for name in gates if isinstance(gates, dict) else ():
        if isinstance(name, str) and not name.startswith(NOT_HELD_OUT):
            text = f"gates.{name} is measured on test rows, {NEEDED}, or add test rows with dataset.test"
            problems.add(tree.place(("gates", name)), text)
    for key in ("stratify", "group"):
        drawn = tree.get("dataset", "split", "validation_size") not in (None, 0)
        if tree.get("dataset", "split", key) is not None and not drawn:
            text = f"dataset.split.{key} controls how test rows are split off, {NEEDED}"
            problems.add(tree.place(("dataset", "split", key)), text)
