"""The schema of a recipe: every section and key with its type, bounds, default and description.

Defaults are defined here only. Rules between keys are in `rules.py`.
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
    read_where,
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
Optimization = Literal[
    "fused_loss",
    "fused_lora",
    "fused_norms",
    "liger_layers",
    "skip_adapter_casts",
    "skip_rng_state",
    "deferred_metrics",
]
"""Optimizations of the training step that do not change its loss; each can be disabled separately."""
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
    """No type coercion, no unknown keys, no changes after validation."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """The base model."""

    name: Text
    """Hub id, local folder (absolute once loaded) or `tiny:llama`."""
    revision: Text | None = None
    """Branch, tag or commit of the Hub repository."""
    task: TaskName = DEFAULT
    """What the model is trained for: generating text, classifying texts or images, or tagging the words of a text."""
    problem_type: Literal["auto", "single-label", "multi-label", "regression"] = "auto"
    """What a classifier predicts for a text or an image: one class, any number of classes, or a number; `auto` decides
    from the labels."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of the computation and of weights that are not quantized; `auto` is decided by the plan."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention implementation."""
    chat_template: Text | None = None
    """File with a Jinja chat template that replaces the tokenizer's; absolute once loaded."""
    template: Arguments = Field(default_factory=lambda: MappingProxyType({}))
    """Values for variables of the chat template, such as `{enable_thinking: false}`; also in the saved template."""
    eos_token: Text | None = None
    """Token that ends an answer, if the model uses another one than the tokenizer's end token."""
    add_tokens: Annotated[tuple[str, ...], BeforeValidator(freeze_names)] = ()
    """New tokens for the vocabulary, such as `[<tool>]`; only their embedding rows are trained, beside the adapter."""
    trust_remote_code: bool = False
    """Run Python code from the model repository; requires `revision` to be a commit."""


class QuantizationSection(Section):
    """Quantization of the base weights; without this section they are not quantized."""

    bits: Literal[4, 8] = 4
    """Bits per weight; the keys below apply to 4 bits only."""
    type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""
    double_quant: bool = True
    """Quantize the quantization constants too; saves about 0.4 bits per weight."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype to which weights are dequantized for each matmul; `auto` is the plan's dtype."""


class PerformanceSection(Section):
    """Settings of speed and memory that do not change what is learned."""

    batching: Literal["auto", "padding_free", "padded"] = "auto"
    """Rows concatenated without padding (`padding_free`), or padded micro-batches (`padded`)."""
    tokens_per_micro_batch: Automatic = "auto"
    """Maximum tokens per micro-batch, padding included; `auto` is the size of the padded micro-batch."""
    sharding: Literal["auto", "none", "full"] = "auto"
    """Every process has the whole base model (`none`) or a shard of it (`full`: FSDP); `auto` is `none`, unless the
    accelerate configuration enables FSDP."""
    disable: Annotated[tuple[Optimization, ...], BeforeValidator(freeze_rows)] = ()
    """Optimizations to disable: logits and loss for trained tokens only (`fused_loss`), LoRA added in one pass
    (`fused_lora`), RMSNorm in one kernel (`fused_norms`), layer kernels of liger-kernel if it is installed
    (`liger_layers`), no unnecessary casts of adapter inputs (`skip_adapter_casts`), no saved random state for
    checkpointed layers that use none (`skip_rng_state`), metrics fetched from the GPU once per step
    (`deferred_metrics`)."""


class EvaluationSection(Section):
    """Evaluation of the base model and the adapter."""

    batch_size: Automatic = "auto"
    """Rows per forward pass."""
    max_new_tokens: Automatic = "auto"
    """Maximum length of a generated answer, tokens; `auto` follows the longest reference."""
    samples: Annotated[int, Field(ge=0, le=100)] = 5
    """Number of rows for which the report shows the answers before and after training."""
    rows: Annotated[int | Literal["all"] | None, BeforeValidator(read_answered_rows)] = None
    """Number of test rows for which answers are generated, drawn by the seed, or `all`; null for at most 500. The loss
    always covers all test rows."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature of generation; 0 for greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: sample from the most likely tokens with this cumulative probability."""
    positive_label: Text | None = None
    """Positive class of a binary classification, for precision, recall and F1; null for the last class."""
    baseline: bool = True
    """Evaluate the base model before the first step."""
    forgetting_text: Text | None = None
    """Text for measuring forgetting: file, folder or glob; absolute once loaded."""
    forgetting_tokens: Annotated[int, Field(ge=100)] = 50_000
    """Number of tokens of that text to evaluate, from its beginning."""


class BudgetSection(Section):
    """Time limits of a run; stored in seconds."""

    wall_clock: Seconds | None = None
    """Maximum time of the run, seconds; it stops with a checkpoint before that."""
    save_every: Seconds | None = None
    """Time between checkpoints, seconds."""


