"""Adapters written by PEFT for another tool: base, task and labels according to their files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from peftcli.errors import MachineError
from peftcli.model.adapter_weights import CONFIG, WEIGHTS, check_adapter_files, read_tensors
from peftcli.model.files import stored_names
from peftcli.model.heads import PROBLEM_TYPES, build_empty, head_modules, is_within
from peftcli.model.inspect import load_config
from peftcli.model.load import PREFIX
from peftcli.run_dir import read_json
from peftcli.tasks.registry import DEFAULT, TASKS

PEFT_TYPES = {task.peft_type: task.name for task in TASKS.values() if task.peft_type is not None}
"""Our task names by PEFT's `task_type`."""


@dataclass(frozen=True)
class ExternalAdapter:
    """An adapter without the files of a run.

    Attributes:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        base: local folder or Hub id of its base; None if it names none.
        revision: on the Hub, None for the default.
        task: None if it is not stated.
    """

    folder: Path
    base: str | None
    revision: str | None
    task: str | None


@dataclass(frozen=True)
class Outputs:
    """The outputs of an adapter's head.

    Attributes:
        names: labels in the order of the outputs; empty for a language model.
        named: they are names, not numbers as placeholders.
        problem_type: for whole texts, otherwise None.
    """

    names: tuple[str, ...] = ()
    named: bool = False
    problem_type: str | None = None


def read_external_adapter(folder: Path) -> ExternalAdapter:
    """Read the configuration of an adapter.

    Raises:
        MachineError: its files are damaged, or its method or task is unknown.
    """
    check_adapter_files(folder, None)
    said = read_json(folder / CONFIG)
    kind, task = said.get("peft_type"), said.get("task_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise MachineError(
            f"{folder / CONFIG}: peft_type {kind} is unknown to the installed peft; install the version of peft that "
            "wrote it, or a later one"
        )
    if task is not None and task not in PEFT_TYPES:
        raise MachineError(
            f"{folder / CONFIG}: task_type {task} is not supported, only {', '.join(PEFT_TYPES)}; use the adapter "
            "with PEFT directly"
        )
    name = said.get("base_model_name_or_path") or None
    if name is not None and Path(name).is_dir():
        name = str(Path(name).resolve())
    return ExternalAdapter(folder, name, said.get("revision"), None if task is None else PEFT_TYPES[task])


def base_config(adapter: ExternalAdapter) -> PreTrainedConfig:
    """The configuration of the base that an adapter names.

    Raises:
        MachineError: it names none, or the base cannot be loaded.
    """
    fix = "pass a recipe with --recipe and set its model.name to the base"
    if adapter.base is None:
        raise MachineError(
            f"{adapter.folder / CONFIG}: base_model_name_or_path is empty, so the base is unknown; {fix}"
        )
    try:
        return load_config(adapter.base, adapter.revision)
    except MachineError as problem:
        raise MachineError(
            f"{adapter.folder / CONFIG}: the base {adapter.base} (base_model_name_or_path) cannot be loaded: it is "
            f"not a local folder, and neither in the Hub's cache nor on the Hub; download it, or {fix}"
        ) from problem


def task_of(adapter: ExternalAdapter, config: PreTrainedConfig) -> str:
    """The task of an adapter; if not stated, a language model is assumed if its base is one and it has no head.

    Raises:
        MachineError: the task is unknown.
    """
    if adapter.task is not None:
        return adapter.task
    saved = read_json(adapter.folder / CONFIG).get("modules_to_save")
    if type(config.get_text_config()) in MODEL_FOR_CAUSAL_LM_MAPPING and not saved:
        return DEFAULT
    raise MachineError(
        f"{adapter.folder / CONFIG}: task_type is empty, so the task is unknown; set it to one of "
        f"{', '.join(PEFT_TYPES)}, or pass a recipe with --recipe and model.task"
    )


def outputs_of(adapter: ExternalAdapter, task: str, base: str, config: PreTrainedConfig) -> Outputs:
    """The outputs of an adapter's head: as many as its weights have, with the names in its files.

    Args:
        base: local folder or Hub id of the base.
        config: of the base.

    Raises:
        MachineError: the weights of the head are neither in the adapter nor in its base.
    """
    if TASKS[task].generates:
        return Outputs()
    head = head_modules(build_empty(base, config, task, ("0", "1")), task, base, adapter.revision)
    shapes = _head_shapes(adapter, head)
    _refuse_headless(adapter, head, shapes, base)
    own = adapter.folder / "config.json"
    said = read_json(own) if own.is_file() else config.to_dict()
    names = _names(said)
    # The last matrix of the head gives the outputs; poolers that may be included never come last.
    wide = [shape[0] for name, shape in shapes.items() if len(shape) > 1 and "pooler" not in name]
    count = wide[-1] if wide else max(len(names), 1)
    named = len(names) == count and not all(name.startswith("LABEL_") for name in names)
    types = {ours: theirs for theirs, ours in PROBLEM_TYPES.items()}
    problem_type = types.get(str(said.get("problem_type")), "regression" if count == 1 else "single-label")
    numbered = tuple(f"LABEL_{number}" for number in range(count))
    return Outputs(
        names if len(names) == count else numbered, named, problem_type if TASKS[task].label_of == "row" else None
    )


def _names(said: Mapping[str, Any]) -> tuple[str, ...]:
    found = said.get("id2label") or {}
    return tuple(str(found[key]) for key in sorted(found, key=int))


def _head_shapes(adapter: ExternalAdapter, head: tuple[str, ...]) -> dict[str, list[int]]:
    """Shapes of the head's tensors in an adapter's file, in the order of the head."""
    stored = read_tensors(adapter.folder / WEIGHTS)
    found = {}
    for module in head:
        for name, said in stored.items():
            bare = name.removeprefix(PREFIX)
            if is_within(bare, (module,)) and said.split()[-1] != "scalar":
                found[bare] = [int(size) for size in said.split()[-1].split("x")]
    return found


def _refuse_headless(adapter: ExternalAdapter, head: tuple[str, ...], shapes: Mapping[str, Any], base: str) -> None:
    stored = stored_names(base, adapter.revision) or set()
    lacking = [one for one in head if not any(is_within(name, (one,)) for name in (*shapes, *stored))]
    if lacking:
        raise MachineError(
            f"{adapter.folder / WEIGHTS}: the weights of {', '.join(lacking)} are neither here nor in the base {base}, "
            "so they would be random; train the adapter with them in modules_to_save, or use the base that it was "
            "trained on"
        )
