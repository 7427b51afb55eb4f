"""Rows on disk: text, token ids, labels and statistics, in memory-mapped files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from peftcli.data.dedup import HASHES, band_of
from peftcli.data.encode import as_lists
from peftcli.data.tokenize import FLAGS, TokenizedBatch
from peftcli.run_dir import read_json, write_json

LISTS = pa.large_list(pa.int32())
ROW_COLUMNS = {
    "source": pa.int32(),
    "file": pa.int32(),
    "number": pa.int64(),
    "uncut": pa.int64(),
    "length": pa.int64(),
    "trained": pa.int64(),
    "flags": pa.uint16(),
    "label": pa.int32(),
    "exact": pa.uint64(),
    "plain": pa.uint64(),
    "prompt": pa.uint64(),
    "class": pa.uint64(),
    "group": pa.uint64(),
}
"""Statistics of a row: its location, token counts, flags (a bit for each of FLAGS), label id, and 64-bit hashes of its
exact text, its normalized text, its prompt, and its columns `split.stratify` and `split.group`."""
SIGNATURES = "signature"


@dataclass(frozen=True)
class StoredSignatures:
    """Signatures of some rows of a store, memory-mapped."""

    pieces: list[NDArray[np.uint32]]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def band(self, number: int) -> NDArray[np.uint64]:
        """(rows,), a hash of one band of each signature."""
        bands = [band_of(piece, number) for piece in self.pieces] or [np.zeros(0, np.uint64)]
        return np.concatenate(bands)[self.rows]

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
        """(n, 24), the signatures of some of the rows."""
        ends = np.cumsum([len(piece) for piece in self.pieces])
        chosen = self.rows[rows]
        found = np.empty((len(chosen), HASHES), np.uint32)
        at = np.searchsorted(ends, chosen, side="right")
        for number in np.unique(at):
            here = at == number
            found[here] = self.pieces[number][chosen[here] - (ends[number] - len(self.pieces[number]))]
        return found


@dataclass(frozen=True)
class Store:
    """The usable rows of one or several sources, in a folder."""

    folder: Path
    facts: dict[str, Any]
    classes: tuple[str, ...] = ()
    """Names of the classes or tags by the ids in `examples`; those of the facts if empty."""

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a store that `Writer` wrote."""
        return cls(folder, read_json(folder / "facts.json"))

    @property
    def rows(self) -> int:
        return int(self.facts["kept"])

    @cached_property
    def examples(self) -> pa.Table:
        """`input_ids`, `labels` and the text columns of the examples, memory-mapped."""
        table = pa.ipc.open_file(pa.memory_map(str(self.folder / "examples.arrow"))).read_all()
        numbers = self._numbers
        if numbers is None:
            return table
        labels = [_renumbered(chunk, numbers) for chunk in table.column("labels").chunks]
        return table.set_column(1, "labels", pa.chunked_array(labels, LISTS))

    def largest_token(self) -> int:
        """The largest token id of all rows."""
        chunks = self.examples.column("input_ids").chunks
        return max((int(pc.max(chunk.flatten()).as_py() or 0) for chunk in chunks), default=0)

    def column(self, name: str) -> NDArray[Any]:
        """(rows,), a column of ROW_COLUMNS."""
        values: NDArray[Any] = self._known.column(name).combine_chunks().to_numpy(zero_copy_only=False)
        numbers = self._numbers if name == "label" else None
        return values if numbers is None else np.where(values >= 0, numbers[np.maximum(values, 0)], values)

    @cached_property
    def signatures(self) -> list[NDArray[np.uint32]]:
        """The memory-mapped signatures (rows, 24), one array per chunk."""
        chunks = self._known.column(SIGNATURES).chunks
        return [chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, HASHES) for chunk in chunks]

    def flag(self, name: str) -> NDArray[np.bool_]:
        """(rows,), whether a flag is set."""
        found: NDArray[np.bool_] = (self.column("flags") >> FLAGS.index(name)) & 1 == 1
        return found

    def places(self, rows: Iterable[int]) -> list[str]:
        """File and line of some rows, or the file names of images in a folder."""
        chosen = pa.array([int(row) for row in rows], pa.int64())
        known = self._known.select(["file", "number"]).take(chosen).to_pylist()
        files = [self.facts["files"][one["file"]] for one in known]
        if not any(file.endswith("/") for file in files):
            return [f"{file}:{one['number']}" for file, one in zip(files, known, strict=True)]
        names = self.examples.column("name").take(chosen).to_pylist()
        rows_of = zip(files, known, names, strict=True)
        return [f"{file}{name}" if file.endswith("/") else f"{file}:{one['number']}" for file, one, name in rows_of]

    @property
    def _numbers(self) -> NDArray[np.int32] | None:
        """Mapping from stored class ids to current ones; None if they are the same."""
        stored = self.facts.get("classes") or []
        if not self.classes or tuple(stored) == self.classes[: len(stored)]:
            return None
        at = {name: number for number, name in enumerate(self.classes)}
        return np.array([at[name] for name in stored], np.int32)

    @cached_property
    def _known(self) -> pa.Table:
        return pa.ipc.open_file(pa.memory_map(str(self.folder / "rows.arrow"))).read_all()


