"""The Plan: what will happen, with no `auto` left in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftcli.methods.registry import METHODS
from peftcli.plan.memory.training_setup import ActivationFit
from peftcli.plan.module_selection import SelectionRule
from peftcli.plan.optimizer import Trained
from peftcli.recipe.fields import Gate
from peftcli.recipe.schema import AdapterSection, BudgetSection, DatasetSection, EvaluationSection
from peftcli.results import Decision as Decision  # the parts of a plan, for the modules that make it
from peftcli.results import (
    Forecast,
    Parameters,
    PlanAdapter,
    PlanBatch,
    PlanBatching,
    PlanJson,
    PlanModel,
    PlanTarget,
)
from peftcli.tasks.registry import DEFAULT, TASKS

BATCHING = "batching"
"""Key of the decision about padding-free and padded batches."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class TokenizerChoice:
    """The tokenizer as it is loaded.

    Attributes:
        path: local folder or Hub id of the base model.
        revision: of the Hub, None for the default.
        chat_template: path of a Jinja file that replaces the tokenizer's, or None.
        eos_token: token that takes the place of the tokenizer's end token, or None.
        trust_remote_code: run code that comes with the model.
        images: it is an image processor, which stands in the place of a tokenizer.
    """

    path: str
    revision: str | None
    chat_template: str | None
    eos_token: str | None
    trust_remote_code: bool
    images: bool = False


@dataclass(frozen=True)
class Base:
    """The base model as it is loaded.

    Attributes:
        name: as the recipe says it.
        path: what is loaded: a local folder or a Hub id.
        revision: of the Hub, None for the default.
        dtype: of the weights that are not quantized: bfloat16, float16 or float32.
        attention: an attention implementation of transformers.
        device: `cuda` or `cpu`.
        quantization: bits, of 4 bits also type, double_quant and compute_dtype; or None.
        chat_template: path of a Jinja file that replaces the tokenizer's, or None.
        trust_remote_code: run code that comes with the model.
        eos_token: token that takes the place of the tokenizer's end token, or None.
        absorbed: folders of adapters that are folded into the weights, in the order in which they were trained.
        task: of the recipe; it decides which head the model has.
        labels: what the head gives, in the order of its outputs; empty for a language model.
        problem_type: of whole texts and images: `single-label`, `multi-label` or `regression`.
        head: names of the modules that are trained whole with the task and are not quantized.
        seed: of a head that begins at random.
    """

    name: str
    path: str
    revision: str | None
    dtype: str
    attention: str
    device: str
    quantization: Mapping[str, Any] | None
    chat_template: str | None
    trust_remote_code: bool
    eos_token: str | None = None
    absorbed: tuple[str, ...] = ()
    task: str = DEFAULT
    labels: tuple[str, ...] = ()
    problem_type: str | None = None
    head: tuple[str, ...] = ()
    seed: int = 0

    @property
    def tokenizer(self) -> TokenizerChoice:
        images = TASKS[self.task].images
        return TokenizerChoice(
            self.path, self.revision, self.chat_template, self.eos_token, self.trust_remote_code, images
        )


@dataclass(frozen=True)
class LossMask:
    """Which tokens are trained, or which labels a row is given.

    Attributes:
        completion_only: prompt tokens are not trained.
        assistant_only: of messages, only the assistant's turns are trained, each with its end token.
        asked: names of the two rules that the recipe demands; data on which one has no meaning are refused.
        max_length: tokens of a row; what is beyond is cut off at the end.
        task: of the recipe.
        problem_type: of whole texts and images: `single-label`, `multi-label`, `regression`; `auto` asks the data.
    """

    completion_only: bool
    assistant_only: bool
    asked: tuple[str, ...]
    max_length: int
    task: str = DEFAULT
    problem_type: str = "auto"


