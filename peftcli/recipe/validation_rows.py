"""Finds keys that choose during or after training, such as the best checkpoint, in a recipe without validation rows.

A choice that is made on the test rows makes their metrics too good, so it uses rows of its own.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from peftcli.recipe.problems import KeyPath, Problems, dotted
from peftcli.recipe.yaml import Tree

FIX = (
    "add dataset.split.validation_size: 0.1 (a share of the rows), or dataset.validation: {path: ...} for a file of "
    "its own"
)
_CHOOSING = ("eval_strategy", "evaluation_strategy", "load_best_model_at_end", "early_stopping_patience")


def find_unvalidated(tree: Tree, problems: Problems) -> None:
    """Add a problem for each section that needs validation rows, at its first key, if the recipe has none."""
    if _validates(tree):
        return
    for path, trainer in _trainers(tree):
        key = next((key for key in _CHOOSING if trainer.get(key) not in (None, False, "no")), None)
        if key is not None:
            text = f"{dotted((*path, key))} needs validation rows, because test rows are only for the final scoring"
            problems.add(tree.place((*path, key)), f"{text}; {FIX}")
    if tree.get("evaluation", "threshold") == "auto":
        text = f"evaluation.threshold: auto chooses a threshold with validation rows, but there are none; {FIX}"
        problems.add(tree.place(("evaluation", "threshold")), text)


def _validates(tree: Tree) -> bool:
    """Whether the recipe has validation rows, or tries to."""
    size: KeyPath = ("dataset", "split", "validation_size")
    given = tree.get("dataset", "validation") is not None or tree.get(*map(str, size)) not in (None, 0)
    return given or any(path in tree.spoiled for path in (size, ("dataset", "validation"), ("dataset",)))


def _trainers(tree: Tree) -> Iterator[tuple[KeyPath, Mapping[str, Any]]]:
    """The `trainer` section, and those of the stages."""
    sections: list[tuple[KeyPath, Any]] = [(("trainer",), tree.get("trainer"))]
    stages = tree.get("stages")
    for number, stage in enumerate(stages if isinstance(stages, list) else ()):
        if isinstance(stage, dict):
            sections.append((("stages", number, "trainer"), stage.get("trainer")))
    yield from ((path, trainer) for path, trainer in sections if isinstance(trainer, dict))