class ReportSection(Section):
    """Where metrics are logged in addition to the run folder."""

    trackers: Annotated[tuple[Tracker, ...], BeforeValidator(freeze_rows)] = ()
    """Experiment trackers."""


class SelectSection(Section):
    """Modules or layers selected by their gradient on training rows, before the first step."""

    select: Literal["gradient"]
    """Selection criterion: the norm of the gradient of the loss with respect to the weights."""
    batches: int = 8
    """Number of training batches to average over."""
    budget: float
    """Maximum share of trainable parameters, relative to the base model, 0..1; can be written as 0.5%."""


def read_target_modules(value: Any) -> Any:
    """Read `adapter.target_modules`: names, all-linear, a regular expression, or a selection by gradient."""
    return read_select(value) if isinstance(value, Mapping | SelectSection) else read_targets(value)


def read_layers(value: Any) -> Any:
    """Read `adapter.layers`: layer indices, or a selection by gradient."""
    if value is None or isinstance(value, Mapping | SelectSection):
        return None if value is None else read_select(value)
    if not isinstance(value, list | tuple) or not value or not all(_is_whole(number) for number in value):
        raise wrong(f"must be a list of layer indices starting at 0, such as [0, 1], or {EXAMPLE}")
    freeze_names([str(number) for number in value])  # checks for duplicates
    return tuple(value)


class AdapterSection(Section):
    """The trained parameters.

    A key that the recipe does not set gets the method's default; a key that the method does not have is None.
    """

    method: Annotated[str, BeforeValidator(read_method)] = "lora"
    """PEFT method; `peftcli methods` lists them."""
    r: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Rank of the update; for AdaLoRA the average final rank."""
    alpha: Annotated[float, Field(gt=0, le=MOST_ALPHA)] | None = None
    """Scaling of the update: alpha / r, or alpha / sqrt(r) with `use_rslora`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout probability of the adapter's inputs."""
    target_modules: Annotated[tuple[str, ...] | str | SelectSection | None, BeforeValidator(read_target_modules)] = None
    """Names of the modules that get an adapter, a regular expression for their full names, `all-linear` for all linear
    layers except the output layer, or a selection by gradient; null for the method's default."""
    layers: Annotated[tuple[int, ...] | SelectSection | None, BeforeValidator(read_layers)] = None
    """Indices of the layers that get an adapter, or a selection by gradient; null for all."""
    use_rslora: bool = False
    """Rank-stabilized LoRA: scale by alpha / sqrt(r)."""
    use_dora: bool = False
    """DoRA: learn the magnitude of each weight column separately from its direction."""
    modules_to_save: Annotated[tuple[str, ...], BeforeValidator(freeze_names)] | None = None
    """Modules that are fully trained and saved with the adapter."""
    init_from: Annotated[str, Field(min_length=1)] | None = None
    """Run or adapter whose weights initialize this adapter; absolute once loaded."""
    dtype: Annotated[Literal["float32", "bfloat16"], BeforeValidator(read_trained_dtype)] = "float32"
    """Dtype of the trained weights, their gradients and, with torch's optimizers, the optimizer state; `bfloat16`
    trains full weights without a float32 copy, and loses updates that are small relative to the weight."""
    bias: Literal["none"] = "none"
    """Biases are not trained, because then disabling the adapter would not restore the base model."""
    arguments: Annotated[Mapping[str, Any], PlainValidator(freeze_mapping), PlainSerializer(dict)] = Field(
        default_factory=lambda: MappingProxyType({})
    )
    """Other arguments of the method, with PEFT's names; in a recipe they are at the same level as the keys above."""

    @model_validator(mode="after")
    def _fill(self) -> Self:
        """Fill in the method's defaults; they do not count as set by the recipe."""
        row = METHODS[self.method]
        for key in ARGUMENT_NAMES:
            if getattr(self, key) is None and key in row.argument_names:
                self.__dict__[key] = row.defaults.get(key)
        if self.target_modules is None and row.targets == "linear":
            self.__dict__["target_modules"] = "all-linear"
        return self


class StageSection(Section):
    """One of several training stages; it starts from the result of the previous one."""

    name: Annotated[str, BeforeValidator(read_name)]
    """Name of the stage and of its folder."""
    adapter: AdapterSection | None = None
    """What this stage trains; replaces the recipe's `adapter` section."""
    trainer: Arguments | None = None
    """Trainer arguments of this stage, merged over the recipe's `trainer` section."""


class CsvSection(Section):
    """The format of a CSV or TSV file."""

    delimiter: Annotated[str, BeforeValidator(read_delimiter)] | None = None
    """Delimiter between cells, one character; null for a tab in .tsv files and a comma elsewhere."""
    quote: Annotated[str, BeforeValidator(read_quote)] | None = None
    """Quote character of a cell, or none if quotes are plain text; null for `"`."""
    column_names: Names | None = None
    """Column names of a file without a header line."""


