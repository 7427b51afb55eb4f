"""Learning curves: the quality of runs that differ in nothing but the number of their training rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from peftcli.compare.variants import ROWS_KEY
from peftcli.recipe.dump import fingerprint
from peftcli.recipe.schema import Recipe


def learning_curves(rows: Sequence[Mapping[str, Any]], recipes: Mapping[str, Recipe | None]) -> list[dict[str, Any]]:
    """Curves of quality over training rows, each of at least two finished runs.

    Args:
        rows: of `compare.json`.
        recipes: of the runs, by name; None for one that cannot be read.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        recipe = recipes[row["name"]]
        if recipe is not None and row["status"] == "finished" and row["quality"] is not None and row["train_rows"]:
            groups.setdefault(_apart_from_rows(recipe), []).append(row)
    curves = []
    for group in groups.values():
        points = sorted(group, key=lambda row: row["train_rows"])
        if len({row["train_rows"] for row in points}) > 1:
            curves.append({"name": _name(points[0]), "points": [_point(row) for row in points]})
    return curves


def _apart_from_rows(recipe: Recipe) -> str:
    """What is the same in two runs of one curve."""
    dataset = recipe.dataset.model_copy(update={"max_train_samples": None})
    return fingerprint(recipe.model_copy(update={"dataset": dataset, "name": "", "output_dir": None}))


def _name(row: Mapping[str, Any]) -> str:
    """What the runs of a curve share, in the words of `--vary`."""
    return ", ".join(f"{key}={value}" for key, value in row["varied"].items() if key != ROWS_KEY)


def _point(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"rows": row["train_rows"], "quality": row["quality"], "interval": row["interval"], "variant": row["name"]}
