"""YAML 1.2 text -> plain values with the line of each; refuses what a recipe never needs.

PyYAML only splits the text into events: its own reading of scalars (YAML 1.1: `2e-4` is text, `no` is false),
of double keys (the last wins), of tags and of aliases never runs.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from peftcli.recipe.problems import KeyPath, Problems, Where, dotted, printable

MAX_DEPTH = 50
MAX_DIGITS = 18

_INT = re.compile(r"[-+]?[0-9]+")
_INT_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **{sign + word: float("inf") for sign in ("", "+") for word in (".inf", ".Inf", ".INF")},
    **{"-" + word: float("-inf") for word in (".inf", ".Inf", ".INF")},
}


class RecipeLoader(yaml.SafeLoader):
    """Our own loader class; only its event stream is used, so nothing of PyYAML is patched."""


@dataclass
class Tree:
    """The values of a recipe file and the place of every key and item."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Where] = field(default_factory=dict)
    empty: set[KeyPath] = field(default_factory=set)
    "Keys with nothing after the colon: read as null, but a section so written deserves a question."
    spoiled: set[KeyPath] = field(default_factory=set)
    "Values already refused (a tag, an alias, a secret): nothing more is said about them."

    def place(self, path: KeyPath) -> Where:
        """The place of a key, or of the nearest key above it that the recipe holds."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return 1

    def get(self, *path: str) -> Any:
        """The value at a path of keys, or None where the recipe has none."""
        value: Any = self.values
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def put(self, path: tuple[str, ...], value: Any, where: Where) -> None:
        """Set a value and its place; what stood there is gone. All above must be mappings or absent."""
        target = self.values
        for end, part in enumerate(path[:-1], start=1):
            if not isinstance(target.get(part), dict):
                target[part] = {}
                self.places[path[:end]] = where
                self.empty.discard(path[:end])
            target = target[part]
        self.drop(path)
        target[path[-1]] = value
        self.places[path] = where

    def drop(self, path: tuple[str, ...]) -> None:
        """Remove a key and the places below it."""
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]
        self.empty = {known for known in self.empty if known[: len(path)] != path}
        parent = self.get(*path[:-1])
        if isinstance(parent, dict):
            parent.pop(path[-1], None)


def read_scalar(text: str) -> Any:
    """Read a plain scalar by the core schema of YAML 1.2.

    >>> [read_scalar(t) for t in ("2e-4", ".5", "no", "010", "1:30", "0x10", "null", "true")]
    [0.0002, 0.5, 'no', 10, '1:30', 16, None, True]

    Raises:
        ValueError: a whole number with more digits than any recipe means.
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text) or _INT_BASE.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise ValueError(f"a number of {len(text)} digits; put it in quotes where it is text")
        return int(text, 0) if _INT_BASE.fullmatch(text) else int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def parse_yaml(text: str, problems: Problems, where: str | None = None) -> tuple[Any, Tree]:
    """Read one YAML document.

    Args:
        where: the place to name in every problem; None for a file, where it is the line.

    Returns:
        The value (None for an empty document), and a tree that holds its places only.

    Raises:
        RecipeError: the text is not YAML. Lesser faults are added to `problems`.
    """
    builder = _Builder(problems, where)
    try:
        for event in yaml.parse(text, Loader=RecipeLoader):
            builder.take(event)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problems.add(where or line, f"character {error.character:#x} is no text; remove it")
        problems.raise_if_any()
    except yaml.MarkedYAMLError as error:
        at_end = "unexpected end of stream" in (error.problem or "")
        mark = error.context_mark if at_end and error.context_mark else error.problem_mark
        problems.add(where or (mark.line + 1 if mark else 1), _syntax_text(error, one_line=where is not None))
        problems.raise_if_any()
    return builder.value, builder.tree


@dataclass
class _Frame:
    value: Any
    path: KeyPath
    key: str | None = None
    lines: dict[str, int] = field(default_factory=dict)


