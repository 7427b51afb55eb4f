"""Splits the rows into train, validation and test: at random, stratified by class, by group, or by separate files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peftcli.data.dedup import first_occurrence
from peftcli.data.rows import FIRST_PLACES
from peftcli.data.split_record import SplitRecord
from peftcli.data.stats import Indices, Split, counted
from peftcli.data.store import Store
from peftcli.errors import DataError
from peftcli.recipe.schema import DatasetSection


def drop_duplicates_of_test(dataset: DatasetSection, store: Store) -> tuple[Indices, int, list[str]]:
    """The rows to use, the number of dropped duplicates, and the locations of the first duplicates."""
    rows = np.arange(store.rows)
    if not dataset.deduplicate:
        return rows, 0, []
    first = first_occurrence(store.column("plain"))
    equal = np.flatnonzero(first != rows)
    return np.flatnonzero(first == rows), len(equal), store.places(equal[:FIRST_PLACES])


def rehearsed_split(dataset: DatasetSection, store: Store, rows: Indices) -> tuple[DatasetSection, str | None]:
    """A split that leaves training rows among the few rows of a smoke run, and a note about the changes.

    Args:
        rows: the rows to use.
    """
    split, changes = dataset.split, []
    update: dict[str, Any] = {}
    most = len(rows) // 4
    for key in ("test_size", "validation_size"):
        size = getattr(split, key)
        if isinstance(size, int) and size > most:
            update[key] = most
            changes.append(f"{most} {key.partition('_')[0]} rows instead of dataset.split.{key}: {size:,}")
    if split.group is not None and len(np.unique(store.column("group")[rows])) < 2:
        update["group"] = None
        changes.append(f"dataset.split.group is ignored, because {split.group} has one value")
    if not update:
        return dataset, None
    note = f"smoke: with {len(rows)} rows: {', and '.join(changes)}"
    return dataset.model_copy(update={"split": split.model_copy(update=update)}), note


def _empty_split(name: str, usable: int, dataset: DatasetSection) -> str:
    """The message for a split without rows."""
    rows = counted(usable, "usable row", "usable rows")
    sizes = {key: value for key, value in drawn_sizes(dataset).items() if value}
    said = " and ".join(f"dataset.split.{key}_size = {value:g}" for key, value in sizes.items())
    if name == "training" and sizes:
        return f"{said} leaves no row for training: the data have {rows}; lower it or add rows"
    if name in sizes:
        return (
            f"dataset.split.{name}_size = {sizes[name]:g} of {rows} gives no {name} row that no earlier training has "
            f"used; raise it or add rows"
        )
    return f"the {name} split is empty: {rows} for training; add rows"


def drawn_sizes(dataset: DatasetSection) -> dict[str, float | int]:
    """The sizes of the splits that are drawn from the rows; 0 for one that is not."""
    return {
        "test": 0 if dataset.test is not None else dataset.split.test_size,
        "validation": 0 if dataset.validation is not None else dataset.split.validation_size,
    }


@dataclass(frozen=True)
class HeldOutStores:
    """The rows of separate test and validation sources; None for rows that are drawn."""

    test: Store | None = None
    validation: Store | None = None

    def all(self) -> list[Store]:
        return [store for store in (self.test, self.validation) if store is not None]


@dataclass(frozen=True)
class Splits:
    """The three splits; one that the recipe does not have is empty.

    Attributes:
        made: how they were made, for `data.json`.
    """

    train: Split
    test: Split
    validation: Split
    made: dict[str, Any]


def split_rows(
    dataset: DatasetSection,
    store: Store,
    held_out: HeldOutStores,
    rows: Indices,
    seed: int,
    earlier: SplitRecord | None = None,
) -> Splits:
    """Split the rows.

    Args:
        rows: of the store that are used.
        earlier: of trainings that this one continues; their rows keep their split, and only new rows are drawn.

    Raises:
        DataError: a split is empty, or rows of a separate test or validation file were trained on before.
    """
    drawn = dataset.split.seed if dataset.split.seed is not None else seed
    sizes = drawn_sizes(dataset)
    for name in ("test", "validation"):
        _refuse_trained(name, getattr(held_out, name), earlier)
    train, test, validation = _recorded_and_drawn(dataset, store, rows, drawn, earlier)
    split: dict[str, Any] = {}
    if held_out.test is None or sizes["validation"]:
        split = {f"{name}_size": size for name, size in sizes.items() if size or name == "test"} | {"seed": drawn}
        split |= {key: getattr(dataset.split, key) for key in ("stratify", "group") if getattr(dataset.split, key)}
    if dataset.max_train_samples is not None and len(train) > dataset.max_train_samples:
        order = np.random.default_rng(seed).permutation(len(train))[: dataset.max_train_samples]
        train = train[np.sort(order)]
        split["max_train_samples"] = dataset.max_train_samples
    own = {name: getattr(held_out, name) for name in ("test", "validation")}
    test, validation = (
        found if own[name] is None else np.arange(own[name].rows)
        for name, found in (("test", test), ("validation", validation))
    )
    asked = {"training": True, "test": dataset.holds_out, "validation": dataset.validates}
    for name, found in (("training", train), ("test", test), ("validation", validation)):
        if len(found) == 0 and asked[name]:
            raise DataError(_empty_split(name, len(rows), dataset))
    return Splits(
        Split(store, train), Split(own["test"] or store, test), Split(own["validation"] or store, validation), split
    )


def _recorded_and_drawn(
    dataset: DatasetSection, store: Store, rows: Indices, seed: int, earlier: SplitRecord | None
) -> tuple[Indices, Indices, Indices]:
    """Training, test and validation rows: those of earlier trainings stay where they are, and new ones are drawn."""
    sizes = drawn_sizes(dataset)
    drawn = _draw_both(dataset, store, rows, seed)
    if earlier is None or not any(sizes.values()):
        return drawn
    hashes = store.column("exact")
    if all(
        np.array_equal(np.sort(hashes[found]), np.sort(known))
        for found, known in zip(drawn[1:], (earlier.test, earlier.validation), strict=True)
    ):
        return drawn  # the same split; rows with equal text may be in several
    hashes = hashes[rows]
    trained, tested = np.isin(hashes, earlier.train), np.isin(hashes, earlier.test)
    validated = np.isin(hashes, earlier.validation) & ~tested
    trained |= ~tested & ~validated & earlier.has_seen(store, rows)
    # Rows of a split that this recipe does not draw are trained on.
    trained |= (tested & (not sizes["test"])) | (validated & (not sizes["validation"]))
    new = rows[~trained & ~tested & ~validated]
    draws = len(new) > 0 and not (earlier.closed and ((tested | validated) & ~trained).any())
    more = _draw_both(dataset, store, new, seed) if draws else (new, new[:0], new[:0])
    kept = rows[trained], rows[tested & ~trained], rows[validated & ~trained]
    train, test, validation = (np.sort(np.concatenate(parts)) for parts in zip(kept, more, strict=True))
    return train, test, validation


def _refuse_trained(name: str, store: Store | None, earlier: SplitRecord | None) -> None:
    if earlier is None or store is None:
        return
    trained = np.flatnonzero(np.isin(store.column("exact"), earlier.train))
    if len(trained):
        raise DataError(
            f"{len(trained):,} of the {store.rows:,} rows of dataset.{name} were trained on by the run that this "
            f"one continues (first {store.places(trained[:1])[0]}), so they would be scored too well; remove them"
        )


def _draw_both(dataset: DatasetSection, store: Store, rows: Indices, seed: int) -> tuple[Indices, Indices, Indices]:
    """Training, test and validation rows; the test rows do not depend on whether validation rows are drawn."""
    sizes = drawn_sizes(dataset)
    others, test = _draw(dataset, store, rows, sizes["test"], seed)
    rest = rows[others]
    # A share is of all rows, as that of the test rows.
    train, validation = _draw(dataset, store, rest, wanted_rows(len(rows), sizes["validation"]), seed)
    return rest[train], rows[test], rest[validation]


def _draw(
    dataset: DatasetSection, store: Store, rows: Indices, size: float | int, seed: int
) -> tuple[Indices, Indices]:
    if size == 0:
        return np.arange(len(rows)), np.arange(0)
    if dataset.split.stratify is not None:
        return split_by_class(store.column("class")[rows], size, seed)
    if dataset.split.group is not None or dataset.too_long == "split":
        groups = store.column("group")[rows]
        if dataset.split.group is not None or len(np.unique(groups)) > 1:
            return split_by_group(groups, size, seed)
    return split_indices(len(rows), size, seed)


def split_indices(rows: int, test_size: float | int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw the test rows at random; both splits keep the order of the source.

    Args:
        rows: number of rows to split.
        test_size: share in 0..1 (rounded up) or a number of rows.
        seed: the same seed and number of rows give the same split.

    Returns:
        Indices of the train rows and of the test rows, each ascending.

    >>> train, test = split_indices(10, 0.25, seed=0)
    >>> len(train), len(test), sorted([*train, *test]) == list(range(10))
    (7, 3, True)
    """
    test = min(wanted_rows(rows, test_size), rows)
    drawn = np.random.default_rng(seed).permutation(rows)
    return np.sort(drawn[test:]), np.sort(drawn[:test])


