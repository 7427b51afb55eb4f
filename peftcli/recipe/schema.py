"""The schema of a recipe: every section and key with its type, bounds, default and meaning.

A default is written here and nowhere else. Rules between keys are in `rules.py`.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    model_validator,
)

from peftcli.methods.base import ARGUMENT_NAMES
from peftcli.methods.registry import METHODS
from peftcli.nearest import nearest
from peftcli.recipe.fields import (
    Gate,
    freeze_mapping,
    freeze_names,
    freeze_rows,
    read_answered_rows,
    read_delimiter,
    read_encoding,
    read_method,
    read_name,
    read_quote,
    read_seconds,
    read_share,
    read_targets,
    read_template,
    read_test_size,
    read_tokens,
    read_trained_dtype,
    wrong,
)
from peftcli.tasks.registry import DEFAULT, TASKS

if TYPE_CHECKING:
    TaskName: TypeAlias = str
else:
    TaskName = Literal[tuple(TASKS)]

Text = Annotated[str, Field(min_length=1)]
Seconds = Annotated[float, BeforeValidator(read_seconds)]
Automatic = Annotated[int | Literal["auto"], BeforeValidator(read_tokens)]
Optimization = Literal["fused_loss", "fused_lora", "skip_adapter_casts", "deferred_metrics"]
"""What makes a step cheaper and leaves its loss as it is; each can be switched off alone."""
Tracker = Literal["wandb", "tensorboard", "mlflow", "trackio", "comet_ml", "swanlab"]

Arguments = Annotated[Mapping[str, Any], PlainValidator(freeze_mapping), PlainSerializer(dict)]
Names = Annotated[tuple[str, ...], BeforeValidator(freeze_names)]
Template = Annotated[str, BeforeValidator(read_template)]
Share = Annotated[float, BeforeValidator(read_share)]

EXAMPLE = "{select: gradient, batches: 8, budget: 0.5%}"
MOST_BATCHES = 1000
MOST_ALPHA = 1e6
"""Far above any use, and far below where the scale of an update overflows float16."""


class Section(BaseModel):
    """Nothing is guessed, nothing unknown is taken, nothing changes afterwards."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """The base model."""

    name: Text
    """Hub id, local folder (absolute once loaded) or `tiny:llama`."""
    revision: Text | None = None
    """Branch, tag or commit of the Hub repository."""
    task: TaskName = DEFAULT
    """What the model learns to do: write text, name the class of a text or an image, or tag the words of a text."""
    problem_type: Literal["auto", "single-label", "multi-label", "regression"] = "auto"
    """What a text or an image is given: one class, any number of them, or a number; `auto` is read
    from the labels."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the computation and of weights that are not quantized; the plan decides `auto`."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "auto"
    """Implementation of attention."""
    chat_template: Text | None = None
    """File with a Jinja chat template that replaces the tokenizer's own; absolute once loaded."""
    eos_token: Text | None = None
    """Token on which an answer ends, where the tokenizer's own end token is not the one that the model knows."""
    trust_remote_code: bool = False
    """Run Python code that the repository ships; only with `revision` pinned to a commit."""


class QuantizationSection(Section):
    """How the base weights are stored; without this section they are not quantized."""

    bits: Literal[4, 8] = 4
    """Bits per weight; the keys below belong to 4."""
    type: Literal["nf4", "fp4"] = "nf4"
    """Code book of the 16 values."""
    double_quant: bool = True
    """Quantize the block constants as well; saves about 0.4 bits per weight."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Format that weights are unpacked to for each product; `auto` follows the plan's dtype."""


class PerformanceSection(Section):
    """How the work is done; none of it changes what is learned."""

    batching: Literal["auto", "padding_free", "padded"] = "auto"
    """Rows of a step concatenated without padding (`padding_free`), or padded micro-batches (`padded`)."""
    tokens_per_micro_batch: Automatic = "auto"
    """Tokens that are run at once, in a line or padded; `auto` is what the padded micro-batch could hold."""
    sharding: Literal["auto", "none", "full"] = "auto"
    """Every process holds the whole base (`none`), or a part of it (`full`: FSDP); `auto` is `none`, unless the
    configuration of accelerate asks for FSDP."""
    disable: Annotated[tuple[Optimization, ...], BeforeValidator(freeze_rows)] = ()
    """Optimizations that are switched off: the loss of trained tokens alone (`fused_loss`), LoRA added in one pass
    (`fused_lora`), adapter inputs that are not cast where they need not be (`skip_adapter_casts`), metrics that are
    fetched once a step (`deferred_metrics`)."""


