"""What the table says about a task: its rows, its model, its metrics, and where its code is.

The table is light, so a recipe is checked and planned without torch. What a task does with rows and weights is named
as `module:attribute` and imported by `implementation` where it runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

Keys: TypeAlias = Mapping[tuple[str, ...], str]
"""Keys of a recipe, each with the reason why a task does not use it."""

AVERAGED_METRICS = tuple(
    f"{name}_{average}"
    for average in ("macro", "micro", "weighted", "samples")
    for name in ("precision", "recall", "f1")
)
"""Metrics of classes by how they are averaged over the classes."""
CLASS_METRICS = ("accuracy", "precision", "recall", "f1", *AVERAGED_METRICS)
ENTITY_METRICS = tuple(f"{of}_{name}" for of in ("entity", "token_entity") for name in ("precision", "recall", "f1"))
NUMBER_METRICS = ("mse", "mae", "pearson", "spearman", "r2")


@dataclass(frozen=True)
class Task:
    """What is known of a task before anything heavy is imported.

    Attributes:
        name: value of `model.task`.
        short: one word for tables.
        aliases: names that other tools give it.
        columns: keys of `dataset.columns` that it reads.
        unused_keys: keys of a recipe that it does not use, each with the reason.
        metrics: that a gate may watch.
        label_of: what carries a label: a `row`, a `token`, or None where text is generated.
        images: rows are image files.
        model: its kind of model, for messages.
        auto_class: the class in transformers that loads that model.
        peft_type: name of PEFT's `TaskType`; None where PEFT has none.
        pipeline_tag: of a model card, None where the Hub has none.
        loss_title: of the loss in tables and plots.
        agreement: what a merged model must share with its adapter, as a verb phrase.
        baseline: what the metrics of an untrained head are compared with; empty for a model that has no new head.
        row_format: `(rows, section, given) -> RowFormat`, chooses how rows are read.
        arguments: class of the trainer arguments.
        trainer: `(plan, run, data, tokenizer, model) -> StepTrainer`.
        batches: `(plan, data, tokenizer, model) -> (rows to batch, batch to loss)`, outside of the trainer.
        predict: `(target, inputs, raw=, batch_rows=, progress=)`, labels new inputs; empty where text is generated.
    """

    name: str
    short: str
    model: str
    auto_class: str
    peft_type: str | None
    pipeline_tag: str | None
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    loss_title: str
    agreement: str
    row_format: str
    arguments: str
    trainer: str
    batches: str
    predict: str = ""
    baseline: str = ""
    label_of: Literal["row", "token"] | None = None
    images: bool = False
    aliases: tuple[str, ...] = ()
    unused_keys: Keys = field(default_factory=lambda: MappingProxyType({}))

    @property
    def generates(self) -> bool:
        """Whether the model writes text; otherwise a new head gives labels."""
        return self.label_of is None

    @property
    def labels_texts(self) -> bool:
        """Whether the model gives one label, several, or a number to a whole text."""
        return self.label_of == "row" and not self.images


def implementation(reference: str) -> Any:
    """The attribute that a `module:attribute` of the table names.

    >>> implementation("peftcli.tasks.base:CLASS_METRICS")[:2]
    ('accuracy', 'precision')
    """
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)
