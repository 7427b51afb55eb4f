"""One pass over the sources: read, join, build examples, tokenize, collect statistics, and store the rows on disk."""

from collections.abc import Callable, Iterator, Sequence
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
from peftcli.data.other_tasks import MediaMarks
from peftcli.data.quality import ColumnScan
from peftcli.data.row_index import row_hashes, signatures_of
from peftcli.data.rows import Dropped, Rows, Source
from peftcli.data.selection import Selection
from peftcli.data.special_tokens import SpecialTexts
from peftcli.data.store import Writer
from peftcli.data.tokenize import TokenizedBatch, TokenizeStep
from peftcli.data.unread import Unread
from peftcli.errors import DataError
from peftcli.plan.plan import LossMask
from peftcli.progress import Progress
from peftcli.recipe.schema import DatasetSection, SourceSection
from peftcli.tasks.base import implementation
from peftcli.tasks.registry import TASKS

TOOLS = ("tools", "functions")
"""Columns with the tools of a chat, which go to the chat template as a whole."""
MANY_LABELS = 5000
"""With more distinct completions than this, they are not treated as labels and their distribution is not counted."""


@dataclass(frozen=True)
class DataRequest:
    """The settings of one pass.

    Attributes:
        dataset: section of the recipe.
        rule: which tokens are trained.
        limit: maximum number of rows per source; None for all.
    """

    dataset: DatasetSection
    rule: LossMask
    limit: int | None = None


def run_pipeline(
    folder: Path,
    sources: Sequence[tuple[Source, SourceSection]],
    joins: Sequence[Join],
    tokenizer: PreTrainedTokenizerBase,
    request: DataRequest,
    progress: Progress,
) -> None:
    """Read all sources into a store.

    Args:
        folder: an empty folder for the store.
        sources: with their sections, which define how rows become examples.
        joins: applied to every source, in order.

    Raises:
        DataError: a source cannot be read, the sources have different formats, or no row is usable.
    """
    TokenizePipeline(folder, sources, joins, tokenizer, request, progress).run()