def split_by_class(
    classes: NDArray[np.uint64], test_size: float | int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw test rows so that each class has the same share in both splits, up to rounding.

    The remainder after rounding down goes to the classes with the largest fraction.

    Args:
        classes: (rows,), a hash of each row's class.

    >>> train, test = split_by_class(np.array([1, 1, 1, 1, 2, 2, 2, 2], np.uint64), 0.25, seed=0)
    >>> len(test), sorted(int(n) // 4 for n in test)
    (2, [0, 1])
    """
    _, inverse, counts = np.unique(classes, return_inverse=True, return_counts=True)
    wanted = min(wanted_rows(len(classes), test_size), len(classes))
    exact = counts * (wanted / max(len(classes), 1))
    shares = np.floor(exact).astype(np.int64)
    rest = np.argsort(-(exact - shares), kind="stable")[: wanted - int(shares.sum())]
    shares[rest] += 1
    drawn = np.random.default_rng(seed).permutation(len(classes))
    by_class = drawn[np.argsort(inverse[drawn], kind="stable")]
    starts = np.cumsum(counts) - counts
    test = np.concatenate([by_class[start : start + share] for start, share in zip(starts, shares, strict=True)])
    return _indices(test, len(classes))


def split_by_group(
    groups: NDArray[np.uint64], test_size: float | int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw whole groups for the test split, up to the requested number of rows.

    Groups that would exceed it are skipped; if no group fits, the smallest is used.

    Args:
        groups: (rows,), a hash of each row's group.

    >>> train, test = split_by_group(np.array([5, 5, 6, 7], np.uint64), 0.25, seed=0)
    >>> len(test)
    1
    """
    values, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    wanted = min(wanted_rows(len(groups), test_size), len(groups))
    taken = np.zeros(len(values), bool)
    left = wanted
    order = np.random.default_rng(seed).permutation(len(values))
    for group in order:
        if counts[group] <= left:
            taken[group] = True
            left -= int(counts[group])
    if not taken.any():
        taken[order[np.argmin(counts[order])]] = True
    return _indices(np.flatnonzero(taken[inverse]), len(groups))


def weighted(rows: NDArray[np.int64], weights: Sequence[float], of: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Repeat the rows of each source according to its weight; for the fractional part rows are sampled.

    Args:
        rows: indices of training rows.
        weights: of each source.
        of: (rows,), the source of each row.

    >>> weighted(np.array([3, 4, 5]), [2.0, 1.0], np.array([0, 1, 1]), seed=0)
    array([3, 3, 4, 5])
    """
    if all(weight == 1 for weight in weights):
        return rows
    generator = np.random.default_rng(seed)
    times = np.zeros(len(rows), np.int64)
    for source, weight in enumerate(weights):
        mine = np.flatnonzero(of == source)
        whole = math.floor(weight)
        times[mine] = whole
        extra = round((weight - whole) * len(mine))
        times[generator.permutation(mine)[:extra]] += 1
    return np.repeat(rows, times)


def wanted_rows(rows: int, test_size: float | int) -> int:
    """Number of test rows for a test size.

    >>> wanted_rows(49_688, 0.2), wanted_rows(100, 7)
    (9938, 7)
    """
    return math.ceil(rows * test_size) if isinstance(test_size, float) else test_size


def _indices(test: NDArray[np.int64], rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    inside = np.zeros(rows, bool)
    inside[test] = True
    return np.flatnonzero(~inside), np.flatnonzero(inside)
