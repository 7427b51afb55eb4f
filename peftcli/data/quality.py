"""Data quality of the columns: types, gaps, damaged text, personal data and secrets; never the values.

Every search takes time linear in the length of the text: the patterns begin with a literal or a small set of characters
and look at a bounded number of characters after it.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeAlias

from peftcli.data.rows import FIRST_PLACES, Rows
from peftcli.data.values import type_name
from peftcli.recipe.problems import printable

PERSONAL_SHARE = 0.01
"""Share of the rows with an e-mail address or a telephone number above which a warning is due."""
PERSONAL_ROWS = 3
"""Rows with such a trace below which none is due."""

_WARNINGS = {
    "key": ("what looks like an access key", "take it out and revoke it; a model can repeat what it learned"),
    "email": ("an e-mail address", "a model can repeat what it learned; replace the addresses if they are private"),
    "phone": ("a telephone number", "a model can repeat what it learned; replace the numbers if they are private"),
    "control_characters": ("control characters", "the model learns to write them; take them out"),
    "replacement_characters": (
        "letters that were decoded wrongly",
        "the model learns to write them; set dataset.encoding, or mend the file",
    ),
}

Search: TypeAlias = Callable[[str], Iterator[int]]
"""Gives the positions of what it finds, from left to right; nothing found reaches over a line break."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_MOJIBAKE = re.compile("\ufffd|â€|Ã[\x80-\xbf]|Â[\xa0-\xbf]|ï»¿|ðŸ")
_EMAIL = re.compile(r"@(?<=[A-Za-z0-9_+%-]@)(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])")
_INTERNATIONAL = re.compile(r"\+(?<![\w+.)]\+)[1-9](?:[ .()-]{0,2}[0-9]){7,14}(?![0-9])")
_DASHED = re.compile(r"-(?<=[0-9]{3}-)(?<![0-9.][0-9]{3}-)[0-9]{3}-[0-9]{4}(?![0-9]|[.-][0-9])")
_DOTTED = re.compile(r"\.(?<=[0-9]{3}\.)(?<![0-9.][0-9]{3}\.)[0-9]{3}\.[0-9]{4}(?![0-9]|[.-][0-9])")
_IN_BRACKETS = re.compile(r"\([0-9]{3}\) ?[0-9]{3}[ .-][0-9]{4}(?![0-9])")
_KEY_STARTS = ("hf_", "sk-", "gho_", "ghp_", "ghs_", "ghu_", "github_pat_", "AKIA", "xox", "-----BEGIN ", "eyJ")
_KEY = re.compile(
    # What a recipe may not hold either (recipe/problems.py), with bounds, since a row may be a whole book.
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20}|sk-(?:[a-z]{1,12}[0-9]{0,4}-){0,4}[A-Za-z0-9_]{20}"
    r"|gh[opsu]_[A-Za-z0-9]{20}|AKIA[0-9A-Z]{16}|github_pat_[A-Za-z0-9_]{20}|xox[bp]-[A-Za-z0-9-]{20})"
    r"|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
    r"|(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{10,}+\.eyJ[A-Za-z0-9_-]{10,}+\.[A-Za-z0-9_-]{10}"
)
_WHOLE_KEY = re.compile(
    rf"-----BEGIN [A-Z ]{{0,30}}PRIVATE KEY-----.*?(?:-----END|\Z)|(?:{_KEY.pattern})[A-Za-z0-9_.-]*", re.DOTALL
)


@dataclass
class _Column:
    """Counts of one column."""

    rows: int = 0
    null: int = 0
    empty: int = 0
    types: Counter[str] = field(default_factory=Counter)
    traces: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)
    of_type: dict[str, list[str]] = field(default_factory=dict)


class ColumnScan:
    """Counts what stands in the used columns of a source, batch by batch."""

    def __init__(self, source: str, columns: Sequence[str]) -> None:
        """Begin with no rows.

        Args:
            source: its name in the data report.
            columns: columns to look at; one that no row has stands in no fact.
        """
        self.source = source
        self._columns = {name: _Column() for name in columns}
        self._seen: set[str] = set()

    def add(self, rows: Rows) -> None:
        """Count a batch."""
        for name, column in self._columns.items():
            values = rows.columns.get(name)
            self._seen.update([name] if values is not None else [])
            _add(column, [None] * len(rows) if values is None else values, rows)

    def facts(self) -> list[dict[str, Any]]:
        """One object for each column: rows by type, null, empty, and by trace, with the first places."""
        return [
            {
                "source": self.source,
                "column": name,
                "rows": column.rows,
                "null": column.null,
                "empty": column.empty,
                "types": dict(column.types.most_common()),
                **{trace: column.traces[trace] for trace in SEARCHES},
                "first": {what: list(places) for what, places in column.first.items()},
            }
            for name, column in self._columns.items()
            if name in self._seen
        ]

    def warnings(self) -> list[str]:
        """Sentences for the terminal, each with a count and the first place."""
        return [text for name, column in self._columns.items() for text in self._column_warnings(name, column)]

    def _column_warnings(self, name: str, column: _Column) -> Iterator[str]:
        where = f"{self.source}: column {printable(name)}"
        if len(column.types) > 1:
            (most, many), *others = column.types.most_common()
            rest = ", ".join(f"{count} {kind} (first {column.of_type[kind][0]})" for kind, count in others)
            yield f"{where} mixes types: {many} rows hold {most}, {rest}; write all of them as one type"
        for trace, (what, fix) in _WARNINGS.items():
            count = column.traces[trace]
            if trace in ("email", "phone") and (count < PERSONAL_ROWS or count <= PERSONAL_SHARE * column.rows):
                continue
            if count:
                rows = f"{count} row{'s hold' if count > 1 else ' holds'}"
                yield f"{where}: {rows} {what} (first {column.first[trace][0]}); {fix}"


