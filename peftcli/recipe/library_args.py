"""The arguments of the installed SFTConfig and PEFT configurations, read from their source.

trl, transformers and peft are not imported. Only the class bodies are parsed, because parsing all of training_args.py
takes four times as long.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from peftcli.methods.base import Method
from peftcli.methods.registry import METHODS

_CLASSES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)
_ENUM_FILES = ("trainer_utils.py", "training_args.py", "debug_utils.py")
_PLAIN = {"int", "float", "bool", "str", "dict", "list"}

_HOMES = {
    "LoraConfig": "tuners/lora/config.py",
    "LycorisConfig": "tuners/lycoris_utils.py",
    "PromptLearningConfig": "config.py",
}
"""Files of base classes of the configurations; the fields of PeftConfig itself are not recipe keys."""
CLOSED = {
    "fan_in_fan_out": "it is read from the model",
    "inference_mode": "it is off for training and on for inference",
    "task_type": "it follows model.task",
    "peft_type": "it follows adapter.method",
    "base_model_name_or_path": "it is model.name",
}
"""Arguments that a recipe cannot set for any method."""
SHARED = ("r", "target_modules", "modules_to_save", "use_rslora", "use_dora", "bias")
"""Arguments that are keys of the schema."""


@dataclass(frozen=True)
class Argument:
    """One argument of an installed configuration class."""

    name: str
    kinds: frozenset[str]
    """Allowed types: int, float, bool, str, dict, list, none; `any` if the source does not tell."""
    choices: tuple[str, ...] = ()
    """Allowed strings; empty if any string is allowed."""


@cache
def installed_arguments() -> dict[str, Argument] | None:
    """The arguments by name, or None if trl or transformers is not installed or its source cannot be parsed."""
    folders = {package: package_folder(package) for package in ("transformers", "trl")}
    transformers = folders["transformers"]
    arguments: dict[str, Argument] = {}
    for package, file, name in _CLASSES:
        folder = folders[package]
        if folder is None or transformers is None:
            return None
        for field in class_fields(folder / file, name):
            argument = _argument(field, transformers)
            arguments[argument.name] = argument
    return arguments if "learning_rate" in arguments and "max_length" in arguments else None


def package_folder(package: str) -> Path | None:
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return None
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


def class_fields(path: Path, name: str) -> Iterator[ast.AnnAssign]:
    for node in class_body(path, name):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node


def class_arguments(package: str, file: str, name: str) -> dict[str, Argument]:
    """The fields of a class in an installed package by name; empty if there is no such class."""
    folder, transformers = package_folder(package), package_folder("transformers")
    if folder is None or transformers is None:
        return {}
    found = [_argument(field, transformers) for field in class_fields(folder / file, name)]
    return {argument.name: argument for argument in found}


@cache
def source_text(path: Path) -> str:
    """The text of a source file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def class_body(path: Path, name: str) -> list[ast.stmt]:
    """The statements of a class up to its first method; empty if the file or the class does not exist."""
    head = re.search(rf"^class {name}\b.*?:\n", source_text(path), re.MULTILINE | re.DOTALL)
    if head is None:
        return []
    rest = source_text(path)[head.start() :]
    end = re.search(r"\n(?=    def |    @|[^\s#])", rest)
    try:
        (node,) = ast.parse(rest[: end.start()] if end else rest).body
    except (SyntaxError, ValueError):
        return []
    return node.body if isinstance(node, ast.ClassDef) else []


def _argument(node: ast.AnnAssign, transformers: Path) -> Argument:
    assert isinstance(node.target, ast.Name)
    kinds: set[str] = set()
    choices = _metadata_choices(node.value)
    for part in union_parts(node.annotation):
        kind, names = _kind(part, transformers)
        kinds.add(kind)
        choices += names
    return Argument(node.target.id, frozenset(kinds), tuple(dict.fromkeys(choices)))


def union_parts(node: ast.expr) -> list[ast.expr]:
    """The parts of `A | B`, `Union[A, B]` and `Optional[A]`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return union_parts(ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.BinOp):
        return [*union_parts(node.left), *union_parts(node.right)]
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in ("Union", "Optional"):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        parts = [part for item in inner for part in union_parts(item)]
        return [*parts, ast.Constant(None)] if node.value.id == "Optional" else parts
    return [node]


def _kind(node: ast.expr, transformers: Path) -> tuple[str, list[str]]:
    if isinstance(node, ast.Constant) and node.value is None:
        return "none", []
    if isinstance(node, ast.Subscript):
        node = node.value
    name = node.id if isinstance(node, ast.Name) else ""
    if name == "Literal":
        return "bool", []
    if name.lower() in _PLAIN:
        return name.lower(), []
    members = _enum_members(name, transformers) if name else []
    return ("str", members) if members else ("any", [])


def _enum_members(name: str, transformers: Path) -> list[str]:
    for file in _ENUM_FILES:
        body = class_body(transformers / file, name)
        values = [node.value for node in body if isinstance(node, ast.Assign)]
        members = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
        if members:
            return members
    return []


def _metadata_choices(value: ast.expr | None) -> list[str]:
    if not isinstance(value, ast.Call):
        return []
    for keyword in value.keywords:
        if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
            for key, item in zip(keyword.value.keys, keyword.value.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(item, ast.List):
                    return [e.value for e in item.elts if isinstance(e, ast.Constant) and isinstance(e.value, str)]
    return []


@cache
def method_arguments(name: str) -> dict[str, Argument] | None:
    """The arguments of a method, PEFT's and ours; None if PEFT is not installed or its source cannot be parsed."""
    method = METHODS[name]
    own = {key: Argument(key, kinds, method.choices.get(key, ())) for key, kinds in method.arguments.items()}
    if method.peft_module is None:
        return own
    folder = package_folder("peft")
    if folder is None:
        return None
    found = _arguments(folder, folder / "tuners" / method.peft_module / "config.py", method.config)
    for key in found.keys() & method.choices.keys():  # values that are missing in PEFT's annotation
        found[key] = replace(found[key], choices=(*found[key].choices, *method.choices[key]))
    return (
        {key: value for key, value in (found | own).items() if key not in method.unsupported_arguments}
        if found
        else None
    )


def recipe_arguments(name: str) -> list[str]:
    """The arguments that a recipe can set in addition to the keys shared by many methods."""
    method = METHODS[name]
    excluded = {*method.argument_names.values(), *CLOSED, *SHARED}
    return [key for key in method_arguments(name) or () if key not in excluded]


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
    # A pattern such as pissa_niter_[number of iters] is reduced to its prefix, which every matching value starts with.
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
