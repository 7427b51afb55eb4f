"""The one pass over the sources: read, join, make examples, tokenize, count, and write what is usable to disk."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from peftcli.data.facts import counted
from peftcli.data.join import Join
from peftcli.data.names import listed
from peftcli.data.readings import KINDS, Examples, Reading, choose_reading
from peftcli.data.rows import FIRST_PLACES, Rows, Source
from peftcli.data.scan import Scan
from peftcli.data.store import Writer
from peftcli.data.tokens import TokenBatch, Tokens
from peftcli.data.twins import digest, plain, signatures
from peftcli.errors import DataError
from peftcli.plan.plan import LabelRule
from peftcli.progress import Progress
from peftcli.recipe.schema import DatasetSection, SourceSection

MANY_LABELS = 5000
"""With more different answers than this, answers are no labels and their balance is not counted."""


@dataclass(frozen=True)
class Asked:
    """What one pass needs to know besides its sources.

    Attributes:
        dataset: section of the recipe.
        rule: which tokens are trained.
        limit: rows to read at most, of each source; None for all.
    """

    dataset: DatasetSection
    rule: LabelRule
    limit: int | None = None


@dataclass
class Dropped:
    """Rows that are left out: how many by reason, and where the first stand."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, rows: Rows, left_out: Sequence[tuple[int, str]]) -> None:
        """Count rows of a batch by their number in it."""
        for row, reason in left_out:
            self._add(reason, rows.place(row))

    def add_unread(self, rows: Rows) -> None:
        """Count rows that could not be read, by their line."""
        for line, reason in rows.unread:
            self._add(reason, f"{rows.file}:{line}")

    def _add(self, reason: str, place: str) -> None:
        self.counts[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < FIRST_PLACES:
            places.append(place)


def ingest(
    folder: Path,
    sources: Sequence[tuple[Source, SourceSection]],
    joins: Sequence[Join],
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    progress: Progress,
) -> None:
    """Read all sources into a store.

    Args:
        folder: empty; receives the store.
        sources: with the sections that say how their rows become examples.
        joins: applied to every source, in order.

    Raises:
        DataError: a source cannot be read, the sources hold different kinds, or no row is usable.
    """
    _Pass(folder, sources, joins, tokenizer, asked, progress).run()


class _Pass:
    """The state of one pass."""

    def __init__(
        self,
        folder: Path,
        sources: Sequence[tuple[Source, SourceSection]],
        joins: Sequence[Join],
        tokenizer: PreTrainedTokenizerBase,
        asked: Asked,
        progress: Progress,
    ) -> None:
        self._folder = folder
        self._sources = sources
        self._joins = joins
        self._tokenizer = tokenizer
        self._asked = asked
        self._progress = progress
        self._reading: Reading | None = None
        self._tokens: Tokens | None = None
        self._dropped = Dropped()
        self._files: dict[str, int] = {}
        self._labels: dict[str, int] | None = {}
        self._special = _special_pattern(tokenizer)
        self._with_special = Dropped()
        self._read = 0

    def run(self) -> None:
        facts: list[dict[str, Any]] = []
        columns: list[dict[str, Any]] = []
        warnings: list[str] = []
        writer: Writer | None = None
        self._progress.start("reading rows", 0)
        try:
            for number, (source, section) in enumerate(self._sources):
                reading, scan, before = None, None, self._read
                for rows in self._limited(source):
                    self._dropped.add_unread(rows)
                    rows = self._join(rows)
                    if not rows.numbers:
                        continue
                    if reading is None:
                        reading = self._choose(rows, source, section)
                        scan = Scan(source.name, reading.columns)
                    writer = writer or Writer(self._folder, KINDS[reading.kind])
                    assert scan is not None  # made with the reading
                    scan.add(rows)
                    self._add(writer, number, rows, reading.examples(rows))
                if self._read == before:
                    raise DataError(f"{source.name}: no rows")
                facts.append(self._source_facts(source, section, reading, self._read - before))
                if scan is not None:
                    columns += scan.facts()
                    warnings += scan.warnings()
        finally:
            self._progress.end()
            if writer is not None:
                writer.__exit__(None, None, None)
        if writer is None or not writer.rows:
            raise DataError(self._nothing_left())
        warnings += self._special_warning()
        writer.write_facts(self._facts() | {"sources": facts, "columns": columns, "warnings": warnings})

    def _limited(self, source: Source) -> Any:
        """The batches of a source, ended where the limit is reached; every row that was seen is counted."""
        seen = 0
        limit = self._asked.limit
        for rows in source.batches():
            if limit is not None and seen + len(rows) > limit:
                rows = _head(rows, limit - seen)
            seen += len(rows)
            self._read += len(rows) + len(rows.unread)
            self._progress.advance(self._read)
            yield rows
            if limit is not None and seen >= limit:
                return

    def _join(self, rows: Rows) -> Rows:
        for join in self._joins:
            before = rows
            rows, lost = join.apply(rows)
            self._dropped.add(before, lost)
        return rows

    def _choose(self, rows: Rows, source: Source, section: SourceSection) -> Reading:
        reading = choose_reading(rows, section, chats=bool(self._tokenizer.chat_template))
        if self._reading is not None and self._reading.kind != reading.kind:
            raise DataError(
                f"{source.name}: holds {reading.kind} ({reading.name}), the source before it {self._reading.kind} "
                f"({self._reading.name}); give the sources templates or columns that make one kind of them"
            )
        if self._reading is None:
            self._reading = reading
            self._tokens = Tokens(reading.kind, self._tokenizer, self._asked.rule)
        return reading

    def _add(self, writer: Writer, source: int, rows: Rows, examples: Examples) -> None:
        assert self._tokens is not None and self._reading is not None  # chosen before the first batch
        self._dropped.add(rows, examples.dropped)
        if not examples.kept:
            return
        ends = None if rows.ends is None else [rows.ends[row] for row in examples.kept]
        batch = self._tokens.batch(examples.columns, ends, self._asked.dataset.too_long)
        self._dropped.add(rows, [(examples.kept[row], reason) for row, reason in batch.dropped])
        self._count_special(rows, examples)
        writer.add(
            examples.columns, batch, self._known(source, rows, examples, batch), _signatures(examples.content, batch)
        )

    def _known(self, source: int, rows: Rows, examples: Examples, batch: TokenBatch) -> dict[str, Any]:
        of = batch.of
        kept = np.array(examples.kept, np.int64)[of]
        file = self._files.setdefault(rows.file, len(self._files))
        wholes = ["\x1f".join(parts) for parts in zip(*examples.columns.values(), strict=True)]
        split = self._asked.dataset.split
        return {
            "source": np.full(len(of), source, np.int32),
            "file": np.full(len(of), file, np.int32),
            "number": np.array(rows.numbers, np.int64)[kept],
            "label": np.array(self._label_numbers(examples), np.int32)[of],
            "exact": _digests(wholes)[of],
            "plain": _pieces(_digests([plain(text) for text in wholes]), batch),
            "prompt": self._prompts(examples)[of],
            "class": _column_digests(rows, split.stratify, "stratify")[kept],
            "group": self._groups(rows)[kept],
        }

    def _groups(self, rows: Rows) -> Any:
        """What keeps rows on one side of the split: the group's column, or the text that they are pieces of."""
        split = self._asked.dataset.split
        if split.group is None and self._asked.dataset.too_long == "split" and rows.ends is None:
            return _digests([rows.place(row) for row in range(len(rows))])
        return _column_digests(rows, split.group, "group")

    def _prompts(self, examples: Examples) -> Any:
        prompts = examples.columns.get("prompt")
        return np.zeros(len(examples.kept), np.uint64) if prompts is None else _digests(list(map(plain, prompts)))

    def _label_numbers(self, examples: Examples) -> list[int]:
        """A number for each different answer, as long as there are few enough to be labels."""
        answers = examples.columns.get("completion")
        if answers is None or self._labels is None:
            self._labels = None
            return [-1] * len(examples.kept)
        labels = self._labels
        numbers = [labels.setdefault(answer.strip(), len(labels)) for answer in answers]
        if len(labels) > MANY_LABELS:
            self._labels = None
        return numbers

    def _count_special(self, rows: Rows, examples: Examples) -> None:
        if self._special is None:
            return
        found = [
            (examples.kept[number], "special")
            for number, text in enumerate(examples.content)
            if self._special.search(text)
        ]
        self._with_special.add(rows, found)

    def _special_warning(self) -> list[str]:
        count = self._with_special.counts["special"]
        if not count:
            return []
        holds = counted(count, "row holds", "rows hold")
        return [
            f"{holds} the text of a special token such as {self._tokenizer.eos_token}, which becomes that token "
            f"(first {self._with_special.places['special'][0]})"
        ]

    def _source_facts(
        self, source: Source, section: SourceSection, reading: Reading | None, rows: int
    ) -> dict[str, Any]:
        return {
            "path": source.name,
            "rows": rows,
            "read_as": reading.said if reading is not None else None,
            "weight": getattr(section, "weight", 1.0),
        }

    def _facts(self) -> dict[str, Any]:
        assert self._reading is not None
        labels = self._labels or {}
        few = 1 < len(labels) <= max(2, self._read // 5)
        return {
            "kind": self._reading.kind,
            "prompt": self._reading.prompt,
            "rows": self._read,
            "joins": [asdict(join.facts()) for join in self._joins],
            "files": list(self._files),
            "dropped": dict(self._dropped.counts),
            "dropped_examples": self._dropped.places,
            "labels": list(labels) if few else None,
        }

    def _nothing_left(self) -> str:
        names = ", ".join(source.name for source, _ in self._sources)
        for join in self._joins:
            if join.facts().unmatched == self._read:
                return join.no_partner()
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self._dropped.counts.most_common(6))
        first = next(iter(self._dropped.places.values()), [""])[0]
        mend = "; raise dataset.max_length" if any("max_length" in reason for reason in self._dropped.counts) else ""
        return f"{names}: no usable row of {self._read:,}: {reasons}" + (f" (first {first})" if first else "") + mend


def _head(rows: Rows, count: int) -> Rows:
    columns = {name: values[:count] for name, values in rows.columns.items()}
    ends = None if rows.ends is None else rows.ends[:count]
    return Rows(rows.file, rows.numbers[:count], columns, rows.unread, ends)


def _digests(texts: Sequence[str]) -> Any:
    return np.fromiter(map(digest, texts), np.uint64, len(texts))


def _pieces(hashes: Any, batch: TokenBatch) -> Any:
    """The hash of each row, made another one for each further piece of one text, so that pieces are no duplicates."""
    return hashes[batch.of] + _piece_numbers(batch).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def _signatures(content: Sequence[str], batch: TokenBatch) -> Any:
    found = signatures([plain(text) for text in content])[batch.of]
    return found + _piece_numbers(batch).astype(np.uint32)[:, None]


def _piece_numbers(batch: TokenBatch) -> Any:
    """0 for the first row that was made from an example, 1 for the next, and so on."""
    return np.arange(len(batch.of)) - np.searchsorted(batch.of, batch.of, side="left")


def _column_digests(rows: Rows, name: str | None, key: str) -> Any:
    """64 bits of each value of a column; zeros where the recipe names none."""
    if name is None:
        return np.zeros(len(rows), np.uint64)
    if name not in rows.columns:
        raise DataError(f"dataset.split.{key}: {rows.file} has no column {name}; it has {listed(rows.columns)}")
    return _digests([repr(value) for value in rows.columns[name]])


def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    tokens = [token for token in tokenizer.all_special_tokens if len(token) > 2]
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None
