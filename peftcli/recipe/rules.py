"""Rules between recipe keys: keys that exclude or need each other, and keys that a task does not use."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from peftcli.methods.registry import METHODS
from peftcli.recipe.no_test_rows import find_untested
from peftcli.recipe.problems import KeyPath, Problems, dotted
from peftcli.recipe.schema import Recipe
from peftcli.recipe.template import template_columns
from peftcli.recipe.validation_rows import find_unvalidated
from peftcli.recipe.yaml import Tree
from peftcli.tasks.base import Task
from peftcli.tasks.registry import DEFAULT, TASKS, find_task, tasks_reading

_ONE_PLACE = "rows come from files, the Hub or a database; keep one"
_ONE_KIND = "a row is either a text, or a prompt and a completion; keep one kind"
_ONE_WAY = "rows are built from templates or from columns; keep one"
_APART: tuple[tuple[str, str, str], ...] = (
    ("path", "name", _ONE_PLACE),
    ("path", "url", _ONE_PLACE),
    ("path", "url_env", _ONE_PLACE),
    ("name", "url", _ONE_PLACE),
    ("name", "url_env", _ONE_PLACE),
    ("url", "url_env", "the URL is set in the recipe or in the environment; keep one"),
    ("table", "query", "rows come from a table or from a query; keep one"),
    ("text", "prompt", _ONE_KIND),
    ("text", "completion", _ONE_KIND),
    *((key, "columns", _ONE_WAY) for key in ("text", "prompt", "completion")),
    *((key, "format", "the recipe defines the row format twice; keep one") for key in ("text", "prompt", "columns")),
)
_OWN_SOURCE = ("path", "name", "url", "url_env", "config", "revision", "hub_split", "table", "query", "file_format")
_OF_THE_SOURCES = (
    *(*_OWN_SOURCE, "encoding", "csv", "format", "turns", "mask_history"),
    *("text", "prompt", "completion", "columns", "where", "ignore_columns"),
)
SHARE_ERROR = 0.001
"""Largest error of a sum of shares, for shares such as 0.333 of three sources."""
_PLACES = ("path", "name", "url", "url_env")

ASKED = "performance.sharding: full"
SHARDABLE_KEYS = frozenset(
    [
        *("method", "r", "alpha", "dropout", "bias", "use_rslora", "target_modules", "layers", "init_from", "dtype"),
        *("alpha_pattern", "exclude_modules", "init_lora_weights", "loraplus_lr_ratio", "rank_pattern"),
    ]
)
"""Keys of the adapter section that do not need unsharded base weights."""
PLAIN_INITS = (True, False, "gaussian")
"""Initializations of LoRA that do not use the base weights."""
_UNSHARDED = "it needs unsharded base weights"
_TRAINER = {
    "activation_offloading": "it would also offload gathered weights",
    "deepspeed": "DeepSpeed shards the model itself",
    "load_best_model_at_end": "the combination is untested",
    "torch_compile": "the combination is untested",
    "use_liger_kernel": "the combination is untested",
}
"""Trainer arguments that cannot be combined with sharding, and why."""


def check_rules(tree: Tree, problems: Problems, *, of_run: bool = False) -> None:
    """Add a problem for keys that exclude each other, and for keys that need another key.

    Args:
        of_run: the recipe is that of a run folder; runs of earlier versions chose on their test rows.
    """
    dataset = tree.get("dataset")
    if isinstance(dataset, dict):
        _check_dataset(dataset, tree, problems)
    _check_model(tree, problems)
    _check_quantization(tree, problems)
    _check_dtype(tree, problems)
    check_unused_keys(tree, problems)
    _check_labels(tree, problems)
    _check_forgetting(tree, problems)
    check_sharding(tree, problems)
    find_untested(tree, problems)
    if not of_run:
        find_unvalidated(tree, problems)


def _check_dtype(tree: Tree, problems: Problems) -> None:
    """Report full training in bfloat16 with a base model in another dtype or quantized."""
    path: KeyPath = ("adapter", "dtype")
    if tree.get("adapter", "dtype") != "bfloat16" or path in tree.spoiled:
        return
    base = tree.get("model", "dtype")
    if base in ("float16", "float32"):
        text = f"adapter.dtype: bfloat16 trains the model's own weights, but model.dtype is {base}; set it to bfloat16"
        problems.add(tree.place(path), text)
    if tree.get("quantization") is not None:
        text = (
            "adapter.dtype: bfloat16 would round the dequantized weights of the base model; remove it or quantization"
        )
        problems.add(tree.place(path), text)


def _check_dataset(dataset: dict[str, Any], tree: Tree, problems: Problems) -> None:
    section: KeyPath = ("dataset",)
    sources = dataset.get("sources")
    if isinstance(sources, list):
        for index, source in enumerate(sources):
            if isinstance(source, dict):
                _check_source((*section, "sources", index), source, tree, problems)
        for key in _OF_THE_SOURCES:
            if dataset.get(key) is not None:
                text = f"dataset.{key} cannot be combined with dataset.sources; set it in each source that needs it"
                problems.add(tree.place((*section, key)), text)
        _check_shares(sources, tree, problems)
    else:
        _check_source(section, dataset, tree, problems)
    if dataset.get("stopping_strategy") is not None and not _have_shares(sources):
        text = "dataset.stopping_strategy needs sources with a share; set dataset.sources[0].share and the others"
        problems.add(tree.place((*section, "stopping_strategy")), text)
    for name in ("test", "validation"):
        _check_held_out(name, dataset, tree, problems)
    split = dataset.get("split")
    if isinstance(split, dict) and split.get("stratify") is not None and split.get("group") is not None:
        why = "a split by groups cannot preserve the class distribution; keep one"
        _apart((*section, "split", "stratify"), (*section, "split", "group"), why, tree, problems)


def _have_shares(sources: Any) -> bool:
    return isinstance(sources, list) and any(isinstance(one, dict) and one.get("share") is not None for one in sources)


def _check_shares(sources: list[Any], tree: Tree, problems: Problems) -> None:
    """Report shares that do not add up to 1, and sources that mix them with weights."""
    sections = [source for source in sources if isinstance(source, dict)]
    shares = [source.get("share") for source in sections]
    if not _have_shares(sources) or any(
        ("dataset", "sources", at, "share") in tree.spoiled for at in range(len(shares))
    ):
        return
    for at, source in enumerate(sections):
        path: KeyPath = ("dataset", "sources", at)
        if source.get("share") is None:
            problems.add(tree.place(path), f"{dotted(path)} has no share, but other sources have one; add it")
        elif source.get("weight") is not None:
            _apart(
                (*path, "share"), (*path, "weight"), "rows are used by shares or by weights; keep one", tree, problems
            )
    numbers = [share for share in shares if isinstance(share, int | float) and not isinstance(share, bool)]
    if len(numbers) == len(sections) and not math.isclose(sum(numbers), 1, abs_tol=SHARE_ERROR):
        text = f"the shares of dataset.sources add up to {sum(numbers):g}; change them so that they add up to 1"
        problems.add(tree.place(("dataset", "sources")), text)


def _check_held_out(name: str, dataset: dict[str, Any], tree: Tree, problems: Problems) -> None:
    """Check `dataset.test` or `dataset.validation`: rows with a source of their own are not also split off."""
    section, split = dataset.get(name), dataset.get("split")
    if section is None:
        return
    path: KeyPath = ("dataset", name)
    drawn = f"{name}_size"
    why = f"{name} rows are split off or have their own source; keep one"
    if isinstance(split, dict) and split.get(drawn) is not None:
        _apart(("dataset", "split", drawn), path, why, tree, problems)
    elif name == "test" and isinstance(split, dict) and not split.get("validation_size"):
        _apart(("dataset", "split"), path, why, tree, problems)  # no row is drawn
    if not isinstance(section, dict):
        return
    if section.get("path") is not None and section.get("name") is not None:
        why = f"{name} rows come from files or the Hub; keep one"
        _apart((*path, "path"), (*path, "name"), why, tree, problems)
    stored = next((key for key in ("table", "query") if section.get(key) is not None), None)
    if stored is not None and section.get("path") is None:
        text = f"{dotted(path)}.{stored} needs {dotted(path)}.path, the SQLite file with the {name} rows"
        problems.add(tree.place((*path, stored)), text)
    elif all(section.get(key) is None for key in ("path", "name")) and (
        section.get("hub_split") is None or dataset.get("name") is None
    ):
        text = f"{dotted(path)} has no source; set {dotted(path)}.path, or {dotted(path)}.hub_split for a Hub dataset"
        problems.add(tree.place(path), text)


def _check_source(path: KeyPath, source: dict[str, Any], tree: Tree, problems: Problems) -> None:
    """Check the keys of one source: the dataset section itself, or one of `dataset.sources`."""
    name = dotted(path)

    def given(key: str) -> bool:
        return source.get(key) is not None

    task = find_task(tree.get("model", "task"))
    for first, second, why in _APART:
        if given(first) and given(second) and not _text_with_label(first, second, source, task):
            _apart((*path, first), (*path, second), why, tree, problems)
    if not any(map(given, _PLACES)) and not any((*path, key) in tree.spoiled for key in _PLACES):
        text = f"{name} has no source; set {name}.path (files) or {name}.name (a Hub dataset)"
        problems.add(tree.place(path), text)
    for key, partner in (("prompt", "completion"), ("completion", "prompt")):
        if given(key) and not given(partner) and not given("text") and (*path, partner) not in tree.spoiled:
            text = f"{name}.{key} needs {name}.{partner}; add it, or use one template in {name}.text"
            problems.add(tree.place((*path, key)), text)
    for key in ("config", "revision", "hub_split"):
        if given(key) and not given("name"):
            text = f"{name}.{key} is for Hub datasets; set {name}.name"
            problems.add(tree.place((*path, key)), text)
    if any(map(given, ("url", "url_env"))) and not any(map(given, ("table", "query"))):
        text = f"{name}.url needs {name}.table or {name}.query; add one of them"
        problems.add(tree.place((*path, "url" if given("url") else "url_env")), text)
    _check_columns((*path, "columns"), source.get("columns"), tree, problems)
    if task is not None:
        _check_task(path, source, task, tree, problems)
    for key in ("text", "completion"):
        if isinstance(source.get(key), str) and _is_constant(source[key]):
            text = f"{name}.{key} has no column, so all rows would be equal; write {{column}} where a value goes"
            problems.add(tree.place((*path, key)), text)


def _check_columns(path: KeyPath, columns: Any, tree: Tree, problems: Problems) -> None:
    name = dotted(path)
    if columns == {}:
        problems.add(tree.place(path), f"{name} is empty; add a column, or remove the line")
    if not isinstance(columns, dict):
        return
    kinds = [kind for kind in (("text",), ("messages",), ("prompt", "completion")) if any(map(columns.get, kind))]
    for first, second in itertools.pairwise(kinds):
        one = next(key for key in first if columns.get(key))
        two = next(key for key in second if columns.get(key))
        _apart((*path, one), (*path, two), "a row has one format; keep one", tree, problems)
    for key, partner in (("prompt", "completion"), ("completion", "prompt")):
        if columns.get(key) and not columns.get(partner) and len(kinds) == 1:
            text = f"{name}.{key} needs {name}.{partner}; add it"
            problems.add(tree.place((*path, key)), text)


def _text_with_label(first: str, second: str, source: dict[str, Any], task: Task | None) -> bool:
    """Whether a template builds the text to classify, and `columns` names the other columns."""
    columns = source.get("columns")
    return (
        (first, second) == ("text", "columns")
        and task is not None
        and task.labels_texts
        and isinstance(columns, dict)
        and (not columns.get("text"))
    )


def _check_task(path: KeyPath, source: dict[str, Any], task: Task, tree: Tree, problems: Problems) -> None:
    """Report columns and templates that the task of the recipe does not use."""
    columns = source.get("columns")
    columns = columns if isinstance(columns, dict) else {}
    for key in columns:
        needed = tasks_reading(key)
        if columns[key] and needed and task.name not in needed and ("dataset", "columns", key) not in task.unused_keys:
            text = f"{dotted((*path, 'columns', key))} is for model.task: {needed[0]}, but the task is {task.name}"
            problems.add(tree.place((*path, "columns", key)), f"{text}; change the task or remove the column")
    for key in ("format", "turns", "mask_history"):
        if not task.generates and source.get(key) is not None:
            text = f"{dotted((*path, key))} is for language models, but model.task is {task.name}; remove it"
            problems.add(tree.place((*path, key)), text)
    if task.label_of == "token" and source.get("text") is not None:
        text = f"{dotted((*path, 'text'))} builds one text, but model.task: {task.name} needs words with tags; "
        problems.add(tree.place((*path, "text")), text + f"name their columns in {dotted((*path, 'columns'))}")


def _check_labels(tree: Tree, problems: Problems) -> None:
    task = find_task(tree.get("model", "task"))
    if task is not None and task.labels_texts and tree.get("dataset", "too_long") == "split":
        text = "dataset.too_long: split would give every piece of a text the same label; use truncate or drop"
        problems.add(tree.place(("dataset", "too_long")), text)
    problem_type = tree.get("model", "problem_type")
    if problem_type in ("single-label", "regression") and tree.get("evaluation", "threshold") is not None:
        text = f"evaluation.threshold is for rows with any number of classes, but model.problem_type is {problem_type}"
        problems.add(tree.place(("evaluation", "threshold")), f"{text}; remove one of the two")
    if problem_type in ("multi-label", "regression") and tree.get("model", "class_weights") is not None:
        text = f"model.class_weights weights the loss of classes, but model.problem_type is {problem_type}"
        problems.add(tree.place(("model", "class_weights")), f"{text}; remove one of the two")
    if tree.get("model", "problem_type") == "regression" and tree.get("dataset", "labels") is not None:
        text = "dataset.labels names classes, but model.problem_type: regression has numbers; remove one of the two"
        problems.add(tree.place(("dataset", "labels")), text)


def _check_model(tree: Tree, problems: Problems) -> None:
    task = find_task(tree.get("model", "task"))
    if tree.get("model", "add_tokens") and task is not None and task.images:
        problems.add(tree.place(("model", "add_tokens")), "model.add_tokens: images have no tokens; remove it")
    revision = tree.get("model", "revision")
    if tree.get("model", "trust_remote_code") is not True or ("model", "trust_remote_code") in tree.spoiled:
        return
    if not isinstance(revision, str) or not re.fullmatch(r"[0-9a-f]{40}", revision):
        problems.add(
            tree.place(("model", "trust_remote_code")),
            "model.trust_remote_code runs code from the repository; set model.revision to a commit hash "
            "(40 characters of 0-9 and a-f)",
        )


def _check_quantization(tree: Tree, problems: Problems) -> None:
    """Report keys of 4-bit quantization with `bits: 8`: bitsandbytes has no data type or double quantization there."""
    if tree.get("quantization", "bits") != 8:
        return
    for key in ("type", "double_quant", "compute_dtype"):
        if tree.get("quantization", key) is not None and ("quantization", key) not in tree.spoiled:
            text = f"quantization.{key} is for 4 bits, but quantization.bits is 8; remove one of the two"
            problems.add(tree.place(("quantization", key)), text)


def _check_forgetting(tree: Tree, problems: Problems) -> None:
    path: KeyPath = ("evaluation", "forgetting_text")
    task = find_task(tree.get("model", "task"))
    if tree.get("evaluation", "forgetting_text") is not None:
        if task is not None and not task.generates:
            problems.add(
                tree.place(path), f"evaluation.forgetting_text needs model.task: {DEFAULT}; remove one of the two"
            )
        return
    if path in tree.spoiled:
        return
    if tree.get("evaluation", "forgetting_tokens") is not None:
        text = "evaluation.forgetting_tokens needs a text; set evaluation.forgetting_text"
        problems.add(tree.place(("evaluation", "forgetting_tokens")), text)
    for name in ("forgetting_loss", "forgetting_change"):
        if tree.get("gates", name) is not None:
            problems.add(tree.place(("gates", name)), f"gates.{name} needs a text; set evaluation.forgetting_text")


def _apart(first: KeyPath, second: KeyPath, why: str, tree: Tree, problems: Problems) -> None:
    """Report the problem at the later key, with the location of the other."""
    places = {path: tree.place(path) for path in (first, second)}
    both_lines = all(isinstance(place, int) for place in places.values())
    if (both_lines and places[first] > places[second]) or isinstance(places[first], str):  # type: ignore[operator]
        first, second = second, first
    other = places[first]
    shown = f"line {other}" if isinstance(other, int) else other
    problems.add(places[second], f"{dotted(second)} excludes {dotted(first)} ({shown}); {why}")


def _is_constant(template: str) -> bool:
    try:
        return bool(template) and not template_columns(template)
    except ValueError:
        return False


def check_unused_keys(tree: Tree, problems: Problems) -> None:
    """Add a problem for each key that has no effect for the task of the recipe."""
    task = find_task(tree.get("model", "task"))
    if task is None:
        return  # the schema reports it
    for path, why in task.unused_keys.items():
        _refuse(path, task.name, why, tree, problems)
    owners = {name: other.name for other in reversed(TASKS.values()) for name in other.metrics}
    for name in (name for name in owners if name not in task.metrics):
        why = f"it is a metric of {owners[name]}; use {' or '.join(task.metrics[1:3])}"
        _refuse(("gates", name), task.name, why, tree, problems)


def _refuse(path: KeyPath, task: str, why: str, tree: Tree, problems: Problems) -> None:
    unset: tuple[Any, ...] = (None, False) if path == ("evaluation", "threshold") else (None, False, "auto")
    if tree.get(*[str(part) for part in path]) not in unset:
        text = f"{dotted(path)} has no effect with model.task: {task}: {why}; remove it"
        problems.add(tree.place(path), text)


def check_sharding(tree: Tree, problems: Problems) -> None:
    """Add a problem for each key that cannot be combined with `performance.sharding: full`."""
    if tree.get("performance", "sharding") != "full":
        return
    for path, why in undivided(tree.values):
        if path not in tree.spoiled:
            problems.add(tree.place(path), f"{dotted(path)} excludes {ASKED}: {why}; keep one of the two")


def undivided(sections: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Keys that cannot be combined with a sharded base model, each with the reason.

    Args:
        sections: of a recipe, as in the YAML file.
    """
    task = find_task(_section(sections, "model").get("task"))
    if task is None or not task.generates:
        yield ("model", "task"), "only language models are supported"
    if sections.get("stages"):
        yield ("stages",), "the result of a stage is merged into unsharded weights"
    if _section(sections, "quantization").get("bits") == 8:
        yield ("quantization", "bits"), "8-bit weights are not supported, 4-bit weights are"
    yield from _of_adapter(_section(sections, "adapter"))
    for name, why in _TRAINER.items():
        if _section(sections, "trainer").get(name):
            yield ("trainer", name), why


