"""Odd values for every key of a recipe: whatever validate accepts must train a step, or end with one clear error."""

import contextlib
import io
import json
import resource
import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args, get_origin

from fork_server import ZYGOTE
from pydantic import BaseModel
from workspace import Ended, Workspace, pairs

from peftcli.cli.main import main
from peftcli.recipe.library_args import installed_arguments
from peftcli.recipe.schema import Recipe
from peftcli.recipe.trainer_args import OWNED

NUMBERS: list[Any] = [
    *(0, 1, 2, 3, 7, -1, 2**31, 2**32 - 1, 2**63, 2**64, 10**19, 10**400),
    *(-0.0, 0.5, 0.999999999, 1.0, 1.5, 1e-300, 5e-324, 1e-12, 1e30, 1e39, 1e300, 1.7e308),
    *(float("nan"), float("inf"), -float("inf"), True, False, None),
    *("1", "1.0", "0.5", "1e3", "1_000", "0x10", "012", "nan", "inf", "-0", "1,5", "½", "٣", "[1]", "float32(1)"),
]
TEXTS: list[Any] = [
    *("", " ", "x", "\0", "a\0b", "\ud800", "\udce9", "a\nb", "\r", "\x1b[31m", "\u202e", "é", "世", "﷽", "\ufeff"),
    *("x" * 300, "x" * 70_000, "{", "}", "{{", "{x}", "{prompt}", "{0}", "{prompt!r:>9999999999}", "{{ x }}", "{% for"),
    *("/", ".", "..", "~", "$HOME", "/dev/null", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/nonexistent/x", "a/b"),
    *("http://127.0.0.1:1/x", "null", "true", "auto", 0, 1.5, True, None, [], {}, ["x"], {"x": 1}),
]
LISTS: list[Any] = [[], ["x"], ["\0"], ["\ud800"], [""], [[]], [{}], [None], ["x"] * 3, ["q_proj"], [0], [-1], {}, "x"]
HEALTHY = {
    "quantization": None,
    "adapter.r": 2,
    "adapter.target_modules": ["q_proj"],
    "trainer.max_steps": 1,
    "evaluation.rows": 2,
    "evaluation.baseline": False,
}
ENDLESS = {"trainer.max_steps", "trainer.num_train_epochs"}
"""Keys of which a large value means a long training."""
SLOW = {"trainer.torch_compile", "trainer.dataloader_num_workers", "trainer.full_determinism"}
"""Trainer arguments that start processes or a compiler."""
CODES = {0, 2, 3, 4, 5, 6, 7}
MEMORY_BYTES = 10 * 2**30
CPU_SECONDS = 60


def keys() -> dict[str, set[type]]:
    """Every key of a recipe with the types that its value may have, trainer arguments among them."""
    found = dict(_keys(Recipe, ""))
    kinds = {"int": int, "float": float, "str": str, "bool": bool, "dict": dict, "list": list}
    for name, argument in (installed_arguments() or {}).items():
        if name not in OWNED:
            found[f"trainer.{name}"] = {kinds[kind] for kind in argument.kinds if kind in kinds} or {str}
    return {key: of for key, of in found.items() if key not in SLOW}


def _keys(model: type[BaseModel], before: str) -> Iterator[tuple[str, set[type]]]:
    for name, field in model.model_fields.items():
        parts = set(_parts(field.annotation))
        sections = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
        for section in sections:
            if get_origin(field.annotation) is not tuple:
                yield from _keys(section, f"{before}{name}.")
        if simple := {part for part in parts if part in (int, float, str, bool, tuple)}:
            yield f"{before}{name}", simple


def _parts(annotation: Any) -> Iterator[Any]:
    """The types that an annotation names."""
    origin = get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        for part in get_args(annotation):
            yield from _parts(part)
    elif origin is typing.Literal:
        yield from {type(value) for value in get_args(annotation)}
    elif origin is not None:
        yield origin
    else:
        yield annotation


def values_for(kinds: set[type]) -> list[Any]:
    """Odd values for a key; numbers also for text, and the other way round, only a few."""
    chosen: list[Any] = []
    if kinds & {int, float, bool}:
        chosen += NUMBERS
    if kinds & {str}:
        chosen += TEXTS
    if kinds & {tuple, list, dict}:
        chosen += LISTS
    return chosen or TEXTS


@cache
def tried() -> tuple[tuple[str, str], ...]:
    """Each key with each of its odd values, as JSON."""
    return tuple((key, json.dumps(value)) for key, kinds in sorted(keys().items()) for value in values_for(kinds))


def write(ground: Workspace, key: str, text: str) -> None:
    """Write the recipe with one odd value; JSON is YAML except for numbers that are not finite."""
    ground.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in pairs(20)))
    kept = {name: {} if key.startswith(f"{name}.") else value for name, value in HEALTHY.items()}
    whole = json.dumps(ground.values(kept | {key: None if text == "null" else "ODD"}))
    odd = text.replace("-Infinity", "-.inf").replace("Infinity", ".inf").replace("NaN", ".nan")
    ground.write("recipe.yaml", whole.replace('"ODD"', odd))


def limited() -> None:
    """Limit the memory and the computing of a session."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))


def validate_here() -> tuple[int, str]:
    """Validate the recipe in the current folder; the exit code and stderr."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(["validate", "recipe.yaml", "--no-data"])
    return code, err.getvalue()


def train(ground: Workspace) -> Ended:
    """Train a step of the recipe."""
    return ZYGOTE.run(ground, "train", "recipe.yaml", "--output-dir", "run", "--overwrite", hook=limited)
