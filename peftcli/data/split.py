"""Splits the rows into train and test: at random, stratified by class, by group, or with a separate test set."""

import math
from collections.abc import Sequence
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
    if isinstance(split.test_size, int) and split.test_size > most:
        update["test_size"] = most
        changes.append(f"{most} test rows instead of dataset.split.test_size: {split.test_size:,}")
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
    if dataset.test is not None:
        return f"the {name} split is empty: {rows} for training; add rows"
    size = dataset.split.test_size
    if name == "training":
        return (
            f"dataset.split.test_size = {size:g} leaves no row for training: the data have {rows}; lower it or add rows"
        )
    return f"dataset.split.test_size = {size:g} of {rows} gives no test row; raise it or add rows"


def split_rows(
    dataset: DatasetSection,
    store: Store,
    test_store: Store | None,
    rows: Indices,
    seed: int,
    earlier: SplitRecord | None = None,
) -> tuple[Split, Split, dict[str, Any]]:
    """Both splits, and how they were made; the test split is empty if the recipe holds no rows out.

    Args:
        rows: of the store that are used.
        earlier: of trainings that this one continues; their rows keep their split, and only new rows are drawn.

    Raises:
        DataError: a split is empty, or rows of a separate test file were trained on before.
    """
    drawn = dataset.split.seed if dataset.split.seed is not None else seed
    split: dict[str, Any] = {}
    if test_store is not None:
        train, test = rows, np.arange(test_store.rows)
        _refuse_trained(test_store, earlier)
    else:
        split = {"test_size": dataset.split.test_size, "seed": drawn}
        train, test = _recorded_and_drawn(dataset, store, rows, drawn, earlier)
        split |= {key: getattr(dataset.split, key) for key in ("stratify", "group") if getattr(dataset.split, key)}
    if dataset.max_train_samples is not None and len(train) > dataset.max_train_samples:
        order = np.random.default_rng(seed).permutation(len(train))[: dataset.max_train_samples]
        train = train[np.sort(order)]
        split["max_train_samples"] = dataset.max_train_samples
    for name, count in (("training", len(train)), ("test", len(test))):
        if count == 0 and (name == "training" or dataset.holds_out):
            raise DataError(_empty_split(name, len(rows), dataset))
    return Split(store, train), Split(test_store or store, test), split


def _recorded_and_drawn(
    dataset: DatasetSection, store: Store, rows: Indices, seed: int, earlier: SplitRecord | None
) -> tuple[Indices, Indices]:
    sides = _draw(dataset, store, rows, seed)
    if earlier is None or not dataset.holds_out:
        return rows[sides[0]], rows[sides[1]]
    hashes = store.column("exact")[rows]
    if np.array_equal(np.sort(hashes[sides[1]]), np.sort(earlier.test)):
        return rows[sides[0]], rows[sides[1]]  # the same split; rows with equal text may be in both
    trained, tested = np.isin(hashes, earlier.train), np.isin(hashes, earlier.test)
    trained |= ~tested & earlier.has_seen(store, rows)
    new = rows[~trained & ~tested]
    draws = len(new) > 0 and not (earlier.closed and (tested & ~trained).any())
    sides = _draw(dataset, store, new, seed) if draws else (np.arange(len(new)), np.arange(0))
    train, test = rows[trained], rows[tested & ~trained]
    return np.sort(np.concatenate([train, new[sides[0]]])), np.sort(np.concatenate([test, new[sides[1]]]))


def _refuse_trained(test_store: Store, earlier: SplitRecord | None) -> None:
    if earlier is None:
        return
    trained = np.flatnonzero(np.isin(test_store.column("exact"), earlier.train))
    if len(trained):
        raise DataError(
            f"{len(trained):,} of the {test_store.rows:,} rows of dataset.test were trained on by the run that this "
            f"one continues (first {test_store.places(trained[:1])[0]}), so they would be scored too well; remove them"
        )


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
