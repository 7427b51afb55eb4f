"""Paths on the command line: `~` and environment variables are expanded, whatever the shell left unexpanded."""

from pathlib import Path
from typing import Any

import typer

from peftcli.errors import RecipeError
from peftcli.filesystem import expand_path


def expanded(param: typer.CallbackParam, value: Any) -> Any:
    """The value of an option or an argument that is a path, or a list of them; anything else is returned unchanged.

    Raises:
        RecipeError: an environment variable is not set.
    """
    if isinstance(value, list | tuple):
        return [expanded(param, one) for one in value]
    if not isinstance(value, str | Path):
        return value
    try:
        return type(value)(expand_path(str(value)))
    except ValueError as problem:
        name = param.opts[0] if param.param_type_name == "option" else str(param.name).upper()
        raise RecipeError(f"{name} {value}: {problem}; set it, or write the full path") from problem