class FilesSection(Section):
    """Files with rows, and their format."""

    path: Text | None = None
    """File, folder or glob; absolute once loaded."""
    file_format: Literal["csv", "tsv", "json", "jsonl", "parquet", "arrow", "text", "conll", "sqlite"] | None = None
    """File format, if the file extension does not tell."""
    encoding: Annotated[str, BeforeValidator(read_encoding)] = "utf-8"
    """Encoding of text files."""
    csv: CsvSection = CsvSection()
    """The format of a CSV or TSV file."""
    table: Text | None = None
    """Table of a database."""
    query: Text | None = None
    """SQL query of a database, instead of a table."""


class JoinSection(FilesSection):
    """A second table whose columns are joined to the rows."""

    path: Text
    """File; absolute once loaded."""
    on: Annotated[tuple[str, ...], BeforeValidator(freeze_names)]
    """Key columns of the join, present in both tables."""


class ColumnsSection(Section):
    """The columns to use, if they do not have the usual names."""

    text: Text | None = None
    """Column with the full text of a row."""
    prompt: Text | None = None
    """Column with the prompt."""
    completion: Text | None = None
    """Column with the completion to learn."""
    messages: Text | None = None
    """Column with a list of chat messages, or a path to them inside its objects, such as `input.messages`."""
    text_pair: Text | None = None
    """Column with the second text of a text pair."""
    label: Text | None = None
    """Column with the label: a class, a list of classes, or a number."""
    tokens: Text | None = None
    """Column with a list of words."""
    tags: Text | None = None
    """Column with a list of tags, one for each word."""
    image: Text | None = None
    """Column with the path of an image file, relative to the file with the rows."""


class SourceSection(FilesSection):
    """The source of the rows, and how they become examples."""

    name: Text | None = None
    """Id of a dataset on the Hub."""
    config: Text | None = None
    """Configuration of the Hub dataset."""
    revision: Text | None = None
    """Branch, tag or commit of the Hub dataset."""
    hub_split: Text | None = None
    """Split of the Hub dataset, or a slice such as train[:10%]; null for train."""
    url: Text | None = None
    """URL of a database, without a password."""
    url_env: Text | None = None
    """Name of the environment variable with the URL of a database, including the password."""
    format: Literal["text", "prompt_completion", "messages", "sharegpt", "alpaca", "question_answer"] | None = None
    """Row format, if the columns fit several formats."""
    text: Template | None = None
    """Template of the full text."""
    prompt: Template | None = None
    """Template of the prompt; no loss is taken on it."""
    completion: Template | None = None
    """Template of the completion to learn."""
    columns: ColumnsSection | None = None
    """Columns to use directly, instead of templates."""
    turns: Literal["refuse", "join", "keep"] = "refuse"
    """Chats with consecutive messages of one role: drop the row (`refuse`), `join` them with a blank line, or `keep`
    them; `join` and `keep` also pass a later system message to the chat template, and drop a row if the template
    rejects it or leaves a message out."""
    mask_history: bool = False
    """Train only the last assistant message of a chat."""
    where: Annotated[Mapping[str, Any], PlainValidator(read_where), PlainSerializer(dict)] | None = None
    """Use only the rows with these values, such as `{label: true}`, `{lang: [en, de]}` or `{score: ">= 4"}`."""
    ignore_columns: Annotated[tuple[str, ...], BeforeValidator(freeze_names)] = ()
    """Columns to treat as if the source did not have them, such as labels for another task."""


class WeightedSection(SourceSection):
    """One of several sources."""

    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """How often each training row of this source is used per epoch; 0.5 uses a random half of them."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training rows per epoch that come from this source, instead of a weight; the shares of all sources
    add up to 1."""


class SplitSection(Section):
    """How test rows are split off."""

    test_size: Annotated[float | int, BeforeValidator(read_test_size)] = 0.2
    """Share of the rows if below 1, otherwise a number of rows; 0 trains on all rows without a test split."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of the split; null for the recipe's `seed`."""
    stratify: Text | None = None
    """Column whose values have the same distribution in both splits."""
    group: Text | None = None
    """Column whose equal values stay in the same split, such as a customer id."""


class TestSection(FilesSection):
    """Test rows from a separate source."""

    __test__ = False  # pytest would take it for a test class because of its name

    name: Text | None = None
    """Id of a dataset on the Hub; that of the training rows if only `hub_split` is set."""
    config: Text | None = None
    """Configuration of the Hub dataset."""
    revision: Text | None = None
    """Branch, tag or commit of the Hub dataset."""
    hub_split: Text | None = None
    """Split of the Hub dataset; null for `test`."""


