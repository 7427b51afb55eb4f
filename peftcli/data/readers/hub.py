"""Datasets on the Hub, read with the `datasets` library."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peftcli.data.readers.parquet import rows_of_arrow
from peftcli.data.rows import BATCH_ROWS, Rows
from peftcli.errors import DataError


@dataclass
class HubSource:
    """One split of a dataset.

    Attributes:
        name: id of the dataset.
        config: its configuration; None for the only one.
        revision: branch, tag or commit; None for the latest.
        split: a split or a slice of it, such as train[:10%].
        key: dotted name of the recipe's section, for messages.
    """

    name: str
    config: str | None
    revision: str | None
    split: str
    key: str
    files: tuple[Path, ...] = ()

    def fingerprint(self) -> str:
        """The library's fingerprint of the split."""
        return str(self._dataset._fingerprint)

    def batches(self) -> Iterator[Rows]:
        """All rows from the beginning.

        Raises:
            DataError: the dataset, its configuration or its split cannot be loaded, or has no rows.
        """
        place = f"{self.key}.name {self.name}"
        if not len(self._dataset):
            raise DataError(f"{place}: the split {self.split} has no rows; set {self.key}.hub_split")
        tables = self._dataset.with_format("arrow").iter(batch_size=BATCH_ROWS)
        yield from rows_of_arrow(self.name, place, (batch for table in tables for batch in table.to_batches()))

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        """Class names by column, if the dataset has them: for single classes and lists of classes."""
        features = {name: getattr(kind, "feature", kind) for name, kind in self._dataset.features.items()}
        return {name: tuple(kind.names) for name, kind in features.items() if getattr(kind, "names", None)}

    @cached_property
    def _dataset(self) -> Any:
        import datasets  # takes half a second to import, and only a Hub source needs it

        try:
            return datasets.load_dataset(self.name, self.config, revision=self.revision, split=self.split)
        except Exception as problem:  # the library raises many types, and all of them mean that loading failed
            first = " ".join(str(problem).split())[:300]
            if "nknown split" in first:
                raise DataError(f"{self.key}.name {self.name}: {first}; set {self.key}.hub_split") from problem
            raise DataError(
                f"{self.key}.name {self.name}: cannot be loaded: {type(problem).__name__}: {first}"
            ) from problem
