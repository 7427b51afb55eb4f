"""The Plan: what will happen, with no `auto` left in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftcli.methods.registry import METHODS
from peftcli.plan.memory.training_setup import ActivationFit
from peftcli.plan.module_selection import SelectionRule
from peftcli.plan.optimizer import Trained
from peftcli.recipe.fields import Gate
from peftcli.recipe.schema import AdapterSection, BudgetSection, DatasetSection, EvaluationSection, Recipe
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
"""Key of the decision about padding-free or padded batches."""
RANDOM_STATE = "random state"
"""Key of the decision about checkpointed layers that use no random numbers."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class TokenizerChoice:
    """The tokenizer to load.

    Attributes:
        path: local folder or Hub id of the base model.
        revision: on the Hub, None for the default.
        chat_template: path of a Jinja file that replaces the tokenizer's, or None.
        eos_token: token that replaces the tokenizer's EOS token, or None.
        trust_remote_code: run code that comes with the model.
        images: it is an image processor instead of a tokenizer.
        add_tokens: tokens that the recipe adds to the vocabulary.
        template: settings of the chat template, see `data.template_settings.settle`; None for none.
    """

    path: str
    revision: str | None
    chat_template: str | None
    eos_token: str | None
    trust_remote_code: bool
    images: bool = False
    add_tokens: tuple[str, ...] = ()
    template: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Base:
    """The base model to load.

    Attributes:
        name: as written in the recipe.
        path: what is loaded: a local folder or a Hub id.
        revision: on the Hub, None for the default.
        dtype: of the unquantized weights: bfloat16, float16 or float32.
        attention: an attention implementation of transformers.
        device: `cuda` or `cpu`.
        quantization: bits, and for 4 bits also type, double_quant and compute_dtype; or None.
        chat_template: path of a Jinja file that replaces the tokenizer's, or None.
        trust_remote_code: run code that comes with the model.
        eos_token: token that replaces the tokenizer's EOS token, or None.
        absorbed: folders of adapters that are merged into the weights, in training order.
        task: of the recipe; it determines the head.
        labels: the outputs of the head, in order; empty for a language model.
        problem_type: for whole texts and images: `single-label`, `multi-label` or `regression`.
        head: names of the modules that are fully trained for the task and not quantized.
        seed: of a randomly initialized head.
        add_tokens: tokens that the recipe adds to the vocabulary.
        template: settings of the chat template, see `template_settings`; None for none.
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
    add_tokens: tuple[str, ...] = ()
    template: Mapping[str, Any] | None = None

    @property
    def tokenizer(self) -> TokenizerChoice:
        images = TASKS[self.task].images
        return TokenizerChoice(
            self.path,
            self.revision,
            self.chat_template,
            self.eos_token,
            self.trust_remote_code,
            images,
            self.add_tokens,
            self.template,
        )


def template_settings(recipe: Recipe) -> dict[str, Any] | None:
    """The settings of the chat template in a recipe: `variables`, `thinking` and `system`; None without any."""
    dataset = recipe.dataset
    found: dict[str, Any] = {"variables": dict(recipe.model.template)} if recipe.model.template else {}
    found |= {"thinking": dataset.thinking} if dataset.thinking != "last" else {}
    found |= {"system": dataset.system} if dataset.system != "keep" else {}
    return found or None


@dataclass(frozen=True)
class LossMask:
    """Which tokens are trained, or which labels a row has.

    Attributes:
        completion_only: prompt tokens are not trained.
        assistant_only: in chats, only assistant messages are trained, including their end token.
        asked: names of the two rules that the recipe requires; data without prompts or chats is then refused.
        max_length: maximum tokens per row; longer rows are truncated at the end.
        task: of the recipe.
        problem_type: for texts and images: `single-label`, `multi-label`, `regression`, or `auto` to detect it.
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
        """The batch as trainer arguments of one process."""
        return {"per_device_train_batch_size": self.per_device, "gradient_accumulation_steps": self.accumulation}

    def repeated(self, rows: int) -> int:
        """Rows repeated per epoch, because all processes need the same number of micro-batches.

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
    """How the rows of a step are batched.

    Attributes:
        kind: `padding_free` (rows concatenated without padding) or `padded` (the loader's micro-batches).
        tokens: maximum tokens of a padding-free batch.
        firm: set by the recipe; a padded micro-batch is then split to this size too.
    """

    kind: str
    tokens: int
    firm: bool = False

    @property
    def most(self) -> int | None:
        """Maximum tokens of a padded micro-batch; None if it is not split."""
        return self.tokens if self.firm else None


@dataclass(frozen=True)
class Plan:
    """What will happen, without any `auto` left; no later step makes decisions.

    Attributes:
        trainer: arguments for SFTConfig: the recipe's and those decided here.
        labels: which tokens are trained.
        adapter_dtype: of the trainable weights.
        evaluation_batch: batch size of evaluation and generation.
        targets: number of modules per target name.
        trained: the trainable parameters, counted on the model's structure.
        total_parameters: trainable parameters and those of the base.
        decisions: shown to the user, in the order of the work.
        choice: modules to be selected by gradient before the first step; until then `adapter` and `targets` contain all
            candidates, and `trained` is an upper bound.
        shards: number of processes across which the base is sharded; 1 if each has all of it.
        possible_shards: number of GPUs or processes across which the base could be sharded; 1 if it cannot.
        activation_fit: what adapters of methods other than LoRA save for the backward pass, by the last part of the
            layer name. checkpointed_blocks: number of checkpointed blocks, None for all or none, as `trainer` says.
        own_tokenizer: the tokenizer is the model's own; a smoke run may have to use another one.
        optimizations: names of the optimizations in use; they do not change the loss.
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
        """Whether base weights with a trained copy are removed from memory during training."""
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