@dataclass
class TokenizePipeline:
    """The state of one pass."""

    folder: Path
    sources: Sequence[tuple[Source, SourceSection]]
    joins: Sequence[Join]
    tokenizer: PreTrainedTokenizerBase
    request: DataRequest
    progress: Progress

    def __post_init__(self) -> None:
        self._format: RowFormat | None = None
        self._tokens: TokenizeStep | TextClasses | WordTags | None = None
        self._classes = Classes()
        self._tags = TagCounts()
        self._dropped = Dropped()
        self._files: dict[str, int] = {}
        self._labels: dict[str, int] | None = {}
        self._special = SpecialTexts(self.tokenizer)
        self._marks = MediaMarks()
        self._read = 0

    def run(self) -> None:
        facts: list[dict[str, Any]] = []
        columns: list[dict[str, Any]] = []
        warnings: list[str] = []
        writer: Writer | None = None
        self.progress.start("reading rows", 0)
        try:
            for number, (source, section) in enumerate(self.sources):
                row_format, scan, unread, before = None, None, None, self._read
                selection = Selection(section)
                finish: Callable[[], None] = _nothing
                for rows in self._selected(source, selection):
                    offered = selection.offered(rows)
                    if row_format is None:
                        row_format = self._choose(offered, source, section)
                        scan = ColumnScan(source.name, row_format.columns)
                        unread = self._unread(row_format, section)
                    writer = writer or Writer(
                        self.folder, KINDS[row_format.kind], numbers=row_format.problem_type == "regression"
                    )
                    assert scan is not None and unread is not None  # created with the format
                    scan.add(rows)
                    unread.add(rows)
                    started = self._start(writer, number, rows, row_format.examples(offered))
                    finish()  # the previous batch, which was encoded while this one was read
                    finish = started
                finish()
                if self._read == before:
                    raise DataError(f"{source.name}: no rows")
                if selection.filters and not selection.kept:
                    raise selection.nothing_left(source.name)
                facts.append(self._source_facts(source, section, row_format, self._read - before))
                facts[-1] |= {} if unread is None else unread.facts()
                if scan is not None:
                    columns += scan.facts()
                    warnings += scan.warnings()
        finally:
            self.progress.end()
            if writer is not None:
                writer.__exit__(None, None, None)
        if writer is None or not writer.rows:
            raise DataError(self._nothing_left())
        warnings += [*self._special.warnings(), *self._marks.warnings()]
        writer.write_facts(self._facts() | {"sources": facts, "columns": columns, "warnings": warnings})

    def _selected(self, source: Source, selection: Selection) -> Iterator[Rows]:
        """The batches of a source after the joins, with the rows that the recipe selects; none is empty."""
        limit, taken, checked = self.request.limit, 0, False
        # The first rows of a sorted file may all be left out, so a limit is for the rows that are selected.
        for rows in self._limited(source, None if selection.filters else limit):
            self._dropped.add_unread(rows)
            rows = self._join(rows)
            if rows.numbers and not checked:
                selection.check(rows)
                checked = True
            before = rows
            rows, left_out = selection.apply(rows)
            self._dropped.add(before, left_out)
            if limit is not None and selection.filters:
                rows = _head(rows, limit - taken)
            taken += len(rows)
            if rows.numbers:
                yield rows
            if limit is not None and taken >= limit:
                return

    def _limited(self, source: Source, limit: int | None) -> Iterator[Rows]:
        """The batches of a source up to a limit; counts the rows that were read."""
        seen = 0
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

    def _unread(self, row_format: RowFormat, section: SourceSection) -> Unread:
        split = self.request.dataset.split
        other = [name for name in (split.group, split.stratify) if name is not None]
        keys = [name for join in self.joins for name in join.facts().on]
        chats = [name for name in row_format.reads if name not in TOOLS] if row_format.kind == "messages" else []
        return Unread([*row_format.reads, *other, *keys, *(section.where or ())], chats)

    def _choose(self, rows: Rows, source: Source, section: SourceSection) -> RowFormat:
        row_format = self._detect(rows, source, section)
        if self._format is not None and self._format.kind != row_format.kind:
            raise DataError(
                f"{source.name}: its format is {row_format.kind} ({row_format.name}), but the previous source is "
                f"{self._format.kind} ({self._format.name}); give the sources templates or columns of one format"
            )
        if self._format is None:
            self._format = row_format
            self._tokens = self._tokenize_step(row_format)
        return row_format

    def _detect(self, rows: Rows, source: Source, section: SourceSection) -> RowFormat:
        rule = self.request.rule
        if self._format is not None and self._format.problem_type is not None:
            rule = replace(rule, problem_type=self._format.problem_type)
        folder = getattr(source, "folder", None)
        chats = bool(getattr(self.tokenizer, "chat_template", None))
        given = Given(rule, self.request.dataset.labels, getattr(source, "class_names", {}), folder, chats)
        chosen: RowFormat = implementation(TASKS[rule.task].row_format)(rows, section, given)
        return chosen

    def _tokenize_step(self, row_format: RowFormat) -> TokenizeStep | TextClasses | WordTags:
        for name in row_format.names or ():
            self._classes.number(name)
        if row_format.kind == "tagging":
            return WordTags(self.tokenizer, self.request.rule, self._classes)
        if row_format.problem_type is not None:
            make = ImageClasses if row_format.kind == "images" else TextClasses
            return make(self.tokenizer, self.request.rule, row_format.problem_type, self._classes)
        return TokenizeStep(row_format.kind, self.tokenizer, self.request.rule)

    def _start(self, writer: Writer, source: int, rows: Rows, examples: Examples) -> Callable[[], None]:
        """Start to encode a batch; the returned function waits for it, counts it and writes it."""
        assert self._tokens is not None and self._format is not None  # chosen before the first batch
        if not examples.kept:
            return lambda: self._dropped.add(rows, examples.dropped)
        ends = None if rows.ends is None else [rows.ends[row] for row in examples.kept]
        arguments = examples.columns, ends, self.request.dataset.too_long
        # Class ids are assigned in the order of the rows, so batches with labels are processed one after the other.
        tokens = self._tokens
        batch = tokens.start(*arguments) if isinstance(tokens, TokenizeStep) else partial(tokens.batch, *arguments)

        def finish() -> None:
            self._dropped.add(rows, examples.dropped)
            self._add(writer, source, rows, examples, batch())

        return finish

    def _add(self, writer: Writer, source: int, rows: Rows, examples: Examples, batch: TokenizedBatch) -> None:
        self._dropped.add(rows, [(examples.kept[row], reason) for row, reason in batch.dropped])
        if isinstance(self._tokens, WordTags):
            self._tags.add(rows, examples)
        self._special.add(rows, examples)
        if isinstance(self._tokens, TokenizeStep):
            self._marks.add(rows, examples.kept, examples.content)
        known = row_hashes(rows, examples, batch, self.request.dataset)
        known["source"] = np.full(len(batch.of), source, np.int32)
        known["file"] = np.full(len(batch.of), self._files.setdefault(rows.file, len(self._files)), np.int32)
        known["label"] = np.array(self._label_numbers(examples), np.int32)[batch.of]
        writer.add(examples.columns, batch, known, signatures_of(examples, batch))

    def _label_numbers(self, examples: Examples) -> list[int]:
        """An id for each distinct completion, as long as there are few enough to be labels."""
        if not isinstance(self._tokens, TokenizeStep):
            assert self._tokens is not None  # chosen before the first batch
            return self._tokens.numbers(examples.columns)
        completions = examples.columns.get("completion")
        if completions is None or self._labels is None:
            self._labels = None
            return [-1] * len(examples.kept)
        labels = self._labels
        numbers = [labels.setdefault(completion.strip(), len(labels)) for completion in completions]
        if len(labels) > MANY_LABELS:
            self._labels = None
        return numbers

    def _source_facts(
        self, source: Source, section: SourceSection, row_format: RowFormat | None, rows: int
    ) -> dict[str, Any]:
        return {
            "path": source.name,
            "rows": rows,
            "read_as": row_format.said if row_format is not None else None,
            "weight": getattr(section, "weight", 1.0),
        }

    def _facts(self) -> dict[str, Any]:
        assert self._format is not None
        labels = self._labels or {}
        few = 1 < len(labels) <= max(2, self._read // 5)
        return {
            "kind": self._format.kind,
            "prompt": self._format.prompt,
            "rows": self._read,
            "joins": [asdict(join.facts()) for join in self.joins],
            "files": list(self._files),
            "dropped": dict(self._dropped.counts),
            "dropped_examples": self._dropped.places,
            "labels": list(labels) if few else None,
            **self._label_facts(self._format),
        }

    def _label_facts(self, row_format: RowFormat) -> dict[str, Any]:
        if isinstance(self._tokens, TokenizeStep):
            return {}
        words = {"words": dict(self._tokens.counts), **self._tags.facts()} if isinstance(self._tokens, WordTags) else {}
        return {
            "problem": row_format.problem_type,
            "label_column": row_format.reads[-1],
            "classes": self._classes.names,
            "named": row_format.names is not None,
            **words,
        }

    def _nothing_left(self) -> str:
        names = ", ".join(source.name for source, _ in self.sources)
        for join in self.joins:
            if join.facts().unmatched == self._read:
                return join.no_partner()
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self._dropped.counts.most_common(6))
        first = next(iter(self._dropped.places.values()), [""])[0]
        where = f" (first {first})" if first else ""
        return f"{names}: none of {self._read:,} rows is usable: {reasons}{where}; {self._fix()}"

    def _fix(self) -> str:
        reasons = list(self._dropped.counts)
        if any("max_length" in reason for reason in reasons):
            return "raise dataset.max_length"
        if any("the unknown role" in reason for reason in reasons):
            return "rename the roles to system, user, assistant or tool"
        return "fix the rows, or read other columns"


def _nothing() -> None:
    """Nothing to finish before the first batch."""


def _head(rows: Rows, count: int) -> Rows:
    columns = {name: values[:count] for name, values in rows.columns.items()}
    ends = None if rows.ends is None else rows.ends[:count]
    return Rows(rows.file, rows.numbers[:count], columns, rows.unread, ends)
