"""Parses YAML 1.2 to plain values with their line numbers; rejects features that a recipe does not need.

PyYAML is only used to split the text into events. Its resolution of scalars (YAML 1.1: `2e-4` is text, `no` is false),
duplicate keys (the last wins), tags and aliases is not used.

`yaml.compose` is not enough: it stops at the first unknown alias, while all are reported here; it rejects an anchor
that is defined twice; for an alias it returns the node of the anchor, so the line of an alias in a list is lost; it
does not distinguish `!!str x` from `x`; and its recursion has no limit.
"""

import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from peftcli.nearest import nearest
from peftcli.recipe.problems import MOST_SHOWN, KeyPath, Problems, Where, dotted, printable

MAX_DEPTH = 50
MAX_DIGITS = 18
MAX_ADDED = 1_000_000
"""Maximum characters that aliases may add to a recipe, the same as the maximum file size."""
VALUE_SIZE = 16
"""Characters that each value counts in addition to its own, so that many empty values are limited too."""
MERGE = "<<"

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


@dataclass
class Tree:
    """The values of a recipe file, and the location of every key and item."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Where] = field(default_factory=dict)
    empty: set[KeyPath] = field(default_factory=set)
    "Keys with nothing after the colon: read as null, which is probably a mistake for a section."
    spoiled: set[KeyPath] = field(default_factory=set)
    "Values that were already rejected (a tag, an unknown alias, a secret); they get no further messages."
    written: dict[KeyPath, str] = field(default_factory=dict)
    "Numbers that Python writes in another way than the recipe, such as 012 or 1.10, as they are in the recipe."

    def place(self, path: KeyPath) -> Where:
        """The location of a key, or of its closest ancestor that is in the recipe."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return 1

    def get(self, *path: str) -> Any:
        """The value at a key path, or None if the recipe does not have it."""
        value: Any = self.values
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def put(self, path: tuple[str, ...], value: Any, where: Where) -> None:
        """Set a value and its location, replacing an existing value. All ancestors must be mappings or absent."""
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

    def rename(self, path: tuple[str, ...], name: str) -> None:
        """Rename an existing key, keeping its position in the section."""
        section = self.get(*path[:-1])
        items = [(name if key == path[-1] else key, value) for key, value in section.items()]
        section.clear()
        section.update(items)
        end = len(path)
        renamed = (*path[:-1], name)

        def moved(known: KeyPath) -> KeyPath:
            return (*renamed, *known[end:]) if known[:end] == path else known

        self.places = {moved(known): where for known, where in self.places.items()}
        self.empty, self.spoiled = set(map(moved, self.empty)), set(map(moved, self.spoiled))
        self.written = {moved(path): text for path, text in self.written.items()}

    def drop(self, path: tuple[str, ...]) -> None:
        """Remove a key and the locations below it."""
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]
        self.empty = {known for known in self.empty if known[: len(path)] != path}
        parent = self.get(*path[:-1])
        if isinstance(parent, dict):
            parent.pop(path[-1], None)


