"""The `stages` section: several training stages, each starting from the result of the previous one."""

from collections.abc import Mapping
from typing import Any

from peftcli.methods.registry import METHODS
from peftcli.recipe.adapter_args import read_adapter
from peftcli.recipe.problems import KeyPath, Problems
from peftcli.recipe.schema import Recipe
from peftcli.recipe.trainer_args import read_trainer
from peftcli.recipe.yaml import Tree

OWN = ("adapter", "trainer")
"""Sections that a stage can have."""


def read_stages(tree: Tree, trainer: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """Check the stages and return them under the key `stages`, for further checks by the schema.

    The `trainer` section of a stage is merged over the recipe's; its `adapter` section replaces the recipe's.

    Args:
        trainer: the checked arguments of the recipe's `trainer` section.
    """
    stages = tree.values.get("stages")
    if "stages" not in tree.values or ("stages",) in tree.spoiled:
        return {}
    if not isinstance(stages, list):
        return {"stages": stages}
    _check_together(stages, tree, problems)
    return {"stages": [_stage(number, stage, tree, trainer, problems) for number, stage in enumerate(stages)]}


def stage_recipes(recipe: Recipe) -> list[Recipe]:
    """A recipe for each stage by itself; only the recipe if it has no stages."""
    if not recipe.stages:
        return [recipe]
    return [
        recipe.model_copy(
            update={
                "name": f"{recipe.name}-{stage.name}",
                "adapter": stage.adapter or recipe.adapter,
                "trainer": recipe.trainer if stage.trainer is None else stage.trainer,
                "stages": (),
            }
        )
        for stage in recipe.stages
    ]


def _stage(number: int, stage: Any, tree: Tree, trainer: Mapping[str, Any], problems: Problems) -> Any:
    if not isinstance(stage, dict):
        return stage
    part = _tree_of(number, stage, tree)
    given = {**trainer, **read_trainer(part, problems, trainer)}
    checked: dict[str, Any] = {"trainer": given} if "trainer" in stage else {}
    return {**stage, **checked, **read_adapter(part, given, problems)}


def _tree_of(number: int, stage: Mapping[str, Any], tree: Tree) -> Tree:
    """The recipe's tree with its sections replaced by those of one stage, with the line numbers of the stage."""
    prefix: KeyPath = ("stages", number)

    def moved(path: KeyPath) -> KeyPath | None:
        if path[: len(prefix)] == prefix:
            return path[len(prefix) :]
        return None if path[:1] in [(key,) for key in OWN] else path

    return Tree(
        values={**{key: value for key, value in tree.values.items() if key not in OWN}, **stage},
        places={to: where for path, where in tree.places.items() if (to := moved(path))},
        empty={to for path in tree.empty if (to := moved(path))},
        spoiled={to for path in tree.spoiled if (to := moved(path))},
    )


def _check_together(stages: list[Any], tree: Tree, problems: Problems) -> None:
    if not stages:
        problems.add(tree.place(("stages",)), "stages is empty; add stages, or remove the line")
    known = [stage for stage in stages if isinstance(stage, dict)]
    names = [stage.get("name") for stage in known]
    for number, name in enumerate(names):
        if name is not None and name in names[:number]:
            text = f"two stages are named {name}; give each its own name"
            problems.add(tree.place(("stages", number, "name")), text)
    if known and len(known) == len(stages) and tree.values.get("adapter") and all("adapter" in one for one in known):
        text = "adapter is unused because every stage defines its own; remove it"
        problems.add(tree.place(("adapter",)), text)
    for number, stage in enumerate(stages[:-1]):
        section = (stage.get("adapter") if isinstance(stage, dict) else None) or tree.values.get("adapter") or {}
        method = METHODS.get(str(section.get("method", "lora"))) if isinstance(section, dict) else None
        if method is not None and method.merge:
            text = f"stages[{number}]: the next stage starts from its merged result, but {method.name} cannot be merged"
            problems.add(tree.place(("stages", number)), f"{text} ({method.merge}); make it the last stage")
