"""The one pass over the sources: read, join, build examples, tokenize, count, and store the rows on disk."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from peftcli.data.formats import KINDS, Examples, Given, RowFormat
from peftcli.data.image_rows import ImageClasses
from peftcli.data.join import Join
from peftcli.data.label_stats import TagCounts
from peftcli.data.label_tokenize import Classes, TextClasses, WordTags
from peftcli.data.quality import ColumnScan
from peftcli.data.row_index import row_hashes, signatures_of
from peftcli.data.rows import Dropped, Rows, Source
from peftcli.data.special_tokens import SpecialTexts
from peftcli.data.store import Writer
from peftcli.data.tokenize import TokenizedBatch, TokenizeStep
from peftcli.errors import DataError
from peftcli.plan.plan import LossMask
from peftcli.progress import Progress
from peftcli.recipe.schema import DatasetSection, SourceSection
from peftcli.tasks.base import implementation
from peftcli.tasks.registry import TASKS

MANY_LABELS = 5000
"""With more different answers than this, answers are no labels and their balance is not counted."""


@dataclass(frozen=True)
class DataRequest:
    """What one pass needs to know besides its sources.

    Attributes:
        dataset: section of the recipe.
        rule: which tokens are trained.
        limit: rows to read at most, of each source; None for all.
    """

    dataset: DatasetSection
    rule: LossMask
    limit: int | None = None


def run_pipeline(
    folder: Path,
    sources: Sequence[tuple[Source, SourceSection]],
    joins: Sequence[Join],
    tokenizer: PreTrainedTokenizerBase,
    asked: DataRequest,
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
    TokenizePipeline(folder, sources, joins, tokenizer, asked, progress).run()


@dataclass
class TokenizePipeline:
    """The state of one pass."""

    folder: Path
    sources: Sequence[tuple[Source, SourceSection]]
    joins: Sequence[Join]
    tokenizer: PreTrainedTokenizerBase
    asked: DataRequest
    progress: Progress

    def __post_init__(self) -> None:
        self._reading: RowFormat | None = None
        self._tokens: TokenizeStep | TextClasses | WordTags | None = None
        self._classes = Classes()
        self._tags = TagCounts()
        self._dropped = Dropped()
        self._files: dict[str, int] = {}
        self._labels: dict[str, int] | None = {}
        self._special = SpecialTexts(self.tokenizer)
        self._read = 0

    def run(self) -> None:
        facts: list[dict[str, Any]] = []
        columns: list[dict[str, Any]] = []
        warnings: list[str] = []
        writer: Writer | None = None
        self.progress.start("reading rows", 0)
        try:
            for number, (source, section) in enumerate(self.sources):
                reading, scan, before = None, None, self._read
                finish: Callable[[], None] = _nothing
                for rows in self._limited(source):
                    self._dropped.add_unread(rows)
                    rows = self._join(rows)
                    if not rows.numbers:
                        continue
                    if reading is None:
                        reading = self._choose(rows, source, section)
                        scan = ColumnScan(source.name, reading.columns)
                    writer = writer or Writer(
                        self.folder, KINDS[reading.kind], numbers=reading.problem_type == "regression"
                    )
                    assert scan is not None  # made with the reading
                    scan.add(rows)
                    begun = self._start(writer, number, rows, reading.examples(rows))
                    finish()  # the batch before, which was encoded while this one was read
                    finish = begun
                finish()
                if self._read == before:
                    raise DataError(f"{source.name}: no rows")
                facts.append(self._source_facts(source, section, reading, self._read - before))
                if scan is not None:
                    columns += scan.facts()
                    warnings += scan.warnings()
        finally:
            self.progress.end()
            if writer is not None:
                writer.__exit__(None, None, None)
        if writer is None or not writer.rows:
            raise DataError(self._nothing_left())
        warnings += self._special.warnings()
        writer.write_facts(self._facts() | {"sources": facts, "columns": columns, "warnings": warnings})

    def _limited(self, source: Source) -> Any:
        """The batches of a source, ended where the limit is reached; every row that was seen is counted."""
        seen = 0
        limit = self.asked.limit
        for rows in source.batches():
            if limit is not None and seen + len(rows) > limit:
                rows = _head(rows, limit - seen)
            seen += len(rows)
            self._read += len(rows) + len(rows.unread)
            self.progress.advance(self._read)
            yield rows
            if limit is not None and seen >= limit:
                return

    def _join(self, rows: Rows) -> Rows:
        for join in self.joins:
            before = rows
            rows, lost = join.apply(rows)
            self._dropped.add(before, lost)
        return rows

    def _choose(self, rows: Rows, source: Source, section: SourceSection) -> RowFormat:
        reading = self._read_as(rows, source, section)
        if self._reading is not None and self._reading.kind != reading.kind:
            raise DataError(
                f"{source.name}: holds {reading.kind} ({reading.name}), the source before it {self._reading.kind} "
                f"({self._reading.name}); give the sources templates or columns that make one kind of them"
            )
        if self._reading is None:
            self._reading = reading
            self._tokens = self._tokenizing(reading)
        return reading

    def _read_as(self, rows: Rows, source: Source, section: SourceSection) -> RowFormat:
        rule = self.asked.rule
        if self._reading is not None and self._reading.problem_type is not None:
            rule = replace(rule, problem_type=self._reading.problem_type)
        folder = getattr(source, "folder", None)
        chats = bool(getattr(self.tokenizer, "chat_template", None))
        given = Given(rule, self.asked.dataset.labels, getattr(source, "class_names", {}), folder, chats)
        chosen: RowFormat = implementation(TASKS[rule.task].row_format)(rows, section, given)
        return chosen

    def _tokenizing(self, reading: RowFormat) -> TokenizeStep | TextClasses | WordTags:
        for name in reading.names or ():
            self._classes.number(name)
        if reading.kind == "tagging":
            return WordTags(self.tokenizer, self.asked.rule, self._classes)
        if reading.problem_type is not None:
            make = ImageClasses if reading.kind == "images" else TextClasses
            return make(self.tokenizer, self.asked.rule, reading.problem_type, self._classes)
        return TokenizeStep(reading.kind, self.tokenizer, self.asked.rule)

    def _start(self, writer: Writer, source: int, rows: Rows, examples: Examples) -> Callable[[], None]:
        """Begin to encode a batch; what is returned waits for it, counts it and writes it."""
        assert self._tokens is not None and self._reading is not None  # chosen before the first batch
        if not examples.kept:
            return lambda: self._dropped.add(rows, examples.dropped)
        ends = None if rows.ends is None else [rows.ends[row] for row in examples.kept]
        given = examples.columns, ends, self.asked.dataset.too_long
        # Classes are numbered in the order of the rows, so their batches are made one after the other.
        tokens = self._tokens
        batch = tokens.start(*given) if isinstance(tokens, TokenizeStep) else partial(tokens.batch, *given)

        def finish() -> None:
            self._dropped.add(rows, examples.dropped)
            self._add(writer, source, rows, examples, batch())

        return finish

    def _add(self, writer: Writer, source: int, rows: Rows, examples: Examples, batch: TokenizedBatch) -> None:
        self._dropped.add(rows, [(examples.kept[row], reason) for row, reason in batch.dropped])
        if isinstance(self._tokens, WordTags):
            self._tags.add(rows, examples)
        self._special.add(rows, examples)
        known = row_hashes(rows, examples, batch, self.asked.dataset)
        known["source"] = np.full(len(batch.of), source, np.int32)
        known["file"] = np.full(len(batch.of), self._files.setdefault(rows.file, len(self._files)), np.int32)
        known["label"] = np.array(self._label_numbers(examples), np.int32)[batch.of]
        writer.add(examples.columns, batch, known, signatures_of(examples, batch))

    def _label_numbers(self, examples: Examples) -> list[int]:
        """A number for each different answer, as long as there are few enough to be labels."""
        if not isinstance(self._tokens, TokenizeStep):
            assert self._tokens is not None  # chosen before the first batch
            return self._tokens.numbers(examples.columns)
        answers = examples.columns.get("completion")
        if answers is None or self._labels is None:
            self._labels = None
            return [-1] * len(examples.kept)
        labels = self._labels
        numbers = [labels.setdefault(answer.strip(), len(labels)) for answer in answers]
        if len(labels) > MANY_LABELS:
            self._labels = None
        return numbers

    def _source_facts(
        self, source: Source, section: SourceSection, reading: RowFormat | None, rows: int
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
            "joins": [asdict(join.facts()) for join in self.joins],
            "files": list(self._files),
            "dropped": dict(self._dropped.counts),
            "dropped_examples": self._dropped.places,
            "labels": list(labels) if few else None,
            **self._label_facts(self._reading),
        }

    def _label_facts(self, reading: RowFormat) -> dict[str, Any]:
        if isinstance(self._tokens, TokenizeStep):
            return {}
        words = {"words": dict(self._tokens.counts), **self._tags.facts()} if isinstance(self._tokens, WordTags) else {}
        return {
            "problem": reading.problem_type,
            "label_column": reading.reads[-1],
            "classes": self._classes.names,
            "named": reading.names is not None,
            **words,
        }

    def _nothing_left(self) -> str:
        names = ", ".join(source.name for source, _ in self.sources)
        for join in self.joins:
            if join.facts().unmatched == self._read:
                return join.no_partner()
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self._dropped.counts.most_common(6))
        first = next(iter(self._dropped.places.values()), [""])[0]
        fix = "; raise dataset.max_length" if any("max_length" in reason for reason in self._dropped.counts) else ""
        return f"{names}: no usable row of {self._read:,}: {reasons}" + (f" (first {first})" if first else "") + fix


def _nothing() -> None:
    """What there is to finish before the first batch."""


def _head(rows: Rows, count: int) -> Rows:
    columns = {name: values[:count] for name, values in rows.columns.items()}
    ends = None if rows.ends is None else rows.ends[:count]
    return Rows(rows.file, rows.numbers[:count], columns, rows.unread, ends)
