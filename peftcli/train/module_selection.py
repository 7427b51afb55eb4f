"""Selects modules by gradient on a few training rows, after loading the weights and before adding the adapter."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peftcli.adapters.module_layout import all_widths, end_name
from peftcli.data.prepare import PreparedData
from peftcli.data.tokenize import IGNORED
from peftcli.errors import MachineError
from peftcli.model.classification import forward, make_batch, task_head
from peftcli.model.distributed import from_first, local_rows, rank_and_world_size
from peftcli.model.gradients import gradient_norms
from peftcli.model.inspect import count_on_layer
from peftcli.plan.module_layout import within
from peftcli.plan.module_selection import Selection, choose_layers, choose_modules
from peftcli.plan.plan import Plan
from peftcli.plan.targets import ALL_LINEAR, matches, resolve_targets
from peftcli.results import PlanJson, load_or_default, save
from peftcli.run_dir import RunDir, read_json, write_json
from peftcli.tasks.base import implementation
from peftcli.tasks.registry import TASKS

Inputs = Mapping[str, Tensor]


def select_modules(
    plan: Plan, run: RunDir, data: PreparedData, tokenizer: PreTrainedTokenizerBase, model: Any, *, resuming: bool
) -> tuple[Plan, str | None]:
    """The plan with the selected modules, and a note about them; unchanged if nothing is to be selected.

    Args:
        model: the loaded base without adapter.
        resuming: the selection was made in an earlier session of the run.

    Raises:
        RecipeError: no module fits the budget.
        MachineError: the selection of the earlier session is missing.
        Diverged: a gradient is not finite.
    """
    if plan.choice is None:
        return plan, None
    if resuming:
        selection = from_first(lambda: _earlier(run))
    else:
        selection = _select(plan, data, tokenizer, model)
    chosen = resolve_targets(plan, selection, _saved_whole(plan, model))
    if rank_and_world_size()[0] == 0:
        write_json(run.selection, selection.as_json())
        if run.plan.is_file():
            save(run.plan, chosen.as_json(load_or_default(PlanJson, run.plan).forecast))
    return chosen, selection.sentence()


def _earlier(run: RunDir) -> Selection:
    """The selection of an earlier session."""
    if not run.selection.is_file():
        raise MachineError(
            f"{run.selection}: missing, so the trained modules of this run are unknown; train it again with --overwrite"
        )
    try:
        return Selection.from_json(read_json(run.selection))
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise MachineError(
            f"{run.selection}: damaged ({problem}), so the trained modules of this run are unknown; restore it, or "
            "train again with --overwrite"
        ) from problem


def _select(plan: Plan, data: PreparedData, tokenizer: PreTrainedTokenizerBase, model: Any) -> Selection:
    assert plan.choice is not None  # checked by the caller
    choice, adapter = plan.choice, plan.adapter
    widths = _candidates(plan, model)
    rows = sample_rows(plan, len(data.train.rows), choice.batches)
    make, loss = implementation(TASKS[plan.task].batches)(plan, data, tokenizer, model)
    norms = gradient_norms(model, list(widths), [make(rows[part]) for part in local_rows(len(rows))], loss)
    kinds = {
        name: (*pair, getattr(model.get_submodule(name), "bias", None) is not None) for name, pair in widths.items()
    }
    cost = {kind: count_on_layer(adapter, plan.task, *kind[:2], bias=kind[2]) for kind in dict.fromkeys(kinds.values())}
    costs = {name: cost[kind] for name, kind in kinds.items()}
    base = plan.total_parameters - plan.trainable_parameters
    if choice.kind == "modules":
        return choose_modules(norms, costs, base, choice.budget, len(rows))
    sizes = {name: inputs * outputs for name, (inputs, outputs) in widths.items()}
    return choose_layers(norms, costs, sizes, base, choice.budget, len(rows))


def _candidates(plan: Plan, model: Any) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each candidate linear layer, in the order of the model."""
    targets = plan.adapter.target_modules
    output = end_name(model, "output")
    widths = {
        name: pair
        for name, pair in all_widths(model).items()
        if name != output and not any(within(name, head) for head in plan.base.head)
    }
    if targets == ALL_LINEAR:
        return widths
    assert isinstance(targets, tuple)  # names, once a plan is made
    return {name: pair for name, pair in widths.items() if any(matches(name, one) for one in targets)}


def _saved_whole(plan: Plan, model: Any) -> int:
    """Parameters of the modules that are fully trained besides the adapter."""
    saved = plan.adapter.modules_to_save or ()
    names = [name for name, _ in model.named_modules() if any(matches(name, one) for one in saved)]
    return sum(weight.numel() for name in names for weight in model.get_submodule(name).parameters())


def sample_rows(plan: Plan, count: int, batches: int) -> list[list[int]]:
    """Indices of training rows for each batch, drawn with the seed of the recipe.

    Args:
        count: number of training rows.
        batches: maximum number of batches.
    """
    order = np.random.default_rng(plan.seed).permutation(count)
    size = plan.batch.per_device
    return [order[first : first + size].tolist() for first in range(0, count, size)][:batches]


ReadRows: TypeAlias = Callable[[Sequence[int]], Inputs]
"""From indices of training rows to a batch on the model's device."""
BatchLoss: TypeAlias = Callable[[Any, Inputs], Tensor]
"""From a model and a batch to the mean loss: (), float."""


def text_batches(
    plan: Plan, data: PreparedData, tokenizer: PreTrainedTokenizerBase, model: Any
) -> tuple[ReadRows, BatchLoss]:
    """Returns functions for the batches of a language model and for their loss.

    Args:
        model: the base, with or without an adapter that does not change its output yet.
    """
    read, pad = _reader(data, "input_ids"), tokenizer.pad_token_id or 0
    return (lambda rows: _on(model, pad_batch(**read(rows), pad=pad))), (lambda one, batch: one(**batch).loss)


def label_batches(
    plan: Plan, data: PreparedData, tokenizer: PreTrainedTokenizerBase, model: Any
) -> tuple[ReadRows, BatchLoss]:
    """The same for a model with a head."""
    head = task_head(plan.base.labels, plan.base.problem_type, model, tokenizer)
    read = _reader(data, head.column)

    def read_batch(rows: Sequence[int]) -> Inputs:
        found = read(rows)
        return _on(model, make_batch(found[head.column], found["labels"], head))

    given = torch.tensor(plan.class_weights) if isinstance(plan.class_weights, tuple) else None

    def loss(one: Any, batch: Inputs) -> Tensor:
        weights = None if given is None else given.to(batch["labels"].device)
        losses = head.losses(forward(one, dict(batch)), batch["labels"], weights=weights)
        count = head.weight_sum(batch["labels"], weights)
        return losses.sum() / torch.where(count > 0, count, 1)

    return read_batch, loss


def _reader(data: PreparedData, column: str) -> Callable[[Sequence[int]], dict[str, list[Any]]]:
    store = data.train.store.examples.select([column, "labels"])

    def read(rows: Sequence[int]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = store.take([int(data.train.rows[row]) for row in rows]).to_pydict()
        return columns

    return read


def pad_batch(input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Pad rows on the right.

    >>> pad_batch([[5, 6], [7]], [[-100, 6], [7]], 0)["labels"].tolist()
    [[-100, 6], [7, -100]]
    """
    longest = max(len(row) for row in input_ids)

    def fill(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

    mask = fill([[1] * len(row) for row in input_ids], 0)
    return {"input_ids": fill(input_ids, pad), "attention_mask": mask, "labels": fill(labels, IGNORED)}


def _on(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(model.device) for name, value in batch.items()}