class EvaluationSection(Section):
    """How the base model and the adapter are measured."""

    batch_size: Automatic = "auto"
    """Rows per forward."""
    max_new_tokens: Automatic = "auto"
    """Longest generated answer, tokens; `auto` follows the longest reference."""
    samples: Annotated[int, Field(ge=0, le=100)] = 5
    """Rows shown before and after training."""
    rows: Annotated[int | Literal["all"] | None, BeforeValidator(read_answered_rows)] = None
    """Test rows that are answered by generation: a number drawn by the seed, or `all`; at most 500 when null. The loss
    is always over all test rows."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Softmax temperature of generation; 0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the probability that generation draws from."""
    positive_label: Text | None = None
    """Of two classes the one that precision, recall and F1 are of; the last one when null."""
    baseline: bool = True
    """Measure the base model before the first step."""
    forgetting_text: Text | None = None
    """Text on which forgetting is measured: file, folder or glob; absolute once loaded."""
    forgetting_tokens: Annotated[int, Field(ge=100)] = 50_000
    """Tokens of that text to predict, from its beginning."""


class BudgetSection(Section):
    """How long a run may take; stored in seconds."""

    wall_clock: Seconds | None = None
    """Stop with a checkpoint before this much time has passed, seconds."""
    save_every: Seconds | None = None
    """Time between checkpoints, seconds."""


class ReportSection(Section):
    """Where progress is sent besides the run folder."""

    trackers: Annotated[tuple[Tracker, ...], BeforeValidator(freeze_rows)] = ()
    """Experiment trackers."""


class SelectSection(Section):
    """Modules or layers chosen by the gradient on training rows, before the first step."""

    select: Literal["gradient"]
    """What is asked: the size of the loss's gradient by the weights."""
    batches: int = 8
    """Training batches that it is a mean of."""
    budget: float
    """Share of the base's parameters that may become trainable, 0..1; a recipe may write 0.5%."""


def read_target_modules(value: Any) -> Any:
    """Read `adapter.target_modules`: names, all-linear, or a choice."""
    return read_select(value) if isinstance(value, Mapping | SelectSection) else read_targets(value)


def read_layers(value: Any) -> Any:
    """Read `adapter.layers`: numbers of layers, or a choice."""
    if value is None or isinstance(value, Mapping | SelectSection):
        return None if value is None else read_select(value)
    if not isinstance(value, list | tuple) or not value or not all(_is_whole(number) for number in value):
        raise wrong(f"must be a list of layer numbers from 0 on, such as [0, 1], or {EXAMPLE}")
    freeze_names([str(number) for number in value])  # none of them twice
    return tuple(value)


class AdapterSection(Section):
    """What is trained.

    A key that the recipe leaves out has the method's own default; one that means nothing to the method is None.
    """

    method: Annotated[str, BeforeValidator(read_method)] = "lora"
    """A method of `peftcli methods`."""
    r: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Rank of the update; of AdaLoRA the mean rank at the end."""
    alpha: Annotated[float, Field(gt=0, le=MOST_ALPHA)] | None = None
    """Numerator of the update's scale: alpha / r, or alpha / sqrt(r) with `use_rslora`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the adapter's inputs that a training step sets to zero."""
    target_modules: Annotated[
        tuple[str, ...] | Literal["all-linear"] | SelectSection | None, BeforeValidator(read_target_modules)
    ] = None
    """Module names that get an adapter, every linear layer except the output, or those that the gradient chooses; the
    method's own choice when null."""
    layers: Annotated[tuple[int, ...] | SelectSection | None, BeforeValidator(read_layers)] = None
    """Numbers of the layers that get an adapter, or those that the gradient chooses; all when null."""
    use_rslora: bool = False
    """Scale by sqrt(r) in place of r."""
    use_dora: bool = False
    """Learn the magnitude of each weight column apart from its direction."""
    modules_to_save: Annotated[tuple[str, ...], BeforeValidator(freeze_names)] | None = None
    """Modules trained whole and stored with the adapter."""
    init_from: Annotated[str, Field(min_length=1)] | None = None
    """Run or adapter whose weights the training starts from; absolute once loaded."""
    dtype: Annotated[Literal["float32", "bfloat16"], BeforeValidator(read_trained_dtype)] = "float32"
    """Format of the trained weights, their gradients and, with torch's optimizers, their state; `bfloat16` trains whole
    weights without a float32 copy, and loses updates that are small beside the weight."""
    bias: Literal["none"] = "none"
    """Bias vectors are not trained: with them, switching the adapter off would not give the base back."""
    arguments: Annotated[Mapping[str, Any], PlainValidator(freeze_mapping), PlainSerializer(dict)] = Field(
        default_factory=lambda: MappingProxyType({})
    )
    """Further arguments of the method, under PEFT's names; a recipe writes them beside the keys above."""

    @model_validator(mode="after")
    def _fill(self) -> Self:
        """Put the method's defaults where the recipe says nothing; they do not count as given."""
        row = METHODS[self.method]
        for key in ARGUMENT_NAMES:
            if getattr(self, key) is None and key in row.argument_names:
                self.__dict__[key] = row.defaults.get(key)
        if self.target_modules is None and row.targets == "linear":
            self.__dict__["target_modules"] = "all-linear"
        return self