def _add(column: _Column, values: Sequence[Any], rows: Rows) -> None:
    column.rows += len(values)
    is_text = set(map(type, values)) == {str}
    # A float that is no number is the only value that differs from itself.
    nulls = [] if is_text else [row for row, value in enumerate(values) if value is None or value != value]
    texts = values if is_text else [_nested_text(value) for value in values]
    column.null += len(nulls)
    _keep(column.first, "null", nulls, rows)
    _add_types(column, values, set(nulls), rows)
    blank = [row for row, text in enumerate(texts) if (not text or text.isspace()) and isinstance(values[row], str)]
    column.empty += len(blank)
    _keep(column.first, "empty", blank, rows)
    whole = "\n".join(texts)
    ends = list(accumulate(len(text) + 1 for text in texts))
    for trace, search in SEARCHES.items():
        found = list(dict.fromkeys(bisect_right(ends, position) for position in search(whole)))
        column.traces[trace] += len(found)
        _keep(column.first, trace, found, rows)


def _add_types(column: _Column, values: Sequence[Any], nulls: set[int], rows: Rows) -> None:
    names = {kind: type_name(kind) for kind in set(map(type, values))}
    counts: Counter[str] = Counter()
    for kind, count in Counter(map(type, values)).items():
        counts[names[kind]] += count
    for row in nulls:
        counts[names[type(values[row])]] -= 1
    for name, count in counts.items():
        if count > 0:
            column.types[name] += count
            if len(column.of_type.get(name, ())) < FIRST_PLACES:
                found = (row for row, v in enumerate(values) if names[type(v)] == name and row not in nulls)
                _keep(column.of_type, name, found, rows)


def _keep(first: dict[str, list[str]], what: str, found: Iterable[int], rows: Rows) -> None:
    """Keep the places of the first few."""
    for row in found:
        places = first.setdefault(what, [])
        if len(places) == FIRST_PLACES:
            return
        places.append(rows.place(row))


def _nested_text(value: Any) -> str:
    """All texts within a value, a line for each."""
    texts: list[str] = []
    open_values = [value]
    while open_values:
        one = open_values.pop()
        if isinstance(one, str):
            texts.append(one)
        elif isinstance(one, dict):
            open_values.extend(reversed(one.values()))
        elif isinstance(one, list | tuple):
            open_values.extend(reversed(one))
    return "\n".join(texts)


def hide_keys(texts: Sequence[str]) -> list[str]:
    """Consecutive stretches of one text with *** for each key, also for one that reaches over an edge.

    >>> hide_keys(["is hf_" + "a" * 10, "a" * 24 + " it?"])
    ['is ***', ' it?']
    """
    whole = "".join(texts)
    spans = [match.span() for match in _WHOLE_KEY.finditer(whole)] if any(map(whole.__contains__, _KEY_STARTS)) else []
    hidden, begin = [], 0
    for text in texts:
        end, at, pieces = begin + len(text), begin, []
        for start, stop in spans:
            if start < end and stop > begin:
                pieces += [whole[at:start], "***"] if start >= begin else []
                at = min(stop, end)
        hidden.append("".join([*pieces, whole[at:end]]))
        begin = end
    return hidden


def control_characters(text: str) -> Iterator[int]:
    """Characters that act on a terminal and mean nothing in a text; line breaks and tabs aside."""
    return (match.start() for match in _CONTROL.finditer(text))


def replacement_characters(text: str) -> Iterator[int]:
    """The sign for a lost letter, and UTF-8 that was read as Latin-1, such as `Ã©` where `é` should stand."""
    return iter(()) if text.isascii() else (match.start() for match in _MOJIBAKE.finditer(text))


def emails(text: str) -> Iterator[int]:
    """Addresses of e-mail; the position is that of the @."""
    return (match.start() for match in _EMAIL.finditer(text))


def phones(text: str) -> Iterator[int]:
    """Telephone numbers that can hardly be anything else: +44 20 7946 0958, 555-010-1234, (555) 010-1234."""
    yield from sorted(
        [
            *(match.start() for match in _INTERNATIONAL.finditer(text) if _is_dialled(match.group())),
            *(match.start() for match in _DASHED.finditer(text) if _begins_a_number(text, match.start() - 3)),
            *(match.start() for match in _DOTTED.finditer(text) if _begins_a_number(text, match.start() - 3)),
            *(match.start() for match in _IN_BRACKETS.finditer(text)),
        ]
    )


def keys(text: str) -> Iterator[int]:
    """Access tokens, private keys and signed tokens (JWT)."""
    found = any(start in text for start in _KEY_STARTS)
    return (match.start() for match in _KEY.finditer(text)) if found else iter(())


SEARCHES: dict[str, Search] = {
    "control_characters": control_characters,
    "replacement_characters": replacement_characters,
    "email": emails,
    "phone": phones,
    "key": keys,
}


def _is_dialled(number: str) -> bool:
    """Whether the digits stand in groups as they are dialled, not as a decimal fraction or a row of figures."""
    groups = re.findall(r"[0-9]+", number)
    is_fraction = number.count(".") == 1 and len(groups) == 2
    return not is_fraction and len(groups) <= 6 and sum(len(group) == 1 for group in groups[1:]) <= 1


def _begins_a_number(text: str, start: int) -> bool:
    """Whether only the 1 of North America may stand before: 1-555-010-1234, but not the parts of an ISBN."""
    before = text[max(0, start - 3) : start]
    return not before.endswith(("-", "+", "/")) or re.fullmatch(r"(.*[^0-9-])?1-", before, re.DOTALL) is not None
