"""The arguments of PEFT's configuration classes, read from the installed source: nothing of peft is imported."""

import ast
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

from peftcli.methods.base import Method
from peftcli.methods.registry import METHODS
from peftcli.recipe.installed import Argument, class_body, class_fields, package_folder, union_parts

_HOMES = {
    "LoraConfig": "tuners/lora/config.py",
    "LycorisConfig": "tuners/lycoris_utils.py",
    "PromptLearningConfig": "config.py",
}
"""Files of the classes that a configuration may be made from; what PeftConfig itself holds is not for a recipe."""
CLOSED = {
    "fan_in_fan_out": "it is read from the model",
    "inference_mode": "training needs it off and answering on",
    "task_type": "it follows model.task",
    "peft_type": "it follows adapter.method",
    "base_model_name_or_path": "it is model.name",
}
"""Arguments that no recipe sets, whatever the method."""
SHARED = ("r", "target_modules", "modules_to_save", "use_rslora", "use_dora", "bias")
"""Arguments that the schema has as keys."""
_PLAIN = {"int", "float", "bool", "str", "dict", "list"}


@cache
def method_arguments(name: str) -> dict[str, Argument] | None:
    """What a method takes, under PEFT's names and ours; None where PEFT is not installed or reads in no known way."""
    method = METHODS[name]
    own = {key: Argument(key, kinds, method.choices.get(key, ())) for key, kinds in method.arguments.items()}
    if method.room is None:
        return own
    folder = package_folder("peft")
    if folder is None:
        return None
    found = _arguments(folder, folder / "tuners" / method.room / "config.py", method.config)
    for key in found.keys() & method.choices.keys():  # words that PEFT's annotation lacks
        found[key] = replace(found[key], choices=(*found[key].choices, *method.choices[key]))
    return {key: value for key, value in (found | own).items() if key not in method.closed} if found else None


def recipe_arguments(name: str) -> list[str]:
    """The arguments that a recipe may write beside the keys that many methods share."""
    method = METHODS[name]
    aside = {*method.core.values(), *CLOSED, *SHARED}
    return [key for key in method_arguments(name) or () if key not in aside]


def homes_of(key: str) -> list[Method]:
    """The methods that have an argument."""
    return [method for method in METHODS.values() if key in (method_arguments(method.name) or ())]


def _arguments(folder: Path, path: Path, name: str) -> dict[str, Argument]:
    found: dict[str, Argument] = {}
    for base in _bases(path, name):
        if base in _HOMES:
            found |= _arguments(folder, folder / _HOMES[base], base)
    for field in class_fields(path, name):
        assert isinstance(field.target, ast.Name)
        found[field.target.id] = _peft_argument(field.target.id, field.annotation, path)
    return found


def _bases(path: Path, name: str) -> list[str]:
    try:
        head = re.search(rf"^class {name}\(([^)]*)\)", path.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return []
    return [base.strip() for base in head[1].split(",")] if head else []


def _peft_argument(name: str, annotation: ast.expr, path: Path) -> Argument:
    kinds: set[str] = set()
    choices: list[str] = []
    for part in union_parts(annotation):
        kind, words = _peft_kind(part, path)
        kinds.add(kind)
        choices += words
    # A pattern such as pissa_niter_[number of iters] leaves its beginning, which every word that goes on from it fits.
    choices = [word.partition("[")[0] for word in choices]
    return Argument(name, frozenset(kinds), tuple(dict.fromkeys(choices)))


def _peft_kind(node: ast.expr, path: Path) -> tuple[str, list[str]]:
    if isinstance(node, ast.Constant) and node.value is None:
        return "none", []
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal":
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        words = [item.value for item in items if isinstance(item, ast.Constant)]
        return "str", [word for word in words if isinstance(word, str)]
    name = node.value if isinstance(node, ast.Subscript) else node
    word = name.id if isinstance(name, ast.Name) else ""
    if word in _PLAIN or word == "tuple":
        return ("list" if word == "tuple" else word), []
    members = [node.value.value for node in class_body(path, word) if _is_member(node)] if word else []  # type: ignore[attr-defined]
    return ("str", members) if members else ("dict", [])


def _is_member(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
