"""The description of a task: its rows, its model, its metrics, and where its code is.

These modules do not import torch, so a recipe can be validated and planned without it. Code that needs rows or weights
is referenced as `module:attribute`, and `implementation` imports it when it is needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

Keys: TypeAlias = Mapping[tuple[str, ...], str]
"""Keys of a recipe, each with the reason why it has no effect for a task."""

AVERAGED_METRICS = tuple(
    f"{name}_{average}"
    for average in ("macro", "micro", "weighted", "samples")
    for name in ("precision", "recall", "f1")
)
"""Classification metrics with an explicit average over the classes."""
CLASS_METRICS = ("accuracy", "precision", "recall", "f1", *AVERAGED_METRICS)
ENTITY_METRICS = tuple(f"{of}_{name}" for of in ("entity", "token_entity") for name in ("precision", "recall", "f1"))
NUMBER_METRICS = ("mse", "mae", "pearson", "spearman", "r2")


@dataclass(frozen=True)
class Task:
    """A task, described without heavy imports.

    Attributes:
        name: value of `model.task`.
        short: one word, for tables.
        aliases: names of the task in other tools.
        columns: keys of `dataset.columns` that it uses.
        unused_keys: keys of a recipe that have no effect, each with the reason.
        metrics: metrics that a gate can check.
        label_of: what has a label: a `row`, a `token`, or None if text is generated.
        images: whether rows are image files.
        model: kind of model, for messages.
        auto_class: the transformers class that loads the model.
        peft_type: name of the PEFT `TaskType`; None if PEFT has none.
        pipeline_tag: for the model card; None if the Hub has none.
        loss_title: title of the loss in tables and plots.
        agreement: what the merged model and the adapter model should have in common, as a verb phrase.
        baseline: what the metrics of an untrained head are compared with; empty if the model has no new head.
        row_format: `(rows, section, given) -> RowFormat`, chooses the row format.
        arguments: class of the trainer arguments.
        trainer: `(plan, run, data, tokenizer, model) -> StepTrainer`.
        batches: `(plan, data, tokenizer, model) -> (rows to batch, batch to loss)`, for use outside the trainer.
        predict: `(loaded target, inputs, raw=, batch_rows=, progress=)`, predicts labels of new inputs; empty if
            text is generated.
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
        """Whether the model generates text; otherwise a new head predicts labels."""
        return self.label_of is None

    @property
    def labels_texts(self) -> bool:
        """Whether the model predicts labels or a number for a whole text."""
        return self.label_of == "row" and not self.images


def implementation(reference: str) -> Any:
    """Import the attribute that a `module:attribute` refers to.

    >>> implementation("peftcli.tasks.base:CLASS_METRICS")[:2]
    ('accuracy', 'precision')
    """
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)
