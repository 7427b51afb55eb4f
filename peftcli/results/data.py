"""`data.json`: what the data hold, what was left out, and how some rows are trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftcli.results.schema import SCHEMA, Counts
from peftcli.typed_json import OMIT_NONE

MOST_SHOWN = 20
"""Maximum number of columns, and of keys, in a line about what is not read."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A source of rows.

    Attributes:
        read_as: how its rows were understood.
        weight: how often its training rows are used per epoch.
        share: asked share of the training rows, instead of a weight.
        train_rows: its training rows; None if it is the only source, or has no training rows.
        mixed_rows: training rows per epoch, with those that are repeated.
        unread: types of the values of the first columns that nothing reads, by column.
        unread_columns: number of all such columns.
        unread_keys: number of rows with a key of a message that nothing reads, by key.
    """

    path: str | None = None
    rows: int | None = None
    read_as: str | None = None
    weight: float | None = None
    share: float | None = field(default=None, metadata=OMIT_NONE)
    train_rows: int | None = field(default=None, metadata=OMIT_NONE)
    mixed_rows: int | None = field(default=None, metadata=OMIT_NONE)
    unread: Mapping[str, str] = field(default_factory=dict)
    unread_columns: int | None = None
    unread_keys: Counts = field(default_factory=dict)

    def not_read(self) -> str | None:
        """The columns and keys that nothing reads; None if everything is read."""
        names = [f"{name} ({types})" for name, types in self.unread.items()]
        keys = [f"{key} in {rows:,} {'row' if rows == 1 else 'rows'}" for key, rows in self.unread_keys.items()]
        more = (self.unread_columns or len(names)) - min(len(names), MOST_SHOWN)
        shown = [", ".join([*names[:MOST_SHOWN], *([f"and {more} more"] if more > 0 else [])])]
        others = len(keys) - MOST_SHOWN
        shown.append(", ".join([*keys[:MOST_SHOWN], *([f"and {others} more"] if others > 0 else [])]))
        return "; ".join(filter(None, shown)) or None


@dataclass(frozen=True, kw_only=True)
class DataJoin:
    """A table that was joined; `unmatched` counts rows without a partner in it."""

    path: str | None = None
    on: tuple[str, ...] = ()
    rows: int | None = None
    unmatched: int | None = None


@dataclass(frozen=True, kw_only=True)
class DataColumn:
    """What was found in a column: how many rows hold each trace, and the first places of each by its name."""

    source: str | None = None
    column: str | None = None
    rows: int | None = None
    null: int | None = None
    empty: int | None = None
    types: Counts = field(default_factory=dict)
    control_characters: int | None = None
    replacement_characters: int | None = None
    email: int | None = None
    phone: int | None = None
    key: int | None = None
    first: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SideCounts:
    """A number of either side; without test rows there is no key for theirs."""

    train: int | None = None
    test: int | None = field(default=None, metadata=OMIT_NONE)


@dataclass(frozen=True, kw_only=True)
class Fingerprints:
    """Hashes of the rows of either side."""

    train: str | None = None
    test: str | None = None


@dataclass(frozen=True, kw_only=True)
class LabelCounts:
    """How often the most frequent answers or classes are there on either side.

    Attributes:
        of: the column that they are read from.
        distinct: number of all values.
        total: tagged words of either side; only where words have labels.
    """

    of: str | None = None
    distinct: int | None = None
    train: Counts = field(default_factory=dict)
    test: Counts | None = field(default=None, metadata=OMIT_NONE)
    total: SideCounts | None = field(default=None, metadata=OMIT_NONE)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The spread of the numbers of a regression."""

    min: float | None = None
    median: float | None = None
    max: float | None = None
    mean: float | None = None
    deviation: float | None = None


@dataclass(frozen=True, kw_only=True)
class NumberSpread:
    """The numbers of a regression on both sides; `of` is their column."""

    of: str | None = None
    train: Spread | None = None
    test: Spread | None = field(default=None, metadata=OMIT_NONE)


@dataclass(frozen=True, kw_only=True)
class WordCounts:
    """Words of tagged rows, of both sides together, and entities by type."""

    words: int | None = None
    tagged: int | None = None
    silent: int | None = None
    cut: int | None = None
    cut_tagged: int | None = None
    entities: Counts = field(default_factory=dict)
    odd_tags: int | None = None
    odd_tag_examples: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SideTokens:
    """Tokens of both sides, and how many of them are trained or scored."""

    train: int | None = None
    trained: int | None = None
    test: int | None = None
    test_trained: int | None = None


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of a training row, before any cut."""

    min: float | None = None
    median: float | None = None
    p95: float | None = None
    max: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainedPerRow:
    """Trained tokens of a training row."""

    min: int | None = None
    median: float | None = None


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts between edges, of which there is one more."""

    edges: tuple[float, ...] = ()
    counts: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class HeldOutPair:
    """A held-out row and the training row that is like it."""

    test: str | None = None
    train: str | None = None

    @property
    def places(self) -> tuple[str | None, str | None]:
        return self.test, self.train


