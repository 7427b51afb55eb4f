"""The schema of the dataset section: where rows stand, what they mean, and how they are split."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from peftcli.recipe.fields import (
    freeze_names,
    freeze_rows,
    read_delimiter,
    read_encoding,
    read_quote,
    read_share,
    read_template,
    read_test_size,
)
from peftcli.recipe.section import Section

Text = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(freeze_names)]
Template = Annotated[str, BeforeValidator(read_template)]
Share = Annotated[float, BeforeValidator(read_share)]


class CsvSection(Section):
    """How the cells of a CSV or TSV file are written."""

    delimiter: Annotated[str, BeforeValidator(read_delimiter)] | None = None
    """One sign between two cells; a tab in .tsv files and a comma elsewhere when null."""
    quote: Annotated[str, BeforeValidator(read_quote)] | None = None
    """The sign that encloses a cell, or none where quotes are plain text; `"` when null."""
    column_names: Names | None = None
    """Names of the columns of a file that has no header line."""


class FilesSection(Section):
    """Where rows stand, and how they are written there."""

    path: Text | None = None
    """File, folder or glob; absolute once loaded."""
    file_format: Literal["csv", "tsv", "json", "jsonl", "parquet", "arrow", "text", "conll", "sqlite"] | None = None
    """What the files are, where their ending does not tell."""
    encoding: Annotated[str, BeforeValidator(read_encoding)] = "utf-8"
    """How the letters of text files are stored."""
    csv: CsvSection = CsvSection()
    """How the cells of a CSV or TSV file are written."""
    table: Text | None = None
    """Table of a database."""
    query: Text | None = None
    """SQL query of a database, in place of a table."""


class JoinSection(FilesSection):
    """A second table whose columns are added to the rows."""

    path: Text
    """File; absolute once loaded."""
    on: Annotated[tuple[str, ...], BeforeValidator(freeze_names)]
    """Columns that both tables share and that rows are matched by."""


class ColumnsSection(Section):
    """Names of the columns to use where they differ from the usual ones."""

    text: Text | None = None
    """Column with the whole text of a row."""
    prompt: Text | None = None
    """Column with the prompt."""
    completion: Text | None = None
    """Column with the answer to learn."""
    messages: Text | None = None
    """Column with a list of chat turns."""
    text_pair: Text | None = None
    """Column with a second text that the class belongs to as well."""
    label: Text | None = None
    """Column with the class of a text, with a list of classes, or with a number."""
    tokens: Text | None = None
    """Column with a list of words."""
    tags: Text | None = None
    """Column with a list of tags, one for each word."""
    image: Text | None = None
    """Column with the name of an image file, relative to the file of the rows."""


class SourceSection(FilesSection):
    """Where rows come from, and how each becomes an example."""

    name: Text | None = None
    """Id of a data set on the Hub."""
    config: Text | None = None
    """Configuration of the Hub data set."""
    revision: Text | None = None
    """Branch, tag or commit of the Hub data set."""
    hub_split: Text | None = None
    """Split of the Hub data set, also a slice such as train[:10%]; train when null."""
    url: Text | None = None
    """Address of a database, without a password."""
    url_env: Text | None = None
    """Name of the environment variable that holds the address of a database, password and all."""
    format: Literal["text", "prompt_completion", "messages", "sharegpt", "alpaca", "question_answer"] | None = None
    """What the columns mean, where several readings fit."""
    text: Template | None = None
    """Template of the whole text."""
    prompt: Template | None = None
    """Template of the prompt; no loss is taken on it."""
    completion: Template | None = None
    """Template of the answer to learn."""
    columns: ColumnsSection | None = None
    """Columns to use as they are, in place of templates."""


class WeightedSection(SourceSection):
    """One of several sources."""

    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """How often a training row of this source is used in one pass; 0.5 takes a drawn half of them."""


class SplitSection(Section):
    """How test rows are taken from the data."""

    test_size: Annotated[float | int, BeforeValidator(read_test_size)] = 0.2
    """Share of the rows when below 1, number of rows otherwise; 0 trains on all rows, and none are held out."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of the shuffle; the recipe's `seed` when null."""
    stratify: Text | None = None
    """Column whose values keep their shares on both sides."""
    group: Text | None = None
    """Column whose equal values stay on one side, such as a customer's id."""


class TestSection(FilesSection):
    """Test rows with a source of their own."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    name: Text | None = None
    """Id of a data set on the Hub; that of the training rows when only `hub_split` is given."""
    config: Text | None = None
    """Configuration of the Hub data set."""
    revision: Text | None = None
    """Branch, tag or commit of the Hub data set."""
    hub_split: Text | None = None
    """Split of the Hub data set, such as test; `test` when null."""


class LimitsSection(Section):
    """Where the data are so wrong that nothing is trained; shares in 0..1."""

    dropped: Share = 0.05
    """Largest share of rows that may be left out."""
    truncated: Share = 0.05
    """Largest share of rows that may be cut at `max_length`."""
    leaked: Share = 0.01
    """Largest share of test rows that may stand in the training rows too."""
    eos_trained: Share = 1.0
    """Smallest share of training rows, those that are cut aside, whose end token must be trained."""


class DatasetSection(SourceSection):
    """The rows to learn from."""

    sources: Annotated[tuple[WeightedSection, ...], BeforeValidator(freeze_rows)] = ()
    """Several sources, in place of one."""
    join: Annotated[tuple[JoinSection, ...], BeforeValidator(freeze_rows)] = ()
    """Tables to join, in order."""
    labels: Annotated[Names, Field(min_length=1)] | None = None
    """Names of the classes or tags in the order of their numbers; all that the rows hold, sorted, when null."""
    deduplicate: bool = False
    """Keep the first of equal rows only, case and white space aside."""
    split: SplitSection = SplitSection()
    """How test rows are taken; not used when `test` is given."""
    test: TestSection | None = None
    """Test rows with a source of their own."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Longest row, tokens."""
    too_long: Literal["truncate", "drop", "split"] | None = None
    """What happens to longer rows: split cuts a text into several; for text files split when null, else truncate."""
    max_train_samples: Annotated[int, Field(ge=1)] | None = None
    """Train on so many rows at most; all when null."""
    limits: LimitsSection = LimitsSection()
    """Where the data are so wrong that nothing is trained."""

    @property
    def holds_out(self) -> bool:
        """Whether there are test rows, so that figures on held-out rows can be had."""
        return self.test is not None or self.split.test_size != 0