def _of_adapter(adapter: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    method = METHODS.get(str(adapter.get("method", "lora")))
    if method is None or not method.is_lora:
        supported = ", ".join(one.name for one in METHODS.values() if one.is_lora)
        text = f"{adapter.get('method')} is not supported with sharded weights; supported: {supported}"
        yield ("adapter", "method"), text
        return
    for key, value in adapter.items():
        if value is None or value is False:
            continue
        if key not in SHARDABLE_KEYS:
            yield ("adapter", key), _UNSHARDED
        elif isinstance(value, Mapping) and key in ("target_modules", "layers"):
            yield ("adapter", key), "the selection by gradient needs gradients of unsharded weights"
        elif key == "init_lora_weights" and value not in PLAIN_INITS:
            yield ("adapter", key), _UNSHARDED


def sections_of(recipe: Recipe) -> dict[str, Any]:
    """The sections of a validated recipe that `undivided` reads, in the form of the YAML file."""
    given = recipe.adapter.model_dump(exclude_none=True, exclude={"arguments"})
    return {
        "model": {"task": recipe.model.task},
        "stages": recipe.stages,
        "quantization": {} if recipe.quantization is None else {"bits": recipe.quantization.bits},
        "adapter": {**given, **recipe.adapter.arguments},
        "trainer": recipe.trainer,
    }


def _section(sections: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = sections.get(name)
    return found if isinstance(found, Mapping) else {}
