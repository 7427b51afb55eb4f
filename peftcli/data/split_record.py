"""The rows that a run trained on and tested, by content, so that later commands find the same rows again.

A split that is drawn from row numbers changes as soon as a file is sorted or rows are put in front, and then scores
rows that were trained on.
"""

import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from peftcli.data.stats import Indices, Split
from peftcli.data.store import Store
from peftcli.errors import DataError, MachineError
from peftcli.filesystem import new_file_mode

Hashes = NDArray[np.uint64]
DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError)
"""What numpy and zipfile raise for a damaged file; its arrays have checksums."""


@dataclass(frozen=True)
class SplitRecord:
    """64-bit hashes of the exact text of rows.

    Attributes:
        train: of the training rows, each once.
        test: of the test rows, as often as they occur.
        validation: of the validation rows, as often as they occur.
        unused: of the other rows, such as those that `dataset.max_train_samples` leaves out; each once.
        inputs: of the normalized text of the training and validation rows, and of the prompts that occur once among
            them. A row that was used is recognized by them after a change of its case or spacing, or of its label; it
            is then a training row.
        closed: no other rows become test rows of a training that continues this one, unless none of its own is left. It
            is not saved.
    """

    train: Hashes
    test: Hashes
    unused: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))
    inputs: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))
    closed: bool = False
    validation: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))

    @classmethod
    def of(cls, train: Split, test: Split, validation: Split | None = None) -> Self:
        """The record of a split."""
        trained, tested = np.unique(train.column("exact")), np.sort(test.column("exact"))
        validated = np.zeros(0, np.uint64) if validation is None else np.sort(validation.column("exact"))
        unused = np.setdiff1d(train.store.column("exact"), np.concatenate([trained, tested, validated]))
        inputs = np.unique(np.concatenate([_inputs(used) for used in (train, validation) if used is not None]))
        return cls(trained, tested, unused, inputs, validation=validated)

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            MachineError: the file cannot be read.
        """
        try:
            with np.load(file) as found:
                none = np.zeros(0, np.uint64)  # earlier versions did not record all of them
                inputs, validation = (found.get(name, none) for name in ("inputs", "validation"))
                return cls(found["train"], found["test"], found["unused"], inputs, validation=validation)
        except DAMAGE as problem:
            raise MachineError(
                f"{file}: cannot be read ({problem}), so it is not known which rows this run trained on; train it again"
            ) from problem

    def changed(self, now: "SplitRecord") -> str | None:
        """How the rows of another record differ, whichever split they are in; None if they do not."""
        known, found = (np.concatenate([one.train, one.validation, one.test, one.unused]) for one in (self, now))
        counts = (
            (len(np.setdiff1d(found, known)), "new"),
            (len(np.setdiff1d(self.train, found)), "of the training rows gone"),
            (len(np.setdiff1d(self.validation, found)), "of the validation rows gone"),
            (len(np.setdiff1d(self.test, found)), "of the test rows gone"),
        )
        return ", ".join(f"{count:,} {what}" for count, what in counts if count) or None

    def has_seen(self, store: Store, rows: Indices) -> NDArray[np.bool_]:
        """(rows,), whether the input of a row was trained on or chosen with, whatever its label is now."""
        found: NDArray[np.bool_] = np.isin(store.column("plain")[rows], self.inputs)
        return found | np.isin(store.column("prompt")[rows], self.inputs)

    def extended(self, earlier: Self) -> Self:
        """This record with what an earlier training has seen."""
        train, inputs = np.union1d(self.train, earlier.train), np.union1d(self.inputs, earlier.inputs)
        return replace(self, train=train, inputs=inputs)

    def save(self, file: Path) -> None:
        """Write the record; a reader sees all of it or nothing.

        Raises:
            MachineError: there is a folder of this name.
        """
        if file.is_dir():
            raise MachineError(f"{file} cannot be written: a folder of this name is in the way; move it")
        descriptor, beside = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".npz")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                arrays = ("train", "validation", "test", "unused", "inputs")
                np.savez(stream, **{name: getattr(self, name) for name in arrays})
            os.chmod(beside, new_file_mode())
            os.replace(beside, file)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise


def _inputs(split: Split) -> Hashes:
    prompts, counts = np.unique(split.column("prompt"), return_counts=True)
    once = prompts[(counts == 1) & (prompts != 0)]  # 0: the rows have no prompt
    return np.union1d(split.column("plain"), once)


def join_records(records: Sequence[SplitRecord]) -> SplitRecord | None:
    """One record of several trainings that build on each other; a row that another one trained on is no test row."""
    if not records:
        return None
    test, validation = [], []
    for one in records:
        others = [other for other in records if other is not one]
        trained = np.concatenate([one.train[:0], *(other.train for other in others)])
        seen = np.concatenate([trained, *(other.validation for other in others)])
        test.append(one.test[~np.isin(one.test, seen)])
        validation.append(one.validation[~np.isin(one.validation, trained)])
    train = np.unique(np.concatenate([one.train for one in records]))
    inputs = np.unique(np.concatenate([one.inputs for one in records]))
    held_out = (np.sort(np.concatenate(rows)) for rows in (test, validation))
    return SplitRecord(train, next(held_out), inputs=inputs, validation=next(held_out))


@dataclass(frozen=True)
class TestRows:
    """Rows that a trained model may be scored on.

    Attributes:
        rows: of the store, ascending.
        recorded: how many of them the run held out itself.
        new: rows that the run has never seen; scored only where none of its own test rows is left.
        missing: test rows of the run that are no longer in the data.
        trained: rows that the run trained on, or whose input it trained on, and its validation rows.
    """

    rows: Indices
    recorded: int
    new: int
    missing: int
    trained: int

    def note(self) -> str | None:
        """What changed since the training, None where nothing did."""
        if not self.recorded:
            return f"note: none of the run's own test rows is in these data; scored on {self.new:,} new rows" + (
                f", without the {self.trained:,} that it has used" if self.trained else ""
            )
        parts = []
        if self.missing:
            parts.append(f"{self.missing:,} of its {self.recorded + self.missing:,} test rows are gone")
        if self.new:
            parts.append(f"{self.new:,} rows are new and not scored")
        if not parts:
            return None
        return (
            f"note: the data changed since training: {' and '.join(parts)}; scored on {self.recorded:,} recorded rows"
        )


def find_test_rows(record: SplitRecord, store: Store, rows: Indices) -> TestRows:
    """The rows of a store that a run held out, or, where none is left, those that it has never seen.

    Args:
        rows: of the store that may be taken.

    Raises:
        DataError: the run trained on all of them.
    """
    hashes = store.column("exact")[rows]
    recorded = _as_often_as(hashes, record.test)
    # Validation rows chose the checkpoint, so they say too much good of it.
    trained = np.isin(hashes, np.concatenate([record.train, record.validation])) & ~recorded
    known = np.isin(hashes, np.concatenate([record.test, record.unused]))
    trained |= ~recorded & ~known & record.has_seen(store, rows)
    new = ~recorded & ~trained & ~known
    counts = int(recorded.sum()), int(new.sum()), len(record.test) - int(recorded.sum()), int(trained.sum())
    if recorded.any():
        return TestRows(rows[recorded], *counts)
    unseen = ~trained
    if not unseen.any():
        raise DataError(f"the run trained on all {len(rows):,} rows, so they say nothing about it; name other rows")
    return TestRows(rows[unseen], 0, int(unseen.sum()), *counts[2:])


def _as_often_as(hashes: Hashes, wanted: Hashes) -> NDArray[np.bool_]:
    """For each hash whether it is wanted, the first ones where it occurs more often than that.

    >>> _as_often_as(np.array([7, 5, 7, 7], np.uint64), np.array([7, 7], np.uint64)).tolist()
    [True, False, True, False]
    """
    values, counts = np.unique(wanted, return_counts=True)
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    rank = np.arange(len(ranked)) - np.searchsorted(ranked, ranked, side="left")
    at = np.searchsorted(values, ranked)
    found = np.zeros(len(hashes), bool)
    inside = at < len(values)
    inside[inside] = values[at[inside]] == ranked[inside]
    found[order[inside]] = rank[inside] < counts[at[inside]]
    return found