def read_scalar(text: str) -> Any:
    """Resolve a plain scalar with the core schema of YAML 1.2.

    >>> [read_scalar(t) for t in ("2e-4", ".5", "no", "010", "1:30", "0x10", "null", "true")]
    [0.0002, 0.5, 'no', 10, '1:30', 16, None, True]

    Raises:
        ValueError: a whole number has too many digits.
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text) or _INT_BASE.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise ValueError(
                f"a whole number of {len(text)} digits, which is too large; put it in quotes if it is text"
            )
        return int(text, 0) if _INT_BASE.fullmatch(text) else int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def parse_yaml(text: str, problems: Problems, where: str | None = None) -> tuple[Any, Tree]:
    """Parse one YAML document.

    Args:
        where: the location for all problems; None for a file, whose locations are lines.

    Returns:
        The value (None for an empty document), and a tree with the locations only.

    Raises:
        RecipeError: the text is not YAML. Other problems are added to `problems`.
    """
    builder = _Builder(problems, where)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            builder.take(event)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problems.add(where or line, f"character {error.character:#x} is not allowed in YAML; remove it")
        problems.raise_if_any()
    except yaml.MarkedYAMLError as error:
        at_end = "unexpected end of stream" in (error.problem or "")
        mark = error.context_mark if at_end and error.context_mark else error.problem_mark
        problems.add(where or (mark.line + 1 if mark else 1), _syntax_text(error, one_line=where is not None))
        problems.raise_if_any()
    return builder.finish()


@dataclass(eq=False)
class _Node:
    """A parsed value with the locations of its parts; an alias reuses the node of its anchor."""

    value: Any = None
    "For a scalar."
    parts: "dict[str, tuple[Where, _Node]] | list[tuple[Where, _Node]] | None" = None
    "For a mapping by key, or for a list, each with its location; None for a scalar."
    size: int = VALUE_SIZE
    "Characters, including those that aliases add."
    height: int = 0
    "Nesting depth of mappings and lists."
    open: bool = False
    "The end is not parsed yet, so an alias to it would be recursive."
    empty: bool = False
    written: str | None = None
    spoiled: bool = False
    refused: set[str] = field(default_factory=set)
    "Keys that are set twice or have a tag."


@dataclass
class _Frame:
    node: _Node
    path: KeyPath
    begin: Where
    key: str | None = None
    key_line: Where = 1
    merges: bool = False
    "The key is <<."
    lines: dict[str, int] = field(default_factory=dict)
    "Line of each parsed key."
    merged: list[_Node] = field(default_factory=list)


class _Builder:
    """Builds nodes from YAML events with an explicit stack, and values from nodes whose size was checked."""

    def __init__(self, problems: Problems, where: str | None) -> None:
        self.problems, self.where = problems, where
        self.root: _Node | None = None
        self.tree = Tree()
        self.stack: list[_Frame] = []
        self.anchors: dict[str, _Node] = {}
        self.added = 0
        self.documents = 0

    def finish(self) -> tuple[Any, Tree]:
        """The value of the document, and a tree with the locations only."""
        return None if self.root is None else self._expand(self.root, ()), self.tree

    def take(self, event: Any) -> None:
        line = self.where or event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                self._stop(line, "a second document starts here (---); a recipe is one document")
        elif isinstance(event, yaml.CollectionEndEvent):
            self._close(self.stack.pop())
        elif isinstance(event, yaml.NodeEvent):
            self._take_node(event, line)

    def _take_node(self, event: Any, line: Where) -> None:
        frame = self.stack[-1] if self.stack else None
        if frame is not None and isinstance(frame.node.parts, dict) and frame.key is None:
            self._take_key(event, line, frame)
            return
        path = self._path(frame)
        if isinstance(event, yaml.AliasEvent):
            self._attach(self._alias(event, line), line)
            return
        node = self._node(event, line, path)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        if node.parts is None:
            self._attach(node, line)
            return
        self.stack.append(_Frame(node, path, line))
        self._check_depth(0, line)

    def _take_key(self, event: Any, line: Where, frame: _Frame) -> None:
        if not isinstance(event, yaml.ScalarEvent):
            self._stop(line, "a key must be a scalar; put text that starts with { or [ in quotes")
        key = event.value
        if event.anchor is not None:
            text = f"&{event.anchor} is an anchor on a key; put it after the colon, on the value"
            self.problems.add(line, printable(text, 120))
        if event.tag is not None:
            frame.node.refused.add(key)
            self._refuse_tag(event.tag, line)
        name = dotted((*frame.path, key))
        frame.key, frame.key_line = key, line
        frame.merges = key == MERGE and event.style is None
        if key in frame.lines:
            fix = f"; the first is on line {frame.lines[key]}"
            if frame.merges:
                fix = "; give it a list, such as <<: [*one, *other]"
            self.problems.add(line, f"{name} is set twice{fix}")
        else:
            self._check_text(key, line, name)
            assert event.start_mark is not None  # parsed events have one; the type also covers emitted events
            frame.lines[key] = event.start_mark.line + 1

    def _alias(self, event: Any, line: Where) -> _Node:
        node = self.anchors.get(event.anchor)
        if node is None:
            # Only for problems that are shown, because comparing many anchors with many unknown aliases is slow.
            near = nearest(event.anchor, self.anchors) if len(self.problems.found) < MOST_SHOWN else None
            fix = f"did you mean *{near}?" if near else f"write &{event.anchor} before the value that it refers to"
            return self._spoilt(line, f"*{event.anchor} refers to an anchor that is not defined above it; {fix}")
        if node.open:
            return self._spoilt(line, f"*{event.anchor} is inside the value that it refers to; write the value out")
        self._check_depth(node.height, line)
        self.added += node.size
        if self.added > MAX_ADDED:
            self._stop(line, f"aliases expand the recipe to more than {MAX_ADDED:,} characters; use fewer of them")
        return node

    def _attach(self, node: _Node, line: Where) -> None:
        """Add a complete node to its parent."""
        if not self.stack:
            self.root = node
            return
        frame = self.stack[-1]
        above = frame.node
        above.size += node.size
        above.height = max(above.height, node.height + 1)
        if isinstance(above.parts, list):
            above.parts.append((line, node))
            return
        key, frame.key = frame.key, None
        assert key is not None and above.parts is not None
        above.size += len(key)
        if frame.merges:
            frame.merged += self._merge_sources(node, frame.key_line)
        elif key in above.parts:
            above.refused.add(key)
        else:
            above.parts[key] = (frame.key_line, node)

    def _merge_sources(self, node: _Node, line: Where) -> list[_Node]:
        sources = [part for _, part in node.parts] if isinstance(node.parts, list) else [node]
        if not all(isinstance(source.parts, dict) or source.spoiled for source in sources):
            self.problems.add(line, "<< must be a mapping, such as *name, or a list of mappings")
        return [source for source in sources if isinstance(source.parts, dict)]

    def _close(self, frame: _Frame) -> None:
        """End a mapping or a list; a mapping gets the keys that it does not set itself from the merged mappings."""
        node = frame.node
        node.open = False
        for source in frame.merged:  # the first mapping that sets a key wins
            assert isinstance(source.parts, dict) and isinstance(node.parts, dict)
            for key, part in source.parts.items():
                node.parts.setdefault(key, part)
            node.refused |= source.refused
        self._attach(node, frame.begin)

    def _node(self, event: Any, line: Where, path: KeyPath) -> _Node:
        tagged = event.tag is not None
        if tagged:
            self._refuse_tag(event.tag, line)
        if isinstance(event, yaml.ScalarEvent):
            node = self._scalar(event, line, path)
        else:
            parts: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
            node = _Node(parts=parts, height=1, open=True)
        node.spoiled |= tagged
        return node

    def _scalar(self, event: Any, line: Where, path: KeyPath) -> _Node:
        text: str = event.value
        self._check_text(text, line, dotted(path))
        size = VALUE_SIZE + len(text)
        if event.style is not None:
            return _Node(text, size=size)
        try:
            value = read_scalar(text)
        except ValueError as error:
            return self._spoilt(line, f"{self._name(path)} is {error}")
        if isinstance(value, int) and not isinstance(value, bool) and re.match(r"[-+]?0[0-9]", text):
            self.problems.note(line, f"{self._name(path)} = {text} means {value} (YAML 1.2: a leading 0 is not octal)")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return _Node(value, size=size, empty=text == "", written=text if number and str(value) != text else None)

    def _name(self, path: KeyPath) -> str:
        """The key of a value; that of the option for the value of `--set`."""
        option = (self.where or "").removeprefix("--set ")
        return ".".join(part for part in (option, dotted(path)) if part)

    def _expand(self, node: _Node, path: KeyPath) -> Any:
        """The value of a node with all aliases expanded, so that no two keys share an object."""
        self.tree.spoiled |= {(*path, key) for key in node.refused} | ({path} if node.spoiled else set())
        if node.empty:
            self.tree.empty.add(path)
        if node.written is not None:
            self.tree.written[path] = node.written
        if node.parts is None:
            return node.value
        mapping = isinstance(node.parts, dict)
        found: dict[str | int, Any] = {}
        for key, (where, part) in node.parts.items() if isinstance(node.parts, dict) else enumerate(node.parts):
            below = (*path, key)
            self.tree.places[below] = where
            found[key] = self._expand(part, below)
        return found if mapping else [*found.values()]

    def _check_depth(self, height: int, line: Where) -> None:
        if len(self.stack) + height > MAX_DEPTH:
            self._stop(line, f"nested more than {MAX_DEPTH} levels deep; a recipe needs four")

    def _refuse_tag(self, tag: str, line: Where) -> None:
        shown = printable(tag.replace("tag:yaml.org,2002:", "!!"))
        self.problems.add(line, f"the tag {shown} is not allowed in a recipe; remove it")

    def _check_text(self, text: str, line: Where, name: str) -> None:
        if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
            self._stop(line, f"{name} contains an invalid character (NUL or a lone surrogate); remove it")

    def _path(self, frame: _Frame | None) -> KeyPath:
        if frame is None:
            return ()
        return (*frame.path, len(frame.node.parts) if isinstance(frame.node.parts, list) else frame.key or "")

    def _spoilt(self, line: Where, text: str) -> _Node:
        self.problems.add(line, text)
        return _Node(spoiled=True)

    def _stop(self, line: Where, text: str) -> NoReturn:
        self.problems.add(line, text)
        self.problems.raise_if_any()
        raise AssertionError("a problem was just added")


def _syntax_text(error: yaml.MarkedYAMLError, *, one_line: bool) -> str:
    """A message for a syntax error of PyYAML that helps the author of a recipe."""
    problem = error.problem or ""
    opened = f" on line {error.context_mark.line + 1}" if error.context_mark and not one_line else ""
    if "'\\t'" in problem:
        return "a tab is used for indentation; indent with spaces"
    for part, text in (
        (
            "mapping values are not allowed",
            "a colon is not allowed here; check the indentation, or quote the text",
        ),
        ("expected <block end>", "the indentation does not match the lines above; indent it like its neighbors"),
        ("could not find expected ':'", "a key without a colon; add it"),
        ("unexpected end of stream", "the quote opened here is never closed"),
        ("expected ',' or ']'", f"the list opened with [{opened} is never closed with ]"),
        ("expected ',' or '}'", f"the mapping opened with {{{opened} is never closed with }}"),
        (
            "unknown escape character",
            "an unknown escape sequence in double quotes; use single quotes",
        ),
        ("expected '<document start>'", "there is text after the value; put text that starts with { or [ in quotes"),
        ("that cannot start any token", "text that starts with this character must be in quotes"),
    ):
        if part in problem:
            return text
    return f"not YAML: {printable(problem, 100)}"