@dataclass(frozen=True, kw_only=True)
class RowPair:
    """A row and the earlier row that is like it."""

    row: str | None = None
    first: str | None = None

    @property
    def places(self) -> tuple[str | None, str | None]:
        return self.row, self.first


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """A check of the tokenizer: `ok`, `warn`, `fail` or `skip`, and one sentence."""

    name: str | None = None
    result: str | None = None
    said: str | None = None


@dataclass(frozen=True, kw_only=True)
class PreviewPart:
    """A stretch of a previewed row: `prompt`, `trained` or `dropped`."""

    kind: str = ""
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class PreviewRow:
    """A row as the trainer sees it.

    Attributes:
        tokens: None for an image.
        trained: None where the whole row has a label.
    """

    place: str | None = None
    tokens: int | None = None
    trained: int | None = None
    parts: tuple[PreviewPart, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TemplateMismatch:
    """Where the trained text of a chat is not the prompt that evaluation asks, followed by the answer.

    Attributes:
        turn: index of the message, from 0.
        trained, asked: the two texts around the first difference.
    """

    place: str | None = None
    turn: int | None = None
    trained: str | None = None
    asked: str | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataFigures:
    """Numbers of rows, as `metrics.json` repeats them."""

    train_rows: int | None = None
    test_rows: int | None = None
    dropped_rows: int | None = None
    truncated_rows: int | None = None
    leaked_rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class DataJson(DataFigures):
    """`data.json`: what the data hold, what was left out, and how some rows are trained.

    The data package collects these as a plain object, part by part; it becomes a `DataJson` where it is written or
    shown. What only rows with labels have (or only those without) is left out of the file elsewhere.

    Attributes:
        file_state: hash of the sizes and times of the data files, see `data.file_state`.
        template: settings that were written into the chat template.
        template_mismatch_rows: chats whose trained text is not what evaluation asks, followed by the answer.
        context_only_rows: chats with answers that are not trained, since the text shows them differently than they are
            generated.
    """

    schema: int = SCHEMA
    format: str | None = None
    task: str | None = None
    sources: tuple[DataSource, ...] = ()
    joins: tuple[DataJoin, ...] = ()
    rows: int | None = None
    dropped: Counts = field(default_factory=dict)
    dropped_examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    columns: tuple[DataColumn, ...] = ()
    labels: LabelCounts | None = None
    truncated_examples: tuple[str, ...] = ()
    merged_boundary_rows: int | None = None
    doubled_bos_rows: int | None = None
    unknown_token_rows: int | None = None
    tokens: SideTokens | None = None
    trained_per_row: TrainedPerRow | None = None
    length: Lengths | None = None
    length_histogram: Histogram | None = None
    max_length: int | None = None
    fingerprint: Fingerprints = field(default_factory=Fingerprints)
    file_state: str | None = field(default=None, metadata=OMIT_NONE)
    leaked_examples: tuple[HeldOutPair, ...] = ()
    leaked_prompts: int | None = None
    duplicate_rows: int | None = None
    duplicate_examples: tuple[RowPair, ...] = ()
    near_duplicate_rows: int | None = None
    near_duplicate_examples: tuple[RowPair, ...] = ()
    near_leaked_rows: int | None = None
    near_leaked_examples: tuple[HeldOutPair, ...] = ()
    warnings: tuple[str, ...] = ()
    split: Mapping[str, Any] | None = None
    cache: str | None = None
    prepare_seconds: float | None = field(default=None, metadata=OMIT_NONE)
    checks: tuple[DataCheck, ...] = ()
    preview: tuple[PreviewRow, ...] = ()
    # Rows without labels.
    eos_expected_rows: int | None = field(default=None, metadata=OMIT_NONE)
    eos_trained_rows: int | None = field(default=None, metadata=OMIT_NONE)
    eos_lacking_examples: tuple[str, ...] | None = field(default=None, metadata=OMIT_NONE)
    ends_with: str | None = None
    # Chats.
    template: Mapping[str, Any] | None = field(default=None, metadata=OMIT_NONE)
    template_mismatch_rows: int | None = field(default=None, metadata=OMIT_NONE)
    template_mismatch_examples: tuple[TemplateMismatch, ...] | None = field(default=None, metadata=OMIT_NONE)
    template_mismatch_fix: str | None = field(default=None, metadata=OMIT_NONE)
    context_only_rows: int | None = field(default=None, metadata=OMIT_NONE)
    context_only_examples: tuple[str, ...] | None = field(default=None, metadata=OMIT_NONE)
    context_only_fix: str | None = field(default=None, metadata=OMIT_NONE)
    # Rows with labels.
    problem: str | None = None
    classes: tuple[str, ...] | None = field(default=None, metadata=OMIT_NONE)
    conflicting_rows: int | None = field(default=None, metadata=OMIT_NONE)
    conflicting_examples: tuple[RowPair, ...] | None = field(default=None, metadata=OMIT_NONE)
    numbers: NumberSpread | None = field(default=None, metadata=OMIT_NONE)
    absent_classes: Mapping[str, tuple[str, ...]] | None = field(default=None, metadata=OMIT_NONE)
    rows_without_class: SideCounts | None = field(default=None, metadata=OMIT_NONE)
    majority_share: Mapping[str, float] | None = field(default=None, metadata=OMIT_NONE)
    words: WordCounts | None = field(default=None, metadata=OMIT_NONE)
