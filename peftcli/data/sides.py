"""The two sides of the data: what is trained and what is tested."""

from typing import Any

import numpy as np

from peftcli.data.facts import Indices, Side
from peftcli.data.rows import FIRST_PLACES
from peftcli.data.split import split_by_class, split_by_group, split_indices
from peftcli.data.store import Store
from peftcli.data.twins import firsts
from peftcli.errors import DataError
from peftcli.recipe.schema import DatasetSection


def without_equal(dataset: DatasetSection, store: Store) -> tuple[Indices, int, list[str]]:
    """The rows that are used; how many are left out as equal to an earlier one, and where the first of those stand."""
    rows = np.arange(store.rows)
    if not dataset.deduplicate:
        return rows, 0, []
    first = firsts(store.column("plain"))
    equal = np.flatnonzero(first != rows)
    return np.flatnonzero(first == rows), len(equal), store.places(equal[:FIRST_PLACES])


def rehearsed_split(dataset: DatasetSection, store: Store, rows: Indices) -> tuple[DatasetSection, str | None]:
    """A split that leaves training rows among the few rows of a smoke run, and what it changes, for people.

    Args:
        rows: those that are used.
    """
    split, said = dataset.split, []
    update: dict[str, Any] = {}
    most = len(rows) // 4
    if isinstance(split.test_size, int) and split.test_size > most:
        update["test_size"] = most
        said.append(f"{most} test rows, dataset.split.test_size is {split.test_size:,}")
    if split.group is not None and len(np.unique(store.column("group")[rows])) < 2:
        update["group"] = None
        said.append(f"one value of dataset.split.group {split.group} among them, so it is left out")
    if not update:
        return dataset, None
    note = f"smoke: of {len(rows)} rows {' and '.join(said)}"
    return dataset.model_copy(update={"split": split.model_copy(update=update)}), note


def split_sides(
    dataset: DatasetSection, store: Store, test_store: Store | None, rows: Indices, seed: int
) -> tuple[Side, Side, dict[str, Any]]:
    """Both sides, and how they were drawn; the test side is empty where the recipe holds no rows out."""
    drawn = dataset.split.seed if dataset.split.seed is not None else seed
    split: dict[str, Any] = {}
    if test_store is not None:
        train, test = rows, np.arange(test_store.rows)
    else:
        split = {"test_size": dataset.split.test_size, "seed": drawn}
        sides = _draw(dataset, store, rows, drawn)
        train, test = rows[sides[0]], rows[sides[1]]
        split |= {key: getattr(dataset.split, key) for key in ("stratify", "group") if getattr(dataset.split, key)}
    if dataset.max_train_samples is not None and len(train) > dataset.max_train_samples:
        order = np.random.default_rng(seed).permutation(len(train))[: dataset.max_train_samples]
        train = train[np.sort(order)]
        split["max_train_samples"] = dataset.max_train_samples
    for side, count in (("training", len(train)), ("test", len(test))):
        if count == 0 and (side == "training" or dataset.holds_out):
            raise DataError(f"the {side} side is empty ({len(rows)} usable rows); change dataset.split")
    return Side(store, train), Side(test_store or store, test), split


def _draw(dataset: DatasetSection, store: Store, rows: Indices, seed: int) -> tuple[Indices, Indices]:
    if not dataset.holds_out:
        return np.arange(len(rows)), np.arange(0)
    if dataset.split.stratify is not None:
        return split_by_class(store.column("class")[rows], dataset.split.test_size, seed)
    if dataset.split.group is not None or dataset.too_long == "split":
        groups = store.column("group")[rows]
        if dataset.split.group is not None or len(np.unique(groups)) > 1:
            return split_by_group(groups, dataset.split.test_size, seed)
    return split_indices(len(rows), dataset.split.test_size, seed)
