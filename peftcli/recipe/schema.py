"""The schema of a recipe: every key, its type, its bounds, its default and its meaning.

A default lives here and nowhere else; contradictions between keys are in `contradictions.py`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
)

from peftcli.recipe.adapter_section import AdapterSection
from peftcli.recipe.dataset_section import DatasetSection
from peftcli.recipe.fields import (
    freeze_mapping,
    freeze_rows,
    read_name,
    read_seconds,
    read_tokens,
)
from peftcli.recipe.section import Section
from peftcli.recipe.values import Gate

Text = Annotated[str, Field(min_length=1)]
Seconds = Annotated[float, BeforeValidator(read_seconds)]
Automatic = Annotated[int | Literal["auto"], BeforeValidator(read_tokens)]
Lever = Literal["head", "products", "casts", "figures"]
"""What makes a step cheaper and leaves its loss as it is; each can be switched off alone."""
Tracker = Literal["wandb", "tensorboard", "mlflow", "trackio", "comet_ml", "swanlab"]


class ModelSection(Section):
    """The base model."""

    name: Text
    """Hub id, local folder (absolute once loaded) or `tiny:llama`."""
    revision: Text | None = None
    """Branch, tag or commit of the Hub repository."""
    task: Literal["causal-lm", "sequence-classification", "token-classification", "image-classification"] = "causal-lm"
    """What the model learns to do: write text, name the class of a text or an image, or tag the words of a text."""
    problem: Literal["auto", "single-label", "multi-label", "regression"] = "auto"
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

    batching: Literal["auto", "flat", "padded"] = "auto"
    """Rows of a step in lines without padding, or in padded micro-batches."""
    tokens_per_micro_batch: Automatic = "auto"
    """Tokens that are run at once, in a line or padded; `auto` is what the padded micro-batch could hold."""
    sharding: Literal["auto", "none", "full"] = "auto"
    """Every process holds the whole base (`none`), or a part of it (`full`: FSDP); `auto` is `none`, unless the
    configuration of accelerate asks for FSDP."""
    without: Annotated[tuple[Lever, ...], BeforeValidator(freeze_rows)] = ()
    """What is left to the libraries: the output layer (`head`), LoRA's sum (`products`), the casts of its inputs
    (`casts`), the figures that are fetched after each micro-batch (`figures`)."""


class EvaluationSection(Section):
    """How the base model and the adapter are measured."""

    batch_size: Automatic = "auto"
    """Rows per forward."""
    max_new_tokens: Automatic = "auto"
    """Longest generated answer, tokens; `auto` follows the longest reference."""
    samples: Annotated[int, Field(ge=0, le=100)] = 5
    """Rows shown before and after training."""
    rows: Annotated[int, Field(ge=1)] | None = None
    """Test rows that are answered by generation; all when null. The loss is always over all of them."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Softmax temperature of generation; 0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the probability that generation draws from."""
    positive_label: Text | None = None
    """Of two classes the one that precision, recall and F1 are of; the last one when null."""
    baseline: bool = True
    """Measure the base model before the first step."""
    retention: Text | None = None
    """Text on which forgetting is measured: file, folder or glob; absolute once loaded."""
    retention_tokens: Annotated[int, Field(ge=100)] = 50_000
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


Arguments = Annotated[Mapping[str, Any], PlainValidator(freeze_mapping), PlainSerializer(dict)]


class StageSection(Section):
    """One of several trainings in a row; it starts from the result of the one before."""

    name: Annotated[str, BeforeValidator(read_name)]
    """Names the folder of the stage."""
    adapter: AdapterSection | None = None
    """What this stage trains, in place of the recipe's own section."""
    trainer: Arguments | None = None
    """Arguments of the trainer, the recipe's own among them."""


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
