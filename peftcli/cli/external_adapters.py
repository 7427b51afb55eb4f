"""Adapters made by other tools as targets: a recipe built from their files, the target itself, and their merge."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftcli.cli.commands import MergeFlags
from peftcli.cli.pipeline import Planned, plan_recipe, prepare_for
from peftcli.cli.pointers import Pointers
from peftcli.cli.recipes import find_recipe
from peftcli.cli.run_inputs import model_of, point
from peftcli.data.prepare import PreparedData
from peftcli.errors import MachineError, RecipeError
from peftcli.merge.fold import refuse_unmergeable
from peftcli.merge.merge import MergeSettings, merge
from peftcli.model.external_adapter import (
    ExternalAdapter,
    Outputs,
    base_config,
    outputs_of,
    read_external_adapter,
    task_of,
)
from peftcli.model.inspect import resolve_model
from peftcli.model.manifest import build_manifest
from peftcli.model.target import Target, open_target
from peftcli.plan.plan import DTYPE_BYTES
from peftcli.progress import Progress
from peftcli.recipe.load import Loaded, load_recipe
from peftcli.recipe.schema import Recipe
from peftcli.results import MergeJson, save
from peftcli.tasks.registry import TASKS
from peftcli.tiny.tokenizer import load_documents
from peftcli.train.disk import check_disk_space, merge_forecast

TEXTS = 64
"""Number of bundled texts on which a merge is compared if no recipe is given."""
FIXED = "fixed texts"


@contextmanager
def opened(
    folder: Path, recipe: str | None, pointers: Pointers, progress: Progress
) -> Iterator[tuple[Loaded, Planned, Target]]:
    """An adapter of another tool as a target, on the base that it names or on the base of a recipe.

    Without a recipe, the yielded recipe uses bundled texts as rows; their file exists only within the context.

    Raises:
        MachineError: the base cannot be loaded, or the files lack required information.
        RecipeError: the recipe is for another task.
    """
    adapter = read_external_adapter(folder)
    if recipe is None and (pointers.overrides or pointers.data):
        raise RecipeError(f"--set and --data: {folder} has no recipe; pass one with --recipe")
    if (model := model_of(pointers, None)) is not None:
        adapter = replace(adapter, base=model, revision=None)
    with tempfile.TemporaryDirectory(prefix="peftcli-") as temporary:
        rows = Path(temporary) / "texts.jsonl"
        if recipe is None:
            loaded, outputs = _own_recipe(adapter, rows)
        else:
            loaded, outputs = _with_names(
                point(load_recipe(find_recipe(recipe), pointers.overrides), pointers), adapter, progress
            )
        planned = plan_recipe(loaded)
        target = open_target(str(folder), planned.plan.base)
        yield loaded, planned, _described(target, loaded.recipe, planned, given=recipe is not None, outputs=outputs)


def prepared(planned: Planned, target: Target, progress: Progress) -> tuple[Target, PreparedData]:
    """The rows of a plan, tokenized for an adapter of another tool.

    Raises:
        MachineError: the head has a different number of outputs than the rows have labels.
    """
    target, data = prepare_for(planned, target, progress)
    outputs, labels = target.identity.get("outputs"), len(target.base.labels)
    if outputs and outputs != labels:
        raise MachineError(
            f"{target.adapter}: its head has {outputs} outputs, but the rows have {labels} labels; list all labels in "
            "dataset.labels, in the order used when the adapter was trained"
        )
    return target, data


def merge_external_adapter(
    folder: Path, recipe: str | None, pointers: Pointers, flags: MergeFlags, progress: Progress
) -> tuple[MergeJson, Path]:
    """Merge an adapter of another tool; `merge.json` is written into the folder of the merged model.

    Args:
        pointers: the base and the rows that the command line names.

    Returns:
        The content of `merge.json`, and the folder of the merged model.

    Raises:
        MachineError: it cannot be merged, or its base cannot be loaded.
        GateNotMet: the merged model differs too much from the adapter; no file is written.
    """
    into, dtype = flags.into, flags.dtype
    final = flags.output_dir or folder.resolve().with_name(f"{folder.resolve().name}-merged")
    refuse_unmergeable(folder)
    with opened(folder, recipe, pointers, progress) as (_, planned, target):
        plan = planned.plan
        if recipe is None and TASKS[plan.task].images:
            raise RecipeError(f"{folder}: merging an image adapter needs test images; pass a recipe with --recipe")
        row_format = {key: target.identity[key] for key in ("format", "prompt") if key in target.identity}
        target, data = prepared(planned, target, progress)
        made = build_manifest(replace(plan, base=target.base), data, folder) | row_format
        stored = DTYPE_BYTES[dtype or plan.base.dtype]
        check_disk_space(final, merge_forecast(plan.total_parameters * stored, folder))
        rows_from = FIXED if recipe is None else None
        options = MergeSettings(into, dtype, plan.gates, plan.evaluation, plan.evaluation_batch, plan.seed, rows_from)
        found = merge(replace(target, identity=made), data, final, options, progress)
        save(final / "merge.json", found)
    return found, final


def _own_recipe(adapter: ExternalAdapter, rows: Path) -> tuple[Loaded, Outputs]:
    """A recipe built from the files of an adapter, with bundled texts as rows."""
    config = base_config(adapter)
    assert adapter.base is not None  # `base_config` refuses an adapter without one
    task = task_of(adapter, config)
    outputs = outputs_of(adapter, task, adapter.base, config)
    columns = _write_rows(rows, task, outputs)
    model: dict[str, Any] = {"name": adapter.base, "revision": adapter.revision, "task": task}
    dataset: dict[str, Any] = {"path": str(rows), "columns": columns, "split": {"test_size": 0}}
    if not TASKS[task].generates and outputs.problem_type != "regression":
        dataset["labels"] = outputs.names
    if outputs.problem_type is not None:
        model["problem_type"] = outputs.problem_type
    recipe = Recipe.model_validate({"name": "adapter", "model": model, "dataset": dataset, "trainer": {}})
    return Loaded(recipe, (), adapter.folder), outputs


def _write_rows(file: Path, task: str, outputs: Outputs) -> dict[str, str]:
    """Write bundled texts as rows of a task, cycling through its labels; returns the columns.

    The labels do not affect any result: only the outputs for the texts are compared.
    """
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(load_documents()[:TEXTS]):
        name = outputs.names[number % len(outputs.names)] if outputs.names else ""
        label: Any = [name] if outputs.problem_type == "multi-label" else name
        label = float(number) if outputs.problem_type == "regression" else label
        words = text.split()
        row: dict[str, Any] = {"text": text}
        if TASKS[task].label_of == "row":
            row["label"] = label
        rows.append({"tokens": words, "tags": [name] * len(words)} if TASKS[task].label_of == "token" else row)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {key: key for key in rows[0]}


def _with_names(loaded: Loaded, adapter: ExternalAdapter, progress: Progress) -> tuple[Loaded, Outputs]:
    """A recipe with the labels in the order of the adapter's outputs, if its files name them."""
    recipe = loaded.recipe
    model = recipe.model
    if adapter.task not in (None, model.task):
        raise RecipeError(
            f"{adapter.folder}: the adapter is for {adapter.task}, but the recipe's model.task is {model.task}; pass a "
            f"recipe for {adapter.task}"
        )
    located = resolve_model(model, smoke=False)
    if adapter.base is not None and Path(adapter.base).name != Path(located.path).name:
        progress.note(f"note: {adapter.folder} names {adapter.base} as its base; using {model.name} of the recipe")
    outputs = outputs_of(adapter, model.task, located.path, located.config)
    if recipe.dataset.labels is None and outputs.named and outputs.problem_type != "regression":
        dataset = recipe.dataset.model_copy(update={"labels": outputs.names})
        loaded = replace(loaded, recipe=recipe.model_copy(update={"dataset": dataset}))
    return loaded, outputs


def _described(target: Target, recipe: Recipe, planned: Planned, *, given: bool, outputs: Outputs) -> Target:
    """The target with the prompt format and length that a manifest would contain."""
    dataset = recipe.dataset
    settings: dict[str, Any] = {"max_length": planned.plan.labels.max_length, "outputs": len(outputs.names) or None}
    prompt = (dataset.prompt or (dataset.text if TASKS[recipe.model.task].labels_texts else None)) if given else None
    if prompt is not None:
        settings |= {"prompt": prompt}
    elif TASKS[recipe.model.task].generates and not (given and dataset.text) and target.tokenizer().chat_template:
        settings |= {"format": "messages"}
    return replace(target, identity=target.identity | settings)