class LimitsSection(Section):
    """Data limits: if one is exceeded, training does not start; shares in 0..1."""

    max_dropped: Share = 0.05
    """Maximum share of dropped rows."""
    max_truncated: Share = 0.05
    """Maximum share of rows truncated at `max_length`."""
    max_leaked: Share = 0.01
    """Maximum share of test rows that are also in the training split."""
    min_eos_trained: Share = 1.0
    """Minimum share of training rows whose end token is trained, not counting truncated rows."""
    max_template_mismatch: Share = 0.0
    """Maximum share of chats whose trained text is not the prompt that evaluation asks, followed by the answer."""


class DatasetSection(SourceSection):
    """The rows to learn from."""

    sources: Annotated[tuple[WeightedSection, ...], BeforeValidator(freeze_rows)] = ()
    """Several sources, instead of one."""
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """With shares of sources: stop when one source is used up, so that no row is repeated, or use all rows of every
    source, repeating those of the others."""
    join: Annotated[tuple[JoinSection, ...], BeforeValidator(freeze_rows)] = ()
    """Tables to join, in order."""
    thinking: Literal["keep", "last", "drop"] = "last"
    """Reasoning in chats: `last` trains it where the chat template shows it at inference, usually in the last answer;
    `keep` shows and trains that of all answers, also in the saved template; `drop` leaves it out."""
    system: Literal["keep", "fold", "drop"] = "keep"
    """System messages: `fold` puts their text into the first user turn, for chat templates that refuse a system role;
    `drop` leaves them out; also in the saved template."""
    labels: Annotated[Names, Field(min_length=1)] | None = None
    """Names of the classes or tags in the order of their ids; null for all that occur in the rows, sorted."""
    deduplicate: bool = False
    """Keep only the first of equal rows, ignoring case and white space."""
    split: SplitSection = SplitSection()
    """How test rows are split off; not used if `test` is set."""
    test: TestSection | None = None
    """Test rows from a separate source."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Maximum length of a row, tokens."""
    too_long: Literal["truncate", "drop", "split"] | None = None
    """What happens to longer rows: `split` cuts a text into several rows; null for `split` with text files and
    `truncate` otherwise."""
    max_train_samples: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of training rows; null for all."""
    limits: LimitsSection = LimitsSection()
    """Data limits: if one is exceeded, training does not start."""

    @property
    def holds_out(self) -> bool:
        """Whether there are test rows to evaluate on."""
        return self.test is not None or self.split.test_size != 0


class Recipe(Section):
    """A validated, frozen recipe."""

    name: Annotated[str, BeforeValidator(read_name)]
    """Name of the run; the file name without its extension by default."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of everything random."""
    output_dir: Text | None = None
    """The run folder, relative to the working directory; null for runs/NAME."""
    model: ModelSection
    quantization: QuantizationSection | None = None
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    stages: Annotated[tuple[StageSection, ...], BeforeValidator(freeze_rows)] = ()
    """Several training stages, instead of one."""
    dataset: DatasetSection
    trainer: Arguments = Field(default_factory=lambda: MappingProxyType({}))  # pydantic before 2.10 copies a default
    """Arguments of SFTConfig, with the names of the installed version."""
    performance: PerformanceSection = PerformanceSection()
    evaluation: EvaluationSection = EvaluationSection()
    gates: tuple[Gate, ...] = ()
    """Limits that the metrics of the run must meet."""
    budget: BudgetSection = BudgetSection()
    report: ReportSection = ReportSection()

    _relative: frozenset[str] = PrivateAttr(default=frozenset())
    """Keys with a path that is relative to the recipe; only used to write the recipe."""


def read_select(value: Any) -> SelectSection:
    """Read a selection by gradient."""
    if isinstance(value, SelectSection):
        return value
    for key in value:
        if key not in SelectSection.model_fields:
            near = nearest(str(key), SelectSection.model_fields)
            raise wrong(f"has no key {key}" + (f"; did you mean {near}?" if near else f"; write {EXAMPLE}"))
    if value.get("select") != "gradient":
        raise wrong(f"needs `select: gradient`, as in {EXAMPLE}")
    if "budget" not in value:
        raise wrong(f"needs a budget, a share of the base model's parameters, as in {EXAMPLE}")
    batches = value.get("batches", SelectSection.model_fields["batches"].default)
    if not _is_whole(batches) or not 1 <= batches <= MOST_BATCHES:
        raise wrong(f"has batches: {batches}; it must be a whole number from 1 to {MOST_BATCHES}")
    return SelectSection(select="gradient", batches=batches, budget=_read_budget(value["budget"]))


def _read_budget(value: Any) -> float:
    percent = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*%\s*", value) if isinstance(value, str) else None
    share = float(percent[1]) / 100 if percent else value
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise wrong(f"has budget: {value}; it must be a share of the base model's parameters, such as 0.5% or 0.005")
    return float(share)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
