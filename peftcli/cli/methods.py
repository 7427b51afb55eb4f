"""The body of `methods`: the table of methods for the terminal."""

import json
import textwrap
from collections.abc import Iterator

import typer
from pydantic_core import PydanticCustomError

from peftcli.errors import RecipeError
from peftcli.methods import registry
from peftcli.methods.base import LEFT_OUT, OPTIONS
from peftcli.methods.registry import METHODS, conflicts, tasks_text
from peftcli.recipe.fields import read_method
from peftcli.recipe.library_args import recipe_arguments

WIDTH = 110


def methods_command(name: str | None, *, as_json: bool) -> None:
    """Print the table, or one method."""
    if name is not None:
        try:
            name = read_method(name)
        except PydanticCustomError as problem:
            raise RecipeError(f"{name} {problem.message()}") from None
    if as_json:
        typer.echo(json.dumps(registry.as_json() if name is None else registry.row(METHODS[name]), ensure_ascii=False))
        return
    for line in method_lines(name):
        typer.echo(line)


def method_lines(name: str | None = None) -> Iterator[str]:
    """The lines of the table, or the details of one method."""
    if name is not None:
        yield from _one(name)
        return
    yield f"{'method':<17}{'4-bit':<7}{'8-bit':<7}{'merge':<7}{'tasks':<21}what is trained"
    for one in METHODS.values():
        marks = "".join(f"{'no' if why else 'yes':<7}" for why in (one.four_bit, one.eight_bit, one.merge))
        yield f"{one.name:<17}{marks}{tasks_text(one):<21}{one.what}"
    yield ""
    yield "LoRA variants set by one more key"
    for option in OPTIONS:
        yield f"  {option.name:<8}{option.keys:<28}{option.what}" + (f"; needs {option.needs}" if option.needs else "")
    yield ""
    yield "methods of the installed PEFT that are not supported"
    for kind, reason in LEFT_OUT.items():
        yield f"  {kind:<26}{reason}"
    yield ""
    yield "`peftcli methods NAME` shows one method: its arguments, and the reason for each no"


def _one(name: str) -> Iterator[str]:
    one = METHODS[name]
    yield f"{one.name}: {one.title}, {one.what}"
    yield f"paper       {one.paper}"
    yield f"tasks       {', '.join(one.tasks)}"
    yield f"4-bit       {f'no: {one.four_bit}' if one.four_bit else 'yes'}"
    yield f"8-bit       {f'no: {one.eight_bit}' if one.eight_bit else 'yes'}"
    yield f"merge       {f'no: {one.merge}' if one.merge else 'yes'}"
    if conflicts(one):
        yield f"not with    {', '.join(conflicts(one))}: {one.padded}" + (
            f"; {one.checkpointing}" if one.checkpointing else ""
        )
    shared = [f"{key} ({one.defaults.get(key)})" for key in one.argument_names]
    yield from _wrapped("keys", ", ".join(shared) or "none (no r, alpha or dropout)")
    yield from _wrapped("arguments", ", ".join(recipe_arguments(name)) or "none")


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{head:<12}", subsequent_indent=" " * 12, break_on_hyphens=False)