class _Builder:
    """Builds values from YAML events with a stack of its own, so depth never costs Python's stack."""

    def __init__(self, problems: Problems, where: str | None) -> None:
        self.problems, self.where = problems, where
        self.value: Any = None
        self.tree = Tree()
        self.stack: list[_Frame] = []
        self.documents = 0

    def take(self, event: Any) -> None:
        line = self.where or event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                self._stop(line, "a second document starts here (---); a recipe is one document")
        elif isinstance(event, yaml.CollectionEndEvent):
            self.stack.pop()
        elif isinstance(event, yaml.NodeEvent):
            self._take_node(event, line)

    def _take_node(self, event: Any, line: Where) -> None:
        frame = self.stack[-1] if self.stack else None
        if frame is not None and isinstance(frame.value, dict) and frame.key is None:
            self._take_key(event, line, frame)
            return
        path = self._path(frame)
        if path:
            self.tree.places.setdefault(path, line)
        value = self._value(event, line, path)
        if frame is None:
            self.value = value
        elif isinstance(frame.value, list):
            frame.value.append(value)
        else:
            assert frame.key is not None
            if frame.key in frame.value or frame.key == "<<":
                self.tree.spoiled.add(path)
            else:
                frame.value[frame.key] = value
            frame.key = None
        if isinstance(value, dict | list) and isinstance(event, yaml.CollectionStartEvent):
            self.stack.append(_Frame(value, path))
            if len(self.stack) > MAX_DEPTH:
                self._stop(line, f"nested more than {MAX_DEPTH} levels deep; a recipe needs four")

    def _take_key(self, event: Any, line: Where, frame: _Frame) -> None:
        if not isinstance(event, yaml.ScalarEvent):
            self._stop(line, "a key must be one word; put text that starts with { or [ in quotes")
        key = event.value
        self._check_marks(event, line, (*frame.path, key))
        name = dotted((*frame.path, key))
        if key == "<<":
            self.problems.add(line, "<< merges another mapping; a recipe is complete by itself: write the keys out")
        elif key in frame.lines:
            self.problems.add(line, f"{name} is set twice; the first is on line {frame.lines[key]}")
        else:
            self._check_text(key, line, name)
            frame.lines[key] = event.start_mark.line + 1
            self.tree.places[(*frame.path, key)] = line
        frame.key = key

    def _value(self, event: Any, line: Where, path: KeyPath) -> Any:
        if isinstance(event, yaml.AliasEvent):
            self._spoil(line, path, f"*{event.anchor} repeats another value; a recipe has no aliases: write it out")
            return None
        self._check_marks(event, line, path)
        if isinstance(event, yaml.MappingStartEvent):
            return {}
        if isinstance(event, yaml.SequenceStartEvent):
            return []
        return self._scalar(event, line, path)

    def _scalar(self, event: Any, line: Where, path: KeyPath) -> Any:
        text: str = event.value
        self._check_text(text, line, dotted(path))
        if event.style is not None:
            return text
        try:
            value = read_scalar(text)
        except ValueError as error:
            self._spoil(line, path, f"{dotted(path)} is {error}")
            return None
        if text == "":
            self.tree.empty.add(path)
        if isinstance(value, int) and not isinstance(value, bool) and re.match(r"[-+]?0[0-9]", text):
            self.problems.note(line, f"{dotted(path)} = {text} is read as {value}: YAML 1.2 takes no octal from a 0")
        return value

    def _check_marks(self, event: Any, line: Where, path: KeyPath) -> None:
        if event.anchor is not None:
            text = f"&{event.anchor} names a value for later; a recipe has no anchors: write it out each time"
            self.problems.add(line, f"{printable(text, 120)}")
        tag = getattr(event, "tag", None)
        if tag is not None:
            shown = printable(tag.replace("tag:yaml.org,2002:", "!!"))
            self._spoil(line, path, f"the tag {shown} is not read in a recipe; remove it")

    def _check_text(self, text: str, line: Where, name: str) -> None:
        if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
            self._stop(line, f"{name} holds a character that is no text (NUL or half a surrogate pair)")

    def _path(self, frame: _Frame | None) -> KeyPath:
        if frame is None:
            return ()
        return (*frame.path, len(frame.value) if isinstance(frame.value, list) else frame.key or "")

    def _spoil(self, line: Where, path: KeyPath, text: str) -> None:
        self.problems.add(line, text)
        self.tree.spoiled.add(path)

    def _stop(self, line: Where, text: str) -> None:
        self.problems.add(line, text)
        self.problems.raise_if_any()


def _syntax_text(error: yaml.MarkedYAMLError, *, one_line: bool) -> str:
    """Say a syntax error of PyYAML in the words of somebody who writes recipes."""
    problem = error.problem or ""
    opened = f" on line {error.context_mark.line + 1}" if error.context_mark and not one_line else ""
    if "'\\t'" in problem:
        return "a tab stands where YAML wants spaces; indent with spaces"
    for part, text in (
        (
            "mapping values are not allowed",
            "a colon stands where none can be; check the indentation, or quote the text",
        ),
        ("expected <block end>", "the indentation does not fit the lines above"),
        ("could not find expected ':'", "a key without its colon"),
        ("unexpected end of stream", "the quote opened here is never closed"),
        ("expected ',' or ']'", f"the list opened with [{opened} is never closed with ]"),
        ("expected ',' or '}'", f"the mapping opened with {{{opened} is never closed with }}"),
        (
            "unknown escape character",
            "a backslash in double quotes that YAML does not know; use single quotes",
        ),
        ("that cannot start any token", "text that starts with this character must stand in quotes"),
    ):
        if part in problem:
            return text
    return f"not YAML: {printable(problem, 100)}"
