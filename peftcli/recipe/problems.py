"""Collects the problems of a recipe with their locations, and reports them together."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftcli.errors import RecipeError

Where = int | str  # a line of the file, or the `--set section.key` that set the value
KeyPath = tuple[str | int, ...]

MOST_SHOWN = 10
"""Maximum number of problems that are listed; further ones often have the same cause."""

_SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|sk-(?:[a-z]+[0-9]*-)*[A-Za-z0-9_]{20,}[A-Za-z0-9_-]*"
    r"|gh[opsu]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})"
)


@dataclass(frozen=True)
class Problem:
    """One problem: its location, and a message with the fix."""

    where: Where
    text: str
    explain: Callable[[], str] | None = field(default=None, compare=False)
    "Builds the message of a problem that is shown, if that is slow; `text` is then only the key of the problem."

    def message(self) -> str:
        return hide_secrets(self.text if self.explain is None else self.explain())


@dataclass
class Problems:
    """The problems and notices of one recipe, with the file name as the user gave it."""

    file: str
    found: dict[Problem, None] = field(default_factory=dict)
    "In the order in which they were found, without duplicates."
    noted: dict[Problem, None] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    "The locations that are `--set` options, in the order they were given."

    def add(self, where: Where, text: str, explain: Callable[[], str] | None = None) -> None:
        """Add a problem, unless it was added before.

        Args:
            explain: builds the message, with `text` as its key. A search for the nearest of all names takes a
                millisecond, and a recipe can hold tens of thousands of unknown keys, of which ten are shown.
        """
        self.found.setdefault(Problem(where, text, explain))

    def note(self, where: Where, text: str) -> None:
        """Add a notice, unless it was added before: not a problem, but the user should know."""
        self.noted[Problem(where, text)] = None

    def place(self, where: Where) -> str:
        """The beginning of a message: `recipe.yaml:4`, or the `--set` option."""
        return f"{self.file}:{where}" if isinstance(where, int) else where

    def notices(self) -> tuple[str, ...]:
        """The notices as text, in the order of the file."""
        return tuple(self._lines(self.noted))

    def raise_if_any(self) -> None:
        """Raise all problems as one error, in the order of the file.

        Raises:
            RecipeError: there is at least one problem.
        """
        count = len(self.found)
        lines = self._lines(self.found, MOST_SHOWN)
        if count == 1:
            raise RecipeError(lines[0])
        if lines:
            head = f"{self.file} has {count} problems"
            more = [f"and {count - MOST_SHOWN} more"] if count > MOST_SHOWN else []
            raise RecipeError("\n  ".join([head, *lines, *more]))

    def _lines(self, problems: Iterable[Problem], most: int | None = None) -> list[str]:
        def order(problem: Problem) -> tuple[bool, int]:
            if isinstance(problem.where, int):
                return False, problem.where
            return True, self.overrides.index(problem.where)

        ordered = sorted(problems, key=order)
        return [f"{self.place(problem.where)}: {problem.message()}" for problem in ordered[:most]]


def dotted(path: Sequence[str | int]) -> str:
    """Format a key path for a message.

    >>> dotted(("dataset", "join", 0, "path"))
    'dataset.join[0].path'
    """
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + printable(part)
    return text


def printable(text: str, limit: int = 60) -> str:
    """Shorten text and escape control characters.

    >>> printable("a" + chr(27) + "[31mb")
    'a\\\\x1b[31mb'
    """
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def show(value: Any) -> str:
    """Format a value as in a recipe, on one line and shortened.

    >>> show("eight"), show(1.5), show(None), show([1, True])
    ('"eight"', '1.5', 'null', '[1, true]')
    """
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return ".nan" if value != value else (".inf" if value > 0 else "-.inf")
    return printable(json.dumps(value, ensure_ascii=False, default=str))


def choice_text(choices: Sequence[str]) -> str:
    """Join choices with commas and "or".

    >>> choice_text(["nf4", "fp4", "int4"])
    'nf4, fp4 or int4'
    """
    if len(choices) < 2:
        return "".join(choices)
    return f"{', '.join(choices[:-1])} or {choices[-1]}"


def is_secret(text: str) -> bool:
    """Whether the text contains something that looks like an access token of a known service.

    >>> is_secret("hf_" + "a" * 34), is_secret("hf_models/llama")
    (True, False)
    """
    return _SECRET.search(text) is not None


def hide_secrets(text: str) -> str:
    """Replace everything that looks like an access token by stars.

    >>> hide_secrets("hf_" + "a" * 34 + " is no recipe key")
    '*** is no recipe key'
    """
    return _SECRET.sub("***", text)