class StageSection(Section):
    """One of several trainings in a row; it starts from the result of the one before."""

    name: Annotated[str, BeforeValidator(read_name)]
    """Names the folder of the stage."""
    adapter: AdapterSection | None = None
    """What this stage trains, in place of the recipe's own section."""
    trainer: Arguments | None = None
    """Arguments of the trainer, the recipe's own among them."""


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

    max_dropped: Share = 0.05
    """Largest share of rows that may be left out."""
    max_truncated: Share = 0.05
    """Largest share of rows that may be cut at `max_length`."""
    max_leaked: Share = 0.01
    """Largest share of test rows that may stand in the training rows too."""
    min_eos_trained: Share = 1.0
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


class Recipe(Section):
    """What was asked, checked and frozen."""

    name: Annotated[str, BeforeValidator(read_name)]
    """Name of the run; the file's name without its ending where the recipe gives none."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of everything random."""
    output_dir: Text | None = None
    """The run folder, relative to the working directory; runs/NAME when null."""
    model: ModelSection
    quantization: QuantizationSection | None = None
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    stages: Annotated[tuple[StageSection, ...], BeforeValidator(freeze_rows)] = ()
    """Trainings in a row, in place of one."""
    dataset: DatasetSection
    trainer: Arguments = Field(default_factory=lambda: MappingProxyType({}))  # pydantic before 2.10 copies a default
    """Arguments of SFTConfig that the recipe sets, under the names of the installed version."""
    performance: PerformanceSection = PerformanceSection()
    evaluation: EvaluationSection = EvaluationSection()
    gates: tuple[Gate, ...] = ()
    """Limits that the figures of the run must meet."""
    budget: BudgetSection = BudgetSection()
    report: ReportSection = ReportSection()

    _relative: frozenset[str] = PrivateAttr(default=frozenset())
    """Keys whose path the recipe gave relative to itself; only the writing of the recipe asks."""


def read_select(value: Any) -> SelectSection:
    """Read a choice."""
    if isinstance(value, SelectSection):
        return value
    for key in value:
        if key not in SelectSection.model_fields:
            near = nearest(str(key), SelectSection.model_fields)
            raise wrong(f"has no key {key}" + (f"; did you mean {near}?" if near else f"; write {EXAMPLE}"))
    if value.get("select") != "gradient":
        raise wrong(f"must say `select: gradient`, as in {EXAMPLE}")
    if "budget" not in value:
        raise wrong(f"needs a budget, a share of the base's parameters, as in {EXAMPLE}")
    batches = value.get("batches", SelectSection.model_fields["batches"].default)
    if not _is_whole(batches) or not 1 <= batches <= MOST_BATCHES:
        raise wrong(f"has batches {batches}; it must be a whole number from 1 to {MOST_BATCHES}")
    return SelectSection(select="gradient", batches=batches, budget=_read_budget(value["budget"]))


def _read_budget(value: Any) -> float:
    percent = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*%\s*", value) if isinstance(value, str) else None
    share = float(percent[1]) / 100 if percent else value
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise wrong(f"has budget {value}; it must be a share of the base's parameters, such as 0.5% or 0.005")
    return float(share)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