@dataclass(frozen=True)
class Batch:
    """Rows of one optimizer step: per device x accumulation x processes."""

    per_device: int
    accumulation: int
    processes: int

    @property
    def effective(self) -> int:
        return self.per_device * self.accumulation * self.processes

    def arguments(self) -> dict[str, int]:
        """The same for the trainer of one process."""
        return {"per_device_train_batch_size": self.per_device, "gradient_accumulation_steps": self.accumulation}

    def repeated(self, rows: int) -> int:
        """Rows that each pass over the data takes twice, since all processes must have equally many micro-batches.

        >>> Batch(4, 1, 2).repeated(36), Batch(4, 1, 1).repeated(35)
        (4, 0)

        Source: `even_batches` of accelerate's `BatchSamplerShard`.
        """
        if self.processes == 1:
            return 0
        at_once = self.per_device * self.processes
        return -(-rows // at_once) * at_once - rows


@dataclass(frozen=True)
class Batching:
    """How the rows of a step are run.

    Attributes:
        kind: `padding_free` (rows concatenated without padding) or `padded` (the loader's micro-batches).
        tokens: of one line at most.
        firm: the recipe says so, and a padded micro-batch is cut to as many too.
    """

    kind: str
    tokens: int
    firm: bool = False

    @property
    def most(self) -> int | None:
        """Tokens of a padded piece, None where it is the loader's micro-batch."""
        return self.tokens if self.firm else None


@dataclass(frozen=True)
class Plan:
    """What will happen. Nothing below this floor decides, and nothing here is `auto`.

    Attributes:
        trainer: arguments for SFTConfig, the recipe's and those decided here.
        labels: which tokens are trained.
        adapter_dtype: of the trainable weights.
        evaluation_batch: rows that are evaluated and answered at once.
        targets: number of modules by name of the target.
        trained: the trainable parameters, counted on the model's structure.
        total_parameters: those and the base's.
        decisions: for people, in the order of the work.
        choice: what the gradient chooses before the first step; until then `adapter` and `targets` hold all that may be
            chosen, and `trained` is a bound.
        shards: processes that each hold a part of the base; 1 where each has all of it.
        possible_shards: cards or processes here that the base could be divided among; 1 where it cannot be.
        activation_fit: what adapters of a method other than LoRA keep for the backward pass, by the last name of their
        layer. checkpointed_blocks: that run again in the backward pass, None for all or none, as `trainer` says.
        own_tokenizer: the rows are read by the model's own tokenizer; a smoke run may have to take another.
        optimizations: names of what makes a step cheaper and leaves its loss as it is.
    """

    name: str
    task: str
    smoke: bool
    seed: int
    base: Base
    architecture: str
    adapter: AdapterSection
    adapter_dtype: str
    dataset: DatasetSection
    labels: LossMask
    batch: Batch
    batching: Batching
    trainer: Mapping[str, Any]
    evaluation: EvaluationSection
    evaluation_batch: int
    gates: tuple[Gate, ...]
    budget: BudgetSection
    targets: Mapping[str, int]
    trained: Trained
    total_parameters: int
    decisions: tuple[Decision, ...]
    notices: tuple[str, ...] = field(default=())
    checkpointed_blocks: int | None = None
    choice: SelectionRule | None = None
    shards: int = 1
    possible_shards: int = 1
    own_tokenizer: bool = True
    activation_fit: Mapping[str, ActivationFit] = field(default_factory=dict)
    optimizations: frozenset[str] = frozenset()

    @property
    def frees_base(self) -> bool:
        """Whether weights of the base that have a trained copy leave the memory while the copies are trained."""
        whole = METHODS[self.adapter.method].targets == "whole"
        return whole and self.base.quantization is None and self.shards == 1

    @property
    def trainable_parameters(self) -> int:
        """Number of trainable parameters."""
        return self.trained.parameters

    def as_json(self, forecast: Forecast | None = None) -> PlanJson:
        """The content of `plan.json`."""
        base = self.total_parameters - self.trainable_parameters
        return PlanJson(
            name=self.name,
            task=self.task,
            smoke=self.smoke,
            model=PlanModel(
                name=self.base.name,
                revision=self.base.revision,
                architecture=self.architecture,
                parameters=base,
                bytes=base * DTYPE_BYTES[self.base.dtype],
            ),
            decisions=self.decisions,
            notices=self.notices,
            adapter=PlanAdapter(method=self.adapter.method, r=self.adapter.r),
            targets=tuple(PlanTarget(name=name, modules=count) for name, count in self.targets.items()),
            parameters=Parameters(trainable=self.trainable_parameters, total=self.total_parameters),
            batch=PlanBatch(
                per_device=self.batch.per_device,
                accumulation=self.batch.accumulation,
                processes=self.batch.processes,
                shards=self.shards,
                effective=self.batch.effective,
            ),
            batching=PlanBatching(kind=self.batching.kind, tokens=self.batching.tokens),
            trainer=dict(self.trainer),
            forecast=forecast,
        )
