"""All methods by name, and the method table for the terminal, as JSON and as Markdown."""

from collections.abc import Mapping
from typing import Any

from peftcli.methods.base import LEFT_OUT, OPTIONS, Method
from peftcli.methods.custom import CUSTOM
from peftcli.methods.low_rank import LOW_RANK
from peftcli.methods.orthogonal import ORTHOGONAL
from peftcli.methods.prompt import PROMPT
from peftcli.methods.sparse import SHARED, SPARSE, SPECTRAL
from peftcli.tasks.registry import TASKS

METHODS: Mapping[str, Method] = {
    method.name: method for method in (*LOW_RANK, *SHARED, *SPECTRAL, *SPARSE, *ORTHOGONAL, *PROMPT, *CUSTOM)
}

HEAD = ("method", "what is trained", "4-bit", "8-bit", "merge", "tasks", "not with")


def conflict_reasons(method: Method) -> tuple[tuple[str, str], ...]:
    """Short names of what a method cannot be combined with, each with its reason."""
    found = (("packing, padding-free batching", method.padded), ("activation checkpointing", method.checkpointing))
    return tuple((name, reason) for name, reason in found if reason)


def conflicts(method: Method) -> tuple[str, ...]:
    """Short names of what a method cannot be combined with."""
    return tuple(name for name, _ in conflict_reasons(method))


def tasks_text(method: Method) -> str:
    """Short names of the tasks that a method supports.

    >>> tasks_text(METHODS["lora"])
    'text, classes, tags, images'
    """
    return ", ".join(task.short for task in TASKS.values() if task.name in method.tasks)


def row(one: Method) -> dict[str, Any]:
    """The row of a method in the table."""
    return {
        "name": one.name,
        "title": one.title,
        "what": one.what,
        "paper": one.paper,
        "config": one.config,
        "keys": dict(one.argument_names),
        "defaults": dict(one.defaults),
        "four_bit": not one.four_bit,
        "four_bit_reason": one.four_bit or None,
        "eight_bit": not one.eight_bit,
        "eight_bit_reason": one.eight_bit or None,
        "merge": not one.merge,
        "merge_reason": one.merge or None,
        "tasks": list(one.tasks),
        "conflicts": list(conflicts(one)),
    }


def as_json() -> dict[str, Any]:
    """The whole table, with the reasons for what is not supported."""
    return {
        "schema": 1,
        "methods": [row(one) for one in METHODS.values()],
        "options": [vars(option) for option in OPTIONS],
        "left_out": [{"type": kind, "reason": reason} for kind, reason in LEFT_OUT.items()],
    }


def markdown() -> str:
    """The table of `docs/methods.md`."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for one in METHODS.values():
        cells = (
            f"`{one.name}`",
            f"{one.title}: {one.what} ({one.paper})",
            "no" if one.four_bit else "yes",
            "no" if one.eight_bit else "yes",
            "no" if one.merge else "yes",
            tasks_text(one),
            ", ".join(conflicts(one)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Variants of LoRA:", "", "| variant | keys | what it changes |", "|---|---|---|"]
    for option in OPTIONS:
        needs = f"; needs `{option.needs}`" if option.needs else ""
        lines.append(f"| {option.name} | `{option.keys}`{needs} | {option.what} ({option.paper}) |")
    lines += ["", "Methods of the installed PEFT that are not offered:", ""]
    lines += [f"- `{kind}`: {reason}." for kind, reason in LEFT_OUT.items()]
    return "\n".join(lines) + "\n"
