"""Parameters of functions of the installed libraries, read from their source: nothing is imported."""

import ast
import re
import textwrap
from functools import cache
from pathlib import Path

from peftcli.recipe.library_args import Argument, package_folder, source_text, union_parts

_PLAIN = ("int", "float", "bool", "str", "dict", "list")


@cache
def parameters(package: str, file: str, name: str, owner: str = "") -> dict[str, tuple[Argument, bool]] | None:
    """The parameters of a function by name, each with whether it must be given.

    Args:
        file: path inside the package.
        owner: class whose method it is; empty for a function of the module.

    Returns:
        None where the source is not there or reads in no known way; `**kwargs` are left out.
    """
    folder = package_folder(package)
    node = None if folder is None else _definition(folder / file, name, owner)
    if node is None:
        return None
    asked = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    positional = len(asked) - len(node.args.kwonlyargs)
    defaults: list[ast.expr | None] = [None] * (positional - len(node.args.defaults))
    defaults += [*node.args.defaults, *node.args.kw_defaults]
    return {one.arg: (_argument(one, default), default is None) for one, default in zip(asked, defaults, strict=True)}


def _definition(path: Path, name: str, owner: str) -> ast.FunctionDef | None:
    """The head of a function without its body, which need not be parsed."""
    text, indent = source_text(path), ""
    if owner:
        head = re.search(rf"^class {owner}\b", text, re.MULTILINE)
        if head is None:
            return None
        text, indent = text[head.start() :], "    "
    end = r"\)(?: -> [^\n]+)?:[ \t]*(?:#[^\n]*)?\n"  # a linter's comment may follow the colon
    found = re.search(rf"^{indent}def {name}\(.*?{end}", text, re.MULTILINE | re.DOTALL)
    if found is None:
        return None
    try:
        (node,) = ast.parse(textwrap.dedent(found[0]) + "    pass\n").body
    except (SyntaxError, ValueError):
        return None
    return node if isinstance(node, ast.FunctionDef) else None


def _argument(node: ast.arg, default: ast.expr | None) -> Argument:
    kinds: set[str] = set()
    choices: list[str] = []
    for part in union_parts(node.annotation) if node.annotation is not None else []:
        kind, words = _kind(part)
        kinds.add(kind)
        choices += words
    if not kinds:  # no annotation: the default tells
        value = default.value if isinstance(default, ast.Constant) else None
        kinds.add(type(value).__name__ if isinstance(value, bool | int | float | str) else "any")
    return Argument(node.arg, frozenset(kinds), tuple(choices))


def _kind(node: ast.expr) -> tuple[str, list[str]]:
    if isinstance(node, ast.Constant) and node.value is None:
        return "none", []
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal":
        words = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return "str", [word.value for word in words if isinstance(word, ast.Constant) and isinstance(word.value, str)]
    if isinstance(node, ast.Subscript):
        node = node.value
    name = node.id.lower() if isinstance(node, ast.Name) else ""
    return (name if name in _PLAIN else "any"), []