def _renumbered(lists: pa.LargeListArray, numbers: NDArray[np.int32]) -> pa.LargeListArray:
    """Map class ids in lists; negative values do not change."""
    values = lists.values.to_numpy(zero_copy_only=False)
    changed = np.where(values >= 0, numbers[np.maximum(values, 0)], values).astype(np.int32)
    return pa.LargeListArray.from_arrays(lists.offsets, pa.array(changed, pa.int32()))


class Writer:
    """Writes a store batch by batch."""

    def __init__(self, folder: Path, columns: Sequence[str], *, numbers: bool = False) -> None:
        """
        Args:
            folder: for the two files.
            columns: names of the text columns of an example.
            numbers: the labels are floats.
        """
        self._folder = folder
        self._columns = list(columns)
        strings = [(name, pa.large_string()) for name in columns]
        labels = pa.large_list(pa.float32()) if numbers else LISTS
        self._schema = pa.schema([("input_ids", LISTS), ("labels", labels), *strings])
        self._known_schema = pa.schema([*ROW_COLUMNS.items(), (SIGNATURES, pa.list_(pa.uint32(), HASHES))])
        self._examples = pa.ipc.new_file(folder / "examples.arrow", self._schema)
        self._known = pa.ipc.new_file(folder / "rows.arrow", self._known_schema)
        self.rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._examples.close()
        self._known.close()

    def add(
        self,
        texts: dict[str, list[str]],
        tokens: TokenizedBatch,
        known: dict[str, Any],
        signatures: NDArray[np.uint32],
    ) -> None:
        """Write the rows of one batch.

        Args:
            texts: of all examples of the batch, including those dropped in `tokens`.
            tokens: the rows.
            known: the columns of ROW_COLUMNS that are not in `tokens`, for each row of `tokens`.
            signatures: (rows, 24).
        """
        if not len(tokens.of):
            return
        chosen = tokens.of.tolist()
        labels = (tokens.labels(), tokens.lengths) if tokens.classes is None else tokens.classes
        lists = [as_lists(tokens.flat, tokens.lengths), as_lists(*labels)]
        strings = [pa.array([texts[name][row] for row in chosen], pa.large_string()) for name in self._columns]
        self._examples.write_batch(pa.record_batch([*lists, *strings], schema=self._schema))
        bits = np.zeros(len(chosen), np.uint16)
        for number, name in enumerate(FLAGS):
            bits |= tokens.flags[name].astype(np.uint16) << np.uint16(number)
        values = {"uncut": tokens.uncut, "length": tokens.lengths, "trained": tokens.trained, "flags": bits, **known}
        columns = [pa.array(values[name], kind) for name, kind in ROW_COLUMNS.items()]
        flat = pa.array(np.ascontiguousarray(signatures).ravel(), pa.uint32())
        columns.append(pa.FixedSizeListArray.from_arrays(flat, HASHES))
        self._known.write_batch(pa.record_batch(columns, schema=self._known_schema))
        self.rows += len(chosen)

    def write_facts(self, facts: dict[str, Any]) -> None:
        """Write the statistics of all rows."""
        write_json(self._folder / "facts.json", facts | {"kept": self.rows})
